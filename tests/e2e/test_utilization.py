"""What a run at work tells of how much it computes."""

import pytest
from command_line import Project


def test_model_flops_are_told_once_the_first_steps_are_over(project: Project) -> None:
    """Their rate is that of the samples times what one of them costs; a processor has no peak to be a share of."""
    assert project.train("steps=13").code == 0
    rows = project.rows("metrics.jsonl")
    told = [row for row in rows if "train/tflops_per_gpu" in row]
    assert [row["step"] for row in told] == [10, 11, 12, 13]
    costs = [float(str(row["train/tflops_per_gpu"])) / float(str(row["perf/samples_per_s_per_gpu"])) for row in told]
    assert costs == pytest.approx([costs[0]] * 4) and 1e-6 < costs[0] < 1e-5
    assert not any("train/mfu" in row for row in rows)
