# SPDX-License-Identifier: Apache-2.0
"""Figures of the diagnostics: events per second, how long something took, memory."""

from __future__ import annotations

from collections import deque
from pathlib import Path
import resource
import threading

import numpy as np

WINDOW = 5.0  # s, of the rates


class Rate:
    """Events per second over the last seconds; a clock that goes back starts it afresh."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[float] = deque()

    def tick(self, now: float) -> None:
        """Note an event at a time in seconds."""
        with self._lock:
            if self._times and now < self._times[-1]:
                self._times.clear()
            self._times.append(now)

    def hz(self, now: float) -> float:
        """Tell the rate at a time in seconds; 0 where there are less than two events."""
        with self._lock:
            while self._times and now - self._times[0] > WINDOW:
                self._times.popleft()
            span = self._times[-1] - self._times[0] if self._times else 0.0
            return (len(self._times) - 1) / span if span > 0 else 0.0


def durations(seconds: list[float]) -> str:
    """Write the mean, the 95th percentile and the longest of some durations."""
    if not seconds:
        return 'none yet'
    values = np.mean(seconds), np.percentile(seconds, 95), np.max(seconds)
    return 'mean {:.1f} ms, p95 {:.1f} ms, max {:.1f} ms'.format(*(1e3 * v for v in values))


def resident_memory() -> str:
    """Tell the memory that this process holds (Linux), or the most it ever held."""
    try:
        pages = int(Path('/proc/self/statm').read_text().split()[1])
    except OSError:
        return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f} MB at most'
    return f'{pages * resource.getpagesize() / 2**20:.1f} MB'
