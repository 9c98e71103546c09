"""What follows an attempt, when a run counts as hung, which rank is the odd one, and what a preflight comes to."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher import bad_nodes, gpu_health, stacks
from launcher.history import Action, Attempt, Ending, History, decide
from launcher.preflight import NodeReport, check_node, judge
from launcher.spec import JobSpec, Limits
from launcher.watchdog import Watchdog
from mmpretrain.core.run_files import OUTCOME, Heartbeat, Outcome, RankProcess, write_record

FIRST = Attempt(0, 100.0, ("n1", "n2"), "7", from_step=0, ended=160.0, reason="why")


def ended(ending: Ending, step: int = 0, saved: int = 0) -> Attempt:
    return replace(FIRST, ending=ending, step=step, saved_step=saved)


@pytest.mark.parametrize(
    ("ending", "asked_by_scheduler", "action"),
    [
        (Ending.COMPLETED, False, Action.DONE),
        (Ending.FATAL, False, Action.STOP),
        (Ending.PREEMPTED, True, Action.REQUEUE),
        (Ending.PREEMPTED, False, Action.DONE),
        (Ending.CRASHED, False, Action.RESTART),
        (Ending.HUNG, False, Action.RESTART),
    ],
)
def test_how_an_attempt_ended_decides_what_follows(ending: Ending, asked_by_scheduler: bool, action: Action) -> None:
    assert decide([], ended(ending), asked_by_scheduler, 10).action is action


def test_a_crash_after_the_same_step_twice_without_a_new_checkpoint_stops() -> None:
    decision = decide([ended(Ending.CRASHED, 41, 40)], ended(Ending.CRASHED, 41, 40), False, 10)
    assert decision.action is Action.STOP
    assert "twice after step 41 with no new checkpoint between" in decision.reason


@pytest.mark.parametrize(("step", "saved"), [(42, 40), (41, 41)])
def test_a_crash_after_progress_is_started_again(step: int, saved: int) -> None:
    past = [ended(Ending.CRASHED, 41, 40), ended(Ending.PREEMPTED, 41, 41)]
    assert decide(past, ended(Ending.CRASHED, step, saved), False, 10).action is Action.RESTART


def test_preemptions_cost_no_restarts_and_failures_do() -> None:
    past = [ended(Ending.PREEMPTED, step) for step in range(5)] + [ended(Ending.CRASHED, 9), ended(Ending.HUNG, 11)]
    assert decide(past, ended(Ending.CRASHED, 12), False, 3).action is Action.RESTART
    spent = decide(past, ended(Ending.CRASHED, 12), False, 2)
    assert spent.action is Action.STOP and "the budget of 2 restarts is spent" in spent.reason


def test_unfit_nodes_are_replaced_and_a_fault_of_all_nodes_stops() -> None:
    unfit = replace(ended(Ending.UNFIT), bad_nodes=("n2",))
    assert decide([], unfit, False, 10).action is Action.REPLACE_NODES
    assert decide([], replace(unfit, bad_nodes=()), False, 10).action is Action.STOP


def test_unfit_nodes_cost_no_restart_and_are_no_first_crash() -> None:
    unfit = replace(ended(Ending.UNFIT), bad_nodes=("n2",))
    assert decide([unfit, unfit], ended(Ending.CRASHED), False, 1).action is Action.RESTART
    assert decide([ended(Ending.CRASHED)], unfit, False, 1).action is Action.REPLACE_NODES
    assert decide([ended(Ending.CRASHED), unfit], ended(Ending.CRASHED), False, 10).action is Action.STOP


def test_a_job_that_finds_no_fit_nodes_stops_after_ten_tries_in_a_row() -> None:
    unfit = replace(ended(Ending.UNFIT), bad_nodes=("n2",))
    assert decide([unfit] * 9, unfit, False, 0).action is Action.REPLACE_NODES
    assert decide([*[unfit] * 9, ended(Ending.PREEMPTED)], unfit, False, 0).action is Action.REPLACE_NODES
    decision = decide([unfit] * 10, unfit, False, 0)
    assert decision.action is Action.STOP
    assert decision.reason == "why; so it is for the nodes of 11 jobs in a row"


def test_an_attempt_left_open_is_written_down_as_lost(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    history = History(tmp_path)
    history.begin(["n1"], "7")
    assert history.current() is not None
    history.end_lost()
    (attempt,) = history.read()
    assert (attempt.ending, attempt.action) == (Ending.LOST, Action.LEFT)
    assert history.current() is None
    history.end_lost()
    assert len(history.read()) == 1


def test_an_attempt_whose_run_had_its_say_before_its_supervisor_was_killed_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    begun = History(tmp_path).begin(["n1"], "7")
    outcome = Outcome("preempted", 5, "5 of 9 steps done", "signal SIGTERM", begun.began + 1)
    write_record(tmp_path / OUTCOME, outcome)
    History(tmp_path).end_lost()
    (attempt,) = History(tmp_path).read()
    assert (attempt.ending, attempt.reason) == (Ending.PREEMPTED, "signal SIGTERM; 5 of 9 steps done")


def test_history_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    whole = replace(FIRST, ending=Ending.HUNG, action=Action.RESTART, bad_nodes=("n2",), first_step_s=3.5)
    (tmp_path / "launch").mkdir()
    History(tmp_path).end(whole)
    assert History(tmp_path).read() == [whole]


# The watchdog.

LIMITS = Limits(start_s=100, step_s=10, save_s=50, evaluate_s=70)


def beat(step: int, phase: str) -> Heartbeat:
    return Heartbeat(step, 100, phase, 0, 1.0, 0.1, 10.0, float(step))  # type: ignore[arg-type]


def test_each_phase_has_its_own_limit_and_a_change_starts_it_anew() -> None:
    before = beat(7, "step")
    watchdog = Watchdog(LIMITS, before, now=0.0)
    assert watchdog.look(before, 99.0) is None, "the heartbeat of the attempt before is none"
    assert watchdog.look(beat(8, "step"), 99.5) is None
    assert watchdog.first_step_at == 99.5
    assert watchdog.look(beat(8, "step"), 109.0) is None
    assert watchdog.look(beat(8, "save"), 109.4) is None
    assert watchdog.look(beat(8, "save"), 159.0) is None
    stall = watchdog.look(beat(8, "save"), 159.5)
    assert stall is not None
    assert str(stall) == "no sign of life for 50 s in phase save (limit 50 s)"


def test_a_run_that_never_begins_is_hung_after_the_start_limit() -> None:
    watchdog = Watchdog(LIMITS, None, now=5.0)
    assert watchdog.look(None, 104.0) is None
    stall = watchdog.look(None, 105.5)
    assert stall is not None and stall.phase == "start"


# Stacks.


def dump(*frames: str) -> str:
    """As faulthandler writes it, innermost frame first, behind a thread that is not the main one."""
    other = 'Thread 0x01 (most recent call first):\n  File "threading.py", line 9 in _bootstrap\n\n'
    places = [frame.split(":") for frame in (*frames, "<frozen runpy>:_run_code", "<frozen runpy>:_run_module_as_main")]
    own = "".join(f'  File "{file}", line 3 in {function}\n' for file, function in places)
    return f"{other}Current thread 0x02 (most recent call first):\n{own}"


WAITING = dump("/torch/distributed/distributed_c10d.py:all_reduce", "/loop.py:fit")
RANKS = {rank: RankProcess(rank, 1, f"n{rank + 1}", 0.0) for rank in range(3)}


def test_the_rank_outside_the_collective_is_named_even_where_it_is_one_of_two() -> None:
    found = {0: stacks.main_thread(WAITING), 1: stacks.main_thread(dump("/reader.py:read", "/loop.py:fit"))}
    assert stacks.odd_ranks(found) == [1]
    assert stacks.describe(found, RANKS) == "rank 1 on n2 is at /reader.py:3 in read; the others wait in all_reduce"


def test_a_rank_without_a_stack_is_the_odd_one() -> None:
    found = {0: stacks.main_thread(WAITING), 1: (), 2: stacks.main_thread(WAITING)}
    assert stacks.odd_ranks(found) == [1]
    assert "rank 1 on n2 is gone, or cannot tell where it is" in stacks.describe(found, RANKS)


def test_ranks_in_one_place_are_told_so() -> None:
    assert (
        stacks.describe(dict.fromkeys(RANKS, stacks.main_thread(WAITING)), RANKS) == "all ranks stand in the same place"
    )


# The preflight.


def report(node: str, *faults: str, **changes: object) -> NodeReport:
    values: dict[str, object] = {"clock": 1000.0, "port": 21000, "versions": {"torch": "2"}, "speeds": {}}
    return NodeReport(node=node, faults=list(faults), **{**values, **changes})  # type: ignore[arg-type]


def test_equal_nodes_pass_and_rank_0s_node_chooses_the_port() -> None:
    verdict = judge(["n2", "n1"], [report("n1"), report("n2", port=22000)])
    assert (verdict.port, verdict.bad_nodes, verdict.faults) == (22000, (), ())


def test_the_node_that_differs_is_at_fault() -> None:
    reports = [report("n1"), report("n2", versions={"torch": "3"}), report("n3", clock=1100.0)]
    verdict = judge(["n1", "n2", "n3", "n4"], reports)
    assert verdict.bad_nodes == ("n2", "n3", "n4")
    assert verdict.faults == (
        "n2: has torch 3, most nodes have 2",
        "n3: its clock is +100 s away from the others",
        "n4: gave no report in time",
    )


def test_a_fault_of_all_nodes_is_the_jobs_and_replaces_none() -> None:
    verdict = judge(["n1", "n2"], [report("n1", "the disk is full"), report("n2", "the disk is full")])
    assert (verdict.bad_nodes, verdict.faults) == ((), ("the disk is full",))


def test_a_fault_of_gpus_is_the_nodes_even_where_it_is_the_only_one() -> None:
    broken = "GPU 0 has 3 uncorrected memory errors since it was reset"
    alone = judge(["n1"], [report("n1", gpu_faults=[broken])])
    assert (alone.bad_nodes, alone.faults) == (("n1",), (f"n1: {broken}",))
    both = judge(["n1", "n2"], [report("n1", gpu_faults=[broken]), report("n2", gpu_faults=[broken])])
    assert both.bad_nodes == ("n1", "n2")
    full = judge(["n1"], [report("n1", "the disk is full", gpu_faults=[broken])])
    assert (full.bad_nodes, full.faults) == ((), ("the disk is full",))


def test_this_machine_passes_and_an_unreadable_shard_does_not(tmp_path: Path) -> None:
    values = {"name": "x", "run": tmp_path, "program": [], "python": "python", "workdir": tmp_path, "ranks_per_node": 1}
    spec = JobSpec.model_validate(values)
    fit = check_node(spec, attempt=0)
    assert fit.faults == [] and 20000 <= fit.port < 32000
    assert list((tmp_path / "checkpoints").iterdir()) == []
    unfit = check_node(spec.model_copy(update={"shards": [str(tmp_path / "0.tar")]}), attempt=0)
    assert len(unfit.faults) == 1 and "0.tar cannot be read (No such file or directory)" in unfit.faults[0]


def test_a_checkpoint_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    values = {"name": "x", "run": tmp_path, "program": [], "python": "python", "workdir": tmp_path, "ranks_per_node": 1}
    (fault,) = check_node(JobSpec.model_validate(values), attempt=0).faults
    assert "cannot be written and renamed in" in fault


def test_a_bad_node_is_remembered_for_the_next_run(tmp_path: Path) -> None:
    bad_nodes.remember(tmp_path, ["n3", "n1"], "ECC")
    bad_nodes.remember(tmp_path, ["n3"], "ECC")
    assert bad_nodes.known(tmp_path) == ["n1", "n3"]


def test_gpus_with_memory_errors_or_too_few_of_them_are_faults() -> None:
    good = ["570.1", "0", "No", "No"]
    assert list(gpu_health.driver_faults([good, ["570.1", "[N/A]", "[N/A]", "[N/A]"]], 2)) == []
    faults = list(gpu_health.driver_faults([good, ["570.1", "3", "Yes", "No"]], 4))
    assert faults == [
        "shows 2 GPUs, the job wants 4",
        "GPU 1 has 3 uncorrected memory errors since it was reset",
        "GPU 1 waits for a reset to remap a bad memory row",
    ]


def test_a_node_far_below_the_median_is_slow() -> None:
    nodes = [{"matmul TFLOP/s": speed} for speed in (600.0, 610.0, 300.0)]
    assert [list(gpu_health.slow(node, nodes)) for node in nodes[:2]] == [[], []]
    assert list(gpu_health.slow(nodes[2], nodes)) == ["matmul TFLOP/s is 300, the median of the nodes 600"]
