# SPDX-License-Identifier: Apache-2.0
"""The functions of `evidence` on a GPU, a Triton kernel or two each; all tensors are float32."""
from perceiver_flow_ros.model import evidence
import torch
from torch import Tensor
import triton
from triton import cdiv
import triton.language as tl

TOKEN = tl.constexpr(evidence.TOKEN)            # pixels per token and axis
PIXELS = tl.constexpr(evidence.TOKEN ** 2)      # of a token
BLOCK = 128                     # pixels or tokens of a program; where there is a second axis:
FEW = 32
# Compiled once, not anew for sizes that 16 divides or not: every level of the pyramid has its own.
any_size = triton.jit(do_not_specialize=(
    'height', 'width', 'rows', 'columns', 'channels', 'images', 'batch', 'count', 'tokens',
    'reach', 'most'))


@triton.jit
def mine(size, BLOCK: tl.constexpr):
    """Give what of so many a program works on, beyond the last one that again, and what is new."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.minimum(n, size - 1), n < size


@triton.jit
def inside(i, size):
    """Give the index that is nearest in a line of ``size``."""
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def sampled(plane, x, y, height, width):
    """Bilinear interpolation of a plane at (x, y), its border repeated."""
    x = tl.minimum(tl.maximum(x, 0.), (width - 1).to(tl.float32))
    y = tl.minimum(tl.maximum(y, 0.), (height - 1).to(tl.float32))
    left, top = x.to(tl.int32), y.to(tl.int32)
    right, bottom = tl.minimum(left + 1, width - 1), tl.minimum(top + 1, height - 1)
    x -= left.to(tl.float32)
    y -= top.to(tl.float32)
    above = (tl.load(plane + top * width + left) * (1 - x)
             + tl.load(plane + top * width + right) * x)
    below = (tl.load(plane + bottom * width + left) * (1 - x)
             + tl.load(plane + bottom * width + right) * x)
    return above * (1 - y) + below * y


@any_size
def warp_kernel(image, flow, out, channels, height, width, images, BLOCK: tl.constexpr):
    """Sample an image where the flow of its tokens goes. Program: pixels of one flow."""
    item, size = tl.program_id(1), height * width
    p, new = mine(size, BLOCK)
    y, x = p // width, p % width
    rows, columns = height // TOKEN, width // TOKEN
    flow += item * 2 * rows * columns
    across, down = (x + 0.5) / TOKEN - 0.5, (y + 0.5) / TOKEN - 0.5
    u = sampled(flow, across, down, rows, columns)
    v = sampled(flow + rows * columns, across, down, rows, columns)
    image += (item % images) * channels * size
    for channel in range(channels):
        value = sampled(image + channel * size, x + u, y + v, height, width)
        tl.store(out + (item * channels + channel) * size + p, value, mask=new)


def warp_by_tokens(image: Tensor, flow: Tensor) -> Tensor:  # noqa: D103
    images, channels, height, width = image.shape
    out = image.new_empty(len(flow), channels, height, width)
    warp_kernel[cdiv(height * width, BLOCK), len(flow)](
        image.contiguous(), flow.contiguous(), out, channels, height, width, images, BLOCK=BLOCK)
    return out


@any_size
def contrast_kernel(frame, out, height, width, REACH: tl.constexpr, BLOCK: tl.constexpr):
    """Take the mean of what is around off. Program: pixels of a plane."""
    size = height * width
    p, new = mine(size, BLOCK)
    y, x = p // width, p % width
    frame += tl.program_id(1) * size
    total = tl.zeros([BLOCK], tl.float32)
    for dy in range(-REACH, REACH + 1):
        row = (y + dy >= 0) & (y + dy < height)
        for dx in range(-REACH, REACH + 1):
            there = row & (x + dx >= 0) & (x + dx < width)
            total += tl.load(frame + p + dy * width + dx, mask=there, other=0.)
    count = ((tl.minimum(y + REACH, height - 1) - tl.maximum(y - REACH, 0) + 1)
             * (tl.minimum(x + REACH, width - 1) - tl.maximum(x - REACH, 0) + 1))
    value = tl.load(frame + p)
    tl.store(out + tl.program_id(1) * size + p, value - total / count, mask=new)


def local_contrast(frame: Tensor) -> Tensor:  # noqa: D103
    batch, channels, height, width = frame.shape
    frame = frame.contiguous()
    out = torch.empty_like(frame)
    contrast_kernel[cdiv(height * width, BLOCK), batch * channels](
        frame, out, height, width, REACH=4, BLOCK=BLOCK)
    return out


@any_size
def difference_kernel(first, second, out, height, width,
                      RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Compare tokens with displaced ones, all of their pixels at once. Program: tokens x row."""
    down, item = tl.program_id(1), tl.program_id(2)
    columns, count = width // TOKEN, height // TOKEN * (width // TOKEN)
    n, new = mine(count, BLOCK)
    i = tl.arange(0, PIXELS)
    y = (n // columns * TOKEN)[None, :] + (i // TOKEN)[:, None]
    x = (n % columns * TOKEN)[None, :] + (i % TOKEN)[:, None]
    value = tl.load(first + item * height * width + y * width + x)
    second += item * height * width + inside(y + down - RADIUS, height) * width
    for across in range(2 * RADIUS + 1):
        there = tl.load(second + inside(x + across - RADIUS, width))
        unlike = tl.minimum(tl.abs(value - there), 1.)
        k = (item * (2 * RADIUS + 1) + down) * (2 * RADIUS + 1) + across
        tl.store(out + k * count + n, tl.sum(unlike, 0) / PIXELS, mask=new)


@any_size
def match_kernel(difference, before, coarse, cost, rows, columns, price, sharpness,
                 RADIUS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Take the best displacement. Program: tokens, with all displacements at once."""
    item, size = tl.program_id(1), rows * columns
    n, new = mine(size, BLOCK)
    y, x = n // columns, n % columns
    k = tl.arange(0, COUNT)
    width: tl.constexpr = 2 * RADIUS + 1
    count: tl.constexpr = width * width
    one = (k < count)[:, None]
    difference += item * count * size
    total = tl.zeros([COUNT, BLOCK], tl.float32)
    for i in tl.static_range(9):
        row, column = y + i // 3 - 1, x + i % 3 - 1
        there = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        total += tl.load(difference + k[:, None] * size + (row * columns + column)[None, :],
                         mask=one & there[None, :], other=0.)
    around = ((tl.minimum(y + 1, rows - 1) - tl.maximum(y - 1, 0) + 1)
              * (tl.minimum(x + 1, columns - 1) - tl.maximum(x - 1, 0) + 1))
    total = total / around[None, :]
    mean = tl.sum(total, 0) / count
    total = total / (mean + 0.02)[None, :]
    cost += item * (count + 3) * size + n
    tl.store(cost[None, :] + k[:, None] * size, total, mask=one & new[None, :])
    best = tl.min(tl.where(one, total, float('inf')), 0)

    across, down = (k % width - RADIUS).to(tl.float32), (k // width - RADIUS).to(tl.float32)
    length = tl.sqrt(across * across + down * down)
    score = tl.where(one, -(total + price * length[:, None]) * sharpness, float('-inf'))
    likely = tl.exp(score - tl.max(score, 0)[None, :])
    likely = likely / tl.sum(likely, 0)[None, :]
    flow = item * 2 * size + n
    u = tl.load(before + flow)
    v = tl.load(before + flow + size)
    tl.store(coarse + flow, u + tl.sum(likely * across[:, None], 0), mask=new)
    tl.store(coarse + flow + size, v + tl.sum(likely * down[:, None], 0), mask=new)
    u += (x + 0.5) * TOKEN
    v += (y + 0.5) * TOKEN
    leaves = (u < 0) | (u > columns * TOKEN) | (v < 0) | (v > rows * TOKEN)
    tl.store(cost + count * size, best, mask=new)
    tl.store(cost + (count + 1) * size, tl.log(mean + 0.01) / 2, mask=new)
    tl.store(cost + (count + 2) * size, leaves.to(tl.float32), mask=new)


def match(first: Tensor, second: Tensor, before: Tensor,  # noqa: D103
          radius: int) -> tuple[Tensor, Tensor]:
    batch, _, height, width = first.shape
    rows, columns = before.shape[-2:]
    count, before = (2 * radius + 1) ** 2, before.contiguous()
    difference = first.new_empty(batch, count, rows, columns)
    difference_kernel[cdiv(rows * columns, FEW), 2 * radius + 1, batch](
        first.contiguous(), second.contiguous(), difference, height, width,
        RADIUS=radius, BLOCK=FEW)
    coarse, cost = torch.empty_like(before), first.new_empty(batch, count + 3, rows, columns)
    match_kernel[cdiv(rows * columns, FEW), batch](
        difference, before, coarse, cost, rows, columns, evidence.DISTANCE, evidence.SHARPNESS,
        RADIUS=radius, COUNT=triton.next_power_of_2(count), BLOCK=FEW)
    return coarse, cost


@any_size
def gradient_kernel(first, second, out, channels, height, width, BLOCK: tl.constexpr):
    """Sum products of derivatives. Program: tokens, with all of their pixels at once."""
    item, size = tl.program_id(1), height * width
    columns, count = width // TOKEN, size // PIXELS
    n, new = mine(count, BLOCK)
    i = tl.arange(0, PIXELS)
    y = (n // columns * TOKEN)[None, :] + (i // TOKEN)[:, None]
    x = (n % columns * TOKEN)[None, :] + (i % TOKEN)[:, None]
    middle = y * width + x
    left, right = y * width + inside(x - 1, width), y * width + inside(x + 1, width)
    above, below = inside(y - 1, height) * width + x, inside(y + 1, height) * width + x
    xx = tl.zeros([PIXELS, BLOCK], tl.float32)
    xy, yy, xt, yt = xx, xx, xx, xx
    for channel in range(channels):
        a = first + (item * channels + channel) * size
        b = second + (item * channels + channel) * size
        dx = (tl.load(a + right) + tl.load(b + right)
              - tl.load(a + left) - tl.load(b + left)) / 4
        dy = (tl.load(a + below) + tl.load(b + below)
              - tl.load(a + above) - tl.load(b + above)) / 4
        dt = tl.load(b + middle) - tl.load(a + middle)
        xx += dx * dx
        xy += dx * dy
        yy += dy * dy
        xt += dx * dt
        yt += dy * dt
    out += item * 5 * count + n
    scale = 1. / (channels * PIXELS)
    tl.store(out, tl.sum(xx, 0) * scale, mask=new)
    tl.store(out + count, tl.sum(xy, 0) * scale, mask=new)
    tl.store(out + 2 * count, tl.sum(yy, 0) * scale, mask=new)
    tl.store(out + 3 * count, tl.sum(xt, 0) * scale, mask=new)
    tl.store(out + 4 * count, tl.sum(yt, 0) * scale, mask=new)


@any_size
def solve_kernel(products, out, rows, columns, BLOCK: tl.constexpr):
    """Solve the normal equations of a window around. Program: tokens x window (3x3, 7x7)."""
    window, item, size = tl.program_id(1), tl.program_id(2), rows * columns
    n, new = mine(size, BLOCK)
    y, x = n // columns, n % columns
    reach = 1 + 2 * window
    products += item * 5 * size + n
    xx = tl.zeros([BLOCK], tl.float32)
    xy, yy, xt, yt, count = xx, xx, xx, xx, xx
    for dy in range(-reach, reach + 1):
        row = (y + dy >= 0) & (y + dy < rows)
        for dx in range(-reach, reach + 1):
            there = row & (x + dx >= 0) & (x + dx < columns)
            at = products + dy * columns + dx
            xx += tl.load(at, mask=there, other=0.)
            xy += tl.load(at + size, mask=there, other=0.)
            yy += tl.load(at + 2 * size, mask=there, other=0.)
            xt += tl.load(at + 3 * size, mask=there, other=0.)
            yt += tl.load(at + 4 * size, mask=there, other=0.)
            count += there.to(tl.float32)
    xx, xy, yy, xt, yt = xx / count + 1e-3, xy / count, yy / count + 1e-3, xt / count, yt / count
    determinant = xx * yy - xy * xy
    u, v = (xy * yt - yy * xt) / determinant, (xy * xt - xx * yt) / determinant
    out += (item * 8 + 2 * window) * size + n
    tl.store(out, tl.minimum(tl.maximum(u, -TOKEN), TOKEN), mask=new)
    tl.store(out + size, tl.minimum(tl.maximum(v, -TOKEN), TOKEN), mask=new)
    tl.store(out + 4 * size, tl.log(determinant) / 4, mask=new)
    tl.store(out + 5 * size, tl.log(xx + yy) / 4, mask=new)


def lucas_kanade(first: Tensor, second: Tensor) -> Tensor:  # noqa: D103
    batch, channels, height, width = first.shape
    rows, columns = height // TOKEN.value, width // TOKEN.value
    products = first.new_empty(batch, 5, rows, columns)
    gradient_kernel[cdiv(rows * columns, FEW), batch](
        first.contiguous(), second.contiguous(), products, channels, height, width, BLOCK=FEW)
    out = first.new_empty(batch, 8, rows, columns)
    solve_kernel[cdiv(rows * columns, BLOCK), 2, batch](
        products, out, rows, columns, BLOCK=BLOCK)
    return out


@triton.jit
def ordered(a, b, c):
    """Sort three."""
    low, high = tl.minimum(a, b), tl.maximum(a, b)
    return tl.minimum(low, c), tl.minimum(tl.maximum(low, c), high), tl.maximum(high, c)


@any_size
def median_kernel(flow, out, rows, columns, BLOCK: tl.constexpr):
    """Median of 3x3. Program: tokens of a component."""
    size = rows * columns
    n, new = mine(size, BLOCK)
    y, x = n // columns, n % columns
    flow += tl.program_id(1) * size
    above, below = inside(y - 1, rows) * columns, inside(y + 1, rows) * columns
    left, right, y = inside(x - 1, columns), inside(x + 1, columns), y * columns
    low1, middle1, high1 = ordered(tl.load(flow + above + left),
                                   tl.load(flow + y + left),
                                   tl.load(flow + below + left))
    low2, middle2, high2 = ordered(tl.load(flow + above + x),
                                   tl.load(flow + y + x),
                                   tl.load(flow + below + x))
    low3, middle3, high3 = ordered(tl.load(flow + above + right),
                                   tl.load(flow + y + right),
                                   tl.load(flow + below + right))
    low = tl.maximum(tl.maximum(low1, low2), low3)
    high = tl.minimum(tl.minimum(high1, high2), high3)
    _, middle, _ = ordered(middle1, middle2, middle3)
    _, middle, _ = ordered(low, middle, high)
    tl.store(out + tl.program_id(1) * size + n, middle, mask=new)


def median(flow: Tensor) -> Tensor:  # noqa: D103
    batch, components, rows, columns = flow.shape
    flow = flow.contiguous()
    out = torch.empty_like(flow)
    median_kernel[cdiv(rows * columns, BLOCK), batch * components](
        flow, out, rows, columns, BLOCK=BLOCK)
    return out
