# SPDX-License-Identifier: Apache-2.0
"""The functions of `propagation` on a GPU: two Triton kernels a step."""
from perceiver_flow_ros.model.evidence import DARKER
from perceiver_flow_ros.model.evidence_cuda import any_size, BLOCK, inside, mine, sampled
from perceiver_flow_ros.model.propagation import PRICE
import torch
from torch import Tensor
import triton
from triton import cdiv
import triton.language as tl


@triton.jit
def direction(k, DIAGONAL: tl.constexpr):
    """Give (dy, dx) of the k-th of four neighbours, row by row."""
    if DIAGONAL:
        return k // 2 * 2 - 1, k % 2 * 2 - 1
    return k // 3 - (3 - k) // 3, k % 3 // 2 - k % 3 % 2


@any_size
def try_kernel(flow, first, second, claimed, differences, height, width, reach, darker,
               DIAGONAL: tl.constexpr, BLOCK: tl.constexpr):
    """Look where another pixel's flow goes. Program: pixels x which other pixel."""
    k, item, size = tl.program_id(1), tl.program_id(2), height * width
    p, new = mine(size, BLOCK)
    y, x = p // width, p % width
    dy, dx = direction(k, DIAGONAL)
    other = (flow + item * 2 * size + inside(y + dy * reach, height) * width
             + inside(x + dx * reach, width))
    x = x + tl.load(other)
    y = y + tl.load(other + size)
    seen = sampled(second + item * size, x, y, height, width)
    taken = sampled(claimed + item * size, x, y, height, width)
    difference = tl.abs(tl.load(first + item * size + p) - seen)
    differences += (item * 8 + k) * size + p
    tl.store(differences, tl.minimum(difference, darker), mask=new)
    tl.store(differences + 4 * size, taken, mask=new)


@any_size
def take_kernel(flow, cost, differences, new_flow, new_cost, height, width, reach, price,
                DIAGONAL: tl.constexpr, BLOCK: tl.constexpr):
    """Take another pixel's flow where it costs less. Program: pixels."""
    item, size = tl.program_id(1), height * width
    p, new = mine(size, BLOCK)
    y, x = p // width, p % width
    flow += item * 2 * size
    u = tl.load(flow + p)
    v = tl.load(flow + size + p)
    least = tl.load(cost + item * size + p)
    around = ((tl.minimum(y + 1, height - 1) - tl.maximum(y - 1, 0) + 1)
              * (tl.minimum(x + 1, width - 1) - tl.maximum(x - 1, 0) + 1))
    for k in range(4):
        at = differences + (item * 8 + k) * size + p
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(9):
            row, column = y + i // 3 - 1, x + i % 3 - 1
            there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            total += tl.load(at + (i // 3 - 1) * width + i % 3 - 1, mask=there, other=0.)
        its = total / around + tl.load(at + 4 * size)
        dy, dx = direction(k, DIAGONAL)
        other = flow + inside(y + dy * reach, height) * width + inside(x + dx * reach, width)
        better = its + price < least
        u = tl.where(better, tl.load(other), u)
        v = tl.where(better, tl.load(other + size), v)
        least = tl.where(better, its, least)
    new_flow += item * 2 * size + p
    tl.store(new_flow, u, mask=new)
    tl.store(new_flow + size, v, mask=new)
    tl.store(new_cost + item * size + p, least, mask=new)


def tried(flow: Tensor, cost: Tensor, first: Tensor, second: Tensor, claimed: Tensor,  # noqa: D103
          reach: int, diagonal: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = flow.shape
    flow, cost = flow.contiguous(), cost.contiguous()
    differences = flow.new_empty(batch, 8, height, width)
    blocks = cdiv(height * width, BLOCK)
    try_kernel[blocks, 4, batch](
        flow, first.contiguous(), second.contiguous(), claimed.contiguous(), differences, height,
        width, reach, DARKER, DIAGONAL=diagonal, BLOCK=BLOCK)
    new_flow, new_cost = torch.empty_like(flow), torch.empty_like(cost)
    take_kernel[blocks, batch](flow, cost, differences, new_flow, new_cost, height, width, reach,
                               PRICE, DIAGONAL=diagonal, BLOCK=BLOCK)
    return new_flow, new_cost
