# SPDX-License-Identifier: Apache-2.0
"""JPEG and PNG messages to frames and back; the node on `image/compressed`."""

import array

import cv2
from node_rig import Rig
import numpy as np
from perceiver_flow_ros.ros.compressed import decode, encode
from perceiver_flow_ros.ros.conversion import BadImage
import pytest
from ros_images import flow_of, picture, texture
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
from test_conversion import mosaic

RGB = texture(48, 64)
GREY = RGB[:, :, 1].copy()
DEEP = GREY.astype(np.uint16) * 257


def compressed(image, kind='png', text='', stamp=0.0):
    """Compress what is given as it is: OpenCV takes colours blue first."""
    data = cv2.imencode(f'.{kind}', image)[1].tobytes()
    message = CompressedImage(format=text or f'bgr8; {kind} compressed bgr8')
    message.data = array.array('B', data)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(stamp * 1e9), 10**9)
    return message


def test_png_is_exact():
    bgr = np.ascontiguousarray(RGB[:, :, ::-1])
    np.testing.assert_array_equal(decode(compressed(bgr)), RGB)
    np.testing.assert_array_equal(decode(compressed(np.dstack([bgr, GREY]))), RGB)
    np.testing.assert_array_equal(decode(compressed(GREY, text='mono8; png compressed ')), GREY)
    np.testing.assert_array_equal(decode(compressed(DEEP, text='mono16; png compressed ')), GREY)
    swapped = compressed(RGB, text='rgb8; png compressed rgb8')
    np.testing.assert_array_equal(decode(swapped), RGB)


def test_a_mosaic_in_png():
    for pattern in ('rggb', 'bggr', 'gbrg', 'grbg'):
        raw = mosaic(pattern)
        rgb = decode(compressed(raw, text=f'bayer_{pattern}8; png compressed '))
        inner = np.abs(rgb[2:-2, 2:-2].astype(int) - RGB[2:-2, 2:-2])
        assert rgb.shape == RGB.shape and inner.mean() < 8


def test_jpeg_is_near_and_comes_back():
    smooth = cv2.GaussianBlur(RGB, (0, 0), 5)  # JPEG halves the resolution of colours
    there = encode(smooth, Header(frame_id='camera'))
    assert there.header.frame_id == 'camera' and there.format == 'rgb8; jpeg compressed bgr8'
    back = decode(there)
    wrong = np.abs(back.astype(int) - smooth).mean()
    assert wrong < 3 < np.abs(back[:, :, ::-1].astype(int) - smooth).mean()
    for more in (bytes(500), b'\xff' * 500, b'made by a camera' * 9):  # as MJPEG cameras pad
        there.data.extend(more)
        np.testing.assert_array_equal(decode(there), back)
    assert decode(compressed(GREY, 'jpg')).ndim == 2


def damaged(text):
    jpeg = compressed(RGB, 'jpg').data.tobytes()
    png = compressed(RGB).data.tobytes()
    return {
        'empty': b'', 'text': b'hello', 'cut JPEG': jpeg[: len(jpeg) // 2],
        'cut after its preview': jpeg[:2] + jpeg + jpeg[2:-300],
        'cut PNG': png[:-30], 'head only': jpeg[:4], 'broken PNG': png[:40] + png[200:],
        'tiny': compressed(RGB[:1, :1]).data.tobytes(),
        'floats': cv2.imencode('.tiff', RGB.astype(np.float32))[1].tobytes(),
    }[text]  # fmt: skip


@pytest.mark.parametrize(
    ('what', 'text'),
    [
        ('empty', 'neither JPEG nor PNG'), ('text', "5 bytes (format 'png') are neither JPEG"),
        ('cut JPEG', 'JPEG data are cut off'), ('cut PNG', 'PNG data are cut off'),
        ('head only', 'JPEG data are cut off'), ('broken PNG', 'damaged'),
        ('cut after its preview', 'JPEG data are cut off'),
        ('tiny', '1x1 pixels'), ('floats', 'neither JPEG nor PNG'),
    ],
)  # fmt: skip
def test_damaged_data_are_refused_with_the_reason(what, text):
    message = CompressedImage(format='png', data=array.array('B', damaged(what)))
    with pytest.raises(BadImage) as refused:
        decode(message)
    assert text in str(refused.value)


@pytest.mark.slow
def test_fuzzed_data_end_in_a_frame_or_in_a_reason():
    random = np.random.default_rng(0)
    sources = [compressed(RGB, kind).data.tobytes() for kind in ('jpg', 'png')]
    refused = 0
    for i in range(1000):
        data = bytearray(sources[i % 2])
        for _ in range(random.integers(1, 5)):
            data[random.integers(len(data))] = random.integers(256)
        if i % 5 == 0:
            del data[random.integers(len(data)): random.integers(len(data))]
        try:
            frame = decode(CompressedImage(format='jpeg', data=array.array('B', bytes(data))))
        except BadImage:
            refused += 1
        else:
            assert frame.dtype == np.uint8 and frame.ndim in (2, 3) and min(frame.shape[:2]) > 1
    assert refused > 100


@pytest.fixture
def rig():
    r = Rig(model='dis', image_transport='compressed', arguments=['-r', 'image:=/cam/image_raw'])
    yield r
    r.close()


def test_the_node_on_compressed_images(rig):
    assert rig.node.image_topic == '/cam/image_raw/compressed'
    colors, name = [], rig.node.get_name()
    topic = f'/{name}/flow/color/compressed'
    rig.peer.create_subscription(CompressedImage, topic, colors.append, 10)
    rig.camera = rig.peer.create_publisher(CompressedImage, rig.node.image_topic, 10)
    rig.peer.create_subscription(Image, f'/{name}/flow', rig.received['flow'].append, 10)
    rig.until(lambda: rig.node.pipeline.wanted() == {'flow', 'flow/color/compressed'})

    def send(shift, stamp):
        bgr = np.ascontiguousarray(picture(shift)[:, :, ::-1])
        rig.publish(compressed(bgr, 'jpg', stamp=stamp))
        rig.settle()

    send(0, 1.0)
    rig.publish(CompressedImage(format='h264', data=array.array('B', b'nothing')))
    text = 'image of /cam/image_raw/compressed refused: its 7 bytes'
    assert rig.status('flow', text).level == b'\x02'
    send(3, 1.1)
    rig.until(lambda: rig.received['flow'] and colors)
    flow = flow_of(rig.received['flow'][0])
    assert np.abs(np.median(flow[8:-8, 8:-8], (0, 1)) - (3, 0)).max() < 0.2
    assert colors[0].header == rig.received['flow'][0].header
    shown = decode(colors[0])
    assert shown.shape == (96, 128, 3) and shown[48, 64, 0] > 180  # rightward motion is red
    rig.until(lambda: rig.statuses['input'].values['format'] == '128x96 colour, compressed')
