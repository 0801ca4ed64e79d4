# SPDX-License-Identifier: Apache-2.0
"""Functions that are Triton kernels on a GPU, where PyTorch would launch hundreds of small ones.

What `accelerated` marks is the definition and serves everywhere; beside its module, in one named
``..._cuda``, is a function of the same name and result. A GPU needs longer to launch an operation
on frames as small as lite's than to do it.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from importlib import import_module
from typing import ParamSpec, TypeVar
import warnings

import torch
from torch import nn, Tensor

P = ParamSpec('P')
R = TypeVar('R')


def accelerated(function: Callable[P, R]) -> Callable[P, R]:
    """Call the kernels of that name instead, on a GPU that has Triton, but for gradients.

    The function itself stays ``__wrapped__``.
    """
    @wraps(function)
    def chosen(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [x for x in args if isinstance(x, Tensor)]
        device = tensors[0].device
        if not served(device) or torch.is_grad_enabled() and any(map(learned, args)):
            return function(*args, **kwargs)
        kernels = import_module(f'{function.__module__}_cuda')
        with on(device):
            return getattr(kernels, function.__name__)(*args, **kwargs)
    return chosen


def learned(x: object) -> bool:
    """Tell whether a gradient is asked for by a tensor or a layer."""
    if isinstance(x, nn.Module):
        return any(map(learned, x.parameters()))
    return isinstance(x, Tensor) and x.requires_grad


def on(device: torch.device) -> AbstractContextManager:
    """Have Triton launch on a device: it asks which is the current one."""
    return torch.cuda.device(device) if device.type == 'cuda' else nullcontext()


@cache
def served(device: torch.device) -> bool:
    """Tell whether kernels run on a device: on a GPU, where Triton can compile them."""
    if device.type != 'cuda':
        return False
    try:
        import triton  # noqa: F401
    except ImportError as error:
        reason = str(error)
    else:
        from perceiver_flow_ros.model.evidence_cuda import median
        try:
            with on(device):
                median(torch.zeros(1, 1, 4, 4, device=device))
            return True
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:      # no compiler, no Python.h, no folder for its cache, ...
            reason = f'{type(error).__name__}: {error}'
    warnings.warn(f'no fused kernels, so lite is slower on {device}: {reason}',
                  stacklevel=3)
    return False
