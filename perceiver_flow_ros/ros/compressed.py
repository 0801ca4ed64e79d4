# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/CompressedImage <-> numpy, as image_transport does it; to decode takes no ROS."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING

import cv2
import numpy as np
from perceiver_flow_ros.ros.conversion import BadImage, MIN_SIDE

if TYPE_CHECKING:
    from sensor_msgs.msg import CompressedImage
    from std_msgs.msg import Header

JPEG_QUALITY = 90
KINDS = {  # how the data begin -> what it is, how its pixels begin, and what must come after them
    b'\xff\xd8\xff': ('JPEG', b'\xff\xda', b'\xff\xd9'),
    b'\x89PNG\r\n\x1a\n': ('PNG', b'IDAT', b'IEND'),
}
# What OpenCV makes of 1, 3 and 4 channels: blue first.
TO_RGB = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
DEMOSAIC = {
    'bayer_rggb': cv2.COLOR_BayerBG2RGB, 'bayer_bggr': cv2.COLOR_BayerRG2RGB,
    'bayer_gbrg': cv2.COLOR_BayerGR2RGB, 'bayer_grbg': cv2.COLOR_BayerGB2RGB,
}  # fmt: skip


def decode(message: CompressedImage) -> np.ndarray:
    """
    Decompress a JPEG or PNG image to what the estimators take.

    Parameters
    ----------
    message : its data tell what they are; of the format text (`bgr8; jpeg compressed bgr8`) only
        the Bayer pattern of a mosaic counts, and whether red was stored where blue belongs.

    Returns
    -------
    (H, W, 3) uint8 RGB, or (H, W) uint8 where the image is grey; 16-bit samples are scaled.

    Raises
    ------
    BadImage
        When the data are neither JPEG nor PNG, cut off or damaged, or the image is too small.

    """
    data = bytes(message.data)
    shown = message.format[:60]
    kind = next((found for start, found in KINDS.items() if data.startswith(start)), None)
    if kind is None:
        raise BadImage(
            f'its {len(data)} bytes (format {shown!r}) are neither JPEG nor PNG; '
            'other codecs need a republisher: ros2 run image_transport republish'
        )
    name, pixels, end = kind
    # OpenCV would paint the missing part grey. (Some cameras write more after the end.)
    if data.rfind(end) <= data.rfind(pixels):
        raise BadImage(f'its {name} data are cut off after {len(data)} bytes')
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise BadImage(f'OpenCV cannot decode its {name} data: {error.err}') from error
    if image is None:
        raise BadImage(f'its {len(data)} bytes of {name} data are damaged')
    if min(image.shape[:2]) < MIN_SIDE:
        height, width = image.shape[:2]
        raise BadImage(f'it has {width}x{height} pixels, but flow needs {MIN_SIDE}x{MIN_SIDE}')
    return _to_rgb(image, message.format)


def encode(image: np.ndarray, header: Header) -> CompressedImage:
    """Compress an image (H, W, 3) uint8 RGB as JPEG."""
    from sensor_msgs.msg import CompressedImage

    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    jpeg = cv2.imencode('.jpg', bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    message = CompressedImage(header=header, format='rgb8; jpeg compressed bgr8')
    data = array.array('B')  # anything else is checked byte by byte
    data.frombytes(jpeg.data)
    message.data = data
    return message


def _to_rgb(image: np.ndarray, text: str) -> np.ndarray:
    source, _, how = text.partition(';')
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if image.dtype != np.uint8:
        raise BadImage(f'its samples are {image.dtype}, expected 8 or 16 bits')
    if image.ndim == 2:
        pattern = DEMOSAIC.get(source.strip().rstrip('0123456789'))
        return image if pattern is None else cv2.cvtColor(image, pattern)
    if 'compressed rgb' in how and image.shape[2] == 3:
        return image
    return cv2.cvtColor(image, TO_RGB[image.shape[2]])
