# SPDX-License-Identifier: Apache-2.0
"""Where a token is seen again, at whatever distance.

Coarse-to-fine estimation loses objects that are smaller than the way they go. As in Brox and
Malik, "Large Displacement Optical Flow" (PAMI 2011), descriptors are matched over the whole
frame to find them: at one level every token's surroundings.
"""
from functools import lru_cache
import math

from perceiver_flow_ros.model.evidence import length, neighbours, TOKEN
import torch
from torch import Tensor
from torch.nn import functional as F

MOST_TOKENS = 2048      # of the level where matches are looked for: the search grows as its square
PATCH = 16              # pixels of the level that are compared, as means of 2x2
GREY_WAVES, COLOUR_WAVES = 36, 16       # what of a patch: its low frequencies
STEP = 2                # pixels of the level between the places that are looked at


@lru_cache(maxsize=8)
def filters(device: torch.device) -> Tensor:
    """Low frequencies of a patch, (C, 3, `PATCH` / 2, `PATCH` / 2): more of its grey.

    Orthonormal: the cosines of JPEG along both axes, brightness and two differences of colours.
    """
    n = PATCH // 2
    k = torch.arange(float(n))
    cosines = torch.cos(math.pi * (k + 0.5) * k[:, None] / n) * math.sqrt(2 / n)
    cosines[0] /= math.sqrt(2)
    waves = torch.einsum('ai,bj->abij', cosines, cosines).flatten(0, 1)
    waves = waves[(k.square() + k[:, None].square()).flatten().argsort(stable=True)]
    grey, red_blue, green = torch.tensor([[1., 1., 1.], [1., 0., -1.], [1., -2., 1.]])
    chosen = ((waves[1:GREY_WAVES], grey), (waves[:COLOUR_WAVES], red_blue),
              (waves[:COLOUR_WAVES], green))
    return torch.cat([torch.einsum('nij,c->ncij', some, colour / colour.norm())
                      for some, colour in chosen]).to(device)


def descriptors(frame: Tensor, step: int) -> Tensor:
    """Surroundings of every ``step``-th pixel, of unit length (or less where there is no texture).

    (B, 3, h, w) -> (B, C, rows, columns), from the centre of the first token on.
    """
    frame = F.pad(frame, ((PATCH - TOKEN) // 2,) * 4, mode='replicate')
    seen = F.conv2d(F.avg_pool2d(frame, 2, 1), filters(frame.device), stride=step, dilation=2)
    return seen / (seen.square().sum(1, keepdim=True).sqrt() + 0.3)


def most_similar(sought: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column (B, n) of the descriptor in (B, C, h, w) most like each in (B, C, n)."""
    h, w = places.shape[-2:]
    similar = (sought.transpose(1, 2) @ places.flatten(2)).unflatten(2, (h, w))
    row = similar.amax(3).max(2).indices                # (in two steps: several times as fast)
    column = similar.gather(2, row[..., None, None].expand(-1, -1, 1, w))[:, :, 0].max(2).indices
    return row, column


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
        row, column = most_similar(first.flatten(2), second)            # for each token
        place = row * second.shape[-1] + column
        found = second.flatten(2).gather(2, place[:, None].expand(-1, first.shape[1], -1))
        row_back, column_back = most_similar(found, first)              # the token found from it
    token = torch.arange(rows * columns, device=place.device)
    x, y = token % columns, token // columns
    match = torch.stack([column * STEP - x * TOKEN, row * STEP - y * TOKEN], 1)
    mutual = ((column_back - x).abs() <= 2) & ((row_back - y).abs() <= 2)
    match = match.float().masked_fill(~mutual[:, None], math.nan)
    match = match.view(batch, 2, rows, columns).to(previous.dtype)
    near = length(match - torch.stack(neighbours(match, 1))) < 3
    return match.masked_fill(near.sum(0) < 2, math.nan)


@torch.no_grad()
def filled(match: Tensor, rounds: int = 6) -> Tensor:
    """Give matches (B, 2, h, w) where there are none: of their neighbours; NaN beyond."""
    for _ in range(rounds):
        known = torch.isfinite(match[:, :1])
        share = F.avg_pool2d(known.to(match.dtype), 3, 1, 1)
        mean = F.avg_pool2d(match.nan_to_num(0.), 3, 1, 1) / share
        match = torch.where(known, match, mean)
    return match
