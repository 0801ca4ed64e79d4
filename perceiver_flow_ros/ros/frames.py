# SPDX-License-Identifier: Apache-2.0
"""Frames, what makes two of them a pair, and a thread that works on the newest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
import threading
from typing import Any, TYPE_CHECKING

import numpy as np
from perceiver_flow_ros.ros.stamped import REWIND

if TYPE_CHECKING:
    from std_msgs.msg import Header


@dataclass(frozen=True)
class Frame:
    """An image as the estimators take it, with the header it came with."""

    header: Header
    image: np.ndarray  # (H, W, 3) or (H, W) uint8

    @property
    def stamp(self) -> int:
        """Nanoseconds."""
        return nanoseconds(self.header.stamp)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.shape[1], self.image.shape[0]


def nanoseconds(stamp: Any) -> int:
    """Give a builtin_interfaces/Time as one number."""
    return stamp.sec * 10**9 + stamp.nanosec


SKIPPED = 'repeated', 'late'  # why an image is as if it had not come: the next one may be a pair


def why_no_pair(previous: Frame, current: Frame, max_gap: float) -> tuple[str, str] | None:
    """Say, in a word and in full, why two frames make no pair; `max_gap` in seconds."""
    gap = (current.stamp - previous.stamp) / 1e9
    if gap == 0:
        hint = ': the driver must set header.stamp' if current.stamp == 0 else ''
        return 'repeated', f'an image repeats the stamp of the one before and is skipped{hint}'
    if gap < 0:
        text = f'image stamps went back by {-gap:.3f} s'
        if gap < -REWIND:
            return 'backward', f'{text} (a bag that starts again, a reset)'
        return 'late', f'{text} (an image out of order, or a clock that was set)'
    if gap > max_gap:
        text = f'{gap:.3f} s between two images exceed max_frame_gap ({max_gap:g} s)'
        return 'gap', f'{text}: the camera paused, or the model is slower than that'
    frames = previous.header.frame_id, current.header.frame_id
    if frames[0] != frames[1]:
        return 'frame', 'the frame_id changed from {!r} to {!r}: two cameras on one topic?'.format(
            *frames)
    if previous.image.shape != current.image.shape:
        return 'size', f'images changed from {_size(previous.image)} to {_size(current.image)}'
    return None


def _size(image: np.ndarray) -> str:
    return f'{image.shape[1]}x{image.shape[0]} {"colour" if image.ndim == 3 else "grey"}'


@dataclass
class Counts:
    """What became of the items: received = processed + dropped + waiting or under way."""

    received: int = 0
    processed: int = 0
    dropped: int = 0


class Worker(threading.Thread):
    """
    A thread that works on one item after the other, the oldest waiting one first.

    With a capacity of one the oldest is also the newest: an item that arrives while another waits
    replaces it, so the work never falls behind its source. Jobs (see `submit`) go before items.
    """

    def __init__(self, process: Callable[[Any], None], capacity: int = 1) -> None:
        super().__init__(daemon=True)
        self.counts = Counts()
        self._process = process
        self._items: deque[Any] = deque()
        self._capacity = capacity
        self._jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._stopping = False
        self._changed = threading.Condition()

    def put(self, item: Any) -> None:
        """Hand over an item; the oldest waiting one goes where there is no room."""
        with self._changed:
            self.counts.received += 1
            if len(self._items) == self._capacity:
                self._items.popleft()
                self.counts.dropped += 1
            self._items.append(item)
            self._changed.notify()

    def clear(self) -> None:
        """Drop what waits."""
        with self._changed:
            self.counts.dropped += len(self._items)
            self._items.clear()

    def submit(self, job: Callable[[], Any]) -> Future:
        """Have a job run before the next item."""
        future: Future = Future()
        with self._changed:
            self._jobs.append((future, job))
            self._changed.notify()
        return future

    def stop(self, timeout: float) -> bool:
        """End the thread after what it is doing; tell whether it did within `timeout` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join(timeout)
        return not self.is_alive()

    def run(self) -> None:
        """Work until stopped."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._jobs or self._items)
                if self._stopping:
                    return
                job = self._jobs.popleft() if self._jobs else None
                item = self._items.popleft() if job is None else None
            if job is None:
                self._process(item)
                with self._changed:
                    self.counts.processed += 1
            else:
                future, function = job
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
