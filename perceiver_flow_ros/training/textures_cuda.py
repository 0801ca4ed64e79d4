# SPDX-License-Identifier: Apache-2.0
"""`textures.cut` on a GPU, as one Triton kernel instead of several for every patch."""
from perceiver_flow_ros.model.evidence_cuda import any_size, mine
from perceiver_flow_ros.training.textures import put
import torch
from torch import Tensor
import triton
from triton import cdiv
import triton.language as tl

BLOCK = 256         # pixels of a program


@triton.jit
def taps(i, size, resized):
    """Where what pixel i of a resized line is a mean of begins and ends, its middle, its scale."""
    scale = size / resized
    reach = tl.maximum(scale, 1.)
    middle = scale * (i + 0.5)
    first = tl.maximum(middle - reach + 0.5, 0.).to(tl.int32)
    last = tl.minimum((middle + reach + 0.5).to(tl.int32), size)
    return first, last, middle, reach


@any_size
def cut_kernel(pixels, crops, out, height, width, most, BLOCK: tl.constexpr):
    """Resize a crop, with triangular weights. Program: pixels of a plane of a patch."""
    p, new = mine(height * width, BLOCK)
    channel, patch = tl.program_id(1), tl.program_id(2)
    crops += 6 * patch
    first, row, plane = tl.load(crops), tl.load(crops + 1), tl.load(crops + 2)
    rows, columns = tl.load(crops + 3).to(tl.int32), tl.load(crops + 4).to(tl.int32)
    y, x = p // width, p % width
    x = tl.where(tl.load(crops + 5) > 0, width - 1 - x, x)
    top, bottom, middle_y, reach_y = taps(y, rows, height)
    left, right, middle_x, reach_x = taps(x, columns, width)
    pixels += first + channel * plane
    total = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for j in range(most):
        down = tl.maximum(1 - tl.abs(top + j + 0.5 - middle_y) / reach_y, 0.)
        down = tl.where(top + j < bottom, down, 0.)
        for i in range(most):
            across = tl.maximum(1 - tl.abs(left + i + 0.5 - middle_x) / reach_x, 0.)
            weight = tl.where(left + i < right, down * across, 0.)
            there = weight > 0
            value = tl.load(pixels + (top + j) * row + left + i, mask=there, other=0)
            total += weight * value.to(tl.float32)
            weights += weight
    tl.store(out + (3 * patch + channel) * height * width + p, total / weights / 255, mask=new)


def cut(pixels: Tensor, crops: Tensor, height: int, width: int) -> Tensor:  # noqa: D103
    out = torch.empty(len(crops), 3, height, width, device=pixels.device)
    scale = (crops[:, 3:5] / torch.tensor([height, width])).amax().clamp(min=1)
    cut_kernel[cdiv(height * width, BLOCK), 3, len(crops)](
        pixels, put(crops, pixels.device), out, height, width, int(2 * scale) + 2, BLOCK=BLOCK)
    return out
