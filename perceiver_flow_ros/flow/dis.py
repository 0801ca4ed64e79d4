# SPDX-License-Identifier: Apache-2.0
"""OpenCV's DIS flow (Kroeger et al. 2016): the classical baseline, behind the same interface."""

from __future__ import annotations

import cv2
import numpy as np
from perceiver_flow_ros.flow.estimator import check_pair, sample

PRESETS = {
    'fast': cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    'balanced': cv2.DISOPTICAL_FLOW_PRESET_FAST,
    'best': cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
    'auto': cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
MIN_SIZE = (
    64  # px; below it OpenCV's coarsest level has no room for a patch: the frames are padded
)


class DisEstimator:
    """Dense Inverse Search on grey frames, on the CPU (shapes and units as in `FlowEstimator`)."""

    name = 'dis'
    device = 'cpu'
    precision = 'float32'

    def __init__(self, *, quality: str = 'auto', query_stride: int = 1) -> None:
        self.query_stride = query_stride
        self._dis = cv2.DISOpticalFlow.create(PRESETS[quality])

    def __call__(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        """Estimate the flow on the query grid: (ceil(H/s), ceil(W/s), 2) float32 pixels."""
        dense = self._dense(previous, current)
        return np.ascontiguousarray(dense[:: self.query_stride, :: self.query_stride])

    def at(self, previous: np.ndarray, current: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Sample the dense flow bilinearly at points (N, 2) (x, y): (N, 2) float32 pixels."""
        return sample(self._dense(previous, current), points)

    def _dense(self, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
        check_pair(previous, current)
        height, width = previous.shape[:2]
        first, second = (_padded(_grey(frame)) for frame in (previous, current))
        flow = self._dis.calc(first, second, None)  # type: ignore[call-overload]  # None: no guess
        return flow[:height, :width]


def _grey(frame: np.ndarray) -> np.ndarray:
    return frame if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)


def _padded(frame: np.ndarray) -> np.ndarray:
    """Repeat the right and bottom borders up to the smallest size DIS works on."""
    height, width = frame.shape
    bottom, right = max(MIN_SIZE - height, 0), max(MIN_SIZE - width, 0)
    if bottom or right:
        return cv2.copyMakeBorder(frame, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    return np.ascontiguousarray(frame)
