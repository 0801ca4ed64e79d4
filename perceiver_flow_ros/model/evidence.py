# SPDX-License-Identifier: Apache-2.0
"""What two frames of a level say of their motion by themselves, without anything learned.

The cost of small displacements (as in PWC-Net, https://arxiv.org/abs/1709.02371, here of the
pixels themselves) and the least-squares motion of Lucas and Kanade, a token of 4x4 pixels each.
"""
from functools import cache

from perceiver_flow_ros.model.accelerated import accelerated
import torch
from torch import Tensor
from torch.nn import functional as F

TOKEN = 4       # pixels of the level per token and axis
DENSE = 160     # pixels, of the longer side, up to which means are taken by products of matrices
DARKER = 0.3    # of the frames' deviation: where brightness differs more, it is as wrong
DISTANCE = 0.03         # cost of a pixel: where nothing can be seen nothing moves
SHARPNESS = 40.         # of the choice between displacements


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """``image`` (B, C, h, w) sampled at pixel + flow (B, 2, h, w); border repeated."""
    h, w = image.shape[-2:]
    y, x = (centres(n, image.device).to(flow.dtype) for n in (h, w))
    grid = torch.stack([torch.add(x, flow[:, 0], alpha=2 / w),
                        torch.add(y[:, None], flow[:, 1], alpha=2 / h)], -1)
    return F.grid_sample(image, grid, padding_mode='border', align_corners=False)


@cache      # (a CUDA graph goes on reading it: it must never be let go; so with all that follow)
def centres(n: int, device: torch.device) -> Tensor:
    """Middles of the ``n`` pixels of a line from -1 to 1, (n,)."""
    return (torch.arange(n, device=device, dtype=torch.float32) * 2 + 1) / n - 1


def spread(flow: Tensor) -> Tensor:
    """Flow (B, 2, h, w) of tokens, in pixels, at every pixel: (B, 2, 4h, 4w)."""
    return F.interpolate(flow, scale_factor=TOKEN, mode='bilinear', align_corners=False)


@accelerated
def warp_by_tokens(image: Tensor, flow: Tensor) -> Tensor:
    """``image`` (B, C, 4h, 4w) sampled where flows (K B, 2, h, w), pixels, of its tokens go."""
    images = image.expand(len(flow) // len(image), -1, -1, -1, -1).flatten(0, 1)
    return warp(images, spread(flow))


@accelerated
def local_contrast(frame: Tensor) -> Tensor:
    """Channels less their mean over 9x9 pixels: a change of exposure is not motion."""
    return frame - window_mean(frame, 9)


def window_mean(x: Tensor, size: int) -> Tensor:
    """Mean over ``size`` x ``size``, an odd number, of what lies inside; all must be finite."""
    if x.device.type != 'cpu':  # (there a kernel costs more to launch than to run)
        return pooled(x, size)
    if max(x.shape[-2:]) <= DENSE:
        rows, columns = (averaging(n, size, x.device) for n in x.shape[-2:])
        with torch.autocast(x.device.type, enabled=False):      # (1/9 is not exact in half)
            return (rows @ (x.float() @ columns.mT)).to(x.dtype)
    rows, columns = (inside(n, size, x.device) for n in x.shape[-2:])
    return box_sum(x, size) / (rows[:, None] * columns).to(x.dtype)


def pooled(x: Tensor, size: int) -> Tensor:
    """As `window_mean`, in one kernel."""
    planes = x.reshape(-1, 1, *x.shape[-2:])
    return F.avg_pool2d(planes, size, 1, size // 2, count_include_pad=False).view(x.shape)


@cache
def averaging(n: int, size: int, device: torch.device) -> Tensor:
    """Matrix (n, n) that takes a line to its means: two products are faster than many sums."""
    k = torch.arange(n, device=device)
    return ((k[:, None] - k).abs() <= size // 2) / inside(n, size, device)[:, None]


@cache
def inside(n: int, size: int, device: torch.device) -> Tensor:
    """How many of the ``size`` around each of ``n`` in a line there are, (n,)."""
    k = torch.arange(n, device=device)
    return ((k + size // 2).clamp(max=n - 1) - (k - size // 2).clamp(min=0) + 1).float()


def box_sum(x: Tensor, size: int) -> Tensor:
    """Sum over ``size`` x ``size``, of what lies inside: of runs of 1, 2, 4... along each axis.

    (Additions of whole tensors: on a CPU torch's pooling takes several times as long.)
    """
    for axis, edges in ((-1, (size // 2,) * 2), (-2, (0, 0, size // 2, size // 2))):
        n, run, length, done = x.shape[axis], F.pad(x, edges), 1, 0
        while done < size:
            if size & length:
                part = run.narrow(axis, done, n)
                x, done = part if not done else x + part, done + length
            if done < size:
                m = run.shape[axis] - length
                run, length = run.narrow(axis, 0, m) + run.narrow(axis, length, m), 2 * length
    return x


def neighbours(x: Tensor, reach: int) -> list[Tensor]:
    """Values (B, C, h, w) of the eight that are ``reach`` away from each, row by row."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (reach,) * 4, mode='replicate')
    steps = 0, reach, 2 * reach
    return [padded[:, :, y:y + h, x:x + w] for y in steps for x in steps
            if (y, x) != (reach, reach)]


def brighter(first: Tensor, second: Tensor) -> Tensor:
    """By how much the first of two aligned frames (B, 1, h, w) is brighter: (B, 1, 1, 1).

    Where they differ little, so that what comes into view has no part in it.
    """
    difference = first - second
    alike = (difference.abs() < DARKER).to(first.dtype)
    return (difference * alike).sum((2, 3), True) / (alike.sum((2, 3), True) + 1)


def matching_cost(first: Tensor, second: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """How badly each displacement explains a token's surroundings, 1 on average.

    Mean absolute difference of local contrast (B, 1, h, w), grey, over 3x3 tokens, divided by its
    mean over all displacements (dy, dx) of up to ``radius`` pixels: (B, (2r+1)^2, h/4, w/4), and
    that mean, (B, 1, h/4, w/4).
    """
    h, w = first.shape[-2:]
    size = 2 * radius + 1
    second = F.pad(second, (radius,) * 4, mode='replicate')[:, 0]
    shifted = second.unfold(2, w, 1).transpose(1, 2)    # (B, 2r+1, h + 2r, w), a view
    shifted = shifted.unfold(2, h, 1).permute(0, 2, 1, 4, 3)    # (B, dy, dx, h, w)
    rows = []
    for some in shifted.split(1 if first.device.type == 'cpu' else size, 1):    # (for its cache)
        # (`out`: else the result has the view's order, in which the last axis is not the last)
        difference = torch.sub(first[:, None], some, out=first.new_empty(some.shape))
        difference = difference.abs_().clamp_(max=1)
        rows.append(F.avg_pool2d(difference.flatten(1, 2), TOKEN))
    cost = window_mean(torch.cat(rows, 1), 3)
    mean = cost.mean(1, keepdim=True)
    return cost / (mean + 0.02), mean


@cache
def displacements(radius: int, device: torch.device) -> Tensor:
    """(u, v) of every channel of the cost volume, (2, (2r+1)^2)."""
    line = torch.arange(-radius, radius + 1., device=device)
    return torch.stack(torch.meshgrid(line, line, indexing='ij')[::-1]).flatten(1)


def best_match(cost: Tensor, radius: int) -> Tensor:
    """Give the expected displacement (B, 2, h, w), pixels, under a softmin of the cost."""
    moves = displacements(radius, cost.device).to(cost.dtype)
    price = DISTANCE * moves.norm(dim=0).view(1, -1, 1, 1)
    likely = (-(cost + price) * SHARPNESS).softmax(1)
    return torch.einsum('bkhw,ck->bchw', likely, moves)


@accelerated
def match(first: Tensor, second: Tensor, before: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Correct flow by what fits best nearby, and tell how well everything fits.

    ``first``, ``second``: local contrast (B, 1, 4h, 4w), grey, the second warped by the flow
    ``before`` (B, 2, h, w), pixels. Gives flow, and (B, (2r+1)^2 + 3, h, w): the costs of all
    displacements, the least of them, the logarithm of their mean, whether ``before`` leaves.
    """
    cost, mean = matching_cost(first, second, radius)
    flow = before + best_match(cost, radius)
    best = cost.amin(1, keepdim=True)
    return flow, torch.cat([cost, best, mean.add(0.01).log() / 2,
                            leaves(before).to(cost.dtype)], 1)


@accelerated
def lucas_kanade(first: Tensor, second: Tensor) -> Tensor:
    """Least-squares motion of every token's surroundings, the classical answer for small motion.

    The normal equations G u = -b of Lucas and Kanade (1981), with G and b summed over a token and
    its 3x3, and its 7x7, neighbours. Local contrast (B, 3, h, w) -> (B, 8, h/4, w/4): for both
    windows u in pixels (2 channels), then for both the logarithms of G's determinant and trace.
    """
    mean = F.pad((first + second) / 2, (1, 1, 1, 1), mode='replicate')
    dx = (mean[:, :, 1:-1, 2:] - mean[:, :, 1:-1, :-2]) / 2
    dy = (mean[:, :, 2:, 1:-1] - mean[:, :, :-2, 1:-1]) / 2
    dt = second - first
    products = torch.stack([(a * b).mean(1) for a, b in (
        (dx, dx), (dx, dy), (dy, dy), (dx, dt), (dy, dt))], 1)
    products = F.avg_pool2d(products, TOKEN)
    local = torch.stack([window_mean(products, window) for window in (3, 7)], 1)
    xx, xy, yy, xt, yt = local.float().unbind(2)                        # (B, 2, h/4, w/4)
    xx, yy = xx + 1e-3, yy + 1e-3       # noise: no texture, no motion
    determinant = xx * yy - xy * xy
    u = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], 2) / determinant[:, :, None]
    logs = torch.stack([determinant, xx + yy], 2).log() / 4
    return torch.cat([u.clamp(-TOKEN, TOKEN), logs], 1).flatten(1, 2)


@accelerated
def median(flow: Tensor) -> Tensor:
    """Median of 3x3 tokens, each component by itself: outliers go, edges stay.

    Columns are sorted, then of the rows of lowest, middle and highest values the highest, the
    middle and the lowest: the median of these three is that of all nine.
    """
    h, w = flow.shape[-2:]
    padded = F.pad(flow, (1, 1, 1, 1), mode='replicate')
    low, middle, high = ordered(*(padded.narrow(-2, k, h) for k in range(3)))
    low = torch.maximum(torch.maximum(low[..., :w], low[..., 1:w + 1]), low[..., 2:])
    middle = ordered(*(middle.narrow(-1, k, w) for k in range(3)))[1]
    high = torch.minimum(torch.minimum(high[..., :w], high[..., 1:w + 1]), high[..., 2:])
    return ordered(low, middle, high)[1]


def ordered(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort three tensors element by element."""
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    middle = torch.minimum(b, c)
    return torch.minimum(a, middle), torch.maximum(a, middle), torch.maximum(b, c)


def length(flow: Tensor) -> Tensor:
    """Euclidean length (..., 1, h, w) of vectors (..., 2, h, w)."""
    return torch.hypot(*flow.split(1, -3))      # (torch's norm is slow over an inner dimension)


def leaves(flow: Tensor) -> Tensor:
    """Tell which tokens' centres the flow (B, 2, h, w), pixels, takes out of the frame."""
    x, y = (TOKEN * (torch.arange(n, device=flow.device) + 0.5) for n in flow.shape[:1:-1])
    x, y = x + flow[:, :1], y[:, None] + flow[:, 1:]
    h, w = (TOKEN * n for n in flow.shape[-2:])
    return (x < 0) | (x > w) | (y < 0) | (y > h)
