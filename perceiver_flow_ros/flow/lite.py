# SPDX-License-Identifier: Apache-2.0
"""The packaged lite network behind the estimator interface: any image, three settings."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
import warnings

import numpy as np
from perceiver_flow_ros.flow.estimator import as_rgb, check_pair, sample
from perceiver_flow_ros.flow.refinement import refined
from perceiver_flow_ros.flow.replay import Replay
from perceiver_flow_ros.model.evidence import TOKEN
from perceiver_flow_ros.model.pyramid import resize_flow
from perceiver_flow_ros.model.weights import load_lite
import torch
from torch import nn
from torch.nn import functional as F

# Images of messages are read-only, and only read here. (A copy of each would, over hours, add up:
# freed memory that is not given back.)
warnings.filterwarnings('ignore', 'The given NumPy array is not writable', UserWarning)
PACKAGED = Path(__file__).parent.parent / 'model' / 'lite.safetensors'


@dataclass(frozen=True)
class Setting:
    """Speed against accuracy: the pyramid level to stop at, and what follows."""

    finest: int         # level k has 1/2^k of the resolution
    halved: int         # rounds of refinement at half of the resolution,
    rounds: int         # and then at all of it


SETTINGS = {
    'fast': Setting(finest=2, halved=3, rounds=2),
    'balanced': Setting(finest=1, halved=1, rounds=1),
    'best': Setting(finest=0, halved=0, rounds=3),
}
# On a GPU the CPU's refinement would take most of the time, and a finer level nearly none.
CUDA_SETTINGS = {
    'fast': Setting(finest=1, halved=0, rounds=0),
    'balanced': Setting(finest=0, halved=0, rounds=0),
    'best': Setting(finest=0, halved=0, rounds=3),
}
DEFAULT = 'balanced'


class LiteEstimator:
    """
    Coarse-to-fine flow with the lite Perceiver (see `FlowEstimator` for shapes and units).

    Parameters
    ----------
    weights : a ``.safetensors`` file of the lite variant; None is the packaged one.
    device, precision : as in `load_estimator`; half precisions run under autocast.
    quality : ``'fast'`` stops at a quarter of the resolution, ``'balanced'`` at half, ``'best'``
        goes to the end; each is followed by `refinement`. On CUDA ``'fast'`` stops at half, the
        others go to the end, and only ``'best'`` is refined (on the CPU). ``'auto'`` is balanced.
    query_stride : flow is returned at the pixels [::query_stride, ::query_stride].

    Raises
    ------
    perceiver_flow_ros.model.weights.WeightsError
        When the weights are missing, corrupt or of another network.

    """

    name = 'lite'

    def __init__(self, weights: Path | None = None, *, device: str = 'cpu',
                 precision: str = 'float32', quality: str = 'auto', query_stride: int = 1):
        self.device, self.precision, self.query_stride = device, precision, query_stride
        cuda = torch.device(device).type == 'cuda'
        settings = CUDA_SETTINGS if cuda else SETTINGS
        self.setting = settings[DEFAULT if quality == 'auto' else quality]
        self.replay = Replay(device)
        network = load_lite(weights or PACKAGED).eval()
        for layer in network.modules():         # else autocast would round them for every pair
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(getattr(torch, precision))
        self._network = network.to(  # type: ignore[call-overload]  # (its stub lacks the format)
            device, memory_format=torch.channels_last)

    def __call__(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Estimate the flow on the query grid: (ceil(H/s), ceil(W/s), 2) float32 pixels."""
        dense = self._dense(previous, current)
        return np.ascontiguousarray(dense[::self.query_stride, ::self.query_stride])

    def at(self, previous: np.ndarray, current: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Sample the dense flow bilinearly at points (N, 2) (x, y): (N, 2) float32 pixels."""
        return sample(self._dense(previous, current), points)

    def _dense(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        check_pair(previous, current)
        with self.replay.context():
            flow = self.replay.fetch(self.launch(as_rgb(previous), as_rgb(current)))
        return refined(flow, previous, current, self.setting.rounds, self.setting.halved)

    @torch.inference_mode()
    def launch(self, previous: np.ndarray, current: np.ndarray) -> torch.Tensor:
        """Begin with a pair (H, W, 3): give its flow (H, W, 2) on the device, not refined.

        On CUDA the next pair overwrites it.
        """
        with self.replay.context():
            if self.replay.stream is None:
                return self._flow(*(torch.from_numpy(np.ascontiguousarray(f))
                                    for f in (previous, current)))
            frames = self.replay.upload(previous, current)
            return self.replay(frames.shape, lambda: self._flow(*frames))

    def _flow(self, previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        height, width = previous.shape[:2]
        first, second = (self._frame(frame) for frame in (previous, current))
        exact = self.precision == 'float32'         # (cuDNN would round to TF32 by default)
        autocast = torch.autocast(torch.device(self.device).type, getattr(torch, self.precision),
                                  enabled=not exact)
        with autocast, torch.backends.cudnn.flags(enabled=True, allow_tf32=not exact):
            flow = self._network(first, second, self.setting.finest)[-1].float()
        flow = resize_flow(flow, *first.shape[-2:])[0, :, :height, :width]
        return flow.permute(1, 2, 0).contiguous()

    def _frame(self, image: torch.Tensor) -> torch.Tensor:
        """(H, W, 3) uint8 -> (1, 3, H', W') 0..1, its borders repeated up to whole tokens."""
        tensor = image.permute(2, 0, 1)[None].float() / 255
        bottom, right = (max(-n % TOKEN, 4 * TOKEN - n) for n in image.shape[:2])
        return F.pad(tensor, (0, right, 0, bottom), mode='replicate')
