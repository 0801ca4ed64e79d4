# SPDX-License-Identifier: Apache-2.0
"""What makes a pair of frames, and what does not."""

from __future__ import annotations

import math

import cv2
import numpy as np

from perceiver_flow_ros.odometry.settings import Reason, Refused


def check_pair(flow, camera, dt, stride, settings, previous_image, image, backward) -> None:
    """Refuse what makes no pair."""
    if not (math.isfinite(dt) and dt > 0):
        raise Refused(
            Reason.BAD_STAMPS,
            f'the frames are {dt:.6f} s apart, expected more than 0: time jumped',
        )
    if dt > settings.max_gap:
        raise Refused(
            Reason.GAP, f'the frames are {dt:.3f} s apart, more than max_gap {settings.max_gap} s'
        )
    if camera is None:
        raise Refused(
            Reason.NO_CAMERA, 'no usable camera_info: publish one that fits the image, calibrated'
        )
    shaped = isinstance(flow, np.ndarray) and flow.ndim == 3 and flow.shape[2] == 2
    if not shaped or not np.issubdtype(flow.dtype, np.floating):
        kind = (
            f'{flow.shape} {flow.dtype}' if isinstance(flow, np.ndarray) else type(flow).__name__
        )
        raise Refused(Reason.BAD_FLOW, f'flow is {kind}, expected (h, w, 2) float pixels')
    size = -(-camera.height // stride), -(-camera.width // stride)
    if flow.shape[:2] != size:
        raise Refused(
            Reason.SIZE,
            f'flow is {flow.shape[1]}x{flow.shape[0]} at stride {stride}, the camera_info '
            f'{camera.width}x{camera.height}: they belong to different images',
        )
    if backward is not None and np.shape(backward) != flow.shape:
        raise Refused(
            Reason.BAD_FLOW, f'backward flow is {np.shape(backward)}, the forward one {flow.shape}'
        )
    for frame in (previous_image, image):
        if frame is None:
            continue
        good = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim in (2, 3)
        if not good or frame.shape[:2] != (camera.height, camera.width):
            raise Refused(
                Reason.SIZE,
                f'an image is {np.shape(frame)}, the camera_info {camera.width}x{camera.height}',
            )
    if image is not None and previous_image is not None and np.array_equal(previous_image, image):
        raise Refused(
            Reason.REPEATED, 'both images are the same, bit by bit: the camera repeats its frames'
        )


def grey(image: np.ndarray | None) -> np.ndarray | None:
    """Give an image one channel."""
    if image is None or image.ndim == 2:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
