# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors that launch the Triton kernels of `kernels`, and the sizes they work with.

None waits for the GPU or depends on values: all can be captured in a CUDA graph.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
import math

from perceiver_flow_ros.model import kernels
from perceiver_flow_ros.model.official import CONTENT
import torch
from torch import Tensor
from torch.nn import functional as F
from triton import cdiv, next_power_of_2

VALUE, HIDDEN = kernels.VALUE.value, kernels.HIDDEN.value
LOG2 = math.log(2)
PROGRAMS = 768          # that the encoder should have at least, to fill a large GPU evenly


@dataclass(frozen=True)
class Blocks:
    """What a program works on."""

    read: tuple[int, int]               # latents, columns
    write: tuple[int, int, int, int]    # rows and columns of queries, latents, hidden channels
    attend: tuple[int, int]             # queries, keys
    read_stages: int
    write_stages: int
    attend_stages: int = 2
    read_warps: int = 4
    write_warps: int = 8
    attend_warps: int = 4

    def latents(self, *, grid: bool) -> int:
        """Latents of a block of `write`: points, unlike a grid, need memory for positions."""
        return self.write[2] if grid else max(16, self.write[2] // 2)


# From what the compiler says for compute capability 9.0 (see test_kernels_compile.py): hardly a
# spilled register in half precision; in float32 the decoder's MLP spills. Before Hopper both need
# less than the 99 KB of shared memory that a GeForce has.
HALF = Blocks(read=(64, 64), write=(8, 16, 64, 64), attend=(128, 64), read_stages=3,
              write_stages=2, attend_stages=3, attend_warps=8)
FULL = Blocks(read=(64, 32), write=(8, 16, 32, 16), attend=(128, 32), read_stages=2,
              write_stages=1, attend_stages=2, attend_warps=8)
ROOMY = replace(HALF, write_stages=3)       # measured on an H200: 3 to 11 % less of the decoder
ROOM = 208 * 1024       # bytes of shared memory that it needs


def blocks_for(dtype: torch.dtype, room: int = 0) -> Blocks:
    """Look up the sizes for a precision, and so many bytes of shared memory."""
    return FULL if dtype == torch.float32 else ROOMY if room >= ROOM else HALF


def room_on(device: torch.device) -> int:
    """Give the bytes of shared memory that a program may have on a device."""
    if device.type != 'cuda':
        return 0
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, 'shared_memory_per_block_optin', 0)      # (older PyTorch: unknown)


def product_of(dtype: torch.dtype) -> str:
    """How kernels multiply: float32 as three products of TF32, with the errors of float32."""
    if kernels.INTERPRETED:
        return 'ieee'
    return 'tf32x3' if dtype == torch.float32 else 'tf32'


@dataclass(frozen=True)
class Pixels:
    """What is kept of the pixels of tiles: a sequence of tiles, or one where there is no B."""

    content: Tensor     # f, (B, H, W, 64), in the network's precision
    rstd: Tensor        # r, (B, H, W) float32

    def __getitem__(self, tile: int | slice | None) -> Pixels:
        return Pixels(self.content[tile], self.rstd[tile])

    def __len__(self) -> int:
        return len(self.rstd)


def preprocess(frames: Tensor, corners: Tensor, weight: Tensor, bias: Tensor, sums: Tensor,
               squares: Tensor, dtype: torch.dtype) -> Pixels:
    """Frames -> pixels.

    Parameters
    ----------
    frames : (B, 2, H', W', 3) uint8 or float32, 0 to 255, contiguous
        Tiles, or one image of any size for all of them (B = 1).
    corners : (T, 2) int32
        (y, x) of the tiles' first pixels.
    weight, bias : (64, 64), (64,) float32
        From a patch's 54 values times 255, and 10 zeros, to the content.
    sums, squares : (H, W) float32
        Of a pixel's position features.
    dtype : of the content
    """
    (height, width), tiles = sums.shape, len(corners)
    content = torch.empty(tiles, height, width, CONTENT, dtype=dtype, device=frames.device)
    rstd = torch.empty(tiles, height, width, device=frames.device)
    block = 64
    kernels.preprocess_kernel[cdiv(width, block), height, tiles](
        frames, corners, weight, bias, sums, squares, content, rstd, *frames.shape[2:4],
        frames[0].numel() if len(frames) > 1 else 0, height, width,
        BLOCK=block, PRECISION=product_of(torch.float32), num_warps=4)
    return Pixels(content, rstd)


def read(pixels: Pixels, content: Tensor, rows: Tensor, columns: Tensor, blocks: Blocks) -> Tensor:
    """Run the encoder's attention of latents to all pixels.

    ``content``: g_f (L, 64), ``rows``: A (H, L), ``columns``: B (L, W), the latter two float32;
    scores are r (f . g_f + A + B) log 2. Gives the softmax's means of [r f, r of each row, r of
    each column], (B, L, 64 + H + W) in the pixels' precision.
    """
    tiles, height, width = pixels.rstd.shape
    latents, device = len(content), content.device
    block_l, block_x = blocks.read
    stripes = cdiv(width, block_x)
    wanted = cdiv(PROGRAMS, cdiv(latents, block_l) * stripes * tiles)
    splits = cdiv(height, cdiv(height, min(height, wanted)))                    # none is empty

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    parts = (new(tiles, splits, stripes, latents), new(tiles, splits, stripes, latents),
             new(tiles, splits, stripes, latents, CONTENT), new(tiles, splits, latents, width),
             new(tiles, stripes, height, latents), new(tiles, stripes, height, latents))
    kernels.read_kernel[cdiv(latents, block_l), stripes, tiles * splits](
        pixels.content, pixels.rstd, content, rows, columns, *parts,
        latents, height, width, splits, cdiv(height, splits), BLOCK_L=block_l, BLOCK_X=block_x,
        PRECISION=product_of(pixels.content.dtype), num_warps=blocks.read_warps,
        num_stages=blocks.read_stages)

    means = torch.empty(tiles, latents, CONTENT + height + width, dtype=pixels.content.dtype,
                        device=device)
    block_l, block = 32, 64
    chunks = 1 + cdiv(height, block) + cdiv(width, block)
    kernels.combine_kernel[cdiv(latents, block_l), chunks, tiles](
        *parts, means, latents, height, width, splits, stripes,
        BLOCK_L=block_l, BLOCK_X=block_x, BLOCK=block, num_warps=4)
    return means


def attend(qkv: Tensor, heads: int, blocks: Blocks) -> Tensor:
    """Attend to each other: queries, keys, values (B, L, 3 D) of latents -> (B, L, D).

    Queries are scaled, so that products are in units of log 2.
    """
    tiles, latents, channels = qkv.shape
    channels //= 3
    width = channels // heads
    if width < 16 or next_power_of_2(width) != width:       # not what the kernel can multiply
        q, k, v = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=LOG2).transpose(1, 2).flatten(2)
    out = torch.empty(tiles, latents, channels, dtype=qkv.dtype, device=qkv.device)
    block_q, block_k = blocks.attend
    kernels.attend_kernel[cdiv(latents, block_q), tiles * heads](
        qkv, out, latents, heads, WIDTH=width, BLOCK_Q=block_q, BLOCK_K=block_k,
        EVEN=latents % block_k == 0, PRECISION=product_of(qkv.dtype),
        num_warps=blocks.attend_warps, num_stages=blocks.attend_stages)
    return out


def add_norm(z: Tensor, y: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Add y to z (..., D) float32, in place; LayerNorm of that, in a precision."""
    x = torch.empty_like(z, dtype=dtype)
    channels = z.shape[-1]
    kernels.add_norm_kernel[z.numel() // channels,](
        z, y, gamma, beta, x, channels, BLOCK=next_power_of_2(channels), num_warps=2)
    return x


@dataclass(frozen=True)
class Head:
    """Weights from the decoder's attention to flow; widths are padded with zeros."""

    dense: Tensor           # (VALUE, HIDDEN), in the network's precision, LayerNorm's gamma in it
    dense_bias: Tensor      # (HIDDEN,) float32
    flow: Tensor            # (2, VALUE) float32: flow of the attention's result
    hidden_flow: Tensor     # (2, HIDDEN) float32: flow of the MLP's hidden layer
    bias: Tensor            # (2,) float32


def write(pixels: Pixels, keys: Tensor, exact: Tensor, values: Tensor, ys: Tensor, xs: Tensor,
          head: Head, blocks: Blocks, *, grid: bool) -> Tensor:
    """Run the decoder's attention of queries to all latents, and all that follows.

    Parameters
    ----------
    pixels : of B tiles
    exact : (B, 64 + H + W + 1, L) float32
        H_f, C, D, e of the latents; scores are (r (f . H_f + C + D) + e) log 2.
    keys : (B, 64 + H + W + H + W, L)
        In half precision: H_f, C, D, then what is missing of C and D. In float32: `exact`.
    values : (B, L, VALUE)
        322 channels, a 1, zeros.
    ys, xs : (B, R), (B, C) int32
        Rows and columns if ``grid``: all pairs are asked for; otherwise points, R = C. Negative
        ones are left out.

    Returns
    -------
    (B, R, C, 2) or (B, R, 2) float32
        Flow, pixels; undefined where left out.
    """
    tiles, height, width = pixels.rstd.shape
    rows, columns, _, block_h = blocks.write
    count = ys.shape[1]
    if grid:
        flow = torch.empty(tiles, count, xs.shape[1], 2, device=ys.device)
        programs = cdiv(count, rows) * cdiv(xs.shape[1], columns)
    else:
        flow = torch.empty(tiles, count, 2, device=ys.device)
        programs = cdiv(count, rows * columns)
    if flow.numel():
        kernels.write_kernel[programs, tiles](
            pixels.content, pixels.rstd, keys, exact, values, ys, xs, head.dense, head.dense_bias,
            head.flow, head.hidden_flow, head.bias, flow, values.shape[1], height, width, count,
            xs.shape[1], ROWS=rows, COLUMNS=columns, GRID=grid, SPLIT=keys.dtype != torch.float32,
            BLOCK_L=blocks.latents(grid=grid), BLOCK_H=block_h, PRECISION=product_of(keys.dtype),
            num_warps=blocks.write_warps, num_stages=blocks.write_stages)
    return flow
