# SPDX-License-Identifier: Apache-2.0
"""Perceiver IO: encode, process, decode, shared by the official and the lite variant.

Jaegle et al., "Perceiver IO: A General Architecture for Structured Inputs & Outputs", 2021,
https://arxiv.org/abs/2107.14795. A small array of latents reads a large array of inputs by
cross-attention (encode), thinks by self-attention (process), and is read by any set of queries
(decode), so that cost is linear in the inputs and in the outputs.
"""
from __future__ import annotations

from perceiver_flow_ros.model.accelerated import accelerated
from torch import nn, Tensor
from torch.nn import functional as F

FEW = 128       # queries: on a GPU a fused kernel has a program for so many, too few to fill it


class Attention(nn.Module):
    """Pre-normalised multi-head attention, softmax(q k^T / sqrt(d)) v, then a projection.

    Self-attention where ``input_channels`` is None, otherwise cross-attention from the hidden
    array to the inputs.

    Parameters
    ----------
    channels, input_channels : width of the attending array and of the one attended to.
    qk_channels, v_channels : widths of queries and keys, and of values, over all heads.
    output_channels : width of the result.
    """

    def __init__(self, channels: int, input_channels: int | None = None, *, qk_channels: int,
                 v_channels: int, output_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layernorm1 = nn.LayerNorm(channels)
        if input_channels:
            self.layernorm2 = nn.LayerNorm(input_channels)
        kv_channels = input_channels or channels
        self.query = nn.Linear(channels, qk_channels)
        self.key = nn.Linear(kv_channels, qk_channels)
        self.value = nn.Linear(kv_channels, v_channels)
        self.output = nn.Linear(v_channels, output_channels)

    def forward(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """``hidden``: (B, M, channels), ``inputs``: (B, N, input_channels) -> (B, M, output)."""
        return self.output(self.attended(hidden, inputs))

    def attended(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        """As `forward`, before the last projection: (B, M, v_channels)."""
        if inputs is None:
            q, k, v = projected(hidden, self.layernorm1, self.query, self.key, self.value)
        else:
            q, = projected(hidden, self.layernorm1, self.query)
            k, v = projected(inputs, self.layernorm2, self.key, self.value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v).transpose(1, 2).flatten(2)


@accelerated
def projected(x: Tensor, norm: nn.LayerNorm, *layers: nn.Linear) -> list[Tensor]:
    """Give what several layers make of a norm of x."""
    x = norm(x)
    return [layer(x) for layer in layers]


@accelerated
def added(hidden: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:
    """Add what a layer makes of x."""
    return hidden + layer(x)


@accelerated
def with_mlp(hidden: Tensor, norm: nn.LayerNorm, mlp: MLP) -> Tensor:
    """Add what an MLP makes of a norm of it."""
    return hidden + mlp(norm(hidden))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of queries (B, heads, M, d), keys and values (B, heads, N, d)."""
    if q.device.type != 'cpu' and q.shape[-2] <= FEW < k.shape[-2] / 8:
        return attend_by_few(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attend_by_few(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `attend`, in operations that share out the keys, too."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


class MLP(nn.Module):
    """Two dense layers with an exact (erf) GELU between them."""

    def __init__(self, channels: int, widening: int = 1):
        super().__init__()
        self.dense1 = nn.Linear(channels, widening * channels)
        self.dense2 = nn.Linear(widening * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.dense1(x)))


class Layer(nn.Module):
    """Attention and MLP, each with its residual; the one around the attention is optional."""

    def __init__(self, channels: int, input_channels: int | None = None, *, qk_channels: int,
                 v_channels: int, heads: int, widening: int = 1, query_residual: bool = True):
        super().__init__()
        self.query_residual = query_residual
        self.attention = Attention(channels, input_channels, qk_channels=qk_channels,
                                   v_channels=v_channels, output_channels=channels, heads=heads)
        self.layernorm = nn.LayerNorm(channels)
        self.mlp = MLP(channels, widening)

    def forward(self, hidden: Tensor, inputs: Tensor | None = None) -> Tensor:
        attended = self.attention.attended(hidden, inputs)
        hidden = (added(hidden, attended, self.attention.output) if self.query_residual
                  else self.attention.output(attended))
        return with_mlp(hidden, self.layernorm, self.mlp)


class Encoder(nn.Module):
    """Latents that read the inputs once and then attend to each other."""

    def __init__(self, cross_attention: Layer, self_attends: list[Layer]):
        super().__init__()
        self.cross_attention = cross_attention
        self.self_attends = nn.ModuleList(self_attends)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        """``latents``: (B, M, D), ``inputs``: (B, N, C) -> latents (B, M, D)."""
        latents = self.cross_attention(latents, inputs)
        for layer in self.self_attends:
            latents = layer(latents)
        return latents


class Decoder(nn.Module):
    """Queries that read the latents; each query is answered independently of the others."""

    def __init__(self, cross_attention: Layer, final_layer: nn.Module):
        super().__init__()
        self.cross_attention = cross_attention
        self.final_layer = final_layer

    def forward(self, queries: Tensor, latents: Tensor) -> Tensor:
        """Answer ``queries`` (B, N, C) from ``latents`` (B, M, D): (B, N, outputs)."""
        return self.final_layer(self.cross_attention(queries, latents))
