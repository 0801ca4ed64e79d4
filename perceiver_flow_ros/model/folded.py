# SPDX-License-Identifier: Apache-2.0
"""The official network, folded: the same function at a fraction of the work, exactly.

A token is x(y, x) = [f, P_y, P_x]: 64 channels f of content, Fourier features P_y of its row and
P_x of its column. Three facts spare us the 182,528 tokens of 322 channels and their projections:

1. Positions are separable. For any vector g, g . x(y, x) = g_f . f + A(y) + B(x), one value a row,
   one value a column and a dot product of 64.
2. LayerNorm folds. LN(x) = gamma (x - mean) r + beta, r = 1 / std(x). Make g' = gamma g and
   subtract its mean over channels: then g . LN(x) = r g' . x + constant, and the mean is gone.
3. Projections move to the side of the 2048 latents. Encoder: q . (W_k LN(x)) = (W_k^T q) . LN(x),
   and W_v is applied to the weighted mean of x. Decoder: W_q moves to the keys, W_o to the values.

What a pixel keeps is [r f, r, 1], 66 numbers. The scores of one image row y with all latents are
one outer product and one matrix product, S = r B(x) + [r f, r, 1] [g_f; A(y); c], and never exist
for more than a row at a time. A softmax does not change when a constant is subtracted from all its
scores, so constants vanish (encoder) or are chosen so that nothing overflows.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
import math
from typing import cast

from perceiver_flow_ros.model.official import (
    CONTENT,
    OfficialNetwork,
    patches,
    PIXELS,
    Positions,
    TOKEN,
)
from perceiver_flow_ros.model.parallel import parallel, parts
from perceiver_flow_ros.model.perceiver import Decoder, Layer
from perceiver_flow_ros.model.processor import Processor
import torch
from torch import nn, Tensor
from torch.nn import functional as F

R = CONTENT             # index of r in a pixel's [r f, r, 1]
ONE = CONTENT + 1       # index of the 1: its weight is a constant, its sum the softmax's divisor
LOG2E = math.log2(math.e)
HEADROOM = 30.          # a sample of the scores is shifted this far below 0; exp2 overflows at 128
SAMPLES = (16, 1)       # every 16th image row; all of them if that overflows, which is never seen
BLOCK = 256             # latents that read at a time, at most
QUERIES = 8             # answered one after the other, in the same memory, at most

Queries = Sequence[tuple[int, slice | Tensor]]      # (row, its columns) of the pixels to decode


def centred(weight: Tensor) -> Tensor:
    """Rows without their mean: they no longer see the mean of what they are multiplied with."""
    return weight - weight.mean(dim=1, keepdim=True)


def split(g: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors g (n, 322) -> g_f (64, n), A (H, n), B (W, n), see the first fact."""
    return (g[:, :CONTENT].T.contiguous(),
            positions.rows @ g[:, positions.row_channels].T,
            positions.columns @ g[:, positions.column_channels].T)


def join(content: Tensor, rows: Tensor, columns: Tensor, positions: Positions) -> Tensor:
    """Join sums of p f (64, n), of p over each row (H, n) and column (W, n) -> of p x (n, 322)."""
    x = content.new_empty(content.shape[1], TOKEN)
    x[:, :CONTENT] = content.T
    x[:, positions.row_channels] = rows.T @ positions.rows
    x[:, positions.column_channels] = columns.T @ positions.columns
    return x


class Preprocessor(nn.Module):
    """Frames -> [r f, r, 1] for each pixel."""

    sums: Tensor            # (H, W): of a pixel's position features, and of their squares
    squares: Tensor

    def __init__(self, content: nn.Linear, positions: Positions):
        super().__init__()
        self.content = content
        rows, columns = positions.rows, positions.columns
        for name, power in (('sums', 1), ('squares', 2)):
            self.register_buffer(name, (rows ** power).sum(1)[:, None] + (columns ** power).sum(1),
                                 persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """``frames``: (B, 2, H, W, 3) RGB, 0 to 255 -> (B, H, W, 66)."""
        both = patches(frames)
        pixels = both.new_ones(*both.shape[:-1], ONE + 1)
        f = pixels.view(-1, ONE + 1)[:, :CONTENT]
        torch.addmm(self.content.bias, both.flatten(0, -2), self.content.weight.T, out=f)
        f = pixels[..., :CONTENT]
        mean = (f.sum(-1) + self.sums) / TOKEN
        square = torch.linalg.vector_norm(f, dim=-1).square() + self.squares
        pixels[..., R] = (square / TOKEN - mean.square() + 1e-5).rsqrt()
        f *= pixels[..., R:ONE]
        return pixels


class Reader(nn.Module):
    """Encoder cross-attention: latents that read all pixels. Its queries do not depend on them."""

    content: Tensor         # (64, L), (H, L), (W, L): the latents' g_f, A(y), B(x)
    rows: Tensor
    columns: Tensor
    value: Tensor           # (322, D): W_o W_v gamma
    residual: Tensor        # (L, D): the latents, and what the values' constants add

    def __init__(self, latents: Tensor, layer: Layer, positions: Positions):
        super().__init__()
        attention = layer.attention
        gamma, beta = attention.layernorm2.weight, attention.layernorm2.bias
        self.layer, self.positions = layer, positions

        query = attention.query(attention.layernorm1(latents)) * (LOG2E / TOKEN ** 0.5)
        content, rows, columns = split(centred(query @ attention.key.weight * gamma), positions)
        self.register_buffer('content', content)
        self.register_buffer('rows', rows)
        self.register_buffer('columns', columns)

        value = attention.output.weight @ centred(attention.value.weight * gamma)
        constant = attention.output(attention.value(beta))
        self.register_buffer('value', value.T)
        self.register_buffer('residual', latents + constant)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels``: (H, W, 66) -> latents (L, D) that have read them."""
        blocks = parts(len(self.residual), BLOCK, pixels.device)
        means = parallel(lambda block: self.mean(pixels, block), blocks, pixels.device)
        z = torch.addmm(self.residual, torch.cat(means), self.value)
        return z + self.layer.mlp(self.layer.layernorm(z))

    def mean(self, pixels: Tensor, block: slice) -> Tensor:
        """softmax(S) r x of some latents, (n, 322)."""
        height, width, _ = pixels.shape
        r = pixels[..., R, None]
        rows, columns = self.rows[:, block].contiguous(), self.columns[:, block].contiguous()
        weight = F.pad(self.content[:, block], (0, 0, 0, 2))                # [g_f; A(y); c]
        n = weight.shape[1]
        buffer, sums = pixels.new_empty(width, n), pixels.new_empty(ONE + 1, n)

        def scores(y: int) -> Tensor:
            torch.mul(columns, r[y], out=buffer)
            weight[R] = rows[y]
            return buffer.addmm_(pixels[y], weight)

        for step in SAMPLES:
            weight[ONE] = 0
            top = torch.stack([scores(y).amax(0) for y in range(0, height, step)]).amax(0)
            weight[ONE] = -top - HEADROOM

            total = pixels.new_zeros(ONE + 1, n)
            by_row, by_column = torch.empty_like(rows), torch.zeros_like(columns)
            for y in range(height):
                p = scores(y).exp2_()               # CPUs do it faster than exp
                torch.mm(pixels[y].T, p, out=sums)                           # sum_x p [r f, r, 1]
                total += sums
                by_row[y] = sums[R]
                by_column.addcmul_(p, r[y])
            mean = join(total[:CONTENT], by_row, by_column, self.positions)
            mean /= total[ONE, :, None]
            if total.isfinite().all() and mean.isfinite().all():
                break
        return mean


class Writer(nn.Module):
    """Decoder: pixels that ask all latents, each on its own. `queries` says which pixels."""

    query: Tensor           # (D, 322 + 1): W_q gamma and a constant, over sqrt(D)
    flow: Tensor            # (2, 322): W_f, in pixels
    hidden_flow: Tensor     # (2, 322): W_f W_2, in pixels
    bias: Tensor            # (2,)

    def __init__(self, decoder: Decoder, positions: Positions):
        super().__init__()
        layer = decoder.cross_attention
        attention = layer.attention
        gamma, beta = attention.layernorm1.weight, attention.layernorm1.bias
        self.attention, self.layernorm, self.dense = attention, layer.layernorm, layer.mlp.dense1
        self.positions = positions

        query = torch.cat([centred(attention.query.weight * gamma),
                           attention.query(beta)[:, None]], dim=1)
        self.register_buffer('query', query / len(query) ** 0.5)

        final, dense = cast(nn.Linear, decoder.final_layer), layer.mlp.dense2
        self.register_buffer('flow', PIXELS * final.weight)
        self.register_buffer('hidden_flow', PIXELS * final.weight @ dense.weight)
        self.register_buffer('bias', PIXELS * final(dense.bias))

    def forward(self, pixels: Tensor, z: Tensor, queries: Queries) -> list[Tensor]:
        """``pixels``: (H, W, 66), ``z``: (L, D) -> flow (n, 2), pixels, of each of the queries."""
        z = self.attention.layernorm2(z)
        keys = self.attention.key(z) @ self.query                            # (L, 322 + 1)
        content, rows, columns = split(keys[:, :-1], self.positions)
        constant = keys[:, -1:].T
        value = F.pad(self.attention.output(self.attention.value(z)), (0, -TOKEN % 16))

        def answer(some: Queries) -> list[Tensor]:
            widest = max(len(columns[x]) for _, x in some)
            buffer = pixels.new_empty(widest, len(z))        # once: a new one is memory to clear
            return [flow(y, x, buffer) for y, x in some]

        def flow(y: int, x: slice | Tensor, buffer: Tensor) -> Tensor:
            asking = pixels[y, x]                                            # (n, 66)
            weight = torch.cat([content, rows[y, None], constant])          # [g_f; A(y); c]
            scores = torch.mul(columns[x], asking[:, R, None], out=buffer[:len(asking)])
            scores.addmm_(asking, weight)
            o = (torch.softmax(scores, 1, out=scores) @ value)[:, :TOKEN]
            hidden = F.gelu(self.dense(self.layernorm(o)))
            return F.linear(o, self.flow, self.bias) + F.linear(hidden, self.hidden_flow)

        groups = [queries[part] for part in parts(len(queries), QUERIES, z.device)]
        return list(chain.from_iterable(parallel(answer, groups, pixels.device)))


class FoldedNetwork(nn.Module):
    """An `OfficialNetwork`, folded: takes over its parameters, for inference only.

    Tiles are encoded together and decoded one by one, at all pixels or at those asked for: what is
    decoded at a pixel does not depend on what else is. ``precision`` is that of the self-attention
    layers; the cross-attentions are computed in float32.
    """

    @torch.no_grad()
    def __init__(self, network: OfficialNetwork, precision: torch.dtype = torch.float32):
        super().__init__()
        self.config = network.config
        positions = network.positions
        self.preprocess = Preprocessor(network.content, positions)
        self.read = Reader(network.latents, network.encoder.cross_attention, positions)
        self.layers = nn.ModuleList(Processor(layer) for layer in
                                    cast(Iterable[Layer], network.encoder.self_attends))
        self.layers.to(precision)
        self.precision = precision
        self.write = Writer(network.decoder, positions)

    @torch.inference_mode()
    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """``frames``: (B, 2, H, W, 3) RGB, 0 to 255 -> pixels (B, H, W, 66), latents (B, L, D)."""
        pixels = self.preprocess(frames)
        z = torch.stack([self.read(tile) for tile in pixels]).to(self.precision)
        for layer in self.layers:
            z = layer(z)
        return pixels, z.float()

    @torch.inference_mode()
    def decode(self, pixels: Tensor, z: Tensor, queries: Queries) -> list[Tensor]:
        """Flow of one tile.

        Parameters
        ----------
        pixels : (H, W, 66), z : (L, D)
            One tile of what `encode` returned.
        queries : sequence of (row, columns)
            The pixels to decode: a row's number, and a slice or the indices of its columns.

        Returns
        -------
        list of (n, 2) float32, one a query
            Flow in pixels, (u right, v down).
        """
        return self.write(pixels, z, queries)

    @torch.inference_mode()
    def decode_at(self, pixels: Tensor, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Flow (N, 2) of one tile at its pixels (y, x), (N,) each, in any order."""
        y, order = y.sort()
        rows, counts = y.unique_consecutive(return_counts=True)
        queries = list(zip(rows.tolist(), x[order].split(counts.tolist())))
        flow = pixels.new_empty(len(y), 2)
        flow[order] = torch.cat([flow[:0], *self.decode(pixels, z, queries)])
        return flow

    def forward(self, frames: Tensor) -> Tensor:
        """``frames``: (B, 2, H, W, 3) RGB, 0 to 255 -> flow (B, H, W, 2), pixels."""
        pixels, latents = self.encode(frames)
        every = [(y, slice(None)) for y in range(pixels.shape[1])]
        return torch.stack([torch.stack(self.decode(x, z, every))
                            for x, z in zip(pixels, latents, strict=True)])
