# SPDX-License-Identifier: Apache-2.0
"""Coarse parallelism on the CPU: each thread works on a block of its own, in its own cache.

PyTorch splits every operator over all threads and waits for the last one. With operators of a
tenth of a millisecond that wait is felt, and badly so when another program has one of the cores.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
import functools
import threading
from typing import TypeVar

import torch

Item = TypeVar('Item')
Result = TypeVar('Result')


def parallel(task: Callable[[Item], Result], items: Iterable[Item],
             device: torch.device) -> list[Result]:
    """``[task(item) for item in items]``, no gradients, by ``torch.get_num_threads()`` threads.

    On other devices than the CPU the caller's thread does it all: there, operators queue anyway.
    """
    def run(item: Item) -> Result:
        with torch.inference_mode():                           # a thread's own setting
            return task(item)

    if device.type != 'cpu':
        return [run(item) for item in items]
    return list(_threads(torch.get_num_threads()).map(run, items))


def parts(count: int, largest: int, device: torch.device) -> list[slice]:
    """Slices of ``count`` items: of ``largest`` at most, and where it can be one a thread.

    On other devices than the CPU all of them are one: there, few large operators are fast.
    """
    size = max(1, min(largest, -(-count // torch.get_num_threads())))
    if device.type != 'cpu':
        size = max(1, count)
    return [slice(i, i + size) for i in range(0, count, size)]


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads that run every operator alone and flush denormals, which are slow to multiply."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.set_num_threads(1)                               # for this thread ...
        torch.get_num_threads()                                # (which asks once, when first used)
        torch.set_flush_denormal(True)
        started.wait()

    pool = ThreadPoolExecutor(count, 'perceiver_flow', initializer=start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(count)                               # ... and for those yet to come
    return pool
