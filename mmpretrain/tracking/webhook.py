"""Alerts by HTTP to whatever takes `{"text": ...}`, such as a chat channel.

Enter: alerts, and how an attempt ends. Leave: one POST each, on a thread of their own, so that a server that hangs
costs the run nothing. Refused: an environment without the address, a secret that never stands in a config.
"""

import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import Pictures, StepReport
from mmpretrain.tracking.background import Worker
from mmpretrain.tracking.base import Outcome, RunFacts, TrackerConfig


class WebhookConfig(TrackerConfig):
    """POST of alerts."""

    kind: Literal["webhook"] = "webhook"
    url_variable: str = "MMPRETRAIN_WEBHOOK_URL"
    """Environment variable that holds the address."""
    ends: tuple[Outcome, ...] = ("completed", "fatal", "crashed")
    """Ends of an attempt that are told."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wait for the server, for each message."""

    def build(self, run: RunFacts) -> "WebhookTracker":
        url = os.environ.get(self.url_variable, "")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"the webhook tracker finds no http(s) address in the environment variable {self.url_variable}; set it "
                f"where the run starts, or remove the tracker"
            )
        return WebhookTracker(self, run, url)


class WebhookTracker:
    """Tells events alone; figures are for the other trackers."""

    def __init__(self, config: WebhookConfig, run: RunFacts, url: str) -> None:
        self.config, self.run, self.url = config, run, url
        self.step = run.start_step
        self._worker = Worker("the webhook", secret=url)

    def log(self, report: StepReport) -> None:
        self.step = report.step

    def log_evaluation(
        self, step: int, samples: int, metrics: Mapping[str, float], pictures: Pictures | None = None
    ) -> None:
        """Figures are for the other trackers."""

    def note(self, message: str) -> None:
        """Events that need nobody are for the console."""

    def saved(self, step: int, path: Path) -> None:
        """Checkpoints are for the console."""

    def alert(self, title: str, text: str) -> None:
        self._post(f"{self.run.name}: {title}: {text}")

    def close(self, outcome: Outcome) -> None:
        if outcome in self.config.ends:
            self._post(f"{self.run.name}: {outcome} after step {self.step} of {self.run.total_steps}")
        self._worker.close(self.config.timeout_s + 1.0)

    def _post(self, text: str) -> None:
        self._worker.submit(lambda: _send(self.url, text, self.config.timeout_s))


def _send(url: str, text: str, timeout_s: float) -> None:
    body = json.dumps({"text": text}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s):
        pass
