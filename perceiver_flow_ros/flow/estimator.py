# SPDX-License-Identifier: Apache-2.0
"""One small interface in front of every way to estimate flow, and the function that picks one."""

from __future__ import annotations

import os
from pathlib import Path
import sys
from typing import Protocol

import cv2
import numpy as np

OFFICIAL_ID = 'deepmind/optical-flow-perceiver'
PRECISIONS = ('float32', 'bfloat16', 'float16')
QUALITIES = ('auto', 'fast', 'balanced', 'best')
QUERY_STRIDES = (1, 2, 4, 8)
TILINGS = ('tile', 'resize')
DEFAULT_THREADS: dict[str, int] = {}  # before the first change


class FlowEstimator(Protocol):
    """
    A frame pair in, a flow field out.

    Flow is in pixels of the input image, (u right, v down), from the previous frame to the current
    one, on the previous frame's grid: what was seen at ``(x, y)`` is at ``(x + u, y + v)`` now.
    """

    name: str  # 'official' | 'lite' | 'dis'
    device: str  # 'cpu', 'cuda:0'
    precision: str  # 'float32' | 'bfloat16' | 'float16'
    query_stride: int  # flow is given at the pixels [::query_stride, ::query_stride]

    def __call__(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """
        Estimate the flow on the query grid.

        Parameters
        ----------
        previous, current : (H, W, 3) uint8 RGB, or (H, W) uint8 grey; any size from 1x1.

        Returns
        -------
        (ceil(H / query_stride), ceil(W / query_stride), 2) float32, pixels.

        Raises
        ------
        ValueError
            When the frames are not a pair of such images (see `check_pair`).

        """
        ...

    def at(self, previous: np.ndarray, current: np.ndarray, points: np.ndarray) -> np.ndarray:
        """
        Estimate the flow at some points only.

        Parameters
        ----------
        previous, current : as in `__call__`.
        points : (N, 2) pixel coordinates (x, y) of the previous frame. `official` decodes exactly
            these (integer) pixels; `lite` and `dis` sample their dense field bilinearly.

        Returns
        -------
        (N, 2) float32, pixels.

        """
        ...


def load_estimator(
    model: str | Path = 'lite',
    *,
    device: str = 'auto',
    precision: str = 'auto',
    tiling: str = 'tile',
    query_stride: int = 1,
    quality: str = 'auto',
    allow_download: bool = False,
) -> FlowEstimator:
    """
    Load an estimator, ready to be called with a pair of frames.

    Parameters
    ----------
    model : ``'lite'`` (packaged weights), ``'official'`` (DeepMind's checkpoint in the local
        Hugging Face cache), ``'dis'`` (OpenCV's DIS, the classical baseline), a path (a folder
        with ``config.json``, a ``.safetensors`` file, a ``pytorch_model.bin``) or an id of the
        Hugging Face hub.
    device : ``'auto'`` (CUDA where there is one), ``'cpu'``, ``'cuda'`` or ``'cuda:N'``.
    precision : ``'float32'``, ``'bfloat16'``, ``'float16'``; ``'auto'`` is float32, the exact one,
        but for `official` on CUDA: there the fastest that differs from it by less than 0.05 px.
    tiling : how `official` treats an image that is not 368x496: ``'tile'`` or ``'resize'``.
    query_stride : 1, 2, 4 or 8: decode every n-th row and column only.
    quality : speed against accuracy of `lite` and `dis`: ``'fast'``, ``'balanced'``, ``'best'``;
        ``'auto'`` is each one's default.
    allow_download : fetch missing weights from the Hugging Face hub. Never by default.

    Raises
    ------
    ValueError
        For an argument that cannot be honoured, with the reason.
    perceiver_flow_ros.model.weights.WeightsError
        When weights are missing, corrupt or of another network.
    ImportError
        When the model needs PyTorch and it is not installed.

    """
    _check_choice('precision', precision, ('auto', *PRECISIONS))
    _check_choice('tiling', tiling, TILINGS)
    _check_choice('quality', quality, QUALITIES)
    _check_choice('query_stride', query_stride, QUERY_STRIDES)
    if not str(model):
        raise ValueError(
            "model is empty: expected 'lite', 'official', 'dis', a path or a Hugging Face id"
        )

    variant, weights = _variant(model)
    if tiling == 'resize' and variant != 'official':
        raise ValueError(
            f"tiling 'resize' concerns the official model only: {variant!r} takes any image size "
            "as it is; use tiling 'tile'"
        )
    if quality != 'auto' and variant == 'official':
        raise ValueError(
            f"quality {quality!r} concerns 'lite' and 'dis' only: the official model has one "
            "setting; use quality 'auto' (query_stride trades density for speed)"
        )

    if variant == 'dis':
        if device not in ('auto', 'cpu'):
            raise ValueError(
                f"model 'dis' runs on the CPU only, not on {device!r}; use device 'cpu' or 'auto'"
            )
        if precision not in ('auto', 'float32'):
            raise ValueError(f"model 'dis' computes in float32 only, not in {precision}")
        from perceiver_flow_ros.flow.dis import DisEstimator

        return DisEstimator(quality=quality, query_stride=query_stride)

    _require_torch(variant)
    device = resolve_device(device)
    if variant == 'lite':
        from perceiver_flow_ros.flow.lite import LiteEstimator

        return LiteEstimator(
            Path(weights) if weights else None,
            device=device,
            precision='float32' if precision == 'auto' else precision,
            quality=quality,
            query_stride=query_stride,
        )
    from perceiver_flow_ros.flow.official import OfficialEstimator

    return OfficialEstimator(
        weights or OFFICIAL_ID,
        device=device,
        precision=precision,
        tiling=tiling,
        query_stride=query_stride,
        allow_download=allow_download,
    )


def set_threads(count: int) -> None:
    """Set the CPU threads of OpenCV and of PyTorch, if loaded; 0 for their defaults."""
    cv2.setNumThreads(count or -1)
    torch = sys.modules.get('torch')
    if torch is not None:
        DEFAULT_THREADS.setdefault('torch', torch.get_num_threads())
        torch.set_num_threads(count or DEFAULT_THREADS['torch'])


def resolve_device(device: str) -> str:
    """Name the device to use ('cpu', 'cuda:0'); ValueError when it is not there."""
    import torch

    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ('cpu', 'cuda'):
        raise ValueError(
            f"device {device!r} is unknown: expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
        )
    if wanted.type == 'cpu':
        return 'cpu'
    if not torch.cuda.is_available():
        raise ValueError(
            f'device {device!r}: no CUDA device: torch.cuda.is_available() is False (torch '
            f'{torch.__version__}, no NVIDIA driver or a build without CUDA); '
            'use device "cpu" or "auto"'
        )
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f'device {device!r}: this machine has {torch.cuda.device_count()} CUDA device(s)'
        )
    return f'cuda:{index}'


def check_pair(previous: np.ndarray, current: np.ndarray) -> None:
    """Raise ValueError, naming shapes and dtypes, unless both are images of one size and kind."""
    for name, image in (('previous', previous), ('current', current)):
        if not isinstance(image, np.ndarray):
            raise ValueError(f'{name} frame is a {type(image).__name__}, expected a numpy array')
        shaped = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not shaped:
            raise ValueError(
                f'{name} frame is {image.shape} {image.dtype}, '
                'expected (H, W, 3) uint8 RGB or (H, W) uint8 grey'
            )
        if image.size == 0:
            raise ValueError(f'{name} frame is empty: {image.shape}, expected at least 1x1 pixels')
    if previous.shape != current.shape:
        raise ValueError(
            f'frames differ in shape: previous {previous.shape}, current {current.shape}; '
            'a pair needs one size'
        )


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Give a grey image three equal channels; (H, W, 3) passes as it is."""
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def sample(flow: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Sample a dense flow (H, W, 2) bilinearly at points (N, 2) (x, y) inside it: (N, 2)."""
    height, width = flow.shape[:2]
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(
            f'points have shape {points.shape}, expected (N, 2) pixel coordinates (x, y)'
        )
    if not ((points >= 0) & (points <= (width - 1, height - 1))).all():
        raise ValueError(f'points lie outside the {width}x{height} image (or are not finite)')
    low = np.minimum(points.astype(int), np.maximum((width - 2, height - 2), 0))
    x0, y0 = low.T
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    fx, fy = (points - low).T[:, :, None]
    top = (1 - fx) * flow[y0, x0] + fx * flow[y0, x1]
    bottom = (1 - fx) * flow[y1, x0] + fx * flow[y1, x1]
    return ((1 - fy) * top + fy * bottom).astype(np.float32)


def _variant(model: str | Path) -> tuple[str, Path | str | None]:
    """Tell which network is meant, and its weights (None: the packaged or the default ones)."""
    if model in ('dis', 'lite', 'official'):
        return str(model), None
    path = Path(model).expanduser()
    if path.exists():
        _require_torch(str(model))
        from perceiver_flow_ros.model.weights import variant_of

        return variant_of(path), path
    return 'official', str(
        model
    )  # a Hugging Face id, or a path that is not there: its loader says so


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f'{name} is {value!r}, expected one of {", ".join(map(repr, choices))}')


def _require_torch(model: str) -> None:
    # GNU OpenMP's threads spin for milliseconds while they wait for each other at the end of an
    # operation. Where other processes want the cores, too, that is many times slower than to
    # sleep soon; on an idle machine it gains little. OpenMP reads this once, when torch is first
    # imported.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'model {model!r} needs PyTorch, which could not be imported ({error}); install it '
            "(rosdep key python3-torch, or pip install torch), or use model 'dis'"
        ) from error
