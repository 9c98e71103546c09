"""One page that shows a whole run, readable offline and years later: curves, figures, pictures, attempts, config.

Enter: a run folder, finished or not. Leave: one HTML file without a single outside reference. Refuses a folder that has
no finished step.
"""

import time
from html import escape
from pathlib import Path

from mmpretrain.core.errors import DataError
from mmpretrain.tracking import report_curves as curves
from mmpretrain.tracking import report_sections as sections
from mmpretrain.tracking.report_charts import Timeline
from mmpretrain.tracking.report_facts import RunStory, read_story
from mmpretrain.tracking.report_ranks import rank_charts, slowest_ranks
from mmpretrain.tracking.report_style import SCRIPT, STYLE

REPORT_FILE = "report.html"


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page, by default as `report.html` in the run folder, and return where it is."""
    page = compose(read_story(run_dir))
    path = out or run_dir / REPORT_FILE
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as fault:
        raise DataError(f"{path} cannot be written ({fault.strerror}); name another place for the report") from fault
    return path


def compose(story: RunStory, further_script: str = "") -> str:
    """The page as text."""
    timeline = Timeline(
        first=story.steps[0].step,
        last=story.steps[-1].step,
        resumed=[attempt.first_step for attempt in story.attempts[1:]],
        skipped=[row.step for row in story.steps if row.skipped],
    )
    parts = [
        sections.heading(story),
        sections.tiles(story),
        sections.charts("Loss", curves.loss_charts(story), timeline),
        sections.charts("Retrieval", curves.recall_charts(story), timeline, "queries answered by the first k"),
        sections.retrieved(story),
        sections.pictures(story),
        sections.evaluation_tables(story, timeline),
        sections.charts("Optimization and embeddings", curves.signal_charts(story), timeline),
        sections.charts("Speed and memory", curves.speed_charts(story), timeline),
        sections.charts("Ranks", rank_charts(story), timeline),
        slowest_ranks(story),
        sections.charts("Further figures", curves.other_charts(story), timeline),
        sections.attempts(story),
        sections.ledger(story),
        sections.config(story),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    footer = (
        f"<footer>Written {written}. Dashed lines mark where an attempt resumed; bold curves are means over a fortieth "
        "of the run, pale ones the single steps.</footer>"
    )
    return page(f"{story.name} · run report", "".join(parts) + footer, further_script)


def page(title: str, body: str, further_script: str = "") -> str:
    """A whole document in the report's style."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main><script>{SCRIPT}{further_script}</script></body></html>\n"
    )
