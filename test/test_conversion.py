# SPDX-License-Identifier: Apache-2.0
"""Image messages to frames: every encoding, padding and byte order; every malformation."""

import array
import sys
import types

import cv2
from cv_bridge import CvBridge
import numpy as np
from perceiver_flow_ros.ros.conversion import BadImage, ENCODINGS, to_frame, to_message
import pytest
from ros_images import image_message, texture
from std_msgs.msg import Header

RGB = texture(48, 64)
GREY = RGB[:, :, 1].copy()
DEEP = (GREY.astype(np.uint16) * 257) ^ 0x55  # 16 bits, not only the high byte
BAYER = {  # the channel seen at (row % 2, column % 2)
    'rggb': ((0, 1), (1, 2)),
    'bggr': ((2, 1), (1, 0)),
    'gbrg': ((1, 2), (0, 1)),
    'grbg': ((1, 0), (2, 1)),
}


def mosaic(pattern, image=RGB):
    raw = np.empty(image.shape[:2], image.dtype)
    for y in (0, 1):
        for x in (0, 1):
            raw[y::2, x::2] = image[y::2, x::2, BAYER[pattern][y][x]]
    return raw


def uyvy(yuyv=False):
    """4:2:2 of GREY with colour differences of its own, written from the definition."""
    u, v = np.full(GREY.shape, 100, np.uint8), np.full(GREY.shape, 160, np.uint8)
    packed = np.empty((*GREY.shape, 2), np.uint8)
    luma, chroma = (0, 1) if yuyv else (1, 0)
    packed[:, :, luma] = GREY
    packed[:, 0::2, chroma], packed[:, 1::2, chroma] = u[:, 0::2], v[:, 1::2]
    # ITU-R BT.601, video range
    y = 1.164 * (np.maximum(GREY.astype(float), 16) - 16)
    d, e = 100 - 128, 160 - 128
    rgb = np.stack([y + 1.596 * e, y - 0.813 * e - 0.391 * d, y + 2.018 * d], -1)
    return packed, np.clip(rgb, 0, 255)


CASES = {
    'rgb8': (RGB, RGB),
    'bgr8': (RGB[:, :, ::-1], RGB),
    '8UC3': (RGB[:, :, ::-1], RGB),
    'rgba8': (np.dstack([RGB, GREY]), RGB),
    'bgra8': (np.dstack([RGB[:, :, ::-1], GREY]), RGB),
    'mono8': (GREY, GREY),
    '8UC1': (GREY, GREY),
    'mono16': (DEEP, DEEP / 257),
    '16UC1': (DEEP, DEEP / 257),
    '32FC1': ((GREY / 255).astype(np.float32), GREY),
    '32FC3': ((RGB[:, :, ::-1] / 255).astype(np.float32), RGB),
    'yuv422': uyvy(),
    'uyvy': uyvy(),
    'yuv422_yuy2': uyvy(yuyv=True),
    'yuyv': uyvy(yuyv=True),
}
# Demosaicing is exact where the pattern has the colour: compared there only (NaN: anything).
for _pattern, _channels in BAYER.items():
    _known = np.full(RGB.shape, np.nan)
    for _y in (0, 1):
        for _x in (0, 1):
            _c = _channels[_y][_x]
            _known[_y::2, _x::2, _c] = RGB[_y::2, _x::2, _c]
    _known[[0, -1]] = _known[:, [0, -1]] = np.nan
    CASES[f'bayer_{_pattern}8'] = mosaic(_pattern), _known
    CASES[f'bayer_{_pattern}16'] = mosaic(_pattern, RGB.astype(np.uint16) * 257), _known


def check(message, expected):
    frame = to_frame(message)
    assert frame.dtype == np.uint8 and frame.shape == expected.shape
    assert np.nanmax(np.abs(frame - expected)) <= 1.5
    return frame


def padded(message, samples, padding):
    """Give the same image with rows that are longer than their pixels."""
    rows = np.ascontiguousarray(samples).view(np.uint8).reshape(samples.shape[0], -1)
    junk = np.full((len(rows), padding), 0xAB, np.uint8)
    message.data = array.array('B', np.hstack([rows, junk]).tobytes())
    message.step += padding
    return message


def test_every_encoding_has_a_case():
    assert set(CASES) == set(ENCODINGS)


@pytest.mark.parametrize('encoding', CASES)
def test_encoding(encoding):
    samples, expected = CASES[encoding]
    plain = check(image_message(samples, 0, encoding), expected)
    message = padded(image_message(samples, 0, encoding), samples, 5)
    assert np.array_equal(to_frame(message), plain)
    message.data = message.data[:-5]  # some drivers leave out the last row's padding
    assert np.array_equal(to_frame(message), plain)


@pytest.mark.parametrize(
    'encoding', [e for e, (dtype, *_) in ENCODINGS.items() if dtype.itemsize > 1]
)
def test_big_endian(encoding):
    samples, expected = CASES[encoding]
    swapped = samples.astype(samples.dtype.newbyteorder('>'))
    check(image_message(swapped, 0, encoding, is_bigendian=1), expected)
    check(padded(image_message(swapped, 0, encoding, is_bigendian=1), swapped, 6), expected)


@pytest.mark.parametrize(
    'encoding', ['rgb8', 'bgr8', 'rgba8', 'bgra8', 'bayer_rggb8', 'bayer_bggr8', 'bayer_gbrg8']
)
def test_equal_to_cv_bridge_where_it_is_right(encoding):
    message = image_message(CASES[encoding][0], 0, encoding)
    assert np.array_equal(to_frame(message), CvBridge().imgmsg_to_cv2(message, 'rgb8'))


def test_other_encodings_are_left_to_cv_bridge(monkeypatch):
    message = image_message(GREY, 0, 'nv24')
    with pytest.raises(BadImage, match="encoding 'nv24' is not one of .* and cv_bridge cannot"):
        to_frame(message)

    class Bridge:
        def imgmsg_to_cv2(self, got, desired):
            assert got is message and desired == 'rgb8'
            return RGB

    monkeypatch.setitem(sys.modules, 'cv_bridge', types.SimpleNamespace(CvBridge=Bridge))
    assert to_frame(message) is RGB
    monkeypatch.setattr(Bridge, 'imgmsg_to_cv2', lambda *_: GREY)
    with pytest.raises(BadImage, match=r'cv_bridge made \(48, 64\) uint8'):
        to_frame(message)
    monkeypatch.setitem(sys.modules, 'cv_bridge', None)
    with pytest.raises(BadImage, match='cv_bridge, which may know it, does not import'):
        to_frame(message)


def test_cv_bridge_is_imported_only_when_asked():
    """The node must run where it does not import."""
    import subprocess

    code = (
        "import sys; sys.modules['cv_bridge'] = None\n"
        'from perceiver_flow_ros.ros import conversion, node'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize(
    ('samples', 'encoding', 'fields', 'text'),
    [
        (RGB, 'rgb8', {'step': 191}, 'its step is 191, but a row of 64 rgb8 pixels has 192 bytes'),
        (RGB, 'rgb8', {'step': 0}, 'its step is 0'),
        (
            RGB,
            'rgb8',
            {'height': 49},
            'its data has 9216 bytes, but 49 rows of step 192 have 9408',
        ),
        (
            RGB,
            'rgb8',
            {'height': 40},
            'its data has 9216 bytes, but 40 rows of step 192 have 7680',
        ),
        (RGB, 'rgb8', {'data': array.array('B')}, 'its data has 0 bytes'),
        (RGB, 'rgb8', {'width': 0}, 'it has 0x48 pixels, but flow needs at least 2x2'),
        (RGB, 'rgb8', {'height': 0}, 'it has 64x0 pixels'),
        (RGB[:1], 'rgb8', {}, 'it has 64x1 pixels'),
        (RGB, '', {}, "encoding '' is not one of"),
        (CASES['uyvy'][0][:, :63], 'yuv422', {}, 'OpenCV cannot convert 63x48 yuv422'),
        (np.full((4, 4), np.inf, np.float32), '32FC1', {}, '16 of its 16 32FC1 values are NaN'),
        (np.full((4, 4), 2, np.float32), '32FC1', {}, 'values run from 2 to 2, expected 0 to 1'),
        (np.full((4, 4, 3), -1, np.float32), '32FC3', {}, 'values run from -1 to -1'),
    ],
)
def test_malformed(samples, encoding, fields, text):
    with pytest.raises(BadImage, match=text):
        to_frame(image_message(samples, 0, encoding, **fields))


def test_fuzzed_messages_are_converted_or_refused():
    """2,000 images with wrong headers: a frame or BadImage, nothing else."""
    rng = np.random.default_rng(0)
    encodings = [*ENCODINGS, 'jpeg', '']
    good = 0
    for _ in range(2000):
        encoding = encodings[rng.integers(len(encodings))]
        dtype, channels, _ = ENCODINGS.get(encoding, (np.dtype('u1'), 1, None))
        height, width = rng.integers(0, 9, 2)
        row = int(width) * channels * dtype.itemsize
        step = row + int(rng.choice([0, 0, 0, 3, -1, 10**6]))
        size = max(step, 0) * int(height) + int(rng.choice([0, 0, 0, -1, 1, 100]))
        message = image_message(
            RGB, 0, encoding, step=max(step, 0), is_bigendian=int(rng.integers(3))
        )
        message.height, message.width = int(height), int(width)
        message.data = array.array('B', rng.bytes(int(np.clip(size, 0, 10**5))))
        try:
            frame = to_frame(message)
        except BadImage as error:
            assert str(error)
            continue
        good += 1
        assert frame.dtype == np.uint8 and frame.shape[:2] == (height, width)
        assert frame.shape[2:] in ((), (3,))
    assert good > 200


def test_messages_of_arrays():
    header = Header(frame_id='camera')
    flow = np.random.default_rng(0).normal(size=(6, 14, 2)).astype(np.float32)[:, ::2]  # a view
    message = to_message(flow, '32FC2', header)
    assert (message.height, message.width, message.step) == (6, 7, 56)
    assert message.header is header and message.encoding == '32FC2' and message.is_bigendian == 0
    assert isinstance(message.data, array.array)  # the type that is not checked sample by sample
    assert np.array_equal(np.frombuffer(message.data, '<f4').reshape(6, 7, 2), flow[:, :])
    message = to_message(RGB, 'rgb8', header)
    assert (message.height, message.width, message.step) == (48, 64, 192)
    assert bytes(message.data) == RGB.tobytes()
    assert np.array_equal(
        cv2.cvtColor(CvBridge().imgmsg_to_cv2(message), cv2.COLOR_RGB2BGR), RGB[:, :, ::-1]
    )
