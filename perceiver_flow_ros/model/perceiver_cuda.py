# SPDX-License-Identifier: Apache-2.0
"""The functions of `perceiver` on a GPU: a linear layer and what is around it are one kernel.

Made for the narrow layers of lite; wider ones are left to PyTorch.
"""
from __future__ import annotations

from perceiver_flow_ros.model.evidence_cuda import any_size
from perceiver_flow_ros.model.kernels import product
from perceiver_flow_ros.model.launch import product_of
from perceiver_flow_ros.model.perceiver import MLP
import torch
from torch import nn, Tensor
from torch.nn import functional as F
from triton import cdiv
import triton.language as tl

WIDEST = 256        # inputs of a layer that is computed here
FEW = 256           # rows up to which small blocks are better: there are few programs


@any_size
def dense_kernel(x, weight, bias, gamma, beta, residual, out, rows, inputs, outputs, epsilon,
                 NORM: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr):
    """LayerNorm, a linear layer, GELU, a residual, each but the second optional. Program: a block.

    Sums are in float32, products in the precision of the weights.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.minimum(m, rows - 1)[:, None] * inputs
    weight += tl.minimum(n, outputs - 1)[None, :] * inputs
    i = tl.arange(0, BLOCK_K)
    mean = tl.zeros([BLOCK_M], tl.float32)
    scale = mean + 1
    if NORM:
        for start in range(0, inputs, BLOCK_K):
            k = start + i[None, :]
            mean += tl.sum(tl.load(x + k, mask=k < inputs, other=0.).to(tl.float32), 1)
        mean = mean / inputs
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, inputs, BLOCK_K):
            k = start + i[None, :]
            value = tl.load(x + k, mask=k < inputs, other=0.).to(tl.float32) - mean[:, None]
            value = tl.where(k < inputs, value, 0.)
            square += tl.sum(value * value, 1)
        scale = 1 / tl.sqrt(square / inputs + epsilon)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + i
        value = tl.load(x + k[None, :], mask=k[None, :] < inputs, other=0.).to(tl.float32)
        if NORM:
            value = (value - mean[:, None]) * scale[:, None]
            value = (value * tl.load(gamma + k, mask=k < inputs, other=0.)[None, :]
                     + tl.load(beta + k, mask=k < inputs, other=0.)[None, :])
        w = tl.load(weight + k[:, None], mask=k[:, None] < inputs, other=0.)
        total = product(value.to(w.dtype), w, total, PRECISION)
    total += tl.load(bias + n, mask=n < outputs, other=0.).to(tl.float32)[None, :]
    if GELU:
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    new = (m < rows)[:, None] & (n < outputs)[None, :]
    at = m[:, None] * outputs + n[None, :]
    if ADD:
        total += tl.load(residual + at, mask=new, other=0.).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=new)


def dense(x: Tensor, layer: nn.Linear, norm: nn.LayerNorm | None = None, *, gelu: bool = False,
          residual: Tensor | None = None) -> Tensor:
    """Apply all that is given to x (..., inputs): residual + GELU(layer(norm(x)))."""
    outputs, inputs = layer.weight.shape
    if inputs > WIDEST:
        y = layer(norm(x) if norm else x)
        y = F.gelu(y) if gelu else y
        return y if residual is None else residual + y
    x, weight = x.contiguous(), layer.weight
    rows = x.numel() // inputs
    dtype = weight.dtype
    if residual is not None:
        residual, dtype = residual.contiguous(), torch.promote_types(residual.dtype, dtype)
    out = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device=x.device)
    block = 16 if rows <= FEW else 64
    dense_kernel[cdiv(rows, block), cdiv(outputs, 32)](
        x, weight, layer.bias, norm.weight if norm else weight, norm.bias if norm else weight,
        residual if residual is not None else x, out, rows, inputs, outputs,
        norm.eps if norm else 0., NORM=norm is not None, GELU=gelu, ADD=residual is not None,
        PRECISION=product_of(weight.dtype), BLOCK_M=block, BLOCK_N=32, BLOCK_K=32)
    return out


def projected(x: Tensor, norm: nn.LayerNorm, *layers: nn.Linear) -> list[Tensor]:  # noqa: D103
    return [dense(x, layer, norm) for layer in layers]


def added(hidden: Tensor, x: Tensor, layer: nn.Linear) -> Tensor:  # noqa: D103
    return dense(x, layer, residual=hidden)


def with_mlp(hidden: Tensor, norm: nn.LayerNorm, mlp: MLP) -> Tensor:  # noqa: D103
    return dense(dense(hidden, mlp.dense1, norm, gelu=True), mlp.dense2, residual=hidden)
