# SPDX-License-Identifier: Apache-2.0
"""A few motions that explain most of the matches: those of the background and of large objects.

As RANSAC (Fischler and Bolles, 1981), but of a fixed pattern of samples, so that the same frames
give the same flow, in operations of fixed shapes, which a CUDA graph can hold.
"""
from functools import cache
import math

from perceiver_flow_ros.model.accelerated import accelerated
from perceiver_flow_ros.model.evidence import TOKEN
import torch
from torch import Tensor

LAYERS = 4              # motions that are looked for
HYPOTHESES = 256        # triangles of matches that propose them
CLOSE = 2.5             # pixels of the level: a match follows a motion
THIN = 4                # tokens: twice the area of a triangle that proposes nothing
DEFORMED = 0.6          # largest change of length that is believed
FITS = 2                # of all motions, after the one before the next is looked for
STEEP = 0.01            # how much less likely perspective is than none
NEAREST = 0.25          # of the distance where its matches are: what is nearer is taken for that


@torch.no_grad()
def layer_motions(match: Tensor) -> tuple[Tensor, Tensor]:
    """Motions of planes (homographies) that most of the matches follow, one after the other.

    Every triangle of a fixed pattern of matches proposes an affine motion; a homography is fitted
    to what follows the one that most matches follow, these are taken away, and so on. At the end
    all of them are fitted again, together.

    Parameters
    ----------
    match : (B, 2, h, w) pixels of the level, NaN where there is none.

    Returns
    -------
    motions : (`LAYERS`, B, 2, h, w), of every token; NaN where fewer than three matches are left.
    shares : (`LAYERS`, B) of the matches that follow each and none before it.
    """
    batch, _, h, w = match.shape
    with torch.autocast(match.device.type, enabled=False):
        unit = max(h, w) / 2                                        # tokens: all below is in it
        place, order = tokens(h, w, match.device)
        value = match.float().flatten(2) / (TOKEN * unit)           # (B, 2, n)
        left = torch.isfinite(value[:, 0]).float()                  # matches not yet explained
        value = value.nan_to_num(0.)
        count = left.sum(1)
        close = CLOSE / (TOKEN * unit)
        place = place / unit
        matrix, shift = proposals(order, place, value, left > 0, THIN / unit ** 2)
        distance = matrix @ place + shift[..., None] - value[:, None]
        distance = distance.square().sum(2)                         # (B, H, n)
        follow = (distance < close ** 2).float()
        kept, errors = [], []
        for _ in range(LAYERS):
            best = (follow @ left[:, :, None]).argmax(1, keepdim=True)
            error = distance.take_along_dim(best, 1)[:, 0]
            _, error = fitted(left, error, place, value, close, 2 / unit ** 2)
            kept.append(left)
            errors.append(error)
            left = left * (error >= (2 * close) ** 2)
        left, error = torch.cat(kept), torch.cat(errors)            # (LAYERS B, n)
        value, count = value.repeat(LAYERS, 1, 1), count.repeat(LAYERS)
        for _ in range(FITS):
            motion, error = fitted(left, error, place, value, close, 2 / unit ** 2)
        following = (left * (error < close ** 2)).sum(1)
        motion = motion.masked_fill((following < 3)[:, None, None], math.nan) * (TOKEN * unit)
        shares = (following / count.clamp(min=1)).view(LAYERS, batch)
    return motion.view(LAYERS, batch, 2, h, w).to(match.dtype), shares.to(match.dtype)


def proposals(order: Tensor, place: Tensor, value: Tensor, known: Tensor,
              thin: float) -> tuple[Tensor, Tensor]:
    """Motions (B, H, 2, 2), (B, H, 2) through triangles of known values, near and far apart.

    ``order``: (n,) of the places (2, n), ``value``: (B, 2, n), ``known``: (B, n). Triangles that
    are ``thin``, or deformed beyond what two frames show, propose what nothing follows.
    """
    listed = order[known[:, order].logical_not().byte().sort(dim=1, stable=True).indices]
    pick = triangles(known.sum(1, keepdim=True)).flatten(1)
    pick = listed.gather(1, pick)                                   # (B, 3 H) of the known ones
    points = place.T[pick].unflatten(1, (-1, 3))                    # (B, H, 3, 2)
    values = value.gather(2, pick[:, None].expand(-1, 2, -1)).transpose(1, 2)
    values = values.unflatten(1, (-1, 3))
    sides, change = ((x[:, :, 1:] - x[:, :, :1]).transpose(2, 3) for x in (points, values))
    area = determinant(sides)
    matrix = change @ adjugate(sides) / torch.where(area == 0, 1, area)[..., None, None]
    sound = (area.abs() > thin) & (matrix.abs().amax((2, 3)) < DEFORMED)
    shift = values[:, :, 0] - (matrix @ points[:, :, 0, :, None])[..., 0]
    return matrix, shift.masked_fill(~sound[..., None], math.inf)


@cache      # (a CUDA graph goes on reading it)
def tokens(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places (2, h w) of tokens, x and y, row by row, and their order (h w,) along Morton's curve.

    What is near in the list is near in the image.
    """
    token = torch.arange(h * w, device=device)
    place = torch.stack([token % w, token // w])
    x, y = place
    code = sum(((x >> k & 1) << 2 * k) + ((y >> k & 1) << 2 * k + 1) for k in range(12))
    return place, code.argsort()


def triangles(count: Tensor) -> Tensor:
    """Positions (B, `HYPOTHESES`, 3) in lists of ``count`` (B, 1): spread evenly, with corners
    2, 8, 32 or 128 or so entries apart.
    """
    k = torch.arange(HYPOTHESES, device=count.device)
    reach = torch.minimum(4. * 4 ** (k % 4), count / 2)
    first = k * 0.61803 % 1 * count     # (multiples of such numbers spread evenly over [0, 1))
    others = (first + (k * step % 1 * 2 - 1) * reach for step in (0.75488, 0.56984))
    return torch.stack([first, *others], -1).long().remainder(count.clamp(min=1)[..., None])


@accelerated
def fitted(left: Tensor, error: Tensor, place: Tensor, value: Tensor, close: float,
           stiff: float) -> tuple[Tensor, Tensor]:
    """Fit a plane's motion to what is left (B, n) and has been close, by its squared error (B, n).

    ``place``: (2, n), ``value``: (B, 2, n) -> motion (B, 2, n), its squared error (B, n).
    """
    motion = homography(left * (error < close ** 2), place, value, stiff)
    return motion, (motion - value).square().sum(1)


def homography(weight: Tensor, place: Tensor, value: Tensor, stiff: float) -> Tensor:
    """Motion (B, 2, n) of a plane, as the values (B, 2, n) at places (2, n) weigh (B, n).

    For a plane that the camera sees, places x go to y with y (1 + p.x) = A x + b. So for a given
    perspective p this is an affine fit, by least squares, to y (1 + p.x); p makes what is left
    smallest. Both are counted from their weighted means (as Hartley, 1997, for the eight-point
    algorithm). ``stiff`` keeps few from having a slope.
    """
    total = weight.sum(1)[:, None, None] + 1e-3
    both = torch.cat([place.expand_as(value), value], 1)
    means = both @ weight[:, :, None] / total
    x, change = (both - means).split(2, 1)
    y = x + change
    rows = torch.cat([x, change, y * x[:, :1], y * x[:, 1:]], 1)                # (B, 8, n)
    weighted = (rows * weight[:, None]).mT
    offset = weighted.sum(1)[:, :, None] / total
    products = rows @ weighted - total * offset @ offset.mT     # of the rows less their means
    spread, across, fitted = products[:, :2, :2], products[:, 2:, :2], products[:, 2:, 2:]
    eye = torch.eye(2, device=x.device)
    slope = across @ inverse(spread + stiff * eye)                              # (B, 6, 2)
    left = fitted - (across - slope @ spread) @ slope.mT - slope @ across.mT
    left = left.unflatten(2, (3, 2)).unflatten(1, (3, 2))
    left = left.diagonal(dim1=2, dim2=4).sum(3)                                 # (B, 3, 3)
    p = -inverse(left[:, 1:, 1:] + STEEP * eye) @ left[:, 1:, :1]
    one, two = p[:, :1], p[:, 1:]
    slope, offset = (t[:, :2] + one * t[:, 2:4] + two * t[:, 4:]
                     for t in (slope, offset[:, 2:]))
    along = p.mT @ x
    moved = (slope @ x + offset - along * x) / (1 + along).clamp(min=NEAREST)
    return moved + means[:, 2:]


def determinant(x: Tensor) -> Tensor:
    """Of matrices (..., 2, 2)."""
    return x[..., 0, 0] * x[..., 1, 1] - x[..., 0, 1] * x[..., 1, 0]


def inverse(x: Tensor) -> Tensor:
    """Of matrices (..., 2, 2) that have one."""
    return adjugate(x) / determinant(x)[..., None, None]


def adjugate(x: Tensor) -> Tensor:
    """Inverse of matrices (..., 2, 2) times their determinants: [[d, -b], [-c, a]]."""
    return x.flip(-2, -1).mT * (2 * torch.eye(2, device=x.device) - 1)
