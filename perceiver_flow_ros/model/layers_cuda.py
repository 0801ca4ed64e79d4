# SPDX-License-Identifier: Apache-2.0
"""`layers.fitted` on a GPU, as one Triton kernel: few numbers follow from a few matches."""
from perceiver_flow_ros.model.evidence_cuda import any_size
from perceiver_flow_ros.model.layers import NEAREST, STEEP
import torch
from torch import Tensor
import triton
import triton.language as tl

BLOCK = 512         # matches at a time


@triton.jit
def inverse(a, b, c):
    """Of the symmetric matrix [[a, b], [b, c]]."""
    determinant = a * c - b * b
    return c / determinant, -b / determinant, a / determinant


@triton.jit
def left_over(f, a0, a1, b0, b1, slope_a0, slope_a1, slope_b0, slope_b1, s00, s01, s11):
    """Products of a and b, summed, f, less what their slopes explain."""
    left = (a0 - slope_a0 * s00 - slope_a1 * s01) * slope_b0
    left += (a1 - slope_a0 * s01 - slope_a1 * s11) * slope_b1
    return tl.sum(f - left - slope_a0 * b0 - slope_a1 * b1, 0)


@triton.jit
def centred(place, value, left, before, means, mean_x, mean_y, n, tokens, close):
    """Give the weights, places (x, y) and values (2, BLOCK) of matches n, less their means."""
    valid = n < tokens
    i = tl.arange(0, 2)[:, None]
    x = tl.load(place + n, mask=valid, other=0.) - mean_x
    y = tl.load(place + tokens + n, mask=valid, other=0.) - mean_y
    v = tl.load(value + i * tokens + n[None, :], mask=valid[None, :], other=0.) - means[:, None]
    weight = tl.load(left + n, mask=valid, other=0.)
    weight = tl.where(tl.load(before + n, mask=valid, other=0.) < close * close, weight, 0.)
    return weight, x, y, v


@any_size
def plane_kernel(left, before, place, value, motion, error, tokens, close, stiff, steep,
                 nearest, BLOCK: tl.constexpr):
    """Fit a plane's motion. Program: a weighting of the matches.

    Names are those of `layers.homography`; g are the changes, then y x_0 and y x_1, (2,) each.
    """
    item = tl.program_id(0)
    left += item * tokens
    before += item * tokens
    value += 2 * item * tokens
    zero = tl.zeros([BLOCK], tl.float32)
    zeros = tl.zeros([2, BLOCK], tl.float32)
    nothing = tl.sum(zeros, 1)
    first = tl.arange(0, 2)[:, None] == 0

    sum_w, sum_x, sum_y, sum_v = zero, zero, zero, zeros
    for start in range(0, tokens, BLOCK):
        w, x, y, v = centred(place, value, left, before, nothing, 0., 0.,
                             start + tl.arange(0, BLOCK), tokens, close)
        sum_w += w
        sum_x += w * x
        sum_y += w * y
        sum_v += w[None, :] * v
    total = tl.sum(sum_w, 0) + 1e-3
    mean_x, mean_y, means = tl.sum(sum_x, 0) / total, tl.sum(sum_y, 0) / total, (
        tl.sum(sum_v, 1) / total)

    sum_x, sum_y, xx, xy, yy = zero, zero, zero, zero, zero
    sum_0, sum_1, sum_2, x0, y0, x1, y1, x2, y2 = (
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    f01, f02, f11, f12, f22 = zeros, zeros, zeros, zeros, zeros
    for start in range(0, tokens, BLOCK):
        w, x, y, g0 = centred(place, value, left, before, means, mean_x, mean_y,
                              start + tl.arange(0, BLOCK), tokens, close)
        goal = g0 + tl.where(first, x[None, :], y[None, :])
        g1, g2 = goal * x[None, :], goal * y[None, :]
        wx, wy = w * x, w * y
        sum_x += wx
        sum_y += wy
        xx += wx * x
        xy += wx * y
        yy += wy * y
        sum_0 += w[None, :] * g0
        sum_1 += w[None, :] * g1
        sum_2 += w[None, :] * g2
        x0 += wx[None, :] * g0
        y0 += wy[None, :] * g0
        x1 += wx[None, :] * g1
        y1 += wy[None, :] * g1
        x2 += wx[None, :] * g2
        y2 += wy[None, :] * g2
        f01 += w[None, :] * g0 * g1
        f02 += w[None, :] * g0 * g2
        f11 += w[None, :] * g1 * g1
        f12 += w[None, :] * g1 * g2
        f22 += w[None, :] * g2 * g2

    at_x, at_y = tl.sum(sum_x, 0) / total, tl.sum(sum_y, 0) / total
    at_0, at_1, at_2 = tl.sum(sum_0, 1) / total, tl.sum(sum_1, 1) / total, tl.sum(sum_2, 1) / total
    s00 = tl.sum(xx, 0) - total * at_x * at_x
    s01 = tl.sum(xy, 0) - total * at_x * at_y
    s11 = tl.sum(yy, 0) - total * at_y * at_y
    i00, i01, i11 = inverse(s00 + stiff, s01, s11 + stiff)
    a0, b0 = tl.sum(x0, 1) - total * at_x * at_0, tl.sum(y0, 1) - total * at_y * at_0
    a1, b1 = tl.sum(x1, 1) - total * at_x * at_1, tl.sum(y1, 1) - total * at_y * at_1
    a2, b2 = tl.sum(x2, 1) - total * at_x * at_2, tl.sum(y2, 1) - total * at_y * at_2
    u0, v0 = a0 * i00 + b0 * i01, a0 * i01 + b0 * i11           # the slopes
    u1, v1 = a1 * i00 + b1 * i01, a1 * i01 + b1 * i11
    u2, v2 = a2 * i00 + b2 * i01, a2 * i01 + b2 * i11
    l10 = left_over(tl.sum(f01, 1) - total * at_0 * at_1, a1, b1, a0, b0, u1, v1, u0, v0,
                    s00, s01, s11)
    l20 = left_over(tl.sum(f02, 1) - total * at_0 * at_2, a2, b2, a0, b0, u2, v2, u0, v0,
                    s00, s01, s11)
    l11 = left_over(tl.sum(f11, 1) - total * at_1 * at_1, a1, b1, a1, b1, u1, v1, u1, v1,
                    s00, s01, s11)
    l12 = left_over(tl.sum(f12, 1) - total * at_1 * at_2, a1, b1, a2, b2, u1, v1, u2, v2,
                    s00, s01, s11)
    l22 = left_over(tl.sum(f22, 1) - total * at_2 * at_2, a2, b2, a2, b2, u2, v2, u2, v2,
                    s00, s01, s11)
    i00, i01, i11 = inverse(l11 + steep, l12, l22 + steep)
    one, two = -(i00 * l10 + i01 * l20), -(i01 * l10 + i11 * l20)
    across, down = u0 + one * u1 + two * u2, v0 + one * v1 + two * v2
    offset = at_0 + one * at_1 + two * at_2

    for start in range(0, tokens, BLOCK):
        n = start + tl.arange(0, BLOCK)
        w, x, y, v = centred(place, value, left, before, means, mean_x, mean_y, n, tokens, close)
        along = (one * x + two * y)[None, :]
        own = tl.where(first, x[None, :], y[None, :])
        moved = (across[:, None] * x[None, :] + down[:, None] * y[None, :] + offset[:, None]
                 - along * own) / tl.maximum(1 + along, nearest)
        valid = n < tokens
        at = motion + (2 * item + tl.arange(0, 2)[:, None]) * tokens + n[None, :]
        tl.store(at, moved + means[:, None], mask=valid[None, :])
        tl.store(error + item * tokens + n, tl.sum((moved - v) * (moved - v), 0), mask=valid)


def fitted(left: Tensor, error: Tensor, place: Tensor, value: Tensor, close: float,  # noqa: D103
           stiff: float) -> tuple[Tensor, Tensor]:
    left, error = left.contiguous(), error.contiguous()
    items, tokens = left.shape
    motion, new_error = left.new_empty(items, 2, tokens), torch.empty_like(left)
    plane_kernel[items,](left, error, place.contiguous(), value.contiguous(), motion, new_error,
                         tokens, close, stiff, STEEP, NEAREST, BLOCK=BLOCK, num_warps=8)
    return motion, new_error
