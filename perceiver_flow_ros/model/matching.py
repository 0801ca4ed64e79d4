# SPDX-License-Identifier: Apache-2.0
"""Motion that coarse-to-fine estimation loses: objects smaller than the way they go.

As in Brox and Malik, "Large Displacement Optical Flow" (PAMI 2011), descriptors are matched over
the whole frame to find it: at one level every token's surroundings. Matches that hold in both
directions and that neighbours share are candidates, there and at the next finer level: a token
takes its own or a neighbour's where that explains the two frames better than the flow so far.
"""
import math

from perceiver_flow_ros.model.evidence import local_contrast, spread, TOKEN, warp, window_mean
import torch
from torch import Tensor
from torch.nn import functional as F

MOST_TOKENS = 2048      # of the level where matches are looked for: the search grows as its square
PATCH = 16              # pixels of the level that are compared, as means of 2x2
STEP = 2                # pixels of the level between the places that are looked at
REACH = 2               # tokens: how far from it those are whose matches a token may take
PRICE = 0.1             # of leaving the flow so far, in units of the mean cost


def descriptors(frame: Tensor, step: int) -> Tensor:
    """Surroundings of every ``step``-th pixel, of zero mean and unit length (or less: no texture).

    (B, 3, h, w) -> (B, 192, n), places in rows from the centre of the first token on.
    """
    frame = F.pad(frame, ((PATCH - TOKEN) // 2,) * 4, mode='replicate')
    patches = F.unfold(F.avg_pool2d(frame, 2, 1), PATCH // 2, dilation=2, stride=step)
    patches = patches - patches.mean(1, keepdim=True)
    return patches / (patches.norm(dim=1, keepdim=True) + 0.3)


def neighbours(x: Tensor, reach: int) -> list[Tensor]:
    """Values (B, C, h, w) of the eight tokens ``reach`` tokens away from each."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (reach,) * 4, mode='replicate')
    steps = 0, reach, 2 * reach
    return [padded[:, :, y:y + h, x:x + w] for y in steps for x in steps
            if (y, x) != (reach, reach)]


@torch.no_grad()
def distant_matches(previous: Tensor, current: Tensor) -> Tensor:
    """Where every token's surroundings are seen again, at whatever distance.

    Normalised frames (B, 3, h, w) of a level -> displacements (B, 2, h/4, w/4) in its pixels, to
    `STEP` pixels, NaN where they cannot be trusted: the place found must find the token, give or
    take two tokens, and at least two of its neighbours must say about the same.
    """
    batch, _, h, w = previous.shape
    rows, columns = h // TOKEN, w // TOKEN
    with torch.autocast(previous.device.type, enabled=False):   # similar means a few thousandths
        first = descriptors(previous.float(), TOKEN)
        second = descriptors(current.float(), STEP)
        there = (first.transpose(1, 2) @ second).max(2).indices         # the place for each token
        found = second.gather(2, there[:, None].expand_as(first))
        back = (found.transpose(1, 2) @ first).max(2).indices           # the token found from it
    token = torch.arange(rows * columns, device=there.device)
    places = (w - TOKEN) // STEP + 1                            # in a row
    x, y = token % columns, token // columns
    match = torch.stack([there % places * STEP - x * TOKEN, there // places * STEP - y * TOKEN], 1)
    mutual = ((back % columns - x).abs() <= 2) & ((back // columns - y).abs() <= 2)
    match = match.float().masked_fill(~mutual[:, None], math.nan)
    match = match.view(batch, 2, rows, columns).to(previous.dtype)
    support = sum((match - other).norm(dim=1, keepdim=True) < 3 for other in neighbours(match, 1))
    return match.masked_fill(support < 2, math.nan)


@torch.no_grad()
def best_candidate(contrast: Tensor, current: Tensor, flow: Tensor,
                   candidates: list[Tensor]) -> Tensor:
    """Give the flow so far, or the candidate that explains a token's surroundings better.

    A flow that leaves the frame stays: what is not seen cannot be explained by anything better.
    ``contrast``: local contrast of the previous frame's grey (B, 1, h, w), ``current``: grey
    (B, 1, h, w), ``flow``, ``candidates``: (B, 2, h/4, w/4) pixels of the level -> the like.
    """
    flows = torch.stack([flow, *(torch.where(x.isnan(), flow, x) for x in candidates)])
    warped = warp(current.repeat(len(flows), 1, 1, 1), spread(flows.flatten(0, 1)))
    difference = (contrast.repeat(len(flows), 1, 1, 1) - local_contrast(warped)).abs_()
    cost = window_mean(F.avg_pool2d(difference.clamp_(max=1), TOKEN), 3)
    cost = cost.unflatten(0, (len(flows), -1))                  # (flows, B, 1, h/4, w/4)
    cost = cost / (cost.mean(0, keepdim=True) + 0.02)
    cost[1:] += PRICE
    best = flows.gather(0, cost.min(0, keepdim=True).indices.expand(-1, -1, 2, -1, -1))[0]
    return torch.where(leaves(flow), flow, best)


def leaves(flow: Tensor) -> Tensor:
    """Tell which tokens' centres the flow (B, 2, h, w), pixels, takes out of the frame."""
    x, y = (TOKEN * (torch.arange(n, device=flow.device) + 0.5) for n in flow.shape[:1:-1])
    x, y = x + flow[:, :1], y[:, None] + flow[:, 1:]
    h, w = (TOKEN * n for n in flow.shape[-2:])
    return (x < 0) | (x > w) | (y < 0) | (y > h)
