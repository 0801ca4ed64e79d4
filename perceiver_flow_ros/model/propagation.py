# SPDX-License-Identifier: Apache-2.0
"""Flow spreads from pixel to pixel, up to the edges of what moves.

A level's tokens are larger than its pixels, so that both sides of an edge are mixed in them. As in
PatchMatch (Barnes et al., https://doi.org/10.1145/1531326.1531330), every pixel then tries the
flow of some others, further ones first, and takes it where it explains the frames better.
"""
from perceiver_flow_ros.model.evidence import brighter, DARKER, neighbours, warp, window_mean
import torch
from torch import Tensor

AXES, DIAGONALS = (1, 3, 4, 6), (0, 2, 5, 7)        # of the eight `neighbours`
STEPS = ((16, AXES), (8, DIAGONALS), (8, AXES), (3, DIAGONALS))     # pixels of the level
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
        both = torch.cat([second, claimed], 1).repeat(4, 1, 1, 1)
        for reach, which in STEPS:
            others = [x for k, x in enumerate(neighbours(flow, reach)) if k in which]
            seen, taken = warp(both, torch.cat(others)).unflatten(0, (4, batch)).split(1, 2)
            costs = misfit(first, seen) + taken
            for other, its in zip(others, costs):
                better = its + PRICE < cost
                flow, cost = torch.where(better, other, flow), torch.where(better, its, cost)
    return flow


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
    inside_x, inside_y = x.clamp(0, w - 1), y.clamp(0, h - 1)
    return (inside_y * w + inside_x).long(), (inside_x != x) | (inside_y != y)
