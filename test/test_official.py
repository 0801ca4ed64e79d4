# SPDX-License-Identifier: Apache-2.0
"""The reference network is transformers' network, and its parts are what the paper's code has."""

import math

import numpy as np
from perceiver_flow_ros.commands.benchmark import frame_pair, peaky_network, transformers_peer
from perceiver_flow_ros.model.folded import FoldedNetwork
from perceiver_flow_ros.model.official import (
    axis_channels,
    axis_features,
    CONTENT,
    OfficialConfig,
    OfficialNetwork,
    patches,
    Positions,
)
import pytest
import torch

SMALL = {'num_latents': 48, 'd_latents': 64, 'num_self_attends_per_block': 2,
         'num_self_attention_heads': 4}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def peer_flow(network: OfficialNetwork, frames: torch.Tensor) -> torch.Tensor:
    pytest.importorskip('transformers', reason='transformers is what parity is proved against')
    x = patches(frames).unflatten(-1, (2, 27)).permute(0, 3, 4, 1, 2)
    with torch.no_grad():
        return 20 * transformers_peer(network)(inputs=x).logits


def test_patches_by_hand():
    """(frame, ky, kx, channel), normalised to -1..1 before zeros are put around."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 2, 4, 5, 3), dtype=np.uint8)
    expected = np.zeros((1, 4, 5, 2, 3, 3, 3), np.float32)
    for f, y, x, ky, kx in np.ndindex(2, 4, 5, 3, 3):
        i, j = y + ky - 1, x + kx - 1
        if 0 <= i < 4 and 0 <= j < 5:
            expected[0, y, x, f, ky, kx] = frames[0, f, i, j] / 255 * 2 - 1
    result = patches(torch.from_numpy(frames))
    torch.testing.assert_close(result, torch.from_numpy(expected.reshape(1, 4, 5, 54)))


def test_positions_by_hand():
    """Channels [y, x, sin y, sin x, cos y, cos x] after the content, up to Nyquist's frequency."""
    tokens = Positions(6, 9)(torch.zeros(1, 6, 9, CONTENT))
    y, x = 2 * 4 / 5 - 1, 2 * 3 / 8 - 1                     # of row 4 and column 3
    fy, fx = np.linspace(1, 6 / 2, 64) * math.pi * y, np.linspace(1, 9 / 2, 64) * math.pi * x
    expected = np.concatenate(
        [np.zeros(CONTENT), [y, x], np.sin(fy), np.sin(fx), np.cos(fy), np.cos(fx)])
    torch.testing.assert_close(tokens[0, 4, 3], torch.from_numpy(expected).float(),
                               rtol=0, atol=1e-5)
    channels = torch.cat(axis_channels())
    assert sorted(channels.tolist()) == list(range(CONTENT, 322))
    assert axis_features(1).isfinite().all()


@pytest.mark.parametrize('height, width', [(24, 40), (17, 9)])
def test_parity_with_transformers(height, width):
    network = peaky_network(height, width, **SMALL)
    frames = torch.from_numpy(np.stack([frame_pair(height, width),
                                        frame_pair(height, width)[::-1]]))
    with torch.no_grad():
        flow = network(frames)
    assert flow.shape == (2, height, width, 2) and flow.std() > 0.1
    assert relative_error(flow, peer_flow(network, frames)) < 1e-5


@pytest.mark.slow
def test_parity_at_full_size():
    """All 41,057,134 parameters at 368x496: reference and folded against transformers."""
    network = peaky_network(368, 496)
    assert sum(weight.numel() for weight in network.parameters()) == 41_057_134
    frames = torch.from_numpy(frame_pair(368, 496))[None]
    expected = peer_flow(network, frames)
    with torch.no_grad():
        assert relative_error(network(frames), expected) < 1e-4
    assert relative_error(FoldedNetwork(network)(frames), expected) < 1e-4


def test_configuration():
    assert OfficialConfig.from_dict({}) == OfficialConfig()
    assert OfficialConfig.from_dict({'train_size': [2, 4], 'd_model': 322}).train_size == (2, 4)
    for values, message in [
            ({'model_type': 'bert'}, "model_type is 'bert', expected 'perceiver'"),
            ({'num_cross_attention_heads': 8}, 'num_cross_attention_heads is 8, expected 1'),
            ({'hidden_act': 'relu'}, "hidden_act is 'relu', expected 'gelu'"),
            ({'train_size': [368]}, r'train_size is \[368\], expected \[height, width\]'),
            ({'train_size': 368}, 'train_size is 368'),
            ({'num_latents': 0}, 'num_latents is 0, expected a positive integer'),
            ({'num_self_attends_per_block': 'many'}, "is 'many', expected a positive integer"),
            ({'d_latents': 100}, r'd_latents \(100\) is not a multiple')]:
        with pytest.raises(ValueError, match=message):
            OfficialConfig.from_dict(values)
