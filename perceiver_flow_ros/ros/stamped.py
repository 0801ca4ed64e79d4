# SPDX-License-Identifier: Apache-2.0
"""Messages that wait until an image of their time asks for them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
import threading
from typing import Any

REWIND = 1.0  # s that a stamp goes back beyond which it is not disorder but a new beginning


class Stamped:
    """
    Items of a topic by stamp (s), the newest `size` at most: what nobody asked for, goes.

    A stamp that goes back far starts it afresh.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: list[tuple[float, Any]] = []
        self._lock = threading.Lock()

    def put(self, stamp: float, item: Any) -> None:
        """Keep an item."""
        with self._lock:
            if self._items and stamp < self._items[-1][0] - REWIND:
                self._items.clear()
            insort(self._items, (stamp, item), key=_stamp)
            del self._items[: -self._size]

    def forget(self, before: float) -> None:
        """Drop what is older, but for the newest of that: it may be the nearest."""
        with self._lock:
            del self._items[: max(bisect_left(self._items, before, key=_stamp) - 1, 0)]

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._items.clear()

    def nearest(self, stamp: float) -> tuple[float, Any] | None:
        """Give the item, and its stamp, that is nearest in time."""
        with self._lock:
            i = bisect_left(self._items, stamp, key=_stamp)
            around = self._items[max(i - 1, 0): i + 1]
            return min(around, key=lambda item: abs(item[0] - stamp)) if around else None

    def valid_at(self, stamp: float) -> Any | None:
        """Give the newest item of that time or before; the oldest one where all came later."""
        with self._lock:
            i = bisect_right(self._items, stamp, key=_stamp)
            return self._items[max(i - 1, 0)][1] if self._items else None

    def between(self, start: float, end: float) -> list[tuple[float, Any]]:
        """Give all within a time, and one on either side."""
        with self._lock:
            low, high = (bisect_left(self._items, t, key=_stamp) for t in (start, end))
            return self._items[max(low - 1, 0): high + 1]


def _stamp(item: tuple[float, Any]) -> float:
    return item[0]
