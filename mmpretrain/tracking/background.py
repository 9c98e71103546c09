"""A thread for calls to servers that may hang or fail, which then cost the run nothing but one warning.

Enter: calls. Leave: their effects, in order; when too many wait, or one has failed, the rest is dropped.
"""

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 1000
"""Calls that may wait; more are dropped, since metrics.jsonl has every row."""


class Worker:
    """Runs calls in order on one thread; after the first that fails it warns once and drops the rest."""

    def __init__(self, name: str, length: int = QUEUE_LENGTH, secret: str = "") -> None:
        self.name = name
        self.secret = secret
        """What no warning may show."""
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(length)
        self._warned = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Run a call soon; returns at once, and drops the call where too many wait."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn(f"is {self._calls.maxsize} calls behind; rows are missing there, metrics.jsonl has all")

    def close(self, timeout_s: float) -> bool:
        """Wait for the calls so far; whether all ended, and in time."""
        try:
            self._calls.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._failed

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                if not self._failed:
                    call()
            except Exception as fault:  # noqa: BLE001 - whatever a library raises must not reach the run
                self._failed = True
                reason = f"{type(fault).__name__}: {one_line(fault, self.secret)}"
                self._warn(f"failed and is dropped; the run goes on: {reason}")

    def _warn(self, message: str) -> None:
        if not self._warned.is_set():
            self._warned.set()
            logger.warning("%s %s", self.name, message)


def one_line(fault: BaseException, secret: str = "") -> str:
    """What went wrong, in one line that never shows the secret."""
    line = str(fault).strip().partition("\n")[0]
    return line.replace(secret, "<secret>") if secret else line
