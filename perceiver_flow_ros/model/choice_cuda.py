# SPDX-License-Identifier: Apache-2.0
"""`choice.describe` on a GPU: two Triton kernels once the frames are warped."""
from __future__ import annotations

from perceiver_flow_ros.model.choice import Candidates, MEASURES
from perceiver_flow_ros.model.evidence import brighter, DARKER
from perceiver_flow_ros.model.evidence_cuda import (
    any_size,
    FEW,
    local_contrast,
    mine,
    PIXELS,
    TOKEN,
    warp_by_tokens,
)
from torch import Tensor
import triton
from triton import cdiv
import triton.language as tl

PLANES = tl.constexpr(6)        # that `look_kernel` gives


@any_size
def look_kernel(previous, contrast, warped, local, light, flows, match, out, batch, height, width,
                darker, BLOCK: tl.constexpr):
    """Say of tokens, with all of their pixels at once, how a flow fits. Program: tokens of a flow.

    Differences of local contrast and of brightness, whether it leaves the frame, whether the match
    agrees; then of the first frame its texture, of the match whether there is one.
    """
    item, frame, size = tl.program_id(1), tl.program_id(1) % batch, height * width
    columns, count = width // TOKEN, size // PIXELS
    n, new = mine(count, BLOCK)
    i = tl.arange(0, PIXELS)
    p = ((n // columns * TOKEN)[None, :] + (i // TOKEN)[:, None]) * width + (
        (n % columns * TOKEN)[None, :] + (i % TOKEN)[:, None])
    textured = tl.load(contrast + frame * size + p)
    unlike = tl.abs(textured - tl.load(local + item * size + p))
    darkened = tl.abs(tl.load(previous + frame * size + p)
                      - tl.load(light + frame)
                      - tl.load(warped + item * size + p))
    out += item * PLANES * count + n
    tl.store(out, tl.sum(tl.minimum(unlike, 1.), 0) / PIXELS, mask=new)
    tl.store(out + count, tl.sum(tl.minimum(darkened, darker), 0) / PIXELS / darker, mask=new)
    u = tl.load(flows + item * 2 * count + n)
    v = tl.load(flows + item * 2 * count + count + n)
    match_u = tl.load(match + frame * 2 * count + n)
    match_v = tl.load(match + frame * 2 * count + count + n)
    du, dv = u - match_u, v - match_v
    x, y = (n % columns + 0.5) * TOKEN + u, (n // columns + 0.5) * TOKEN + v
    leaves = (x < 0) | (x > width) | (y < 0) | (y > height)
    tl.store(out + 2 * count, leaves.to(tl.float32), mask=new)
    # (What is not a number is not less than any.)
    tl.store(out + 3 * count, (du * du + dv * dv < 4).to(tl.float32), mask=new)
    tl.store(out + 4 * count, tl.sum(tl.abs(textured), 0) / PIXELS, mask=new)
    tl.store(out + 5 * count, (match_u == match_u).to(tl.float32), mask=new)


@triton.jit
def mean(plane, n, rows, columns, REACH: tl.constexpr):
    """Mean of what is around tokens n of a plane."""
    y, x = n // columns, n % columns
    total = tl.zeros_like(n).to(tl.float32)
    for dy in range(-REACH, REACH + 1):
        row = (y + dy >= 0) & (y + dy < rows)
        for dx in range(-REACH, REACH + 1):
            total += tl.load(plane + n + dy * columns + dx,
                             mask=row & (x + dx >= 0) & (x + dx < columns), other=0.)
    return total / ((tl.minimum(y + REACH, rows - 1) - tl.maximum(y - REACH, 0) + 1)
                    * (tl.minimum(x + REACH, columns - 1) - tl.maximum(x - REACH, 0) + 1))


@triton.jit
def distance(u, v):
    """Logarithm of 1 and half of the length."""
    return tl.log(1 + tl.sqrt(u * u + v * v) / 2)


@any_size
def measure_kernel(planes, flows, shares, out, count, batch, rows, columns,
                   MEASURES: tl.constexpr, BLOCK: tl.constexpr):
    """Put together what `choice.describe` gives. Program: tokens of a flow."""
    frame, k, size = tl.program_id(1), tl.program_id(2), rows * columns
    n, new = mine(size, BLOCK)
    first = planes + frame * PLANES * size
    cost_before, near_before = mean(first, n, rows, columns, 1), mean(
        first + size, n, rows, columns, 1)
    least, nearest, widest = cost_before, near_before, mean(first + size, n, rows, columns, 3)
    for other in range(1, count):
        plane = planes + (other * batch + frame) * PLANES * size
        least = tl.minimum(least, mean(plane, n, rows, columns, 1))
        nearest = tl.minimum(nearest, mean(plane + size, n, rows, columns, 1))
        widest = tl.minimum(widest, mean(plane + size, n, rows, columns, 3))
    texture, known = first + 4 * size, mean(first + 5 * size, n, rows, columns, 2)
    texture_1 = tl.load(texture + n)
    texture_3 = mean(texture, n, rows, columns, 1)
    texture_7 = mean(texture, n, rows, columns, 3)
    before = flows + frame * 2 * size
    u_before = tl.load(before + n)
    v_before = tl.load(before + size + n)
    u_around = mean(before, n, rows, columns, 3)
    v_around = mean(before + size, n, rows, columns, 3)
    item = k * batch + frame
    plane, flow = planes + item * PLANES * size, flows + item * 2 * size
    to = out + item * MEASURES * size + n
    cost, near, wide = mean(plane, n, rows, columns, 1), mean(
        plane + size, n, rows, columns, 1), mean(plane + size, n, rows, columns, 3)
    cost_1 = tl.load(plane + n)
    tl.store(to, tl.minimum(cost_1 / (texture_1 + 0.02), 2.), mask=new)
    tl.store(to + size, tl.minimum(cost / (texture_3 + 0.02), 2.), mask=new)
    tl.store(to + 2 * size,
             10 * tl.minimum(tl.maximum(cost - cost_before, -0.2), 0.2), mask=new)
    tl.store(to + 3 * size, tl.minimum(10 * (cost - least), 2.), mask=new)
    tl.store(to + 4 * size, tl.minimum(
        mean(plane, n, rows, columns, 3) / (texture_7 + 0.02), 2.), mask=new)
    tl.store(to + 5 * size, tl.log(texture_1 + 0.01) / 2, mask=new)
    tl.store(to + 6 * size, tl.load(plane + 2 * size + n), mask=new)
    tl.store(to + 7 * size, mean(plane + 2 * size, n, rows, columns, 2), mask=new)
    tl.store(to + 8 * size, mean(plane + 3 * size, n, rows, columns, 1), mask=new)
    tl.store(to + 9 * size, mean(plane + 3 * size, n, rows, columns, 4), mask=new)
    tl.store(to + 10 * size, known, mask=new)
    u = tl.load(flow + n)
    v = tl.load(flow + size + n)
    tl.store(to + 11 * size, distance(u - u_before, v - v_before) / 2, mask=new)
    tl.store(to + 12 * size, distance(u - u_around, v - v_around) / 2, mask=new)
    tl.store(to + 13 * size, distance(u - mean(flow, n, rows, columns, 2),
                                      v - mean(flow + size, n, rows, columns, 2)), mask=new)
    share = tl.load(shares + item - batch, mask=k > 0, other=0.)
    kind = tl.where(k == 0, 1., tl.where(k == 1, -1., 0.))
    tl.store(to + 14 * size, tl.zeros_like(u) + share, mask=new)
    tl.store(to + 15 * size, tl.zeros_like(u) + kind, mask=new)
    tl.store(to + 16 * size, tl.load(plane + size + n), mask=new)
    tl.store(to + 17 * size, near, mask=new)
    tl.store(to + 18 * size, wide, mask=new)
    tl.store(to + 19 * size,
             tl.minimum(tl.maximum(4 * (near - near_before), -1.), 1.), mask=new)
    tl.store(to + 20 * size, tl.minimum(4 * (near - nearest), 2.), mask=new)
    tl.store(to + 21 * size, tl.minimum(4 * (wide - widest), 2.), mask=new)


def describe(previous: Tensor, contrast: Tensor, current: Tensor, flows: Tensor,  # noqa: D103
             candidates: Candidates) -> Tensor:
    k, batch, _, rows, columns = flows.shape
    flows = flows.contiguous()
    warped = warp_by_tokens(current, flows.flatten(0, 1))
    light = brighter(previous, warped[:batch]).contiguous()
    planes = flows.new_empty(k * batch, PLANES.value, rows, columns)
    look_kernel[cdiv(rows * columns, FEW), k * batch](
        previous.contiguous(), contrast.contiguous(), warped, local_contrast(warped), light, flows,
        candidates.match.contiguous(), planes, batch, rows * TOKEN.value, columns * TOKEN.value,
        DARKER, BLOCK=FEW)
    out = flows.new_empty(k, batch, MEASURES, rows, columns)
    measure_kernel[cdiv(rows * columns, FEW), batch, k](
        planes, flows, candidates.shares.contiguous(), out, k, batch, rows, columns,
        MEASURES=MEASURES, BLOCK=FEW, num_warps=1)
    return out
