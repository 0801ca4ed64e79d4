# SPDX-License-Identifier: Apache-2.0
"""The official network on a GPU for images of any size: what `official` does, as few launches.

What depends on the size of the images only is prepared once; a pair then goes up through pinned
memory, is computed by one CUDA graph, and its flow comes back.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import itertools

import numpy as np
from perceiver_flow_ros.flow.official import neighbours, OVERLAP
from perceiver_flow_ros.flow.replay import in_batches, Replay
from perceiver_flow_ros.flow.tiling import blend, tile_grid, tile_queries, tile_weight
from perceiver_flow_ros.model.cuda import CudaNetwork
from perceiver_flow_ros.model.official import OfficialNetwork
import torch
from torch import Tensor
from torch.nn import functional as F

BATCH = {torch.float32: 2, torch.bfloat16: 4, torch.float16: 4}      # tiles at once: below 1 GB
TOLERANCE = 0.05        # pixels that a half precision may differ by, on average, to be chosen


class CudaFlow:
    """
    Frame pair -> flow, by a `CudaNetwork`, in one tile or many.

    Parameters
    ----------
    network : what computes the flow of tiles.
    tiling, query_stride : as in `OfficialEstimator`.
    """

    def __init__(self, network: CudaNetwork, tiling: str = 'tile', query_stride: int = 1):
        self.network, self.tiling, self.stride = network, tiling, query_stride
        self.device, self.size = network.device, network.config.train_size
        self.batch = BATCH[network.precision]
        self.replay = Replay(self.device)
        self._plans: dict[tuple[int, int], Callable[[Tensor, int], Tensor]] = {}

    def __call__(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Estimate flow on the query grid: RGB (H, W, 3) uint8 -> (ceil(H/s), ceil(W/s), 2)."""
        with self.replay.context():
            return self.replay.fetch(self.launch(previous, current))

    def launch(self, previous: np.ndarray, current: np.ndarray) -> Tensor:
        """Begin to estimate: give the flow on the device, where the next pair overwrites it."""
        with self.replay.context():
            size = previous.shape[:2]
            frames = self.replay.upload(previous, current)
            if size not in self._plans:
                self._plans[size] = self._plan(*size)
            plan = self._plans[size]
            return self._run(lambda batch: self.replay(
                (size, batch), lambda: plan(frames, batch)))

    def at(self, previous: np.ndarray, current: np.ndarray, y: Tensor, x: Tensor) -> np.ndarray:
        """Estimate flow at whole pixels (y, x), (N,) each: (N, 2)."""
        if not len(y):
            return np.zeros((0, 2), np.float32)
        with self.replay.context():
            frames = self.replay.upload(previous, current)
            points = self._resized_at if self.tiling == 'resize' else self._tiled_at
            return self.replay.fetch(self._run(lambda batch: points(frames, y, x, batch)))

    @torch.inference_mode()
    def _run(self, compute: Callable[[int], Tensor]) -> Tensor:
        result, self.batch = in_batches(compute, self.batch, self.replay.clear)
        return result

    def _plan(self, height: int, width: int) -> Callable[[Tensor, int], Tensor]:
        """Prepare for a size: frames (2, H, W, 3), tiles at once -> flow on the query grid."""
        make = self._plan_resized if self.tiling == 'resize' else self._plan_tiled
        return make(height, width)

    # Tiles, blended

    def _plan_tiled(self, height: int, width: int) -> Callable[[Tensor, int], Tensor]:
        grid = tile_grid(height, width, self.size, OVERLAP)
        queries = [tile_queries(corner, self.size, (height, width), self.stride)
                   for corner in grid]
        corners = self._indices(grid)
        ys, xs = (self._indices(itertools.zip_longest(*axis, fillvalue=-1)).T.contiguous()
                  for axis in zip(*queries))

        def tiles(frames: Tensor, batch: int) -> Iterator[Tensor]:
            step = -(-len(grid) // -(-len(grid) // batch))             # batches of one size
            for start in range(0, len(grid), step):
                part = slice(start, start + step)
                encoded = self.network.encode(frames[None], corners[part])
                flow = self.network.decode_grid(*encoded, ys[part], xs[part])
                for tile, (rows, columns) in zip(flow, queries[part], strict=True):
                    yield tile[:len(rows), :len(columns)]

        return lambda frames, batch: blend(tiles(frames, batch), grid, self.size, (height, width),
                                           self.stride)

    def _tiled_at(self, frames: Tensor, y: Tensor, x: Tensor, batch: int) -> Tensor:
        height, width = frames.shape[1:3]
        corners = torch.tensor(tile_grid(height, width, self.size, OVERLAP))
        ys, xs = y - corners[:, :1], x - corners[:, 1:]                     # (T, N)
        inside = (ys >= 0) & (ys < self.size[0]) & (xs >= 0) & (xs < self.size[1])
        needed = inside.any(1)
        corners, ys, xs, inside = (i[needed] for i in (corners, ys, xs, inside))
        weight = tile_weight(self.size)[ys.where(inside, 0), xs.where(inside, 0)] * inside
        share = (weight / weight.sum(0))[..., None].to(self.device)
        total = torch.zeros(len(y), 2, device=self.device)
        for part in torch.arange(len(corners)).split(batch):
            encoded = self.network.encode(frames[None], self._indices(corners[part]))
            flow = self.network.decode_points(
                *encoded, *(self._indices(i[part].where(inside[part], -1)) for i in (ys, xs)))
            total += (share[part] * flow.where(share[part] > 0, 0)).sum(0)
        return total

    # One tile: the image resized

    def _plan_resized(self, height: int, width: int) -> Callable[[Tensor, int], Tensor]:
        (ys, top, bottom, down), (xs, left, right, across) = (
            self._between(torch.arange(0, n, self.stride), n, small)
            for n, small in zip((height, width), self.size))
        scale = torch.tensor([width / self.size[1], height / self.size[0]], device=self.device)

        def compute(frames: Tensor, _: int) -> Tensor:
            encoded = self.network.encode(self._resize(frames))
            flow = self.network.decode_grid(*encoded, ys[None], xs[None])[0]
            rows = torch.lerp(flow[top], flow[bottom], down[:, None])
            return torch.lerp(rows[:, left], rows[:, right], across) * scale

        return compute

    def _resized_at(self, frames: Tensor, y: Tensor, x: Tensor, _: int) -> Tensor:
        height, width = frames.shape[1:3]
        (ys, top, bottom, down), (xs, left, right, across) = (
            self._between(i, n, small)
            for i, n, small in zip((y, x), (height, width), self.size))
        encoded = self.network.encode(self._resize(frames))
        around = [self.network.decode_points(*encoded, ys[i][None], xs[j][None])[0]
                  for i in (top, bottom) for j in (left, right)]
        flow = torch.lerp(torch.lerp(around[0], around[1], across),
                          torch.lerp(around[2], around[3], across), down)
        return flow * torch.tensor([width / self.size[1], height / self.size[0]]).to(self.device)

    def _resize(self, frames: Tensor) -> Tensor:
        resized = F.interpolate(frames.movedim(-1, 1).float(), self.size, mode='bilinear',
                                antialias=True)
        return resized.movedim(1, -1)[None]

    def _between(self, i: Tensor, size: int, small: int) -> tuple[Tensor, ...]:
        """Pixels of a resized axis that are needed for pixels i; i's neighbours in them; share."""
        low, high, share = neighbours(i, size, small)
        needed = torch.cat([low, high]).unique()
        return (self._indices(needed), *(torch.searchsorted(needed, n).to(self.device)
                                         for n in (low, high)), share.to(self.device))

    def _indices(self, values: Tensor | Iterable[object]) -> Tensor:
        values = values if isinstance(values, Tensor) else torch.tensor(list(values))
        return values.to(self.device, torch.int32).contiguous()


@torch.inference_mode()
def pick_network(network: OfficialNetwork, precision: str) -> CudaNetwork:
    """
    Prepare a network, on its device, for a precision, and use it once.

    ``'auto'`` takes the fastest whose flow of a fixed pair differs from float32's by less than
    0.05 pixels on average: float16 (it rounds eight times finer than bfloat16 at the same speed),
    bfloat16 (where float16 overflows), float32.
    """
    pair = sample_pair(*network.config.train_size).to(network.latents.device)
    if precision != 'auto':
        chosen = CudaNetwork(network, getattr(torch, precision))
        chosen(pair)
        return chosen
    exact = CudaNetwork(network)
    expected = exact(pair)
    for half in (torch.float16, torch.bfloat16):
        candidate = CudaNetwork(network, half)
        if (candidate(pair) - expected).norm(dim=-1).mean() < TOLERANCE:        # NaN is not
            return candidate
    return exact


def sample_pair(height: int, width: int) -> Tensor:
    """Blurred noise that moves by (5, 3) pixels: frames (1, 2, H, W, 3) uint8."""
    noise = torch.rand(1, 3, height + 19, width + 21, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        noise = F.avg_pool2d(noise, 9, 1)
    noise = (noise[0] - noise.min()) / (noise.max() - noise.min()) * 255
    frames = noise[:, 3:, 5:], noise[:, :-3, :-5]
    return torch.stack(frames).movedim(1, -1)[None].to(torch.uint8)
