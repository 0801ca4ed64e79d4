# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/Image <-> numpy; a malformed message is refused with the reason; no ROS needed."""

from __future__ import annotations

import array
import sys
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from sensor_msgs.msg import Image
    from std_msgs.msg import Header

MIN_SIDE = 2  # pixels: one row or one column has no flow across it

# encoding -> (sample type, samples per pixel, OpenCV's conversion; None where RGB or grey).
# cv_bridge is asked for any other, not for these: the one on PyPI ignores padded rows and knows no
# bayer_grbg8 and no yuv422; a robot's may not import beside the numpy that torch came with.
U8, U16, F32 = np.dtype('u1'), np.dtype('u2'), np.dtype('f4')
ENCODINGS: dict[str, tuple[np.dtype, int, int | None]] = {
    'rgb8': (U8, 3, None),
    'bgr8': (U8, 3, cv2.COLOR_BGR2RGB),
    '8UC3': (U8, 3, cv2.COLOR_BGR2RGB),
    'rgba8': (U8, 4, cv2.COLOR_RGBA2RGB),
    'bgra8': (U8, 4, cv2.COLOR_BGRA2RGB),
    'mono8': (U8, 1, None),
    '8UC1': (U8, 1, None),
    'mono16': (U16, 1, None),
    '16UC1': (U16, 1, None),
    '32FC1': (F32, 1, None),
    '32FC3': (F32, 3, cv2.COLOR_BGR2RGB),
    'yuv422': (U8, 2, cv2.COLOR_YUV2RGB_UYVY),
    'uyvy': (U8, 2, cv2.COLOR_YUV2RGB_UYVY),
    'yuv422_yuy2': (U8, 2, cv2.COLOR_YUV2RGB_YUY2),
    'yuyv': (U8, 2, cv2.COLOR_YUV2RGB_YUY2),
}
DEPTHS: dict[str, np.dtype] = {'32FC1': F32, '16UC1': U16, 'mono16': U16}
# OpenCV names a Bayer pattern by its second row, ROS by its first.
for _ros, _opencv in (('rggb', 'BG'), ('bggr', 'RG'), ('gbrg', 'GR'), ('grbg', 'GB')):
    _code = getattr(cv2, f'COLOR_Bayer{_opencv}2RGB')
    ENCODINGS |= {f'bayer_{_ros}8': (U8, 1, _code), f'bayer_{_ros}16': (U16, 1, _code)}


class BadImage(ValueError):
    """An image message that cannot be used; the text says why."""


def to_frame(message: Image) -> np.ndarray:
    """
    Convert an image message to what the estimators take.

    Parameters
    ----------
    message : any encoding of `ENCODINGS`, or one that cv_bridge converts to rgb8; padded rows and
        either byte order. 16-bit samples are scaled from 0..65535, floats from 0..1.

    Returns
    -------
    (H, W, 3) uint8 RGB, or (H, W) uint8 for the grey encodings. May share the message's memory.

    Raises
    ------
    BadImage
        For an empty image, a wrong step, too little data, an unknown encoding, or values that are
        not finite or out of range.

    """
    if message.width < MIN_SIDE or message.height < MIN_SIDE:
        raise BadImage(
            f'it has {message.width}x{message.height} pixels, '
            f'but flow needs at least {MIN_SIDE}x{MIN_SIDE}'
        )
    if message.encoding not in ENCODINGS:
        return _by_cv_bridge(message)
    dtype, channels, code = ENCODINGS[message.encoding]
    image = _samples(message, dtype, channels)
    if dtype == F32:
        image = _eight_bits_of_float(image, message.encoding)
    if code is not None:
        try:
            image = cv2.cvtColor(image, code)
        except cv2.error as error:  # an odd width in 4:2:2, for one
            what = f'{message.width}x{message.height} {message.encoding}'
            raise BadImage(f'OpenCV cannot convert {what}: {error.err}') from error
    return cv2.convertScaleAbs(image, alpha=1 / 257) if dtype == U16 else image


def to_depth(message: Image) -> np.ndarray:
    """
    View a depth image (REP-118): (H, W) float32 metres or uint16 millimetres, in native order.

    Raises
    ------
    BadImage
        For another encoding than 32FC1, 16UC1 or mono16, or a malformed message.

    """
    dtype = DEPTHS.get(message.encoding)
    if dtype is None:
        raise BadImage(f'its encoding is {message.encoding!r}, expected 32FC1 or 16UC1')
    if not message.width or not message.height:
        raise BadImage('it is empty')
    return _samples(message, dtype, 1)


def to_message(
    image: np.ndarray, encoding: str, header: Header, memory: array.array | None = None
) -> Image:
    """
    Make an image message of an array.

    Parameters
    ----------
    image : (H, W, C), samples of the encoding: float32 for 32FC2, uint8 for rgb8.
    encoding : a ROS image encoding.
    header : copied as it is.
    memory : data of an earlier message that is published already, written over where its size
        fits: fresh memory costs many times more than the copy.

    """
    from sensor_msgs.msg import Image

    image = np.ascontiguousarray(image)
    message = Image(header=header, encoding=encoding, is_bigendian=int(sys.byteorder == 'big'))
    message.height, message.width = image.shape[:2]
    message.step = image.strides[0]
    # No other type will do: it would be checked byte by byte, for seconds, not milliseconds.
    data = array.array('B') if memory is None or len(memory) != image.nbytes else memory
    if data is memory:
        np.frombuffer(data, np.uint8)[:] = image.reshape(-1).view(np.uint8)
    else:
        data.frombytes(image.data.cast('B'))
    message.data = data
    return message


def _samples(message: Image, dtype: np.dtype, channels: int) -> np.ndarray:
    """View the samples, (H, W) or (H, W, C), in native byte order, without padding."""
    height, width, step = message.height, message.width, message.step
    row = width * channels * dtype.itemsize
    if step < row:
        raise BadImage(
            f'its step is {step}, but a row of {width} {message.encoding} pixels has {row} bytes'
        )
    # Some drivers leave out the padding of the last row.
    if not step * (height - 1) + row <= len(message.data) <= step * height:
        size = f'{height} rows of step {step} have {step * height}'
        raise BadImage(f'its data has {len(message.data)} bytes, but {size}')
    order = dtype.newbyteorder('>' if message.is_bigendian else '<')
    shape = (height, width, channels) if channels > 1 else (height, width)
    strides = (step, channels * dtype.itemsize, dtype.itemsize)[: len(shape)]
    samples: np.ndarray = np.ndarray(shape, order, np.frombuffer(message.data, U8), 0, strides)
    # OpenCV needs samples aligned to their size, which padding may have moved.
    return samples if dtype == U8 else np.ascontiguousarray(samples, dtype)


def _eight_bits_of_float(image: np.ndarray, encoding: str) -> np.ndarray:
    unknown = image.size - np.count_nonzero(np.isfinite(image))
    if unknown:
        raise BadImage(f'{unknown} of its {image.size} {encoding} values are NaN or infinite')
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise BadImage(f'its {encoding} values run from {low:g} to {high:g}, expected 0 to 1')
    return cv2.convertScaleAbs(image, alpha=255)


def _by_cv_bridge(message: Image) -> np.ndarray:
    """Ask cv_bridge, imported only where needed: it often breaks with a newer numpy."""
    known = f'encoding {message.encoding!r} is not one of {", ".join(sorted(ENCODINGS))}'
    try:
        from cv_bridge import CvBridge

        image = CvBridge().imgmsg_to_cv2(message, 'rgb8')
    except ImportError as error:
        raise BadImage(
            f'{known}, and cv_bridge, which may know it, does not import: {error}'
        ) from error
    except Exception as error:  # it raises whatever it meets
        raise BadImage(f'{known}, and cv_bridge cannot convert it: {error!r}') from error
    if image.dtype != U8 or image.shape != (message.height, message.width, 3):
        raise BadImage(f'{known}, and cv_bridge made {image.shape} {image.dtype} of it')
    return image
