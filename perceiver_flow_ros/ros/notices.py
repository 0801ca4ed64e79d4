# SPDX-License-Identifier: Apache-2.0
"""What the node logs: each kind of trouble once, then rarely; exceptions in one line."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from rclpy.exceptions import ParameterException

KINDS = 100  # of trouble that are remembered: a stream of nonsense has ever new ones
LONGEST = 200  # letters that tell one from another


class Notices:
    """Log lines said once, then at most every `interval` seconds for each kind of trouble."""

    def __init__(self, logger: Any, interval: float = 30.0) -> None:
        self._logger = logger
        self._interval = interval
        self._said: dict[str, float] = {}  # kind -> when
        self._lock = threading.Lock()

    def warn(self, kind: str, text: str) -> None:
        """Log a warning, unless this kind was logged lately."""
        if self._is_due(kind):
            self._logger.warning(text)

    def error(self, kind: str, text: str) -> None:
        """Log an error, unless this kind was logged lately."""
        if self._is_due(kind):
            self._logger.error(text)

    def _is_due(self, kind: str) -> bool:
        now = time.monotonic()
        with self._lock:
            due = kind not in self._said or now - self._said[kind] >= self._interval
            if due:
                self._said.pop(kind, None)
                self._said[kind] = now
                if len(self._said) > KINDS:
                    del self._said[next(iter(self._said))]
        return due


def without_numbers(text: str) -> str:
    """Give what texts have in common that differ by sizes or stamps only."""
    return re.sub(r'\d+', '', text)[:LONGEST]


def explain(error: Exception) -> str:
    """Give an exception's text on one line, with the parameters to change where memory ran out."""
    text = ' '.join(str(error).split())
    name = type(error).__name__
    if name == 'OutOfMemoryError' or 'out of memory' in text:
        remedy = 'raise query_stride, set precision to float16, tiling to resize or device to cpu'
        return f'out of GPU memory: {remedy} ({text})'
    plain = isinstance(error, (ValueError, OSError, ParameterException)) or name == 'WeightsError'
    return text if plain and text else f'{name}: {text}'
