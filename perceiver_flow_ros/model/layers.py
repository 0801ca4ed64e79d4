# SPDX-License-Identifier: Apache-2.0
"""A few motions that explain most of the matches: those of the background and of large objects.

As RANSAC (Fischler and Bolles, 1981), but of a fixed pattern of samples, so that the same frames
give the same flow, in operations of fixed shapes, which a CUDA graph can hold.
"""
import math

from perceiver_flow_ros.model.evidence import TOKEN
import torch
from torch import Tensor

LAYERS = 4              # motions that are looked for
HYPOTHESES = 256        # triangles of matches that propose them
CLOSE = 2.5             # pixels of the level: a match follows a motion
DEFORMED = 0.6          # largest change of length that is believed
FITS = 3                # of each motion to what follows it
STEEP = 0.01            # how much less likely perspective is than none
NEAREST = 0.25          # of the distance where its matches are: what is nearer is taken for that


@torch.no_grad()
def layer_motions(match: Tensor) -> tuple[Tensor, Tensor]:
    """Motions of planes (homographies) that most of the matches follow, one after the other.

    Every triangle of a fixed pattern of matches proposes an affine motion; a homography is fitted
    to what follows the one that most matches follow, these are taken away, and so on.

    Parameters
    ----------
    match : (B, 2, h, w) pixels of the level, NaN where there is none.

    Returns
    -------
    motions : (`LAYERS`, B, 2, h, w), of every token.
    shares : (`LAYERS`, B) of the matches that follow each and none before it; where that is next
        to nothing, the motion is arbitrary.
    """
    batch, _, h, w = match.shape
    with torch.autocast(match.device.type, enabled=False):
        token = torch.arange(h * w, device=match.device)
        place = torch.stack([token % w, token // w]).float()        # (2, n), tokens
        value = match.float().flatten(2)                            # (B, 2, n)
        left = torch.isfinite(value[:, 0]).float()                  # matches not yet explained
        value = value.nan_to_num(0.)
        count = left.sum(1)
        size = max(h, w) / 2                                        # tokens
        matrix, shift = proposals(place, value, left > 0)
        follow = (misfit(matrix, shift, place, value[:, None]) < CLOSE ** 2).float()  # (B, H, n)
        motions, shares = [], []
        for _ in range(LAYERS):
            best = (follow @ left[:, :, None]).argmax(1)            # (B, 1)
            a, b = (x.take_along_dim(best.view(-1, 1, *[1] * (x.ndim - 2)), 1)[:, 0]
                    for x in (matrix, shift))
            error = misfit(a, b, place, value)
            for _ in range(FITS):
                motion = homography(left * (error < CLOSE ** 2), place, value, size)
                error = (motion - value).square().sum(1)
            shares.append((left * (error < CLOSE ** 2)).sum(1) / count.clamp(min=1))
            motions.append(motion.view(batch, 2, h, w))
            left = left * (error >= (2 * CLOSE) ** 2)
    return torch.stack(motions).to(match.dtype), torch.stack(shares).to(match.dtype)


def proposals(place: Tensor, value: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Motions (B, H, 2, 2), (B, H, 2) through triangles of known values, near and far apart.

    ``place``: (2, n), ``value``: (B, 2, n), ``known``: (B, n). Triangles that are thin, or
    deformed beyond what two frames show, propose what nothing follows.
    """
    order = morton(place)
    listed = order[known[:, order].logical_not().byte().sort(dim=1, stable=True).indices]
    pick = triangles(known.sum(1, keepdim=True)).flatten(1)
    pick = listed.gather(1, pick)                                   # (B, 3 H) of the known ones
    points = place.T[pick].unflatten(1, (-1, 3))                    # (B, H, 3, 2)
    values = value.gather(2, pick[:, None].expand(-1, 2, -1)).transpose(1, 2)
    values = values.unflatten(1, (-1, 3))
    sides, change = ((x[:, :, 1:] - x[:, :, :1]).transpose(2, 3) for x in (points, values))
    area = determinant(sides)
    matrix = change @ adjugate(sides) / torch.where(area == 0, 1, area)[..., None, None]
    sound = (area.abs() > 4) & (matrix.abs().amax((2, 3)) < DEFORMED * TOKEN)
    shift = values[:, :, 0] - (matrix @ points[:, :, 0, :, None])[..., 0]
    return matrix, shift.masked_fill(~sound[..., None], math.inf)


def morton(place: Tensor) -> Tensor:
    """Order of places (2, n) along Morton's curve: near in the list is near in the image."""
    x, y = place.long()
    code = sum(((x >> k & 1) << 2 * k) + ((y >> k & 1) << 2 * k + 1) for k in range(12))
    return code.argsort()


def triangles(count: Tensor) -> Tensor:
    """Positions (B, `HYPOTHESES`, 3) in lists of ``count`` (B, 1): spread evenly, with corners
    2, 8, 32 or 128 or so entries apart.
    """
    k = torch.arange(HYPOTHESES, device=count.device)
    reach = torch.minimum(4. * 4 ** (k % 4), count / 2)
    first = k * 0.61803 % 1 * count     # (multiples of such numbers spread evenly over [0, 1))
    others = (first + (k * step % 1 * 2 - 1) * reach for step in (0.75488, 0.56984))
    return torch.stack([first, *others], -1).long().remainder(count.clamp(min=1)[..., None])


def misfit(matrix: Tensor, shift: Tensor, place: Tensor, value: Tensor) -> Tensor:
    """Squared distance (..., n) of values (..., 2, n) from a motion at places (2, n)."""
    return (matrix @ place + shift[..., None] - value).square().sum(-2)


def homography(weight: Tensor, place: Tensor, value: Tensor, size: float) -> Tensor:
    """Motion (B, 2, n) of a plane, as the values (B, 2, n) at places (2, n) weigh (B, n).

    For a plane that the camera sees, places x go to y with y (1 + p.x) = A x + b. So for a given
    perspective p this is an affine fit to y (1 + p.x); p makes its residual smallest. Both are
    counted from their weighted means (as Hartley, 1997, for the eight-point algorithm).
    """
    total = weight.sum(1)[:, None, None] + 1e-3
    centre, mean = ((weight[:, None] * t).sum(2, keepdim=True) / total for t in (place, value))
    x, change = (place - centre) / size, (value - mean) / (TOKEN * size)        # (B, 2, n)
    y = x + change
    targets = torch.cat([change, y * x[:, :1], y * x[:, 1:]], 1)                # (B, 6, n)
    fits = affine_fit(weight, x, targets, 2 / size ** 2)
    residual = (targets - fits).unflatten(1, (3, 2))
    products = torch.einsum('bicn,bjcn,bn->bij', residual, residual, weight)
    normal = products[:, 1:, 1:] + STEEP * torch.eye(2, device=x.device)
    p = -(adjugate(normal) @ products[:, 1:, :1]) / determinant(normal)[:, None, None]
    along, across = fits[:, 2:4] - x * x[:, :1], fits[:, 4:] - x * x[:, 1:]
    moved = fits[:, :2] + p[:, :1] * along + p[:, 1:] * across
    return moved / (1 + p.mT @ x).clamp(min=NEAREST) * (TOKEN * size) + mean


def affine_fit(weight: Tensor, x: Tensor, targets: Tensor, stiff: float) -> Tensor:
    """Weighted least squares in places (B, 2, n): what it says of targets (B, C, n), everywhere.

    The places' weighted mean is 0.
    """
    mean = (weight[:, None] * targets).sum(2, keepdim=True) / (weight.sum(1)[:, None, None] + 1e-3)
    weighted = (weight[:, None] * x).mT
    spread = x @ weighted + stiff * torch.eye(2, device=x.device)   # few: no slope
    slope = (targets - mean) @ weighted @ adjugate(spread) / determinant(spread)[:, None, None]
    return mean + slope @ x


def determinant(x: Tensor) -> Tensor:
    """Of matrices (..., 2, 2)."""
    return x[..., 0, 0] * x[..., 1, 1] - x[..., 0, 1] * x[..., 1, 0]


def adjugate(x: Tensor) -> Tensor:
    """Inverse of matrices (..., 2, 2) times their determinants."""
    (a, b), (c, d) = (row.unbind(-1) for row in x.unbind(-2))
    return torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
