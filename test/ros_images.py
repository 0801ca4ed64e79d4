# SPDX-License-Identifier: Apache-2.0
"""Pictures that move, as image messages, and back."""

import array

import numpy as np
from sensor_msgs.msg import Image


def texture(height=120, width=160, seed=0):
    """Blurred noise, (height, width, 3) uint8: something to follow."""
    noise = np.random.default_rng(seed).random((height // 4 + 1, width // 4 + 1, 3))
    fine = noise.repeat(4, 0).repeat(4, 1)[:height, :width]
    for axis in (0, 1):
        fine = (fine + np.roll(fine, 1, axis) + np.roll(fine, 2, axis)) / 3
    return (fine * 255).astype(np.uint8)


def picture(shift=0, height=96, width=128):
    """Give a texture that has moved `shift` pixels to the right."""
    return texture(height, width + 64)[:, 32 - shift: 32 - shift + width]


def image_message(pixels, stamp, encoding='rgb8', **fields):
    """Make an image message, field by field: not made by what is tested."""
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.step = pixels[0].nbytes
    message.data = array.array('B', pixels.tobytes())
    message.header.frame_id = 'camera'
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(stamp * 1e9), 10**9)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def seconds(stamp):
    return stamp.sec + stamp.nanosec / 1e9


def flow_of(message):
    """(H, W, 2) float32 of a 32FC2 message."""
    assert message.encoding == '32FC2' and message.step == message.width * 8
    assert not message.is_bigendian and len(message.data) == message.step * message.height
    return np.frombuffer(message.data, '<f4').reshape(message.height, message.width, 2)
