# SPDX-License-Identifier: Apache-2.0
"""What makes a pair of frames, and what does not."""

from __future__ import annotations

import math

import cv2
import numpy as np
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.settings import Reason, Refused, Settings

ROUNDING = 1e-6  # s: seconds since 1970 have no more digits than that


def checked(
    flow: np.ndarray | None,
    camera: Camera | None,
    dt: float,
    stride: int,
    settings: Settings,
    previous_image: np.ndarray | None,
    image: np.ndarray | None,
    backward: np.ndarray | None,
) -> tuple[np.ndarray, Camera]:
    """Refuse what makes no pair; give flow and camera, which are there."""
    if not (math.isfinite(dt) and dt > 0):
        raise Refused(
            Reason.BAD_STAMPS,
            f'the frames are {dt:.6f} s apart, expected more than 0: time jumped',
        )
    if dt > settings.max_gap + ROUNDING:
        raise Refused(
            Reason.GAP, f'the frames are {dt:.3f} s apart, more than max_gap {settings.max_gap} s'
        )
    if camera is None:
        raise Refused(
            Reason.NO_CAMERA, 'no usable camera_info: publish one that fits the image, calibrated'
        )
    kind = type(flow).__name__
    if isinstance(flow, np.ndarray):
        kind = f'{flow.shape} {flow.dtype}'
    if (
        not isinstance(flow, np.ndarray) or flow.ndim != 3 or flow.shape[2] != 2
        or not np.issubdtype(flow.dtype, np.floating)
    ):  # fmt: skip
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
    return flow, camera


def grey(image: np.ndarray | None) -> np.ndarray | None:
    """Give an image one channel."""
    if image is None or image.ndim == 2:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
