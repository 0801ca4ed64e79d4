# SPDX-License-Identifier: Apache-2.0
"""What a GPU is, how long it takes, and what it can do at best."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
import statistics
import time
from typing import Any

import torch

ENOUGH = 1.     # seconds of a measurement, warm-ups too, after which five runs are enough


def gpu(device: torch.device) -> dict[str, Any]:
    """Describe the GPU and what runs on it."""
    import triton

    if device.type != 'cuda':
        return {'gpu': "no GPU, Triton's interpreter", 'triton': triton.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {'gpu': properties.name, 'capability': f'{properties.major}.{properties.minor}',
            'multiprocessors': properties.multi_processor_count,
            'gpu_memory': properties.total_memory, 'cuda': torch.version.cuda,
            'triton': triton.__version__}


def seconds(task: Callable[[int], Any], device: torch.device, repeat: int) -> list[float]:
    """Time ``task(i)`` on the device, after up to three warm-ups.

    ``repeat`` times, or five if that takes longer than `ENOUGH`.
    """
    taken: list[float] = []
    warm, begin = min(repeat, 3), time.perf_counter()
    for i in range(warm + repeat):
        if len(taken) >= warm + 5 and time.perf_counter() - begin > ENOUGH:
            break
        if device.type == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            task(i)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            task(i)
            taken.append(time.perf_counter() - before)
    return taken[warm:]


def ceilings(device: torch.device, matrix: int, copied: int) -> dict[str, Any]:
    """Measure what this GPU does at best: operations a second, bytes a second read and written.

    By a product of two matrices of ``matrix`` rows and columns, and a copy of ``copied`` bytes.
    """
    n, rates = matrix, {}
    for name, dtype, tf32 in (('float32', torch.float32, False), ('tf32', torch.float32, True),
                              ('bfloat16', torch.bfloat16, False),
                              ('float16', torch.float16, False)):
        a = [torch.randn(n, n, device=device).to(dtype) for _ in range(3)]
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        took = seconds(partial(product, a), device, 10)
        torch.backends.cuda.matmul.allow_tf32 = before
        rates[name] = 2 * n ** 3 / statistics.median(took)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    took = seconds(lambda _: target.copy_(source), device, 10)
    return {'matrix': rates, 'copy': 2 * copied / statistics.median(took)}


def product(matrices: list[torch.Tensor], i: int) -> torch.Tensor:
    """Multiply the i-th of three matrices by the next one; they take turns."""
    return matrices[i % 3] @ matrices[(i + 1) % 3]
