"""Whether a run's checkpoints fit into the time its jobs are given.

Enter: the job of a run, and how long its steps and saves take. Leave: warnings, each with the keys to change.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from launcher.history import Attempt
from launcher.progress import duration
from launcher.snapshot import config_file
from launcher.spec import JobSpec
from mmpretrain.core.run_files import Heartbeat


@dataclass(frozen=True)
class Pace:
    """Seconds, as measured."""

    start_s: float
    """Until the first step."""
    step_s: float
    save_s: float


def measured(attempts: list[Attempt], beat: Heartbeat | None) -> Pace | None:
    """From the newest step and save, and the slowest start; None before the first step."""
    if beat is None or beat.step_s is None:
        return None
    starts = [one.first_step_s for one in attempts if one.first_step_s is not None]
    return Pace(max(starts, default=0.0), beat.step_s, beat.save_s or 0.0)


def warnings(spec: JobSpec, pace: Pace) -> Iterator[str]:
    """What would cost work: nothing is saved between two ends of a job, or there is no time to save at its end."""
    every = steps_between_checkpoints(spec)
    cycle_s = every * pace.step_s + pace.save_s
    if spec.time_limit_s is not None and pace.start_s + cycle_s > spec.time_limit_s:
        yield (
            f"the time limit of {duration(spec.time_limit_s)} is too short for {every} steps of {pace.step_s:.3g} s "
            f"and a save of {pace.save_s:.3g} s, after {duration(pace.start_s)} of starting: a crash costs the whole "
            f"job; lower checkpoint.every to {_affordable(spec.time_limit_s, pace)} or give more --time"
        )
    needed_s = 2 * (pace.step_s + pace.save_s)
    if spec.time_limit_s is not None and needed_s > spec.cluster.signal_lead_s:
        yield (
            f"{spec.cluster.signal_lead_s} s between the scheduler's signal and the end are few for a step of "
            f"{pace.step_s:.3g} s and a save of {pace.save_s:.3g} s; set signal_lead_s to {needed_s:.0f} or more in "
            f"the cluster file"
        )


def steps_between_checkpoints(spec: JobSpec) -> int:
    """As the config says with which the run was submitted."""
    config = yaml.safe_load(config_file(spec.run, spec.config_hash).read_text(encoding="utf-8"))
    return int(config["checkpoint"]["every"])


def _affordable(limit_s: float, pace: Pace) -> int:
    """Steps of which three rounds with their saves fit in a job."""
    return max(1, int(((limit_s - pace.start_s) / 3 - pace.save_s) / pace.step_s))
