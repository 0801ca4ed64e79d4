# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: what is computed again and again is launched as one, on a stream of its own."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
import contextlib
import gc
import warnings

import numpy as np
import torch
from torch import Tensor

KEPT = 4                # graphs, and image sizes; each keeps the memory that it works in
REMEDY = "raise query_stride, set precision to 'float16' or tiling to 'resize'"


class Replay:
    """
    Functions of what lies in device memory, captured at first use, then replayed.

    On the CPU, and where capturing fails, the function is simply called.

    Parameters
    ----------
    device : where the functions compute.
    shared : all graphs work in one memory: a result lasts until the next call with any key.

    """

    def __init__(self, device: torch.device | str, *, shared: bool = False):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None
        self._pool = torch.cuda.graph_pool_handle() if shared and self.stream else None
        self._graphs: OrderedDict[Hashable, tuple[Callable, Tensor | None]] = OrderedDict()
        self._uploads: OrderedDict[tuple[int, ...], Upload] = OrderedDict()

    def context(self) -> contextlib.AbstractContextManager:
        """Give the context in which everything is to be launched: the stream."""
        return torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()

    def upload(self, previous: np.ndarray, current: np.ndarray) -> Tensor:
        """Send a pair (H, W, 3) uint8; (2, H, W, 3), always the same tensor for a size."""
        size = previous.shape[:2]
        if size not in self._uploads:
            if len(self._uploads) == KEPT:
                self._uploads.popitem(last=False)
                self.clear()                                    # of what read from there
            self._uploads[size] = Upload(size[0], size[1], self.device)
        self._uploads[size](previous, current)
        return self._uploads[size].frames

    def __call__(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Give ``function()``, in memory that the next call with its key (shared: any) reuses."""
        if self.stream is None:
            return function()
        if key not in self._graphs:
            self._graphs[key] = self._capture(self.stream, function)
            while len(self._graphs) > KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        replay, output = self._graphs[key]
        result = replay()
        return output if output is not None else result

    @property
    def captured(self) -> bool:
        """Tell whether all that was computed since `clear` is replayed."""
        return all(output is not None for _, output in self._graphs.values())

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self._graphs.clear()
        if self.stream is not None:
            torch.cuda.empty_cache()

    def _capture(self, stream: torch.cuda.Stream, function: Callable[[], Tensor]
                 ) -> tuple[Callable, Tensor | None]:
        """Give what computes, and its output where that is always the same tensor."""
        with torch.cuda.stream(stream):
            for _ in range(2):                                  # compiles, chooses algorithms
                function()
            stream.synchronize()
            gc.collect()        # (an old graph must not be freed while a new one is captured)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream,
                                      capture_error_mode='thread_local'):
                    output = function()
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f'no CUDA graph, launching one by one instead: {error}',
                              stacklevel=2)
                return function, None
        return graph.replay, output

    def fetch(self, result: Tensor) -> np.ndarray:
        """Copy a result to the host, through pinned memory, when it is done."""
        if self.stream is None:
            return result.numpy()
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        host.copy_(result, non_blocking=True)
        self.stream.synchronize()
        return host.numpy()


class Upload:
    """
    A pair of frames (2, H, W, 3) uint8 on the device, through pinned memory.

    The previous frame usually is the last pair's current one: then it is there already.
    """

    def __init__(self, height: int, width: int, device: torch.device):
        cuda = device.type == 'cuda'
        self._host = torch.empty(2, height, width, 3, dtype=torch.uint8, pin_memory=cuda)
        self._filled = False
        self.frames = torch.empty_like(self._host, device=device)

    def __call__(self, previous: np.ndarray, current: np.ndarray) -> None:
        """Send a pair. The last one must have arrived."""
        host = self._host.numpy()
        if self._filled and np.array_equal(previous, host[1]):
            self.frames[0].copy_(self.frames[1])
        else:
            host[0] = previous
            self.frames[0].copy_(self._host[0], non_blocking=True)
        host[1] = current
        self.frames[1].copy_(self._host[1], non_blocking=True)
        self._filled = True


def in_batches(function: Callable[[int], Tensor], batch: int,
               give_back: Callable[[], None]) -> tuple[Tensor, int]:
    """
    Give ``function(batch)`` and the batch: halved as often as GPU memory does not suffice.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        When a batch of one does not fit: it names the parameters to change.

    """
    while True:
        try:
            return function(batch), batch
        except torch.cuda.OutOfMemoryError as error:
            if batch == 1:
                raise torch.cuda.OutOfMemoryError(
                    f'one tile needs more GPU memory than is free: {REMEDY} ({error})') from error
        batch //= 2                                             # (after the exception let go)
        give_back()
