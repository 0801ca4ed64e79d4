# SPDX-License-Identifier: Apache-2.0
"""Every kernel against plain PyTorch in float64, on random inputs: for `benchmark` and the tests.

Inputs are rounded to the kernel's precision first, so what is left are the errors of its products
and sums. Outputs are poisoned with NaN before, so that what was not written shows.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import math
from typing import Any

from perceiver_flow_ros.model import launch
from perceiver_flow_ros.model.launch import Blocks, HIDDEN, Pixels, VALUE
from perceiver_flow_ros.model.official import CONTENT, patches, TOKEN
import torch
from torch import Tensor
from torch.nn import functional as F

ALLOWED = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}     # relative errors


@dataclass(frozen=True)
class Sizes:
    """Of what the kernels are checked on."""

    tiles: int = 2
    height: int = 368
    width: int = 496
    latents: int = 2048
    channels: int = 512


@dataclass(frozen=True)
class Check:
    """A kernel's relative error |out - expected| / |expected|; not a number where it left gaps."""

    kernel: str
    precision: torch.dtype
    error: float

    @property
    def passed(self) -> bool:
        """Tell whether the error is what rounding explains."""
        return self.error <= ALLOWED[self.precision]


def check_kernels(device: torch.device | str, sizes: Sizes, precision: torch.dtype, seed: int,
                  blocks: Blocks | None = None) -> Iterator[Check]:
    """Run every kernel once."""
    random = torch.Generator().manual_seed(seed)
    blocks = blocks or launch.blocks_for(precision, launch.room_on(torch.device(device)))

    def normal(*shape: int, scale: float = 1., dtype: torch.dtype = torch.float32) -> Tensor:
        return (scale * torch.randn(shape, generator=random)).to(dtype).to(device)

    for name, make in (('preprocess', preprocessing), ('read', reading), ('attend', attending),
                       ('add_norm', adding),
                       ('write grid', writing_grid), ('write points', writing_points)):
        with poisoned():
            out, expected = make(normal, sizes, precision, blocks)
        yield Check(name, precision, relative_error(out, expected))


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Give |out - expected| / |expected| in float64."""
    return float((out.double() - expected).norm() / expected.norm())


class poisoned:
    """While it is open, memory that `torch.empty` gives is full of NaN."""

    settings: Any = torch.utils.deterministic   # a module with a property, as no checker sees it

    def __enter__(self) -> None:
        self._before = (torch.are_deterministic_algorithms_enabled(),
                        self.settings.fill_uninitialized_memory)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.settings.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self._before[0])
        self.settings.fill_uninitialized_memory = self._before[1]


def some_pixels(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype) -> Pixels:
    """Make pixels; their r are like real ones."""
    return Pixels(normal(s.tiles, s.height, s.width, CONTENT, dtype=precision),
                  1 + 0.1 * normal(s.tiles, s.height, s.width))


def preprocessing(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, _: Blocks
                  ) -> tuple[Tensor, Tensor]:
    """Cut two tiles out of an image, one of which goes beyond its end."""
    weight, bias = normal(54, CONTENT, scale=0.2), normal(CONTENT)
    position = normal(s.height, s.width, TOKEN - CONTENT)
    image = (normal(1, 2, s.height + 3, s.width + 5, 3, scale=60) + 128).clamp(0, 255)
    image = image.to(torch.uint8)
    corners = torch.tensor([(1, 2), (4, 8)], dtype=torch.int32, device=image.device)
    pixels = launch.preprocess(image, corners, F.pad(weight / 255, (0, 0, 0, 10)), bias,
                               position.sum(-1), position.square().sum(-1), precision)

    whole = F.pad(image[0].movedim(-1, 1).float(), (0, 8, 0, 8), mode='replicate').movedim(1, -1)
    tiles = torch.stack([whole[:, y:y + s.height, x:x + s.width] for y, x in corners.tolist()])
    f = patches(tiles).double() @ weight.double() + bias.double()
    tokens = torch.cat([f, position.double().expand(2, -1, -1, -1)], -1)
    r = (tokens.var(-1, unbiased=False) + 1e-5).rsqrt()
    return (torch.cat([pixels.content.flatten(), pixels.rstd.flatten()]),
            torch.cat([f.flatten(), r.flatten()]))


def reading(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, blocks: Blocks
            ) -> tuple[Tensor, Tensor]:
    """Attend to all pixels, with scores of about +-10: some pixels matter, most do not."""
    pixels = some_pixels(normal, s, precision)
    content = normal(s.latents, CONTENT, scale=0.5, dtype=precision)
    rows, columns = normal(s.height, s.latents, scale=2), normal(s.latents, s.width, scale=2)
    out = launch.read(pixels, content, rows, columns, blocks)

    expected = []
    r = pixels.rstd.double()[..., None]
    for tile, r in zip(pixels.content.double(), pixels.rstd.double()):
        for g, a, b in zip(content.double().split(64), rows.T.double().split(64),
                           columns.double().split(64)):                   # latents at a time
            scores = (torch.einsum('yxc,lc->lyx', tile, g) + a[..., None] + b[:, None]) * r
            p = (scores.flatten(1) * math.log(2)).softmax(1).view_as(scores) * r
            expected.append(torch.cat([torch.einsum('lyx,yxc->lc', p, tile), p.sum(2), p.sum(1)],
                                      1))
    return out, torch.cat(expected).view(out.shape)


def attending(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, blocks: Blocks
              ) -> tuple[Tensor, Tensor]:
    """Attend to each other, with heads of 32 channels and scores of about +-10."""
    heads = max(1, s.channels // 32)
    qkv = normal(s.tiles, s.latents, 3 * 32 * heads, dtype=precision)
    out = launch.attend(qkv, heads, blocks)
    q, k, v = qkv.double().unflatten(-1, (3, heads, 32)).permute(2, 0, 3, 1, 4)
    expected = (math.log(2) * q @ k.mT).softmax(-1) @ v
    return out, expected.transpose(1, 2).flatten(2)


def adding(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, _: Blocks
           ) -> tuple[Tensor, Tensor]:
    """Add, then LayerNorm."""
    z, y = normal(s.tiles, s.latents, s.channels), normal(s.tiles, s.latents, s.channels,
                                                          dtype=precision)
    gamma, beta, before = 1 + 0.1 * normal(s.channels), normal(s.channels), z.double()
    x = launch.add_norm(z, y, gamma, beta, precision)
    total = before + y.double()
    expected = F.layer_norm(total, (s.channels,), gamma.double(), beta.double())
    return torch.stack([z.double(), x.double()]), torch.stack([total, expected])


def writing_grid(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, blocks: Blocks
                 ) -> tuple[Tensor, Tensor]:
    """Ask for every third row and column, one column fewer in the first tile."""
    rows, columns = (torch.arange(min(1, n - 1), n, 3) for n in (s.height, s.width))
    ys, xs = (i.repeat(s.tiles, 1).to(torch.int32) for i in (rows, columns))
    xs[0, -1] = -1
    return writing(normal, s, precision, blocks, ys, xs, grid=True)


def writing_points(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, blocks: Blocks
                   ) -> tuple[Tensor, Tensor]:
    """Ask for points anywhere, one of them left out."""
    count = min(1000, 2 * s.height)
    ys, xs = ((normal(s.tiles, count).cpu() * 1000).abs().to(torch.int32) % n
              for n in (s.height, s.width))
    ys[0, 0] = -1
    return writing(normal, s, precision, blocks, ys, xs, grid=False)


def writing(normal: Callable[..., Tensor], s: Sizes, precision: torch.dtype, blocks: Blocks,
            ys: Tensor, xs: Tensor, *, grid: bool) -> tuple[Tensor, Tensor]:
    """Ask all latents, then what follows up to the flow."""
    pixels = some_pixels(normal, s, precision)
    exact = normal(s.tiles, CONTENT + s.height + s.width + 1, s.latents)
    exact[:, :CONTENT] *= 0.5
    exact[:, :CONTENT] = exact[:, :CONTENT].to(precision)
    keys = exact
    if precision != torch.float32:
        keys = exact[:, :-1].to(precision)
        keys = torch.cat([keys, (exact[:, CONTENT:-1] - keys[:, CONTENT:]).to(precision)], 1)
    values = normal(s.tiles, s.latents, VALUE, dtype=precision)
    values[..., TOKEN:] = 0
    values[..., TOKEN] = 1
    head = launch.Head(normal(VALUE, HIDDEN, scale=0.1, dtype=precision), normal(HIDDEN),
                       normal(2, VALUE), normal(2, HIDDEN), normal(2))
    for weight in (head.dense[TOKEN:], head.dense.T[TOKEN:], head.dense_bias[TOKEN:],
                   head.flow.T[TOKEN:], head.hidden_flow.T[TOKEN:]):
        weight.zero_()
    device = values.device
    out = launch.write(pixels, keys, exact, values, ys.to(device), xs.to(device), head, blocks,
                       grid=grid)

    if grid:
        ys, xs = (i.flatten(1) for i in torch.broadcast_tensors(ys[:, :, None], xs[:, None]))
    asked = (ys >= 0) & (xs >= 0)
    expected = []
    for t in range(s.tiles):
        y, x = ys[t][asked[t]].long().to(device), xs[t][asked[t]].long().to(device)
        e = exact[t].double()
        f, r = pixels.content[t, y, x].double(), pixels.rstd[t, y, x].double()[:, None]
        scores = r * (f @ e[:CONTENT] + e[CONTENT + y] + e[CONTENT + s.height + x]) + e[-1]
        o = (scores * math.log(2)).softmax(1) @ values[t, :, :TOKEN].double()
        hidden = F.layer_norm(o, (TOKEN,)) @ head.dense[:TOKEN].double() + head.dense_bias.double()
        expected.append(o @ head.flow[:, :TOKEN].T.double()
                        + F.gelu(hidden) @ head.hidden_flow.T.double() + head.bias.double())
    return out.flatten(1, -2)[asked.to(device)], torch.cat(expected)
