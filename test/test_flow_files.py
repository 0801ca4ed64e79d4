# SPDX-License-Identifier: Apache-2.0
"""Flow files, images, the colour wheel and the metrics."""

import struct

import cv2
import numpy as np
from perceiver_flow_ros.flow.color import flow_to_color, WHEEL
from perceiver_flow_ros.flow.files import read_flow, read_image, write_flow, write_image
from perceiver_flow_ros.flow.metrics import end_point_error, metrics, sparsification_error
import pytest


def some_flow(height=7, width=11):
    flow = np.random.default_rng(0).normal(0, 20, (height, width, 2)).astype(np.float32)
    flow[2, 3] = np.nan
    return flow


@pytest.mark.parametrize(
    ('suffix', 'step'), [('.flo', 0), ('.npy', 0), ('.png', 1 / 64), ('.FLO', 0)]
)
def test_a_flow_file_gives_back_what_was_written(tmp_path, suffix, step):
    flow = some_flow()
    path = tmp_path / f'flow{suffix}'
    write_flow(path, flow)
    back = read_flow(path)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, flow, rtol=0, atol=step / 2)  # NaN stays NaN
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_flo_bytes_are_middleburys(tmp_path):
    flow = np.array([[[1, 2], [3, 4], [np.nan, 0]]], np.float32)
    write_flow(tmp_path / 'a.flo', flow)
    data = (tmp_path / 'a.flo').read_bytes()
    assert struct.unpack('<fii4f', data[:28]) == (202021.25, 3, 1, 1, 2, 3, 4)
    assert min(struct.unpack('<2f', data[28:])) > 1e9


def test_kitti_png_is_kittis(tmp_path):
    write_flow(tmp_path / 'a.png', np.array([[[1.5, -2], [np.nan, np.nan]]], np.float32))
    blue, green, red = cv2.split(cv2.imread(str(tmp_path / 'a.png'), cv2.IMREAD_UNCHANGED))
    assert red.tolist() == [[2**15 + 96, 0]]  # u in steps of 1/64
    assert green.tolist() == [[2**15 - 128, 0]]  # v
    assert blue.tolist() == [[1, 0]]  # valid


def test_kitti_png_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r'less than 512 px.*600\.0 px'):
        write_flow(tmp_path / 'a.png', np.full((2, 2, 2), 600, np.float32))
    assert not list(tmp_path.iterdir())


def flo(width, height, values):
    return b'PIEH' + struct.pack('<ii', width, height) + bytes(4 * values)


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('a.flo', b'', 'not a Middlebury .flo file'),
        ('a.flo', b'JUNK' + bytes(100), 'not a Middlebury .flo file'),
        ('a.flo', flo(4, 3, 20), r'92 bytes, expected 108 for the 4x3'),
        ('a.flo', flo(4, 3, 25), 'expected 108'),
        ('a.flo', flo(-4, 3, 24), '-4x3'),
        ('a.flo', b'PIEH', '0x0'),
        ('a.npy', b'\x93NUMPY junk', 'corrupt .npy'),
        ('a.npy', b'', 'corrupt .npy'),
        ('a.png', b'junk', 'not a KITTI flow file: no whole PNG'),
        ('a.txt', b'', r'expected one of \.flo, \.png, \.npy'),
    ],
)
def test_a_bad_flow_file_is_named_with_what_was_expected(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_flow(path)
    assert str(path) in str(error.value)


def test_a_picture_or_a_pickle_is_no_flow_file(tmp_path):
    write_image(tmp_path / 'a.png', np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match='uint8, expected 3 channels of 16 bits'):
        read_flow(tmp_path / 'a.png')
    np.save(tmp_path / 'a.npy', np.array([{'a': 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match='corrupt .npy'):
        read_flow(tmp_path / 'a.npy')
    np.save(tmp_path / 'b.npy', np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r'\(4, 4\) float64, expected a flow'):
        read_flow(tmp_path / 'b.npy')


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'a.flo'
    write_flow(path, some_flow())
    before = path.read_bytes()
    with pytest.raises(ValueError, match='expected'):
        write_flow(path, np.zeros((4, 4)))
    with pytest.raises(OSError, match='no_such_folder'):
        write_flow(tmp_path / 'no_such_folder' / 'a.flo', some_flow())
    (tmp_path / 'folder.flo').mkdir()
    with pytest.raises(OSError, match='folder.flo'):
        write_flow(tmp_path / 'folder.flo', some_flow())
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.flo', 'folder.flo']


def test_images_come_as_rgb_of_8_bits(tmp_path):
    red = np.zeros((4, 5, 3), np.uint8)
    red[..., 0] = 200
    write_image(tmp_path / 'red.png', red)
    np.testing.assert_array_equal(read_image(tmp_path / 'red.png'), red)

    cv2.imwrite(str(tmp_path / 'grey.png'), np.full((4, 5), 90, np.uint8))
    assert (read_image(tmp_path / 'grey.png') == 90).all()
    assert read_image(tmp_path / 'grey.png').shape == (4, 5, 3)

    cv2.imwrite(str(tmp_path / 'deep.png'), np.full((4, 5), 51 * 257, np.uint16))
    assert (read_image(tmp_path / 'deep.png') == 51).all()

    cv2.imwrite(str(tmp_path / 'alpha.png'), np.full((4, 5, 4), (0, 0, 200, 128), np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / 'alpha.png'), red)


@pytest.mark.parametrize(('name', 'width'), [('a.webp', 20_000), ('a.jpg', 70_000)])
def test_an_image_too_large_for_its_format_is_refused(tmp_path, name, width):
    with pytest.raises(ValueError, match=f'{name}: .* {width}x1 .*; choose another format'):
        write_image(tmp_path / name, np.zeros((1, width, 3), np.uint8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['.png', '.ppm', '.bmp'])
def test_grey_images_are_written(tmp_path, suffix):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_image(tmp_path / f'a{suffix}', grey)
    assert np.array_equal(read_image(tmp_path / f'a{suffix}'), np.repeat(grey[..., None], 3, 2))


def test_a_truncated_or_missing_image_is_refused(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for suffix in ('.png', '.jpg', '.ppm'):
        path = tmp_path / f'a{suffix}'
        write_image(path, picture)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(ValueError, match=f'a{suffix}: not a whole image'):
            read_image(path)
    (tmp_path / 'empty.png').write_bytes(b'')
    with pytest.raises(ValueError, match='not a whole image'):
        read_image(tmp_path / 'empty.png')
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / 'missing.png')
    with pytest.raises(ValueError, match='expected one of'):
        write_image(tmp_path / 'a.flo', picture)


# The colours of Middlebury's own program (colorcode.cpp) at a largest motion of 1 px.
MIDDLEBURY = {
    (1, 0): (255, 0, 0),
    (0, 1): (255, 229, 0),
    (-1, 0): (0, 209, 255),
    (0, -1): (87, 0, 255),
    (0.5, 0.5): (255, 155, 74),
    (-0.3, 0.2): (163, 255, 184),
    (0.6, -0.8): (196, 0, 255),
    (0, 0): (255, 255, 255),
    (2, 0): (191, 0, 0),  # out of range: darkened
}


def test_pixels_of_another_kind_are_named(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.tiff'), np.zeros((8, 8), np.float32))
    with pytest.raises(ValueError, match='pixels are float32, expected 8 or 16 bits'):
        read_image(tmp_path / 'a.tiff')


def test_colours_are_middleburys():
    flow = np.array([list(MIDDLEBURY)], np.float32)
    assert flow_to_color(flow, 1.0)[0].tolist() == [list(c) for c in MIDDLEBURY.values()]
    np.testing.assert_array_equal(flow_to_color(flow * 7, 7.0), flow_to_color(flow, 1.0))
    assert len(WHEEL) == 55


def test_colours_scale_to_the_largest_known_motion():
    flow = np.array([[[3, 0], [0, 0], [np.nan, 1], [np.inf, 1], [1e10, 1e10]]], np.float32)
    colours = flow_to_color(flow)[0].tolist()
    assert colours == [[255, 0, 0], [255, 255, 255], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert (flow_to_color(np.zeros((2, 2, 2))) == 255).all()
    assert not flow_to_color(np.full((2, 2, 2), np.nan)).any()
    with pytest.raises(ValueError, match='positive'):
        flow_to_color(flow, 0)
    with pytest.raises(ValueError, match=r'\(2, 2\), expected \(H, W, 2\)'):
        flow_to_color(np.zeros((2, 2)))


def test_metrics_count_what_they_say():
    truth = np.zeros((1, 6, 2), np.float32)
    truth[0, :, 0] = [0, 0, 10, 100, 100, np.nan]
    flow = truth.copy()
    flow[0, :, 1] = [0, 2, 4, 4, 6, 50]  # errors 0, 2, 4, 4, 6 and an unknown one
    result = metrics(flow, truth)
    assert result['pixels'] == 5
    assert result['epe'] == pytest.approx(16 / 5)
    assert (result['px1'], result['px3'], result['px5']) == pytest.approx((80, 60, 20))
    assert result['fl'] == pytest.approx(40)  # 4 px of 10 and 6 px of 100, but not 4 px of 100

    valid = np.array([[True, True, False, False, False, True]])
    assert metrics(flow, truth, valid)['epe'] == pytest.approx(1)
    assert np.isnan(end_point_error(flow, truth, valid)[0, 2:]).all()


def test_metrics_do_not_reward_holes():
    truth = np.ones((2, 2, 2), np.float32)
    flow = truth.copy()
    flow[0, 0] = np.nan
    result = metrics(flow, truth)
    assert result['epe'] == np.inf
    assert result['fl'] == result['px5'] == 25
    with pytest.raises(ValueError, match='unknown at every pixel'):
        metrics(flow, truth * np.nan)
    with pytest.raises(ValueError, match='differ in shape'):
        metrics(flow, truth[:1])


def test_sparsification_error_tells_a_good_confidence_from_a_bad_one():
    error = np.random.default_rng(0).exponential(size=(40, 50)).astype(np.float32)
    error[3, :7] = np.nan
    perfect = sparsification_error(error, np.nan_to_num(-error))
    none = sparsification_error(error, np.ones_like(error))
    worst = sparsification_error(error, np.nan_to_num(error))
    assert perfect == pytest.approx(0, abs=1e-6)
    assert none == pytest.approx(np.mean(1 - np.cumsum(e := np.sort(error[error > 0]))
                                         / np.arange(1, e.size + 1) / e.mean()), rel=1e-3)
    assert 0.3 < none < worst
