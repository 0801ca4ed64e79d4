# SPDX-License-Identifier: Apache-2.0
"""Every kernel of lite against plain PyTorch in float64, on random inputs: for `benchmark`, tests.

What is plain PyTorch is the function itself, as it serves on a CPU (see `accelerated`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
import math
from typing import Any

from perceiver_flow_ros.commands._kernel_checks import Check, poisoned, relative_error
from perceiver_flow_ros.model import choice, evidence, layers, perceiver, propagation, pyramid
import torch
from torch import nn, Tensor

RADIUS = 3          # of the cost volume, as in `LiteConfig`
MATCHES = 300       # to which a plane is fitted; and rows of the Perceiver,
LATENTS = 40        # which have so many channels: no multiple of what a program takes at a time
TIES = 2            # pixels whose choice may fall otherwise, since both cost the same


def check_lite_kernels(device: torch.device | str, batch: int, height: int, width: int,
                       seed: int) -> Iterator[Check]:
    """Run every kernel once, on frames (B, 3, height, width), multiples of 4.

    Small ones: in large frames positions are rounded, and some pixel's choice falls otherwise.
    """
    random = torch.Generator().manual_seed(seed)
    rows, columns = height // evidence.TOKEN, width // evidence.TOKEN

    def normal(*shape: int, scale: float = 1.) -> Tensor:
        return (scale * torch.randn(batch, *shape, generator=random)).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=random).to(device)

    first, second, flow = normal(3, height, width), normal(3, height, width), normal(
        2, height, width, scale=4)
    tokens = normal(2, rows, columns, scale=4)
    place = 2 * torch.rand(2, MATCHES, generator=random).to(device)
    several = normal(2, rows, columns, scale=4).repeat(3, 1, 1, 1)
    left = (uniform(MATCHES) < 0.7).float()
    match = torch.where(uniform(1, rows, columns) < 0.8, tokens + 1, math.nan)
    flows = torch.stack([tokens, *several.split(batch)])
    candidates = choice.Candidates(match, flows[1:], torch.rand(3, batch, generator=random).to(
        device))
    layer = perceiver.Layer(LATENTS, qk_channels=LATENTS, v_channels=LATENTS, heads=1).to(device)
    layer.requires_grad_(False)
    attention, hidden = layer.attention, normal(MATCHES, LATENTS) + 1
    checks: tuple[tuple[Callable, tuple], ...] = (
        (evidence.warp_by_tokens, (first, several)),
        (evidence.local_contrast, (first,)),
        (evidence.match, (first[:, :1], second[:, :1], tokens, RADIUS)),
        (evidence.lucas_kanade, (first, first + 0.3 * second)),
        (evidence.median, (tokens,)),
        (choice.describe, (first[:, :1], second[:, :1], first[:, 1:2], flows, candidates)),
        (pyramid.convex_upsample, (tokens, normal(9 * 16, rows, columns))),
        (propagation.tried, (flow, uniform(1, height, width) / 3, first[:, :1], second[:, :1],
                             (uniform(1, height, width) < 0.3).float(), 3, True)),
        (propagation.tried, (flow, uniform(1, height, width) / 3, first[:, :1], second[:, :1],
                             (uniform(1, height, width) < 0.3).float(), 8, False)),
        (layers.fitted, (torch.cat([left, 1 - left]), uniform(MATCHES).repeat(2, 1), place,
                         normal(2, MATCHES, scale=0.1).repeat(2, 1, 1), 0.7, 1e-3)),
        (perceiver.projected, (hidden, layer.layernorm, attention.query, attention.key)),
        (perceiver.added, (hidden, normal(MATCHES, LATENTS), attention.output)),
        (perceiver.with_mlp, (hidden, layer.layernorm, layer.mlp)))
    for function, inputs in checks:
        kernels = import_module(f'{function.__module__}_cuda')
        plain = function.__wrapped__        # type: ignore[attr-defined]
        with poisoned():
            out = getattr(kernels, function.__name__)(*inputs)
        out = out.cpu() if isinstance(out, Tensor) else tuple(x.cpu() for x in out)
        expected = plain(*map(widened, inputs))
        pairs = [(out, expected)] if isinstance(out, Tensor) else list(zip(out, expected))
        if function is propagation.tried:
            pairs = without_ties(pairs)
        yield Check(function.__name__, torch.float32, max(relative_error(*pair) for pair in pairs))


def widened(x: Any) -> Any:
    """Give tensors in float64 on the CPU, where no kernel serves; also those in a tuple."""
    if isinstance(x, tuple):
        return type(x)(*map(widened, x))
    if isinstance(x, nn.Module):
        return deepcopy(x).cpu().double()
    return x.cpu().double() if isinstance(x, Tensor) else x


def without_ties(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Take a few pixels whose flow, the first pair, was chosen otherwise out of the comparison."""
    flow, expected = pairs[0]
    same = ((flow - expected).abs() < 1e-3).all(1, keepdim=True)
    if (~same).sum() > TIES:
        return pairs
    return [(out * same, expected * same) for out, expected in pairs]
