# SPDX-License-Identifier: Apache-2.0
"""Flow spreads from pixel to pixel, up to the edges of what moves.

A level's tokens are larger than its pixels, so that both sides of an edge are mixed in them. As in
PatchMatch (Barnes et al., https://doi.org/10.1145/1531326.1531330), every pixel then tries the
flow of some others, further ones first, and takes it where it explains the frames better.
"""
from perceiver_flow_ros.model.accelerated import accelerated
from perceiver_flow_ros.model.evidence import brighter, DARKER, neighbours, warp, window_mean
import torch
from torch import Tensor

AXES, DIAGONALS = (1, 3, 4, 6), (0, 2, 5, 7)        # of the eight `neighbours`
# How far the others are, pixels of the level, and whether on the diagonals
STEPS = (16, False), (8, True), (8, False), (3, True)
PRICE = 0.01            # of another's flow, in deviations of the frames' brightness
CLAIMED = 0.05          # difference up to which a pixel is taken to be where its flow says


@torch.no_grad()
def propagated(flow: Tensor, previous: Tensor, current: Tensor) -> Tensor:
    """Flow (B, 2, h, w), pixels, that follows the edges of normalised frames (B, 3, h, w).

    A pixel keeps its flow where that leaves the frame: nothing tells how good it is. And no pixel
    takes a flow to where another one already is: it is hidden there.
    """
    batch, _, h, w = flow.shape
    with torch.autocast(flow.device.type, enabled=False):
        flow = flow.float()
        first, second = (x.float().mean(1, keepdim=True) for x in (previous, current))
        seen = warp(second, flow)
        light = brighter(first, seen)
        second, cost = second + light, misfit(first, seen + light)
        goal, leaves = goals(flow)
        goal = torch.where(cost < CLAIMED, goal, h * w)         # (the last of them: nowhere)
        claimed = torch.zeros(batch, h * w + 1, device=flow.device)
        claimed = claimed.scatter(1, goal.flatten(1), 1.)[:, :-1].view_as(first)
        cost = cost.masked_fill(leaves, -1.)
        for reach, diagonal in STEPS:
            flow, cost = tried(flow, cost, first, second, claimed, reach, diagonal)
    return flow


@accelerated
def tried(flow: Tensor, cost: Tensor, first: Tensor, second: Tensor, claimed: Tensor, reach: int,
          diagonal: bool) -> tuple[Tensor, Tensor]:
    """Let every pixel take the flow of four others where it costs less: flow, its cost.

    ``flow``: (B, 2, h, w), the others (B, 1, h, w): its cost, both frames, where the second is
    ``claimed``. The four are ``reach`` pixels away, above, left, right, below or ``diagonal``.
    """
    which = DIAGONALS if diagonal else AXES
    others = [x for k, x in enumerate(neighbours(flow, reach)) if k in which]
    both = torch.cat([second, claimed], 1).expand(4, -1, -1, -1, -1).flatten(0, 1)
    seen, taken = warp(both, torch.cat(others)).unflatten(0, (4, -1)).split(1, 2)
    for other, its in zip(others, misfit(first, seen) + taken):
        better = its + PRICE < cost
        flow, cost = torch.where(better, other, flow), torch.where(better, its, cost)
    return flow, cost


def misfit(first: Tensor, second: Tensor) -> Tensor:
    """How much brightness (..., B, 1, h, w) differs around each pixel."""
    return window_mean((first - second).abs_().clamp_(max=DARKER), 3)


def goals(flow: Tensor) -> tuple[Tensor, Tensor]:
    """Where pixels go: index of the pixel there, row by row, and whether that is outside.

    (B, 2, h, w) -> twice (B, 1, h, w).
    """
    h, w = flow.shape[-2:]
    x = (torch.arange(w, device=flow.device) + flow[:, :1]).round()
    y = (torch.arange(h, device=flow.device)[:, None] + flow[:, 1:]).round()
    inside_x, inside_y = x.nan_to_num().clamp(0, w - 1), y.nan_to_num().clamp(0, h - 1)
    return (inside_y * w + inside_x).long(), (inside_x != x) | (inside_y != y)
