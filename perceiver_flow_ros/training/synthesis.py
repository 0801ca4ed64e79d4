# SPDX-License-Identifier: Apache-2.0
"""Image pairs with exact flow, made on the fly on any device.

Layers of textures are composited back to front, as in AutoFlow (https://arxiv.org/abs/2104.14544).
Every layer has its forward flow f in closed form and its texture T lives in the second frame:
I2(x) = T(x) and I1(x) = T(x + f(x)), the same for its mask. So the flow of what is seen in frame 1
is f exactly, occlusions included; only a pair's reverse needs f inverted (`reversed_flow`).
"""
from dataclasses import dataclass
import math
from typing import NamedTuple

from perceiver_flow_ros.training.photometric import photometric
from perceiver_flow_ros.training.textures import put, smooth_field, Textures, uniform
import torch
from torch import Tensor
from torch.nn import functional as F


class Kind(NamedTuple):
    """What some of the pairs show, and how often."""

    share: float        # of the pairs
    still: float        # probability that the camera nearly stands still,
    rigid: float        # that a motion is rigid or affine,
    drives: float       # that it is a drive between planes only
    fewest: int         # objects, at least
    most: int           # and at most,
    size: float         # times as large as they may be
    begin: float        # between smallest and largest motion (in logarithms): scales are above it


# Anything, objects that go far before what hardly moves, drives, a small object or two in front of
# what stands still: what is rare is not learned.
KINDS = (Kind(0.25, still=0.40, rigid=0.15, drives=0.15, fewest=0, most=6, size=1.0, begin=0.0),
         Kind(0.23, still=0.65, rigid=0.50, drives=0.05, fewest=2, most=6, size=1.0, begin=0.5),
         Kind(0.40, still=0.10, rigid=0.20, drives=0.60, fewest=0, most=6, size=1.0, begin=0.5),
         Kind(0.12, still=0.95, rigid=0.70, drives=0.00, fewest=1, most=2, size=0.4, begin=0.5))
SHOWN = 0.75    # share of the objects whose middle is sure to be in the first frame
PLAIN = 0.25    # share of the objects with little texture, as much of what people make


@dataclass(frozen=True)
class Motion:
    """What moves, and how far."""

    smallest: float = 0.5       # pixels: the scale of a pair's motion lies between both
    largest: float = 36.0
    layers: int = 6             # foreground layers at most, also where a kind has more
    augment: float = 1.0        # share of batches with photometric changes, fog, blur and noise
    both_ways: bool = False     # every pair also with its frames exchanged
    kinds: tuple[Kind, ...] = KINDS     # what pairs show


def random_flow(height: int, width: int, scale: Tensor, rigid: Tensor,
                drives: Tensor) -> Tensor:
    """Forward flow fields (n, 2, height, width) in pixels, of about ``scale`` (n,).

    Translation + affine deformation + motion parallax (a direction and an expansion times a smooth
    inverse depth) + smooth non-rigid motion + a drive between planes, in random proportions; with
    the probabilities ``rigid`` and ``drives`` (n,) the first two, or nearly the last one, only.
    """
    count, device = len(scale), str(scale.device)
    size = max(height, width) / 2
    y = (torch.arange(height, device=device) - height / 2) / size
    x = (torch.arange(width, device=device) - width / 2) / size
    grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1])[None]  # (1, 2, h, w) as (x, y)
    scale = scale.view(-1, 1, 1, 1)

    def direction() -> Tensor:
        angle = uniform(0, 2 * torch.pi, count, 1, device=device)
        return torch.cat([angle.cos(), angle.sin()], 1).view(count, 2, 1, 1)

    def share(power: float = 1.0) -> Tensor:
        return torch.rand(count, 1, 1, 1, device=device) ** power

    # The texture shrinks or grows by a third at most, else its detail would be lost or invented.
    deform = torch.minimum(scale * share(), torch.full_like(scale, 0.3 * size))
    matrix = torch.randn(count, 2, 2, device=device) * 0.5
    rotation = torch.randn(count, 1, 1, device=device) * put([[0., -1.], [1., 0.]], device)
    zoom = torch.randn(count, 1, 1, device=device) * torch.eye(2, device=device)
    kind = torch.rand(count, 3, 1, 1, device=device)
    matrix = matrix * kind[:, 0:1, 0] + rotation * kind[:, 1:2, 0] + zoom * kind[:, 2:3, 0]
    affine = torch.einsum('nij,njhw->nihw', matrix.clamp(-1.5, 1.5),
                          grid.expand(count, -1, -1, -1)) * deform
    depth = smooth_field(count, 1, height, width, 4, device).clamp(-1.5, 1.5)
    parallax = torch.minimum(scale * share(2), torch.full_like(scale, 0.15 * size))
    parallax = depth * parallax * (direction() + grid * torch.randn(count, 1, 1, 1, device=device))
    bend = torch.minimum(scale * share(2) * 0.6, torch.full_like(scale, 0.06 * size))
    bend = smooth_field(count, 2, height, width, 5, device) * bend
    drive = drive_flow(grid, scale, size)
    moves = (torch.rand(count, 4, 1, 1, 1, device=device) < 0.6).float()
    other = torch.rand(count, 1, 1, 1, device=device)
    rigid, drives = (x.view(-1, 1, 1, 1) for x in (rigid, drives))
    moves[:, 1:] *= (other >= rigid + drives)[:, None]
    driven = other < drives
    moves[:, 0] *= ~driven
    moves[:, 3] = torch.maximum(moves[:, 3], driven.float())
    shift = direction() * scale * share(0.7) * torch.where(driven, 0.1, 1.)
    return (shift + affine * moves[:, 0] + parallax * moves[:, 1]
            + bend * moves[:, 2] + drive * moves[:, 3])


def drive_flow(grid: Tensor, scale: Tensor, size: float) -> Tensor:
    """Flow of a drive between ground, walls and ceiling: of planes, whose inverse depth is linear.

    What is near leaves the frame, as in front of a car. ``grid``: (1, 2, h, w) from the centre, in
    units of ``size`` pixels; ``scale``: (n, 1, 1, 1) pixels -> (n, 2, h, w) pixels.
    """
    n, device = len(scale), grid.device
    planes = torch.randn(n, 3, 2, 1, 1, device=device)
    offset = uniform(-0.5, 0.3, n, 3, 1, 1, device=device)
    inverse_depth = ((planes * grid[:, None]).sum(2) + offset).amax(1, keepdim=True).clamp(0, 1.5)
    focus = 0.3 * torch.randn(n, 2, 1, 1, device=device)        # of expansion
    forward = torch.where(torch.rand_like(scale) < 0.8, 1.0, -1.0)
    largest = torch.minimum(2 * scale * torch.rand_like(scale) ** 0.7,
                            torch.full_like(scale, 0.4 * size))
    return (grid - focus) * inverse_depth * largest * forward


def shape_mask(points: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Opacity 0..1 of random shapes at ``points`` (n, 2, h, w) pixels -> (n, 1, h, w).

    ``centre``: (n, 2) of each, ``size``: (n,) of the largest they may have. Blobs (an ellipse
    whose radius varies with the angle), boxes, rings, and four thin bars at random (like the legs
    of a chair); edges a pixel soft.
    """
    n, _, h, w = points.shape
    device = points.device
    largest = 0.42 * size.view(-1, 1, 1, 1)
    radius = (0.06 + (largest - 0.06) * torch.rand_like(largest)) * min(h, w)
    angle = uniform(0, 2 * torch.pi, n, device=device)
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()], 1).view(n, 2, 2)
    p = torch.einsum('nij,njhw->nihw', rotation, points - centre.view(n, 2, 1, 1))
    aspect = uniform(0.0, 1.2, n, device=device).exp().view(n, 1, 1, 1)
    ellipse = torch.cat([p[:, :1] / aspect, p[:, 1:] * aspect], 1)
    theta = torch.atan2(ellipse[:, 1:], ellipse[:, :1])
    wobble = torch.zeros_like(theta)
    for k in range(2, 8):
        amplitude = uniform(-1, 1, n, 1, 1, 1, device=device) / k
        wobble += amplitude * torch.sin(k * theta + uniform(0, 6.3, n, 1, 1, 1, device=device))
    depth = uniform(0, 0.9, n, 1, 1, 1, device=device)
    blob = radius * (1 + depth * wobble) - torch.hypot(ellipse[:, :1], ellipse[:, 1:])
    thin = uniform(1.0, 0.25 * min(h, w), n, 1, 1, 1, device=device)
    box = torch.minimum(2.0 * radius - p[:, :1].abs(), thin - p[:, 1:].abs())
    ring = torch.minimum(blob, thin * 0.5 + 2 - blob)  # a blob with a hole
    bars = torch.full_like(blob, -1.)
    for _ in range(4):
        q = p - radius * uniform(-0.8, 0.8, n, 2, 1, 1, device=device)
        turn = uniform(0, torch.pi, n, 1, 1, 1, device=device)
        along = q[:, :1] * turn.cos() + q[:, 1:] * turn.sin()
        across = q[:, 1:] * turn.cos() - q[:, :1] * turn.sin()
        thick = 1 + 0.5 * torch.rand_like(turn) + 0.25 * radius * torch.rand_like(turn) ** 2
        long = radius * uniform(0.4, 1.4, n, 1, 1, 1, device=device)
        bars = torch.maximum(bars, torch.minimum(long - along.abs(), thick - across.abs()))
    kind = torch.rand(n, 1, 1, 1, device=device)
    inside = torch.where(kind < 0.5, blob, torch.where(
        kind < 0.7, box, torch.where(kind < 0.8, ring, bars)))
    return (inside + 0.5).clamp(0, 1)


def sample(texture: Tensor, points: Tensor, margin: int) -> Tensor:
    """``texture`` (n, 3, H, W), its origin ``margin`` px up left, at ``points`` (n, 2, h, w)."""
    size = put([texture.shape[-1], texture.shape[-2]], points.device).view(1, 2, 1, 1)
    grid = ((points + margin + 0.5) * 2 / size - 1).permute(0, 2, 3, 1)
    return F.grid_sample(texture, grid, mode='bilinear', padding_mode='reflection',
                         align_corners=False)


def reversed_flow(flow: Tensor, grid: Tensor, steps: int = 12) -> Tensor:
    """Flow back b, on the second frame's grid, with b(y) = -f(y + b(y)), by iteration.

    (n, 2, h, w) -> (n, 2, h, w); NaN where that does not converge to a tenth of a pixel, or what
    moves comes from outside of the first frame.
    """
    size = put([flow.shape[-1], flow.shape[-2]], flow.device).view(1, 2, 1, 1)

    def at(points: Tensor) -> Tensor:
        place = ((points + 0.5) * 2 / size - 1).permute(0, 2, 3, 1)
        return F.grid_sample(flow, place, padding_mode='border', align_corners=False)

    back = -at(grid - flow)
    for _ in range(steps):
        back = -at(grid + back)
    origin = grid + back
    good = (((origin >= 0) & (origin <= size - 1)).all(1, keepdim=True)
            & ((back + at(origin)).norm(dim=1, keepdim=True) < 0.1))
    return back.masked_fill(~good, math.nan)


@torch.no_grad()
def make_pairs(count: int, height: int, width: int, textures: Textures,
               motion: Motion = Motion()) -> tuple[Tensor, Tensor, Tensor]:
    """Make a batch of synthetic pairs from torch's global random state.

    Returns
    -------
    previous, current : (count, 3, height, width) float, 0..1.
    flow : (count, 2, height, width) float, pixels, exact for what is seen in ``previous``, also
        where it is hidden or outside in ``current``. With ``motion.both_ways`` the second half
        of the pairs are the first half's, exchanged (``count`` must be even); NaN in their flow
        is not known.
    """
    if motion.both_ways:
        if count % 2:
            raise ValueError(f'{count} pairs cannot be pairs and their reverse: make it even')
        count //= 2
    device = textures.device
    margin = 24
    y = torch.arange(height, device=device, dtype=torch.float32)
    x = torch.arange(width, device=device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1])[None]
    centre = grid.mean((2, 3), keepdim=True)
    low, high = torch.log(torch.tensor([motion.smallest, motion.largest])).tolist()
    kinds = torch.tensor(motion.kinds)
    # What a pair shows is decided on the CPU: to ask the GPU would be to wait for it.
    shows = kinds[kinds[:, 0].multinomial(count, replacement=True)]
    stands, rigid, drives, fewest, most, size, begin = shows[:, 1:].unbind(1)

    def between(lowest: Tensor, highest: Tensor | float) -> Tensor:
        return lowest + (highest - lowest) * torch.rand(count)

    scale = between(low + (high - low) * begin, high).exp()
    fewest, most = (n.clamp(max=motion.layers) for n in (fewest, most))
    layers = between(fewest, most + 1).long()
    # A camera moves everything, or nearly stands still; each object adds a motion of its own.
    still = torch.rand(count) < stands
    pace = scale * torch.rand(count) * torch.where(still, 0.03, 1.)
    pace, scale, rigid, drives, size = (put(x, device) for x in (pace, scale, rigid, drives, size))
    # All that is seen, at once: backgrounds, then objects, back to front; each object's pair.
    there, pair = (layers >= torch.arange(1, motion.layers + 1)[:, None]).nonzero().unbind(1)
    numbers, pair = there.bincount(minlength=motion.layers).tolist(), put(pair, device)
    flow = random_flow(height, width, torch.cat([pace, scale[pair]]),
                       *(torch.cat([x, x[pair]]) for x in (rigid, drives)))
    objects = len(pair)
    carried = torch.rand(objects, 1, 1, 1, device=device) < 0.7
    flow[count:] += flow[:count][pair] * carried
    # Texture coordinates turned and zoomed, so that both frames are interpolated alike.
    angle = uniform(-0.6, 0.6, len(flow), device=device)
    zoom = uniform(-0.25, 0.25, len(flow), device=device).exp()
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    turn = turn.view(-1, 2, 2) * zoom.view(-1, 1, 1)
    here = grid.expand(len(flow), -1, -1, -1)
    seen = torch.cat([here + flow, here], 3)  # frame 1 left of frame 2 on one canvas
    points = torch.einsum('nij,njhw->nihw', turn, seen - centre) + centre
    patch = textures.patches(len(flow), height + 2 * margin, width + 2 * margin)
    colour = sample(patch, points, margin)
    back = reversed_flow(flow, here) if motion.both_ways else None
    place = torch.rand(objects, 2, device=device) * put([width, height], device)
    x, y = place.long().unbind(1)
    goes = flow[count:][torch.arange(objects, device=device), :, y, x]
    # Most of them are where the first frame shows them: there flow is asked for.
    place = place + goes * (torch.rand(objects, 1, device=device) < SHOWN)
    mask = shape_mask(seen[count:], place, size[pair])
    plain = torch.rand(objects, 1, 1, 1, device=device) < PLAIN
    contrast = torch.where(plain, uniform(0.03, 0.5, objects, 1, 1, 1, device=device), 1.)
    middle = colour[count:].mean((2, 3), keepdim=True)
    colour[count:] = middle + contrast * (colour[count:] - middle)
    canvas, truth = colour[:count].clone(), flow[:count].clone()
    done = 0
    for number in numbers:
        some, of = (slice(first + done, first + done + number) for first in (0, count))
        shape, which = mask[some], pair[some]
        canvas[which] = canvas[which] * (1 - shape) + colour[of] * shape
        truth[which] = torch.where(shape[..., :width] > 0.5, flow[of], truth[which])
        if back is not None:
            back[which] = torch.where(shape[..., width:] > 0.5, back[of], back[which])
        done += number
    first, second = canvas.split(width, 3)
    if motion.augment == 1 or (motion.augment and torch.rand(()) < motion.augment):
        first, second = photometric(first, second)
    if back is not None:
        first, second = torch.cat([first, second]), torch.cat([second, first])
        truth = torch.cat([truth, back[:count]])
    return first, second, truth
