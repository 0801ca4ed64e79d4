# SPDX-License-Identifier: Apache-2.0
"""The interface in front of the estimators, and DIS behind it."""

import subprocess
import sys

import cv2
import numpy as np
from perceiver_flow_ros.flow import load_estimator
from perceiver_flow_ros.flow.estimator import as_rgb, check_pair, sample
from perceiver_flow_ros.flow.files import read_flow, read_image
from perceiver_flow_ros.flow.metrics import metrics
import pytest
import torch


def textured(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5).astype(np.float32)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def shifted_pair(height=120, width=160, u=3, v=-2):
    """Give two frames of a plane that moves by (u, v)."""
    big = textured(height + 40, width + 40)
    return big[20:-20, 20:-20], big[20 - v: 20 - v + height, 20 - u: 20 - u + width]


def test_dis_finds_a_known_motion():
    flow = load_estimator('dis')(*shifted_pair())
    assert flow.shape == (120, 160, 2)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(np.median(flow, axis=(0, 1)), (3, -2), atol=0.1)


def test_dis_sees_colour_as_it_sees_grey():
    grey = shifted_pair()
    dis = load_estimator('dis')
    np.testing.assert_allclose(dis(*map(as_rgb, grey)), dis(*grey), atol=0.05)


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (50, 1), (7, 9), (33, 31), (64, 64), (40, 700)])
def test_dis_takes_any_size(size):
    frame = textured(*size)
    flow = load_estimator('dis')(frame, frame)
    assert flow.shape == (*size, 2)
    assert np.abs(flow).max() < 0.5


@pytest.mark.parametrize('stride', [2, 4, 8])
def test_a_query_stride_gives_the_dense_flow_at_those_pixels(stride):
    pair = shifted_pair(61, 83)
    sparse = load_estimator('dis', query_stride=stride)(*pair)
    np.testing.assert_array_equal(sparse, load_estimator('dis')(*pair)[::stride, ::stride])


def test_points_sample_the_dense_flow():
    pair = shifted_pair()
    dis = load_estimator('dis', query_stride=4)
    dense = load_estimator('dis')(*pair)
    points = np.array([[0, 0], [159, 119], [10, 20], [10.5, 20.25]])
    result = dis.at(*pair, points)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:3], dense[[0, 119, 20], [0, 159, 10]], rtol=1e-6)
    between = 0.75 * dense[20, 10:12].mean(axis=0) + 0.25 * dense[21, 10:12].mean(axis=0)
    np.testing.assert_allclose(result[3], between, rtol=1e-5)
    assert dis.at(*pair, np.zeros((0, 2))).shape == (0, 2)


@pytest.mark.parametrize('points', [[[-0.1, 0]], [[0, 2.1]], [[np.nan, 0]], [0, 0]])
def test_points_outside_the_image_are_refused(points):
    with pytest.raises(ValueError, match='points'):
        sample(np.zeros((3, 4, 2), np.float32), np.array(points))


def test_sampling_works_on_a_single_pixel():
    assert sample(np.ones((1, 1, 2), np.float32), [[0, 0]]).tolist() == [[1, 1]]


IMAGE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ('previous', 'current', 'message'),
    [
        (IMAGE, IMAGE[:3], r'previous \(4, 5, 3\), current \(3, 5, 3\)'),
        (IMAGE, IMAGE[..., 0], 'differ in shape'),
        (IMAGE, IMAGE.astype(float), 'current frame is .* float64, expected'),
        (IMAGE[..., :2], IMAGE[..., :2], r'previous frame is \(4, 5, 2\)'),
        (IMAGE[:0], IMAGE[:0], 'empty'),
        ([[0]], IMAGE, 'a list, expected a numpy array'),
    ],
)
def test_what_is_no_pair_of_images_is_refused(previous, current, message):
    with pytest.raises(ValueError, match=message):
        check_pair(previous, current)
    with pytest.raises(ValueError, match=message):
        load_estimator('dis')(previous, current)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'model': 'dis', 'device': 'cuda'}, "'dis' runs on the CPU only"),
        ({'model': 'dis', 'precision': 'float16'}, 'float32 only'),
        ({'model': 'dis', 'tiling': 'resize'}, "'dis' takes any image size"),
        ({'model': 'lite', 'tiling': 'resize'}, "'lite' takes any image size"),
        ({'model': 'official', 'quality': 'best'}, 'the official model has one setting'),
        ({'query_stride': 3}, 'expected one of 1, 2, 4, 8'),
        ({'precision': 'int8'}, "precision is 'int8'"),
        ({'quality': 'good'}, "quality is 'good'"),
        ({'tiling': 'crop'}, "tiling is 'crop'"),
        ({'device': 'tpu'}, "device 'tpu' is unknown"),
        ({'model': ''}, 'model is empty'),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_estimator(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has a CUDA device')
def test_cuda_where_there_is_none_says_so():
    with pytest.raises(
        ValueError, match='no CUDA device: torch.cuda.is_available.. is False.*use device "cpu"'
    ):
        load_estimator('lite', device='cuda')


def test_dis_needs_no_torch():
    code = (
        'import sys; sys.modules["torch"] = None\n'
        'import numpy as np\n'
        'from perceiver_flow_ros.flow import load_estimator\n'
        'frame = np.zeros((70, 80, 3), np.uint8)\n'
        'assert load_estimator("dis")(frame, frame).shape == (70, 80, 2)\n'
        'try:\n'
        '    load_estimator("lite")\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert "model 'lite' needs PyTorch" in done.stdout


def test_dis_reaches_its_known_accuracy_on_real_pairs(flow_data):
    errors = []
    for scene in ('Dimetrodon', 'Grove2', 'RubberWhale', 'Urban2'):
        folder = flow_data / 'middlebury' / scene
        frames = [read_image(folder / name) for name in ('frame10.png', 'frame11.png')]
        errors.append(
            metrics(load_estimator('dis')(*frames), read_flow(folder / 'flow10.flo'))['epe']
        )
    np.testing.assert_allclose(errors, [0.15, 0.32, 0.22, 0.65], atol=0.02)
