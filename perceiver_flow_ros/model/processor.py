# SPDX-License-Identifier: Apache-2.0
"""Self-attention among the latents, arranged for CPUs: the same function as `perceiver.Layer`."""
from perceiver_flow_ros.model.parallel import parallel, parts
from perceiver_flow_ros.model.perceiver import Layer
import torch
from torch import nn, Tensor
from torch.nn import functional as F

PART = 512      # latents projected at a time, at most


class Processor(nn.Module):
    """A self-attention layer, in parallel over the latents and over the heads."""

    projection: Tensor      # (D, 3 D): W_q, W_k, W_v side by side
    bias: Tensor            # (3 D,)

    def __init__(self, layer: Layer):
        super().__init__()
        attention = layer.attention
        three = attention.query, attention.key, attention.value
        self.register_buffer('projection', torch.cat([x.weight for x in three]).T.contiguous())
        self.register_buffer('bias', torch.cat([x.bias for x in three]))
        self.heads, self.layernorm1, self.output = (
            attention.heads, attention.layernorm1, attention.output)
        self.layernorm2, self.mlp = layer.layernorm, layer.mlp

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, L, D) that have attended to each other."""
        flat = z.flatten(0, 1)
        qkv = flat.new_empty(len(flat), self.projection.shape[1])
        attended, out = torch.empty_like(flat), torch.empty_like(flat)
        by_head = (*z.shape[:2], self.heads, -1)
        q, k, v = (x.reshape(by_head).transpose(1, 2) for x in qkv.chunk(3, -1))
        answers = attended.view(by_head).transpose(1, 2)                     # (B, heads, L, d)

        def project(part: slice) -> None:
            torch.addmm(self.bias, self.layernorm1(flat[part]), self.projection, out=qkv[part])

        def attend(some: slice) -> None:
            mine, keys, values = (x[:, some].contiguous() for x in (q, k, v))   # for the cache
            answers[:, some] = F.scaled_dot_product_attention(mine, keys, values)

        def rest(part: slice) -> None:
            x = flat[part] + self.output(attended[part])
            torch.add(x, self.mlp(self.layernorm2(x)), out=out[part])

        latents, heads = parts(len(flat), PART, z.device), parts(self.heads, 1, z.device)
        for task, items in ((project, latents), (attend, heads), (rest, latents)):
            parallel(task, items, z.device)
        return out.view_as(z)
