# SPDX-License-Identifier: Apache-2.0
"""The official network on a GPU: the folded mathematics with one kernel per attention.

Same interface and the same three facts as `folded.FoldedNetwork`. In half precision the
operands of all matrix products are halves, while sums, softmax, LayerNorm and the latents between
the layers stay in float32. Nothing here waits for the GPU or depends on values, so a whole pair
can be captured in a CUDA graph. Importing this needs Triton.
"""
from __future__ import annotations

from collections.abc import Iterable
import math
from typing import cast, NamedTuple

from perceiver_flow_ros.model import launch
from perceiver_flow_ros.model.folded import centred, Queries
from perceiver_flow_ros.model.launch import Blocks, HIDDEN, Pixels, VALUE
from perceiver_flow_ros.model.official import (
    CONTENT,
    OfficialNetwork,
    PATCH,
    PIXELS,
    Positions,
    TOKEN,
)
from perceiver_flow_ros.model.perceiver import Decoder, Layer
import torch
from torch import nn, Tensor
from torch.nn import functional as F

LOG2E = math.log2(math.e)             # scores are in units of log 2: GPUs have 2^x, not e^x

Affine = tuple[Tensor, Tensor]        # weight and bias


class PreparedMLP(NamedTuple):
    """A layer's MLP and the norm before it."""

    norm: Affine
    dense1: Affine
    dense2: Affine


class PreparedLayer(NamedTuple):
    """A self-attention layer: queries (in units of log 2), keys and values as one product."""

    heads: int
    norm: Affine
    qkv: Affine
    output: Affine
    mlp: PreparedMLP


class CudaNetwork:
    """An `OfficialNetwork`, folded, on its device, in any precision, for inference only."""

    @torch.no_grad()
    def __init__(self, network: OfficialNetwork, precision: torch.dtype = torch.float32,
                 blocks: Blocks | None = None):
        self.config, self.precision = network.config, precision
        self.device = network.latents.device
        self.blocks = blocks or launch.blocks_for(precision, launch.room_on(self.device))
        self._prepare_pixels(network.content, network.positions)
        encoder, decoder = network.encoder, network.decoder
        self._prepare_reader(network.latents, encoder.cross_attention, network.positions)
        layers = cast(Iterable[Layer], encoder.self_attends)
        self.layers = [self._prepare_layer(layer) for layer in layers]
        self._prepare_writer(decoder, network.positions)

    # Weights, once

    def _prepare_pixels(self, content: nn.Linear, positions: Positions) -> None:
        weight = F.pad(content.weight.T / 255, (0, 0, 0, 64 - PATCH))
        rows, columns = positions.rows, positions.columns
        sums, squares = ((rows ** power).sum(1)[:, None] + (columns ** power).sum(1)
                         for power in (1, 2))
        self.patches = weight, content.bias, sums, squares

    def _prepare_reader(self, latents: Tensor, layer: Layer, positions: Positions) -> None:
        attention = layer.attention
        gamma, beta = attention.layernorm2.weight, attention.layernorm2.bias
        query = attention.query(attention.layernorm1(latents)) * (LOG2E / TOKEN ** 0.5)
        g = expand(centred(query @ attention.key.weight * gamma).T, positions)
        content, rows, columns = g.split((CONTENT, *self.config.train_size))
        self.content = content.T.to(self.precision).contiguous()                    # (L, 64)
        self.rows, self.columns = rows.contiguous(), columns.T.contiguous()   # (H, L), (L, W)

        value = attention.output.weight @ centred(attention.value.weight * gamma)
        self.mix = expand(value.T, positions).to(self.precision)
        self.residual = latents + attention.output(attention.value(beta))
        self.read_mlp = self._prepare_mlp(layer)

    def _prepare_layer(self, layer: Layer) -> PreparedLayer:
        attention = layer.attention
        projections = (attention.query, attention.key, attention.value)
        scale = torch.ones(len(projections), 1, device=self.device)
        scale[0] = LOG2E / (attention.query.out_features // attention.heads) ** 0.5
        qkv = (torch.cat([p.weight * s for p, s in zip(projections, scale)]).to(self.precision),
               torch.cat([p.bias * s for p, s in zip(projections, scale)]).to(self.precision))
        return PreparedLayer(attention.heads, norm_of(attention.layernorm1), qkv,
                             self._linear(attention.output), self._prepare_mlp(layer))

    def _prepare_mlp(self, layer: Layer) -> PreparedMLP:
        return PreparedMLP(norm_of(layer.layernorm), self._linear(layer.mlp.dense1),
                           self._linear(layer.mlp.dense2))

    def _prepare_writer(self, decoder: Decoder, positions: Positions) -> None:
        layer, final = decoder.cross_attention, cast(nn.Linear, decoder.final_layer)
        attention, norm, mlp = layer.attention, layer.layernorm, layer.mlp
        gamma, beta = attention.layernorm1.weight, attention.layernorm1.bias
        self.write_norm = norm_of(attention.layernorm2)

        # [H_f; C; D; e] = query^T (W_k z + b_k)
        query = torch.cat([expand(centred(attention.query.weight * gamma).T, positions),
                           attention.query(beta)[None]])                            # (929, D)
        query = query * (LOG2E / query.shape[1] ** 0.5)
        self.key_weight = (query @ attention.key.weight).contiguous()
        self.key_bias = (query @ attention.key.bias)[:, None]

        # W_o (W_v z + b_v) + b_o, 322 channels, and a 1 after them
        spare, spare_hidden = VALUE - TOKEN, HIDDEN - TOKEN
        weight = attention.output.weight @ attention.value.weight
        bias = F.pad(attention.output(attention.value.bias), (0, spare))
        bias[TOKEN] = 1
        self.value = (F.pad(weight, (0, 0, 0, spare)).to(self.precision),
                      bias.to(self.precision))

        # LayerNorm's gamma and beta move into the MLP, the last layers become one
        dense, bias = mlp.dense1.weight * norm.weight, mlp.dense1(norm.bias)
        self.head = launch.Head(
            F.pad(dense.T, (0, spare_hidden, 0, spare)).to(self.precision).contiguous(),
            F.pad(bias, (0, spare_hidden)), F.pad(PIXELS * final.weight, (0, spare)),
            F.pad(PIXELS * final.weight @ mlp.dense2.weight, (0, spare_hidden)),
            PIXELS * final(mlp.dense2.bias))

    def _linear(self, layer: nn.Linear) -> Affine:
        return layer.weight.to(self.precision), layer.bias.to(self.precision)

    # Frames -> pixels and latents

    @torch.inference_mode()
    def encode(self, frames: Tensor, corners: Tensor | None = None) -> tuple[Pixels, Tensor]:
        """Look at tiles.

        Parameters
        ----------
        frames : (B, 2, H, W, 3) RGB, 0 to 255, uint8 or float32, on the device
            Tiles; or, with corners, one image of any size, B = 1.
        corners : (T, 2) int32
            (y, x) of the tiles' first pixels in the image. Beyond its end its last row and column
            go on.

        Returns
        -------
        `Pixels` of the tiles, latents (T, L, D) float32
        """
        pixels = self.preprocess(frames, corners)
        return pixels, self.process(self.read(pixels))

    def preprocess(self, frames: Tensor, corners: Tensor | None = None) -> Pixels:
        """As `encode`, only the pixels."""
        if corners is None:
            corners = frames.new_zeros(len(frames), 2, dtype=torch.int32)
        return launch.preprocess(frames.contiguous(), corners, *self.patches, self.precision)

    def read(self, pixels: Pixels) -> Tensor:
        """``pixels`` of B tiles -> means of [p r f, row sums, column sums], (B, L, 64 + H + W)."""
        return launch.read(pixels, self.content, self.rows, self.columns, self.blocks)

    def process(self, means: Tensor) -> Tensor:
        """Process what was read, (B, L, 64 + H + W), to latents (B, L, D) float32."""
        z = self.residual.repeat(len(means), 1, 1)
        y = self._mlp(z, means @ self.mix, self.read_mlp)
        for layer in self.layers:
            x = self.add_norm(z, y, *layer.norm)
            attended = launch.attend(F.linear(x, *layer.qkv), layer.heads, self.blocks)
            y = F.linear(attended, *layer.output)
            y = self._mlp(z, y, layer.mlp)
        return z.add_(y)

    def _mlp(self, z: Tensor, y: Tensor, mlp: PreparedMLP) -> Tensor:
        """Do z += y; give what the MLP then adds."""
        x = self.add_norm(z, y, *mlp.norm)
        return F.linear(F.gelu(F.linear(x, *mlp.dense1)), *mlp.dense2)

    def add_norm(self, z: Tensor, y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Do z += y, (..., D) float32; give LayerNorm of that in the network's precision."""
        return launch.add_norm(z, y, gamma, beta, self.precision)

    # Latents and queries -> flow

    @torch.inference_mode()
    def answers(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give what latents (B, L, D) answer with: keys, keys in float32, values.

        Keys are rows of (B, ..., L): content, C, D, then in half precision what is missing of C
        and D, or in float32 e.
        """
        z = F.layer_norm(z, z.shape[-1:], *self.write_norm)
        weight = self.key_weight.expand(len(z), -1, -1)
        exact = torch.baddbmm(self.key_bias, weight, z.transpose(1, 2))
        values = F.linear(z.to(self.precision), *self.value)
        if self.precision == torch.float32:
            return exact, exact, values
        keys = exact[:, :-1].to(self.precision)
        missing = exact[:, CONTENT:-1] - keys[:, CONTENT:]
        return torch.cat([keys, missing.to(self.precision)], 1), exact, values

    @torch.inference_mode()
    def decode_grid(self, pixels: Pixels, z: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
        """Flow of all pairs of rows and columns.

        ``pixels``, ``z``: of B tiles; ``ys``: (B, R), ``xs``: (B, C) int32, negative ones are left
        out -> (B, R, C, 2) float32, pixels; undefined where left out.
        """
        return launch.write(pixels, *self.answers(z), ys, xs, self.head, self.blocks, grid=True)

    @torch.inference_mode()
    def decode_points(self, pixels: Pixels, z: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
        """As `decode_grid`, of points (ys, xs), (B, N) int32 each -> (B, N, 2)."""
        return launch.write(pixels, *self.answers(z), ys, xs, self.head, self.blocks, grid=False)

    def decode(self, pixels: Pixels, z: Tensor, queries: Queries) -> list[Tensor]:
        """Flow of one tile, as `FoldedNetwork.decode`."""
        every = torch.arange(pixels.rstd.shape[1])
        columns = [every[x] for _, x in queries]
        counts = [len(x) for x in columns]
        rows = torch.tensor([y for y, _ in queries]).repeat_interleave(torch.tensor(counts))
        return list(self.decode_at(pixels, z, rows, torch.cat(columns)).split(counts))

    def decode_at(self, pixels: Pixels, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Flow (N, 2) of one tile at its pixels (y, x), (N,) each, in any order."""
        ys, xs = (i.to(self.device, torch.int32)[None].contiguous() for i in (y, x))
        return self.decode_points(pixels[None], z[None], ys, xs)[0]

    def __call__(self, frames: Tensor) -> Tensor:
        """``frames``: (B, 2, H, W, 3) RGB, 0 to 255 -> flow (B, H, W, 2), pixels."""
        pixels, z = self.encode(frames)
        ys, xs = (torch.arange(n, dtype=torch.int32, device=self.device).repeat(len(z), 1)
                  for n in self.config.train_size)
        return self.decode_grid(pixels, z, ys, xs)


def norm_of(layer: nn.LayerNorm) -> Affine:
    """Weight and bias of a LayerNorm."""
    return layer.weight, layer.bias


def expand(g: Tensor, positions: Positions) -> Tensor:
    """Rows g (322, n), one a channel of a token -> (64 + H + W, n): content, A(y), B(x)."""
    return torch.cat([g[:CONTENT], positions.rows @ g[positions.row_channels],
                      positions.columns @ g[positions.column_channels]])
