"""Weights & Biases, as a view that can neither stop nor slow a run.

Enter: reports and evaluations. Leave: one W&B run per run folder, online where a key and a server are at hand, else
recorded in the folder's `wandb/`, which `mmpretrain wandb sync` uploads. All calls after the start run on a thread of
their own with a bounded queue, so a server that hangs costs rows there and no training time here.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import psutil

from mmpretrain.core.errors import DataError
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.background import Worker, one_line
from mmpretrain.tracking.base import Outcome, RunFacts, TrackerConfig
from mmpretrain.tracking.pictures import decoded

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"
STEP = "train/step"
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
Mode = Literal["online", "offline", "disabled"]


class WandbConfig(TrackerConfig):
    """Weights & Biases."""

    kind: Literal["wandb"] = "wandb"
    project: str = "mmpretrain"
    """Project of the run."""
    entity: str | None = None
    """User or team; null: that of the key."""
    group: str | None = None
    """Name that runs are grouped by; null: that of the experiment."""
    job_type: str = "train"
    """Kind of job in the group."""
    tags: tuple[str, ...] = ()
    """Labels of the run."""
    mode: Literal["auto", "offline", "disabled"] = "auto"
    """auto: online with a key, else offline; WANDB_MODE=offline or disabled holds as well."""
    init_timeout_s: float = 20.0
    """Longest wait for the server at the start; then the run is recorded offline."""
    finish_timeout_s: float = 60.0
    """Longest wait for the upload at the end; what is missing stays in the folder for `wandb sync`."""

    def build(self, run: RunFacts) -> WandbTracker:
        return WandbTracker(run, self._start(run), self.finish_timeout_s)

    def _start(self, run: RunFacts) -> wandb.Run:
        """Begin the W&B run. Takes no longer than `init_timeout_s` and a second or two."""
        import wandb

        mode = self._mode()
        if mode == "online":
            try:
                return self._init(run, mode)
            except (wandb.Error, OSError) as fault:
                logger.warning("W&B cannot be used (%s); %s", first_line(fault), _offline_hint(run))
                # The half-begun run holds its id until W&B's helper process is gone.
                wandb.teardown()
        elif mode == "offline" and self.mode == "auto" and not has_credentials():
            logger.warning("W&B has no API key (`wandb login` sets one); %s", _offline_hint(run))
        return self._init(run, "disabled" if mode == "disabled" else "offline")

    def _mode(self) -> Mode:
        if self.mode != "auto":
            return self.mode
        match os.environ.get("WANDB_MODE"):
            case "disabled":
                return "disabled"
            case "offline" | "dryrun":
                return "offline"
        return "online" if has_credentials() else "offline"

    def _init(self, run: RunFacts, mode: Mode) -> wandb.Run:
        config = {**run.config, "attempt": run.attempt}
        return open_run(self, run.run_dir, run.name, run.experiment, config, mode, continues=mode == "online")


def open_run(
    settings: WandbConfig,
    run_dir: Path,
    name: str,
    experiment: str,
    config: Mapping[str, object],
    mode: Mode,
    continues: bool = False,
) -> wandb.Run:
    """The W&B run of a run folder, under the folder's id; one that does not continue replaces what has that id."""
    import wandb

    started = wandb.init(
        mode=mode,
        project=settings.project,
        entity=settings.entity,
        group=settings.group or experiment,
        job_type=settings.job_type,
        tags=settings.tags,
        name=name,
        id=run_id(run_dir),
        resume="allow" if continues else None,
        reinit="create_new",
        dir=run_dir,
        config=dict(config),
        settings=wandb.Settings(
            init_timeout=settings.init_timeout_s,
            finish_timeout=settings.finish_timeout_s,
            console="off",
            silent=mode != "online",
            quiet=True,
            save_code=False,
            disable_code=True,
            # The stop button in the web page ends the run with a checkpoint, never by an interrupt.
            stop_fn=lambda: _ask_to_stop(run_dir),
        ),
    )
    started.define_metric(STEP, hidden=True)
    started.define_metric("*", step_metric=STEP)
    return started


def wandb_row(step: int, samples: int, metrics: Mapping[str, float]) -> dict[str, object]:
    """What W&B is told of a step or an evaluation."""
    return {STEP: step, "train/samples": samples, **metrics}


def best_metrics(names: Iterable[str]) -> list[str]:
    """The metrics of which W&B's summary keeps the largest value."""
    return sorted(name for name in names if name.endswith("_r@1"))


class WandbTracker:
    """Writes every due step, every skipped one and every evaluation."""

    def __init__(self, run: RunFacts, started: wandb.Run, finish_timeout_s: float) -> None:
        self.run = run
        self._wandb_run = started
        self._finish_timeout_s = finish_timeout_s
        self._best: set[str] = set()
        self._worker = Worker("W&B", secret=os.environ.get("WANDB_API_KEY", ""))

    def log(self, report: StepReport) -> None:
        if self.run.is_due(report.step) or report.skipped:
            row = wandb_row(report.step, report.samples, report.metrics)
            self._worker.submit(lambda: self._wandb_run.log(row))

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        row = {**wandb_row(step, samples, metrics), **media(pictures or {})}
        best = [name for name in best_metrics(metrics) if name not in self._best]
        self._best.update(best)
        self._worker.submit(lambda: self._log_evaluation(row, best))

    def note(self, message: str) -> None:
        """Events are for the console."""

    def saved(self, step: int, path: Path) -> None:
        """A reference to where it lies; nothing of it is uploaded."""
        import wandb

        artifact = wandb.Artifact(f"checkpoints-{run_id(self.run.run_dir)}", "checkpoint", metadata={"step": step})
        artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
        self._worker.submit(lambda: self._log_artifact(artifact, path.name))

    def alert(self, title: str, text: str) -> None:
        self._worker.submit(lambda: self._wandb_run.alert(title=title, text=text))

    def close(self, outcome: Outcome) -> None:
        self._worker.submit(lambda: self._finish(outcome))
        if not self._worker.close(self._finish_timeout_s + 5.0):
            logger.warning("W&B did not finish; %s", _sync_hint(self.run.run_dir))
            _end_helper()

    def _log_evaluation(self, row: dict[str, object], best: list[str]) -> None:
        for name in best:
            self._wandb_run.define_metric(name, step_metric=STEP, summary="max")
        self._wandb_run.log(row)

    def _log_artifact(self, artifact: wandb.Artifact, alias: str) -> None:
        self._wandb_run.log_artifact(artifact, aliases=["latest", alias])

    def _finish(self, outcome: Outcome) -> None:
        if outcome == "preempted":
            self._wandb_run.mark_preempting()
        self._wandb_run.finish(exit_code=0 if outcome == "completed" else 1)


def media(pictures: Pictures) -> dict[str, list[wandb.Image]]:
    """Pixels as they are now, since the next evaluation may replace the files before these are sent."""
    import wandb

    found: dict[str, list[wandb.Image]] = {}
    for name, shown in pictures.items():
        for picture in shown:
            found.setdefault(name, []).append(wandb.Image(decoded(picture.path), caption=picture.caption))
    return found


def run_id(run_dir: Path) -> str:
    """The W&B id of a run folder, made at its first use, so that every attempt continues one run."""
    path = run_dir / ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    found = path.read_text(errors="replace").strip()
    if not _ID.fullmatch(found):  # it becomes part of a path
        raise DataError(f"{path} holds {found[:40]!r}, which is no id of a W&B run; remove the file for a new one")
    return found


def has_credentials() -> bool:
    """Whether W&B would find a key without asking: environment, settings file or netrc. The key is not kept."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        entry = netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def _ask_to_stop(run_dir: Path) -> None:
    (run_dir / "control").mkdir(exist_ok=True)
    (run_dir / "control" / "stop").touch()


def _end_helper() -> None:
    """Kill W&B's helper process: the interpreter's exit waits for it without end, even where it hangs."""
    import wandb

    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
    with suppress(wandb.Error, OSError):
        wandb.teardown()


def first_line(fault: BaseException) -> str:
    """What went wrong, in one line that never shows the key."""
    return one_line(fault, os.environ.get("WANDB_API_KEY", ""))


def _offline_hint(run: RunFacts) -> str:
    return f"the run is recorded offline: {_sync_hint(run.run_dir)}"


def _sync_hint(run_dir: Path) -> str:
    return f"`mmpretrain wandb sync {run_dir}` uploads it later, as one run"
