"""The ranks of a run in its report: how evenly they work, and which of them the others wait for.

Enter: the story of a run. Leave: charts and a table. Figures are of the time before ranks meet in a step, since after
that all take as long as the slowest.
"""

import math
from collections import Counter
from html import escape

from mmpretrain.core.run_files import read_ranks
from mmpretrain.tracking.record import Row
from mmpretrain.tracking.report_charts import Chart, Series
from mmpretrain.tracking.report_curves import curve
from mmpretrain.tracking.report_facts import RunStory

_SHOWN = 8


def rank_charts(story: RunStory) -> list[Chart]:
    """Fastest, median and slowest rank; none for a single rank."""
    if (story.attempts[-1].ranks or 1) < 2:
        return []
    labels = (("max", "slowest"), ("med", "median"), ("min", "fastest"))
    series = [Series(label, curve(story.steps, f"rank/busy_s_{name}")) for name, label in labels]
    return [Chart("Seconds of a step before ranks meet", series, wide=True)]


def _tells_slowest(row: Row) -> bool:
    return math.isfinite(row.metrics.get("rank/slowest", math.nan))


def slowest_ranks(story: RunStory) -> str:
    """Which rank was slowest how often in the newest attempt, with its host."""
    newest = [row for row in story.steps if row.attempt == story.attempts[-1].number and _tells_slowest(row)]
    if not newest or (story.attempts[-1].ranks or 1) < 2:
        return ""
    hosts = {one.rank: one.node for one in read_ranks(story.run_dir)}
    counted = Counter(int(row.metrics["rank/slowest"]) for row in newest)
    rows = "".join(
        f'<tr><td>{rank}</td><td class="left">{escape(hosts.get(rank, "unknown"))}</td>'
        f"<td>{count / len(newest):.0%}</td></tr>"
        for rank, count in counted.most_common(_SHOWN)
    )
    return (
        f"<h2>Slowest ranks<small>share of the newest attempt's {len(newest):,} steps</small></h2>"
        '<div class="card scroll"><table><thead><tr><th>Rank</th><th class="left">Host</th><th>Slowest</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )
