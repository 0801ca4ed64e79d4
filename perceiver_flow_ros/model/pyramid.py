# SPDX-License-Identifier: Apache-2.0
"""The pyramid over which flow goes from coarse to fine: its sizes, its frames, its flow."""
from collections.abc import Callable

from perceiver_flow_ros.model.accelerated import accelerated
from perceiver_flow_ros.model.evidence import TOKEN
from perceiver_flow_ros.model.matching import MOST_TOKENS
from torch import stack, Tensor
from torch.nn import functional as F


def normaliser(previous: Tensor, current: Tensor) -> Callable[[Tensor, Tensor], tuple]:
    """Give what takes each frame to zero mean, and both to one common unit deviation.

    Frames (B, 3, H, W), of any size when it is applied: to shrink them and to shift and scale
    them commute.
    """
    means, variances = [], []
    for frame in (previous, current):
        means.append(frame.mean((1, 2, 3), keepdim=True))
        variances.append(frame.square().mean((1, 2, 3), keepdim=True) - means[-1].square())
    unit = ((variances[0] + variances[1]) / 2 + 1e-4).rsqrt()
    return lambda *frames: tuple((f - m) * unit for f, m in zip(frames, means))


def shrink(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Frame (B, 3, H, W) in another, smaller size, (B, 3, *size)."""
    return F.interpolate(frame, size, mode='bilinear', antialias=True)


def matching_level(sizes: list[tuple[int, int]], finest: int) -> int:
    """Level whose tokens are looked for everywhere: the finest, or one that is small enough."""
    small = [k for k, (h, w) in enumerate(sizes) if h * w <= MOST_TOKENS * TOKEN ** 2]
    return max(finest, small[0] if small else len(sizes))


def pyramid_sizes(height: int, width: int, smallest: int) -> list[tuple[int, int]]:
    """Sizes of the levels, finest first, each a multiple of 4 and about half of the last."""
    sizes = [(height, width)]
    while min(sizes[-1]) >= 2 * smallest:
        k = 2 ** len(sizes)
        sizes.append(tuple(TOKEN * max(1, round(n / (k * TOKEN))) for n in (height, width)))
    return sizes


def resize_flow(flow: Tensor, h: int, w: int, mode: str = 'bilinear') -> Tensor:
    """Flow (B, 2, h0, w0) on another grid, its two components scaled each by its own factor."""
    if flow.shape[-2:] == (h, w):
        return flow
    x, y = w / flow.shape[-1], h / flow.shape[-2]
    u, v = F.interpolate(flow, (h, w), mode=mode).unbind(1)
    return stack([u * x, v * y], 1)       # (no tensor from the host: CUDA graphs)


@accelerated
def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:
    """Each of a token's 4x4 pixels is a convex combination of 3x3 tokens (RAFT).

    ``flow``: (B, 2, h, w), ``mask``: (B, 9 * 16, h, w) logits -> (B, 2, 4h, 4w).
    """
    batch, _, h, w = flow.shape
    weights = mask.view(batch, 1, 9, TOKEN * TOKEN, h, w).softmax(2)
    neighbours = F.unfold(F.pad(flow, (1, 1, 1, 1), mode='replicate'), 3)
    neighbours = neighbours.view(batch, 2, 9, 1, h, w)
    return F.pixel_shuffle((weights * neighbours).sum(2).flatten(1, 2), TOKEN)
