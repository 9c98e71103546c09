"""How long a rank computes on its own before it meets the others: what tells a slow rank from those that wait for it.

Enter: start and stop around the forward of a step. Leave: seconds, on the device's own clock where it has one.
"""

import time

import torch


class Stopwatch:
    """Adds up stretches; reading it waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a stretch."""
        if self._on_cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._events.append(pair)
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """End the stretch."""
        if self._on_cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read(self) -> float:
        """Seconds of all stretches since the last reading."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000.0
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
