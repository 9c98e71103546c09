"""What can happen to a run: each fault, what it needs, and how it is brought about.

Enter: a run under watch and where it runs. Leave: the fault, there. Refused: what cannot be done at a place is not
tried; the reason stands in the table.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from launcher import slurm_commands
from launcher.chaos.strike import Blow, strike
from launcher.chaos.subject import Subject
from launcher.dev_cluster import DevCluster
from mmpretrain.core import run_files
from mmpretrain.core.errors import ClusterError

_URGENT_S = 3
"""How long the jobs run that preempt."""


@dataclass(frozen=True)
class Site:
    """Where a run is, and what may be done there."""

    backend: str
    """local or slurm."""
    nodes: int = 1
    """Of the run."""
    own: DevCluster | None = None
    """A cluster that may be broken too."""
    urgent: str | None = None
    """Slurm partition whose jobs preempt the run."""


@dataclass(frozen=True)
class Fault:
    """One thing that happens."""

    name: str
    words: str
    """For the table."""
    strike: Callable[[Subject, Site], None]
    obstacle: Callable[[Site], str] = lambda site: ""
    """Why it cannot be tried at a place; empty where it can."""
    ends_job: bool = False
    """Nothing starts the run again but a person."""
    mend: Callable[[Site], None] = lambda site: None
    """Undo what the fault changed beside the run."""
    wears_job: bool = False
    """The job is not what it was afterwards; a new one follows."""


def _hit(blow: Blow) -> Callable[[Subject, Site], None]:
    """The blow falls on the last rank, where it lives."""

    def hit(subject: Subject, site: Site) -> None:
        last = run_files.read_ranks(subject.run)[-1]
        if site.backend == "local":
            strike(subject.run, last.rank, blow)
            return
        step = ["srun", f"--jobid={subject.job}", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={last.node}"]
        program = [sys.executable, "-m", "launcher.chaos.strike", str(subject.run), str(last.rank), blow]
        done = subprocess.run([*step, *program], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise ClusterError(f"rank {last.rank} on {last.node} could not be struck: {done.stderr.strip()[-500:]}")

    return hit


def _preempt(subject: Subject, site: Site) -> None:
    """A job of higher priority takes the run's nodes for a moment."""
    nodes = subject.current.nodes if subject.current is not None else ()
    assert site.urgent is not None, "a fault with an obstacle is not tried"
    options = [f"--partition={site.urgent}", f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", "--exclusive"]
    slurm_commands.call(
        "sbatch", *options, "--time=1", "--job-name=urgent", "--output=/dev/null", f"--wrap=sleep {_URGENT_S}"
    )


def _preempt_unsignalled(subject: Subject, site: Site) -> None:
    assert site.own is not None, "a fault with an obstacle is not tried"
    site.own.send_user_signal(False)
    _preempt(subject, site)


def _signal_again(site: Site) -> None:
    assert site.own is not None, "a fault with an obstacle is not tried"
    site.own.send_user_signal(True)


def _near_time_limit(subject: Subject, site: Site) -> None:
    """Lower the limit of the job, as its owner may, to some two minutes from now."""
    minutes = slurm_commands.minutes_spent(subject.job) + 2
    slurm_commands.call("scontrol", "update", f"JobId={subject.job}", f"TimeLimit={minutes}")


def _kill_node(subject: Subject, site: Site) -> None:
    assert site.own is not None, "a fault with an obstacle is not tried"
    site.own.kill_node(run_files.read_ranks(subject.run)[-1])


def _no_urgent(site: Site) -> str:
    return "" if site.urgent else "no partition was named whose jobs preempt this one's (--urgent)"


def _not_own(site: Site) -> str:
    return _no_urgent(site) or ("" if site.own else "the cluster's own settings would have to be changed")


def _no_spare_node(site: Site) -> str:
    if site.own is None:
        return "only nodes of a cluster made by slurm/dev_cluster.sh are killed"
    return "" if site.own.nodes > site.nodes else f"the cluster has no node beside the {site.nodes} of the run"


_RANK_KILLED = Fault("rank-killed", "a rank is killed", _hit(Blow.KILL))
_HANG = Fault("hang", "a rank hangs", _hit(Blow.HANG))
_DISK_FULL = Fault("disk-full", "a rank's disk is full at a save", _hit(Blow.FILL_DISK), ends_job=True)
NAN = Fault("nan", "a loss of one rank is NaN", _hit(Blow.POISON))
"""Comes last, since from then on the losses are not those of a run that never met it."""

_LOCAL = (
    _RANK_KILLED,
    _HANG,
    Fault(
        "sigterm",
        "the launcher is told to stop (SIGTERM)",
        lambda subject, site: os.kill(int(subject.job), signal.SIGTERM),
        ends_job=True,
    ),
    Fault(
        "launcher-killed",
        "the launcher is killed",
        lambda subject, site: os.kill(int(subject.job), signal.SIGKILL),
        ends_job=True,
    ),
    _DISK_FULL,
    NAN,
)
_SLURM = (
    _RANK_KILLED,
    _HANG,
    Fault("preemption", "preemption, with the job's signal", _preempt, _no_urgent),
    Fault("time-limit", "the time limit", _near_time_limit, wears_job=True),
    Fault("requeue", "scontrol requeue", lambda subject, site: _requeue(subject)),
    Fault("node-killed", "a node dies with its daemon", _kill_node, _no_spare_node),
    _DISK_FULL,
    Fault("preemption-unsignalled", "preemption, without a signal", _preempt_unsignalled, _not_own, mend=_signal_again),
    NAN,
)


def _requeue(subject: Subject) -> None:
    slurm_commands.call("scontrol", "requeue", subject.job)


def faults_at(backend: str) -> tuple[Fault, ...]:
    """In the order in which a drill tries them."""
    return _LOCAL if backend == "local" else _SLURM
