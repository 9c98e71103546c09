"""metrics.jsonl replayed into one clean W&B run, however many attempts and offline pieces the run was in.

Enter: a run folder. Leave: a W&B run under the folder's own id, online or recorded in `wandb/`, with every row that
stands, each once and in order, and the pictures of the last evaluation. Refused: a folder without metrics, a server
that cannot be reached.

W&B itself cannot join offline pieces: each becomes a run of its own and overlapping steps overwrite one another. A run
of the same id that is on the server already is overwritten as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from mmpretrain.core.errors import ClusterError, DataError
from mmpretrain.tracking.pictures import read_pictures
from mmpretrain.tracking.record import Row, read_metrics
from mmpretrain.tracking.report_facts import read_saved_config
from mmpretrain.tracking.wandb import WandbConfig, best_metrics, first_line, has_credentials, media, open_run, wandb_row


@dataclass(frozen=True)
class Replayed:
    """What came of a replay."""

    rows: int
    last_step: int
    folder: Path
    """Where the run is recorded."""
    online: bool


def replay(run_dir: Path, project: str | None = None, offline: bool = False) -> Replayed:
    """Replay a run; without a key it is recorded offline."""
    rows = read_metrics(run_dir)
    if not rows:
        raise DataError(f"{run_dir}/metrics.jsonl holds no whole row; there is nothing to replay")
    saved = read_saved_config(run_dir / "config.yaml")
    tracker = _tracker_config(saved, project)
    online = has_credentials() and not offline
    folder = _write(tracker, run_dir, saved, rows, online)
    return Replayed(len(rows), rows[-1].step, folder, online)


def _write(tracker: WandbConfig, run_dir: Path, saved: Mapping[str, object], rows: list[Row], online: bool) -> Path:
    import wandb

    run_dir = run_dir.resolve()
    config = {**saved, "attempt": rows[-1].attempt}
    try:
        run = open_run(tracker, run_dir, run_dir.name, run_dir.parent.name, config, "online" if online else "offline")
    except (wandb.Error, OSError) as fault:
        raise ClusterError(
            f"W&B cannot be used ({first_line(fault)}); try again later, or `--offline` records the run in {run_dir}"
        ) from fault
    for name in best_metrics(rows[-1].metrics.keys() | {name for row in rows for name in row.metrics}):
        run.define_metric(name, step_metric="train/step", summary="max")
    last = max((number for number, row in enumerate(rows) if not row.is_training), default=-1)
    for number, row in enumerate(rows):
        pictures = media(read_pictures(run_dir)) if number == last else {}
        run.log({**wandb_row(row.step, row.samples, row.metrics), **pictures})
    folder = Path(run.dir).parent
    run.finish(exit_code=0)
    return folder


def _tracker_config(saved: Mapping[str, object], project: str | None) -> WandbConfig:
    """The run's own W&B settings, where it had any."""
    tracking = saved.get("tracking")
    trackers = tracking.get("trackers") if isinstance(tracking, dict) else None
    listed = trackers if isinstance(trackers, list) else []
    own = next((one for one in listed if isinstance(one, dict) and one.get("kind") == "wandb"), {})
    try:
        return WandbConfig.model_validate({**own, **({"project": project} if project else {})})
    except ValidationError as fault:
        raise DataError(f"the W&B settings in config.yaml cannot be read: {fault.errors()[0]['msg']}") from fault
