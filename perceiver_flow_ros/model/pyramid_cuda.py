# SPDX-License-Identifier: Apache-2.0
"""`pyramid.convex_upsample` on a GPU, as one Triton kernel."""
from perceiver_flow_ros.model.evidence_cuda import any_size, FEW, inside, mine, PIXELS, TOKEN
from torch import Tensor
from triton import cdiv
import triton.language as tl

NINE = tl.constexpr(16)         # 3x3 neighbours, as a power of two


@any_size
def upsample_kernel(flow, logits, out, rows, columns, BLOCK: tl.constexpr):
    """Combine 3x3 tokens. Program: a pixel of every one of BLOCK tokens."""
    pixel, item, size = tl.program_id(1), tl.program_id(2), rows * columns
    n, new = mine(size, BLOCK)
    y, x = n // columns, n % columns
    k = tl.arange(0, NINE)
    one = (k < 9)[:, None]
    logit = tl.load(logits + ((item * 9 + k) * PIXELS + pixel)[:, None] * size + n[None, :],
                    mask=one, other=float('-inf')).to(tl.float32)
    weight = tl.exp(logit - tl.max(logit, 0)[None, :])
    weight = weight / tl.sum(weight, 0)[None, :]
    row = inside(y[None, :] + (k // 3)[:, None] - 1, rows)
    column = inside(x[None, :] + (k % 3)[:, None] - 1, columns)
    at = flow + item * 2 * size + row * columns + column
    out += (item * 2 * PIXELS * size + (y * TOKEN + pixel // TOKEN) * columns * TOKEN
            + x * TOKEN + pixel % TOKEN)
    for component in tl.static_range(2):
        value = tl.load(at + component * size, mask=one, other=0.)
        tl.store(out + component * PIXELS * size, tl.sum(weight * value, 0), mask=new)


def convex_upsample(flow: Tensor, mask: Tensor) -> Tensor:  # noqa: D103
    batch, _, rows, columns = flow.shape
    out = flow.new_empty(batch, 2, TOKEN.value * rows, TOKEN.value * columns)
    upsample_kernel[cdiv(rows * columns, FEW), PIXELS.value, batch](
        flow.contiguous(), mask.contiguous(), out, rows, columns, BLOCK=FEW)
    return out
