# SPDX-License-Identifier: Apache-2.0
"""The official network on images of any size: tiles that join, strides and points that agree."""

import numpy as np
from perceiver_flow_ros.commands.benchmark import frame_pair, peaky_network
from perceiver_flow_ros.flow.estimator import load_estimator
from perceiver_flow_ros.flow.official import neighbours, OfficialEstimator
from perceiver_flow_ros.flow.tiling import tile_grid
from perceiver_flow_ros.model.weights import transformers_name
import pytest
from safetensors.torch import save_file
import torch
from torch.nn import functional as F

SIZE = (32, 48)
SIZES = [SIZE, (1, 1), (1, 60), (33, 7), (50, 48), (61, 115)]


@pytest.fixture(scope='module')
def network():
    return peaky_network(*SIZE, num_latents=32, d_latents=32, num_self_attends_per_block=1,
                         num_self_attention_heads=2)


@pytest.fixture(scope='module')
def checkpoint(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint')
    save_file({transformers_name(name): value.contiguous()
               for name, value in network.state_dict().items()}, folder / 'model.safetensors')
    (folder / 'config.json').write_text(
        '{"train_size": [32, 48], "num_self_attention_heads": 2}')
    return folder


@pytest.fixture(scope='module')
def estimators(checkpoint):
    return {(tiling, stride): load_estimator(checkpoint, device='cpu', tiling=tiling,
                                             query_stride=stride)
            for tiling in ('tile', 'resize') for stride in (1, 2, 4, 8)}


@pytest.fixture(scope='module')
def dense(estimators):
    """Give the dense flow of both tilings at every size, each computed once."""
    return {(tiling, size): estimators[tiling, 1](*frame_pair(*size))
            for tiling in ('tile', 'resize') for size in SIZES}


def relative_error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_an_image_of_the_training_size_is_one_pass(network, dense):
    with torch.no_grad():
        expected = network(torch.from_numpy(frame_pair(*SIZE))[None])[0].numpy()
    assert len(tile_grid(*SIZE, SIZE)) == 1
    for tiling in ('tile', 'resize'):
        assert relative_error(dense[tiling, SIZE], expected) < 1e-4


@pytest.mark.parametrize('tiling', ['tile', 'resize'])
@pytest.mark.parametrize('size', SIZES)
def test_any_size_stride_and_point(estimators, dense, tiling, size):
    """Output size = input size, and what is decoded sparsely is the dense flow at those pixels."""
    frames, expected = frame_pair(*size), dense[tiling, size]
    assert expected.shape == (*size, 2) and expected.dtype == np.float32
    assert np.isfinite(expected).all()
    for stride in (2, 4, 8):
        flow = estimators[tiling, stride](*frames)
        assert flow.shape == (-(-size[0] // stride), -(-size[1] // stride), 2)
        np.testing.assert_allclose(flow, expected[::stride, ::stride], rtol=1e-3, atol=1e-4)
    random = np.random.default_rng(0)
    points = random.integers(0, (size[1], size[0]), (20, 2))
    flow = estimators[tiling, 1].at(*frames, points)
    np.testing.assert_allclose(flow, expected[points[:, 1], points[:, 0]], rtol=1e-3, atol=1e-4)
    assert estimators[tiling, 1].at(*frames, points[:0]).shape == (0, 2)


def test_tiles_join_at_the_right_place(checkpoint):
    """A network whose flow is what it sees gives the image back, without a trace of the tiles."""
    class Mirror:
        def encode(self, frames):
            return frames[:, 0], frames[:, 1]

        def decode(self, previous, current, queries):
            return [torch.stack([previous[q][..., 0], current[q][..., 1]], -1).float()
                    for q in queries]

        def decode_at(self, previous, current, y, x):
            return torch.stack([previous[y, x, 0], current[y, x, 1]], -1).float()

    estimator = OfficialEstimator(checkpoint)
    estimator._network, estimator._batch = Mirror(), 3
    for size in SIZES:
        previous, current = frame_pair(*size)
        expected = np.stack([previous[..., 0], current[..., 1]], -1)
        np.testing.assert_allclose(estimator(previous, current), expected, atol=1e-4)
        points = np.argwhere(np.ones(size))[::7, ::-1]
        np.testing.assert_allclose(estimator.at(previous, current, points),
                                   expected[points[:, 1], points[:, 0]], atol=1e-4)


def test_resize_scales_both_components(network, dense):
    """The network's flow on the resized image, enlarged, times (W / w, H / h)."""
    size = (61, 115)
    frames = torch.from_numpy(frame_pair(*size)).permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, SIZE, mode='bilinear', antialias=True).permute(0, 2, 3, 1)
    with torch.no_grad():
        flow = network(small[None]).permute(0, 3, 1, 2)
    flow = F.interpolate(flow, size, mode='bilinear')[0].permute(1, 2, 0).numpy()
    assert relative_error(dense['resize', size], flow * [115 / 48, 61 / 32]) < 1e-4


def test_neighbours():
    low, high, share = neighbours(torch.arange(4), 4, 2)
    assert low.tolist() == [0, 0, 0, 1] and high.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(share[:, 0], torch.tensor([0, 0.25, 0.75, 0]))


def test_grey_is_colour_with_equal_channels(estimators):
    grey = np.ascontiguousarray(frame_pair(*SIZE)[..., 0])
    colour = np.repeat(grey[..., None], 3, axis=-1)
    estimator = estimators['tile', 4]
    np.testing.assert_array_equal(estimator(*grey), estimator(*colour))


def test_describes_itself(estimators):
    estimator = estimators['resize', 4]
    assert (estimator.name, estimator.device, estimator.precision, estimator.query_stride) == (
        'official', 'cpu', 'float32', 4)


def test_half_precision(checkpoint, dense):
    estimator = load_estimator(checkpoint, device='cpu', precision='bfloat16')
    assert relative_error(estimator(*frame_pair(*SIZE)), dense['tile', SIZE]) < 0.1


def test_bad_input(estimators):
    estimator = estimators['tile', 1]
    previous, current = frame_pair(*SIZE)
    with pytest.raises(ValueError, match='differ in shape'):
        estimator(previous, current[1:])
    with pytest.raises(ValueError, match='float64, expected'):
        estimator(previous / 255, current / 255)
    with pytest.raises(ValueError, match='empty'):
        estimator(previous[:0], current[:0])
    for points in ([[0.5, 3]], [[48, 0]], [[0, -1]], [[np.nan, 0]]):
        with pytest.raises(ValueError, match='whole pixels .* of the 48x32 image'):
            estimator.at(previous, current, np.array(points))
    with pytest.raises(ValueError, match=r'expected \(N, 2\)'):
        estimator.at(previous, current, np.zeros(4))
