"""Several trackers behind the calls of one, so that what merely watches a run can never end it.

Enter: tracker configs. Leave: one tracker. `metrics.jsonl` and the console are always among them. A tracker that fails
is dropped with one warning, unless it is required.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmpretrain.core.errors import MMPretrainError
from mmpretrain.core.registry import kind_of
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.base import Outcome, RunFacts, Tracker, TrackerConfig
from mmpretrain.tracking.console import ConsoleConfig
from mmpretrain.tracking.jsonl import JsonlConfig

logger = logging.getLogger(__name__)


class Trackers:
    """Hands every call to all trackers that still work."""

    def __init__(self) -> None:
        self._members: dict[str, tuple[Tracker, bool]] = {}

    @property
    def kinds(self) -> list[str]:
        """Kinds of the trackers at work."""
        return list(self._members)

    def add(self, config: TrackerConfig, run: RunFacts) -> None:
        """Build a tracker; what a person must repair is raised, any other failure leaves the tracker out."""
        kind = kind_of(type(config))
        try:
            self._members[kind] = (config.build(run), config.required)
        except Exception as fault:
            if config.required or isinstance(fault, MMPretrainError):
                raise
            _warn(kind, fault)

    def log(self, report: StepReport) -> None:
        self._each(lambda tracker: tracker.log(report))

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        self._each(lambda tracker: tracker.log_evaluation(step, samples, metrics, pictures))

    def note(self, message: str) -> None:
        self._each(lambda tracker: tracker.note(message))

    def saved(self, step: int, path: Path) -> None:
        self._each(lambda tracker: tracker.saved(step, path))

    def alert(self, title: str, text: str) -> None:
        self._each(lambda tracker: tracker.alert(title, text))

    def close(self, outcome: Outcome) -> None:
        self._each(lambda tracker: tracker.close(outcome))
        self._members.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for kind, (tracker, required) in list(self._members.items()):
            try:
                call(tracker)
            except Exception as fault:
                if required:
                    raise
                del self._members[kind]
                _warn(kind, fault)


def build_trackers(configs: Sequence[TrackerConfig], run: RunFacts) -> Trackers:
    """The trackers of a run: those named, after `jsonl` and `console`, which need no naming."""
    kinds = [kind_of(type(config)) for config in configs]
    always = [config for config in (JsonlConfig(), ConsoleConfig()) if config.kind not in kinds]
    trackers = Trackers()
    for config in (*always, *configs):
        trackers.add(config, run)
    return trackers


def _warn(kind: str, fault: Exception) -> None:
    logger.warning("the %s tracker failed and is dropped; the run goes on: %s: %s", kind, type(fault).__name__, fault)
