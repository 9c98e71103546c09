"""Which figures of a run share a chart, and in which order the charts stand.

Enter: a run's story. Leave: charts by section. A figure that no chart here names gets one of its own: none is
hidden.
"""

import re
from collections.abc import Iterable, Sequence

from mmpretrain.tracking.figures import objective_losses
from mmpretrain.tracking.record import Row
from mmpretrain.tracking.report_charts import Chart, Point, Series
from mmpretrain.tracking.report_facts import RunStory
from mmpretrain.tracking.report_tables import WAY, way_label

RECALL = re.compile(rf"(?P<task>.+)/(?P<direction>{WAY})_r@(?P<k>\d+)")
_ACCURACY = re.compile(r"(?P<own>.+_acc)(?:_(?:no|shuffled)(?:_\w+)?)?")
_CLASSIFIED = re.compile(r"(?P<own>.+/(?:zeroshot|probe_\w+|knn_\w+))_(?:top\d+|mean_class)")
_SIGNALS = (
    Chart("Learning rate", [Series("lr", ())]),
    Chart("Gradient norm before clipping", [Series("grad_norm", ())], logarithmic=True),
    Chart("Logit scale", [Series("logit_scale", ())]),
)


def curve(rows: Iterable[Row], name: str) -> list[Point]:
    """A figure over the steps."""
    return [(row.step, row.metrics[name]) for row in rows if name in row.metrics]


def loss_charts(story: RunStory) -> list[Chart]:
    """The total, then each objective where there are several."""
    charts = [Chart("Total loss", [Series("loss", curve(story.steps, "train/loss"))], wide=True)]
    objectives = list(dict.fromkeys(name for row in story.steps for name in objective_losses(row.metrics)))
    if len(objectives) > 1:
        charts += [Chart(name, [Series("loss", curve(story.steps, f"train/loss_{name}"))]) for name in objectives]
    return charts


def recall_charts(story: RunStory) -> list[Chart]:
    """One chart per task and direction, chance beside it."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in evaluation_names(story):
        if match := RECALL.fullmatch(name):
            groups.setdefault((match["task"], match["direction"]), []).append(int(match["k"]))
    return [_recall_chart(story.evaluations, task, way, sorted(ks)) for (task, way), ks in groups.items()]


def signal_charts(story: RunStory) -> list[Chart]:
    """What the optimizer did, and the health of the embeddings: every train/ and embed/ figure but losses."""
    named = [
        Chart(chart.title, [Series(one.name, curve(story.steps, f"train/{one.name}")) for one in chart.series],
              logarithmic=chart.logarithmic)
        for chart in _SIGNALS
    ]  # fmt: skip
    similarity = Chart(
        "Cosine similarity in the batch",
        [
            Series("matching pairs", curve(story.steps, "embed/pos_sim")),
            Series("other pairs", curve(story.steps, "embed/neg_sim")),
        ],
    )
    return [*named, similarity]


def speed_charts(story: RunStory) -> list[Chart]:
    """Throughput, waiting, memory."""
    rows = story.steps
    memory = [
        Series(label, curve(rows, f"mem/{name}"))
        for name, label in (
            ("max_active_gib", "GPU active"),
            ("max_reserved_gib", "GPU reserved"),
            ("host_rss_gib", "host, main rank"),
        )
    ]
    return [
        Chart("Samples per second", [Series("samples/s", curve(rows, "perf/samples_per_s"))]),
        Chart("Model FLOPs utilization", [Series("mfu", curve(rows, "train/mfu"))], unit="%"),
        Chart("Model TFLOP/s of a rank", [Series("tflops", curve(rows, "train/tflops_per_gpu"))]),
        Chart("Share of time spent waiting for data", [Series("waiting", curve(rows, "perf/data_pct"))], unit="%"),
        Chart("Memory, GiB", memory),
    ]


def other_charts(story: RunStory) -> list[Chart]:
    """Every further figure of the steps."""
    shown = {"train/loss", "train/skipped_steps", "perf/samples_per_s", "perf/data_pct", "perf/data_s"}
    shown |= {"train/mfu", "train/tflops_per_gpu"}
    shown |= {"rank/slowest", "rank/busy_s_min", "rank/busy_s_med", "rank/busy_s_max"}
    shown |= {"embed/pos_sim", "embed/neg_sim", "mem/max_active_gib", "mem/max_reserved_gib", "mem/host_rss_gib"}
    shown |= {f"train/{one.name}" for chart in _SIGNALS for one in chart.series}
    names = dict.fromkeys(name for row in story.steps for name in row.metrics)
    objectives = {f"train/loss_{name}" for row in story.steps for name in objective_losses(row.metrics)}
    return [
        Chart(name, [Series(name.split("/")[-1], curve(story.steps, name))])
        for name in sorted(names)
        if name not in shown | objectives
    ]


def evaluation_names(story: RunStory) -> list[str]:
    """Figures of all evaluations in their order, those of chance left out."""
    names = dict.fromkeys(name for row in story.evaluations for name in row.metrics)
    return [name for name in names if chance_name(name) != name]


def chance_name(name: str) -> str:
    """The figure that tells what guessing scores, for those that have one; a name of chance is its own."""
    if "chance" in name or name.endswith("_acc_guess"):
        return name
    if match := _ACCURACY.fullmatch(name):
        return f"{match['own']}_guess"
    if match := _CLASSIFIED.fullmatch(name):
        return f"{match['own']}_chance"
    return name.replace("_r@", "_chance_r@") if RECALL.fullmatch(name) else ""


def _recall_chart(rows: Sequence[Row], task: str, way: str, ks: Sequence[int]) -> Chart:
    series = [Series(f"R@{k}", curve(rows, f"{task}/{way}_r@{k}"), "dots") for k in ks]
    chance = Series("chance R@1", curve(rows, f"{task}/{way}_chance_r@1"), "dashed")
    prefix = "" if task == "val" else f"{task}: "
    return Chart(f"{prefix}{way_label(way)}", [*series, chance], limits=(0.0, 1.0))
