"""The parts of the report page, each from a run's story to HTML.

Enter: a RunStory. Leave: escaped HTML; an empty string where a run has nothing to tell of a part.
"""

import base64
import statistics
import time
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

from mmpretrain.core.types import Picture
from mmpretrain.tracking.figures import duration, significant
from mmpretrain.tracking.record import Row
from mmpretrain.tracking.report_charts import Chart, Timeline, draw, sparkline
from mmpretrain.tracking.report_curves import RECALL, chance_name, curve, evaluation_names
from mmpretrain.tracking.report_facts import Attempt, Retrieved, RunStory
from mmpretrain.tracking.report_tables import Table, tables_of, way_label

_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_FINAL_ROWS = 20
"""A noisy figure at the end is a mean over so many steps, or over the last tenth where that is less."""


def heading(story: RunStory) -> str:
    """Name, state and the run in one line."""
    last, config = story.steps[-1], story.config
    ranks = story.attempts[-1].ranks
    facts = [
        f"{last.step:,} of {story.total_steps:,} steps",
        f"{last.samples:,} samples",
        f"{duration(story.training_s)} of training",
        *([_plural(ranks, "rank")] if ranks else []),
        *([f"ZeRO-{config['zero_stage']}"] if "zero_stage" in config else []),
        *([str(config["precision"])] if "precision" in config else []),
    ]
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f'<header><p class="over">Run report</p><h1>{escape(story.name)}'
        f'<span class="state {escape(story.state)}">{escape(story.state)}</span></h1>'
        f'<p class="facts">{spans}</p>{"".join(_notices(story))}</header>'
    )


def _notices(story: RunStory) -> Iterable[str]:
    if story.message and story.state != "completed":
        bad = " bad" if story.state in ("fatal", "crashed") else ""
        yield f'<p class="notice{bad}">{escape(story.message)}</p>'
    skipped = [row.step for row in story.steps if row.skipped]
    if skipped:
        listed = ", ".join(map(str, skipped[:12])) + (" …" if len(skipped) > 12 else "")
        yield (
            f'<p class="notice">{_plural(len(skipped), "step")} skipped because a loss or gradient was not finite: '
            f"{listed}. Marked red under the curves; skipped.jsonl names the samples.</p>"
        )
    if story.torn:
        yield (
            f'<p class="notice">{_plural(story.torn, "line")} of metrics.jsonl cut short when an attempt was killed; '
            "left out.</p>"
        )


def tiles(story: RunStory) -> str:
    """The figures asked for first."""
    steps = story.steps
    losses = _finite(steps, "train/loss")
    first, final = losses[:1], losses[-min(_FINAL_ROWS, -(-len(losses) // 10)) :]
    cards = []
    if final:
        since = f"{_over(len(final))}from {significant(first[0])}"
        cards.append(_tile("Loss", significant(statistics.fmean(final)), since))
    for name in evaluation_names(story):
        match = RECALL.fullmatch(name)
        if match and match["k"] == "1" and match["task"] == "val":
            points = curve(story.evaluations, name)
            best = max(value for _, value in points)
            cards.append(
                _tile(way_label(match["direction"]).capitalize(), f"{points[-1][1]:.1%}", f"R@1, best {best:.1%}")
            )
    rates, spent = _finite(steps, "perf/samples_per_s"), sum(_finite(steps, "perf/step_s"))
    begun = [row for before, row in pairwise(steps) if row.attempt == before.attempt]
    waits, of = _finite(begun, "perf/data_s"), sum(_finite(begun, "perf/step_s"))
    if rates:
        cards.append(_tile("Throughput", significant(statistics.median(rates)), "samples/s, median"))
    used, computed = _finite(steps, "train/mfu"), _finite(steps, "train/tflops_per_gpu")
    if used:
        cards.append(_tile("MFU", f"{statistics.median(used):.1f}%", "of the device's peak, median"))
    elif computed:
        cards.append(_tile("TFLOP/s", significant(statistics.median(computed)), "model FLOPs of a rank, median"))
    if waits and of:
        cards.append(_tile("Waiting for data", f"{sum(waits) / of:.1%}", "of step time, first steps aside"))
    if spent and story.training_s:
        share = min(1.0, spent / max(story.steps[-1].time - story.attempts[0].begun, spent))
        cards.append(_tile("Goodput", f"{share:.0%}", "kept of wall time"))
    replaced = sum(story.skip_reasons.values())
    cards.append(_tile("Replaced", f"{replaced:,}", f"of {steps[-1].samples:,} samples"))
    return f'<div class="tiles">{"".join(cards)}</div>'


def _over(steps: int) -> str:
    return f"over {steps} steps, " if steps > 1 else ""


def charts(title: str, drawn: Sequence[Chart], timeline: Timeline, aside: str = "") -> str:
    """A section of charts."""
    wide = "".join(draw(chart, timeline) for chart in drawn if chart.wide)
    narrow = "".join(draw(chart, timeline) for chart in drawn if not chart.wide)
    if not wide + narrow:
        return ""
    small = f"<small>{escape(aside)}</small>" if aside else ""
    grid = f'<div class="charts">{narrow}</div>' if narrow else ""
    return f"<h2>{escape(title)}{small}</h2>{wide}{grid}"


def evaluation_tables(story: RunStory, timeline: Timeline) -> str:
    """The last evaluation: figures side by side by what they measure, then folded every one of them."""
    if not story.evaluations:
        return ""
    last = story.evaluations[-1]
    tables = "".join(_table(table) for table in tables_of(last.metrics))
    return (
        f"<h2>Last evaluation<small>after step {last.step:,}</small></h2>"
        f'<div class="tables">{tables}</div>{_every_figure(story, last, timeline)}'
    )


def _table(table: Table) -> str:
    columns = table.columns
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    rows = "".join(
        f"<tr><td>{escape(row)}</td>{''.join(f'<td>{_cell(values.get(column))}</td>' for column in columns)}</tr>"
        for row, values in table.rows.items()
    )
    return (
        f'<div class="card scroll"><table><thead><tr><th>{escape(table.title)}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _cell(value: float | None) -> str:
    return "" if value is None else significant(value)


def _every_figure(story: RunStory, last: Row, timeline: Timeline) -> str:
    """Each figure beside its best, what guessing scores and its way there."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td><b>{significant(last.metrics[name])}</b></td>{_best(story, name)}"
        f"<td>{_chance(last, name)}</td><td>{sparkline(curve(story.evaluations, name), timeline)}</td></tr>"
        for name in evaluation_names(story)
        if name in last.metrics
    )
    return (
        '<details class="card"><summary>Every figure, with its best, chance and its way over the run</summary>'
        '<div class="scroll"><table><thead><tr><th>Figure</th><th>Last</th><th>Best</th><th>Chance</th>'
        f"<th>Over the run</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _best(story: RunStory, name: str) -> str:
    """The best value and its step, for figures whose good end is known."""
    points = curve(story.evaluations, name)
    if name.endswith(("_mean_rank", "_median_rank")) or "/loss_" in name:
        step, value = min(points, key=lambda point: point[1])
    elif chance_name(name):
        step, value = max(points, key=lambda point: point[1])
    else:
        return "<td></td>"
    return f"<td>{significant(value)} <small>at {step:,}</small></td>"


def _chance(row: Row, name: str) -> str:
    chance = row.metrics.get(chance_name(name))
    return "" if chance is None else significant(chance)


def retrieved(story: RunStory) -> str:
    """Captions with the images found for them."""
    cards = "".join(_retrieved_card(sample) for sample in story.retrieved)
    if not cards:
        return ""
    return (
        "<h2>What the model finds<small>captions and their five nearest images, the right one outlined</small></h2>"
        f'<div class="found">{cards}</div>'
    )


def pictures(story: RunStory) -> str:
    """What the last evaluation left to look at; what it retrieved has a section of its own."""
    return "".join(
        f"<h2>{escape(name)}<small>of the last evaluation</small></h2>"
        f'<div class="strips">{"".join(_strip(one) for one in shown)}</div>'
        for name, shown in story.pictures.items()
        if shown and not name.endswith("/retrieved")
    )


def _strip(one: Picture) -> str:
    return f'<figure class="card">{_picture(one.path)}<figcaption>{escape(one.caption)}</figcaption></figure>'


def _retrieved_card(sample: Retrieved) -> str:
    place = "not among them" if sample.correct is None else f"right image at place {sample.correct + 1}"
    good = " good" if sample.correct == 0 else ""
    pictures = "".join(
        f"<li{' class=right' if index == sample.correct else ''}>{_picture(path)}{score:.3f}</li>"
        for index, (path, score) in enumerate(zip(sample.images, sample.scores, strict=False))
    )
    return (
        f'<div class="card"><p>“{escape(sample.query)}” <span class="verdict{good}">{place}</span></p>'
        f"<ol>{pictures}</ol></div>"
    )


def _picture(path: Path) -> str:
    media_type = _MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None or not path.is_file():
        return f'<span class="lost" title="{escape(path.name)} is missing"></span>'
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="" src="data:{media_type};base64,{content}">'


def attempts(story: RunStory) -> str:
    """Every start of the run on one line of time, then as a table."""
    starts, ends = [one.begun for one in story.attempts], [one.ended for one in story.attempts]
    begin, whole = min(starts), max(max(ends) - min(starts), 1e-9)
    bars = "".join(
        f'<i{" class=last" if one is story.attempts[-1] else ""} style="left:{100 * (one.begun - begin) / whole:.2f}%;'
        f'width:{100 * (one.ended - one.begun) / whole:.2f}%" title="attempt {one.number}"></i>'
        for one in story.attempts
    )
    rows = "".join(_attempt_row(one) for one in story.attempts)
    return (
        f"<h2>Attempts<small>{duration(whole)} from first to last step</small></h2>"
        f'<div class="card scroll"><div class="span">{bars}</div><table><thead><tr><th>Attempt</th><th>Begun (UTC)</th>'
        "<th>Lasted</th><th>Ranks</th><th>Steps</th><th>Repeated later</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _attempt_row(one: Attempt) -> str:
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one.begun))
    return (
        f"<tr><td>{one.number}</td><td>{begun}</td><td>{duration(one.ended - one.begun)}</td>"
        f"<td>{one.ranks or ''}</td><td>{one.first_step:,} to {one.last_step:,}</td>"
        f"<td>{one.lost_steps or ''}</td></tr>"
    )


def ledger(story: RunStory) -> str:
    """Samples that were not used, by reason."""
    total = sum(story.skip_reasons.values())
    if not total:
        return '<h2>Samples not used</h2><p class="empty">None: every sample that was asked for was used.</p>'
    rows = "".join(
        f'<tr><td class="left">{escape(reason)}</td><td>{count:,}</td></tr>'
        for reason, count in sorted(story.skip_reasons.items(), key=lambda pair: -pair[1])
    )
    return (
        f"<h2>Samples not used<small>{total:,} replaced; ledger.jsonl names each</small></h2>"
        f'<div class="card scroll"><table><thead><tr><th>Reason</th><th>Samples</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def config(story: RunStory) -> str:
    """The resolved config, folded."""
    if not story.config_text:
        return ""
    return (
        '<h2>Configuration</h2><details class="card"><summary>config.yaml, every default written out</summary>'
        f"<pre>{escape(story.config_text)}</pre></details>"
    )


def _tile(label: str, figure: str, aside: str) -> str:
    return f'<div class="tile"><span>{escape(label)}</span><b>{escape(figure)}</b><span>{escape(aside)}</span></div>'


def _finite(rows: Iterable[Row], name: str) -> list[float]:
    values = (row.metrics.get(name) for row in rows)
    return [value for value in values if value is not None and value == value]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
