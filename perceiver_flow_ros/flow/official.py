# SPDX-License-Identifier: Apache-2.0
"""The official network behind the estimator interface: any image, by tiles or by resizing."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
import warnings

import numpy as np
from perceiver_flow_ros.flow.estimator import as_rgb, check_pair
from perceiver_flow_ros.flow.tiling import (
    blend,
    Corner,
    cut,
    pad,
    tile_grid,
    tile_queries,
    tile_weight,
)
from perceiver_flow_ros.model.folded import FoldedNetwork
from perceiver_flow_ros.model.official import OfficialNetwork
from perceiver_flow_ros.model.weights import load_official
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from perceiver_flow_ros.flow.official_cuda import CudaFlow

OVERLAP = 20            # least overlap of tiles, pixels, as in the reference


class OfficialEstimator:
    """
    DeepMind's Perceiver IO on images of any size (see `FlowEstimator` for shapes and units).

    Parameters
    ----------
    weights : folder, file or Hugging Face id, see `model.weights.load_official`.
    device : ``'cpu'``, ``'cuda:0'``.
    precision : of the matrix products; on the CPU of the self-attention layers only. `'auto'` is
        float32 on the CPU, on CUDA see `official_cuda.pick_network`.
    tiling : ``'tile'``: windows of the training size, blended; ``'resize'``: the whole image
        resized to it, and the flow scaled back.
    query_stride : flow is decoded at the pixels [::query_stride, ::query_stride] only.
    allow_download : fetch a Hugging Face id that is not in the local cache.

    Raises
    ------
    perceiver_flow_ros.model.weights.WeightsError
        When the weights are missing, damaged or of another network.

    """

    name = 'official'

    def __init__(self, weights: str | Path, *, device: str = 'cpu', precision: str = 'float32',
                 tiling: str = 'tile', query_stride: int = 1, allow_download: bool = False):
        self.device, self.query_stride, self.tiling = device, query_stride, tiling
        network = load_official(weights, allow_download)
        self.size = network.config.train_size
        self._cuda = load_cuda(network.to(device), precision, tiling, query_stride)
        if self._cuda:
            self.precision = str(self._cuda.network.precision).removeprefix('torch.')
            return
        self.precision = 'float32' if precision == 'auto' else precision
        self._network = FoldedNetwork(network, getattr(torch, self.precision)).to(device)
        self._batch = 1 if device == 'cpu' else 4

    @torch.inference_mode()
    def __call__(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Estimate the flow on the query grid: (ceil(H/s), ceil(W/s), 2) float32 pixels."""
        check_pair(previous, current)
        if self._cuda:
            return self._cuda(as_rgb(previous), as_rgb(current))
        frames = self._frames(previous, current)
        if self.tiling == 'resize':
            y, x = (torch.arange(0, n, self.query_stride) for n in frames.shape[1:3])
            return self._resized(frames, y[:, None], x[None]).cpu().numpy()
        return self._tiled(frames).cpu().numpy()

    @torch.inference_mode()
    def at(self, previous: np.ndarray, current: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Decode the flow at pixels (N, 2) (x, y), whole numbers: (N, 2) float32 pixels."""
        check_pair(previous, current)
        x, y = check_points(points, previous.shape[:2]).T
        if self._cuda:
            return self._cuda.at(as_rgb(previous), as_rgb(current), y, x)
        frames = self._frames(previous, current)
        estimate = self._resized if self.tiling == 'resize' else self._tiled_at
        return estimate(frames, y, x).cpu().numpy()

    def _frames(self, previous: np.ndarray, current: np.ndarray) -> Tensor:
        pair = np.stack([as_rgb(previous), as_rgb(current)])
        return torch.from_numpy(pair).to(self.device)                       # (2, H, W, 3) uint8

    def _encode(self, frames: Tensor, grid: list[Corner]) -> Iterator[tuple[Tensor, Tensor]]:
        """Encode tiles in batches; give each one's pixels and latents."""
        frames = pad(frames, self.size)
        for i in range(0, len(grid), self._batch):
            tiles = cut(frames, grid[i:i + self._batch], self.size)
            yield from zip(*self._network.encode(tiles))

    def _tiled(self, frames: Tensor) -> Tensor:
        """Blend the tiles' flow on the query grid."""
        height, width = size = frames.shape[1], frames.shape[2]
        grid = tile_grid(height, width, self.size, OVERLAP)

        def tiles() -> Iterator[Tensor]:
            for corner, (pixels, z) in zip(grid, self._encode(frames, grid)):
                rows, xs = tile_queries(corner, self.size, size, self.query_stride)
                columns = slice(xs.start, xs.stop, xs.step)
                yield torch.stack(self._network.decode(pixels, z, [(y, columns) for y in rows]))

        return blend(tiles(), grid, self.size, size, self.query_stride)

    def _tiled_at(self, frames: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Blend the tiles' flow at some pixels; only tiles that hold some are looked at."""
        height, width = self.size
        members = {}                                                        # corner -> its points
        for top, left in tile_grid(frames.shape[1], frames.shape[2], self.size, OVERLAP):
            inside = (top <= y) & (y < top + height) & (left <= x) & (x < left + width)
            if inside.any():
                members[top, left] = inside

        total, weights = torch.zeros(len(x), 2), torch.zeros(len(x), 1)
        weight = tile_weight(self.size)
        for ((top, left), inside), (pixels, z) in zip(
                members.items(), self._encode(frames, list(members))):
            rows, columns = y[inside] - top, x[inside] - left
            share = weight[rows, columns, None]
            total[inside] += share * self._network.decode_at(pixels, z, rows, columns).cpu()
            weights[inside] += share
        return total / weights

    def _resized(self, frames: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Resize the image, decode what lies around the pixels (y, x), which broadcast."""
        (height, width), small = frames.shape[1:3], self.size
        resized = F.interpolate(frames.movedim(-1, 1).float(), small, mode='bilinear',
                                antialias=True).movedim(1, -1)
        pixels, z = (batch[0] for batch in self._network.encode(resized[None]))

        y0, y1, fy = neighbours(y, height, small[0])
        x0, x1, fx = neighbours(x, width, small[1])
        wanted = torch.zeros(small, dtype=torch.bool)
        for i, j in product((y0, y1), (x0, x1)):
            wanted[i, j] = True
        rows, columns = wanted.nonzero(as_tuple=True)
        flow = torch.empty(*small, 2)
        flow[rows, columns] = self._network.decode_at(pixels, z, rows, columns).cpu()

        flow = torch.lerp(torch.lerp(flow[y0, x0], flow[y0, x1], fx),
                          torch.lerp(flow[y1, x0], flow[y1, x1], fx), fy)
        return flow * torch.tensor([width / small[1], height / small[0]])


def neighbours(i: Tensor, size: int, resized: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of a resized axis on both sides of pixels i of it, and the share of the second."""
    position = ((i + 0.5) * (resized / size) - 0.5).clamp(0, resized - 1)
    low = position.long()
    return low, (low + 1).clamp(max=resized - 1), (position - low)[..., None]


def check_points(points: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Points (N, 2) as whole numbers; ValueError where they are not pixels of the image."""
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f'points have shape {points.shape}, expected (N, 2) pixels (x, y)')
    height, width = size
    if not ((points >= 0) & (points < (width, height)) & (points % 1 == 0)).all():
        raise ValueError(f'points must be whole pixels (x, y) of the {width}x{height} image')
    return torch.from_numpy(points.astype(np.int64))


def load_cuda(network: OfficialNetwork, precision: str, tiling: str,
              query_stride: int) -> CudaFlow | None:
    """Make the estimator of a network on a GPU with fused kernels; None where they cannot run."""
    device = network.latents.device
    if device.type != 'cuda':
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        reason = 'they need compute capability 8.0'
    else:
        try:
            from perceiver_flow_ros.flow import official_cuda
        except ImportError as error:
            reason = f'they need Triton ({error})'
        else:
            try:
                with torch.cuda.device(device):
                    chosen = official_cuda.pick_network(network, precision)
                return official_cuda.CudaFlow(chosen, tiling, query_stride)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:      # no compiler, no Python.h, no folder for its cache...
                reason = f'{type(error).__name__}: {error}'
    warnings.warn(f'no fused kernels, so the GPU is far slower: {reason}', stacklevel=3)
    return None
