# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of lite and of its training pairs: on a GPU, else in Triton's interpreter."""

import contextlib
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip('triton', reason='kernels need Triton (CUDA builds of torch bring it)')

from perceiver_flow_ros.commands._lite_checks import check_lite_kernels
from perceiver_flow_ros.flow.lite import PACKAGED
from perceiver_flow_ros.model import (
    accelerated,
    choice_cuda,
    evidence,
    evidence_cuda,
    layers_cuda,
    perceiver_cuda,
    propagation_cuda,
    pyramid_cuda,
)
from perceiver_flow_ros.model.lite import LiteConfig, LitePerceiver
from perceiver_flow_ros.model.weights import load_lite
from perceiver_flow_ros.training import textures, textures_cuda
from perceiver_flow_ros.training.synthesis import make_pairs, Motion

pytestmark = pytest.mark.usefixtures('one_thread')
DEVICE = torch.device('cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda')
KERNELS = [(kernels, name) for kernels, names in (
    (evidence_cuda, ('warp_by_tokens', 'local_contrast', 'match', 'lucas_kanade', 'median')),
    (choice_cuda, ('describe',)), (pyramid_cuda, ('convex_upsample',)),
    (propagation_cuda, ('tried',)), (layers_cuda, ('fitted',)),
    (perceiver_cuda, ('projected', 'added', 'with_mlp'))) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize('size', [(1, 4, 8), (3, 12, 44)], ids=str)
def test_every_kernel_against_float64(size):
    """Several blocks, the last one not full; one row of tokens; batch 3."""
    checks = list(check_lite_kernels(DEVICE, *size, seed=0))
    assert {c.kernel for c in checks} == {name for _, name in KERNELS}
    assert not [check for check in checks if not check.passed]


@pytest.mark.slow
def test_a_wrong_kernel_is_noticed(monkeypatch):
    monkeypatch.setattr(evidence_cuda, 'median', lambda flow: flow)
    monkeypatch.setattr(evidence_cuda, 'local_contrast', torch.empty_like)
    checks = check_lite_kernels(DEVICE, 1, 12, 20, seed=0)
    assert [c.kernel for c in checks if not c.passed] == ['local_contrast', 'median']


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('width', [24, 300])
def test_layers_in_half_precision(dtype, width):
    """Sums are float32, a residual stays what it was; wide layers are PyTorch's."""
    torch.manual_seed(0)
    layer, norm = torch.nn.Linear(width, 20).to(DEVICE), torch.nn.LayerNorm(width).to(DEVICE)
    x, residual = torch.randn(3, 7, width, device=DEVICE), torch.randn(3, 7, 20, device=DEVICE)
    expected = residual + torch.nn.functional.gelu(layer(norm(x)))
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype):
        out = perceiver_cuda.dense(x, layer.to(dtype), norm, gelu=True, residual=residual)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 8 * torch.finfo(dtype).eps


def test_crops_of_photographs():
    """Shrunk, grown, mirrored, as high as the photograph, and of another aspect ratio."""
    pixels = torch.randint(0, 256, (3 * 40 * 50,), dtype=torch.uint8)
    crops = torch.tensor([[0, 50, 2000, 40, 50, 0], [53, 50, 2000, 17, 16, 1],
                          [203, 50, 2000, 33, 20, 1], [0, 50, 2000, 16, 40, 0]])
    expected = textures.cut.__wrapped__(pixels, crops, 24, 26)
    out = textures_cuda.cut(pixels.to(DEVICE), crops, 24, 26)
    assert torch.allclose(out.cpu(), expected, atol=1e-5)


@pytest.mark.slow
def test_the_network_is_the_same(monkeypatch):
    """Flow of lite with all of its kernels is flow of lite without them."""
    if DEVICE.type == 'cpu':        # (interpreted, a program takes as long whatever its size)
        for kernels in (evidence_cuda, propagation_cuda):
            monkeypatch.setattr(kernels, 'BLOCK', 2048)
        for kernels in (evidence_cuda, choice_cuda, pyramid_cuda):
            monkeypatch.setattr(kernels, 'FEW', 128)
    torch.manual_seed(0)
    network = LitePerceiver(LiteConfig(feature_channels=8, joint_channels=16, token_channels=24,
                                       latents=16, latent_channels=32, layers=1, heads=2)).eval()
    for parameter in network.parameters():      # (some begin as zeros)
        parameter.data += 0.02 * torch.randn_like(parameter)
    first = torch.nn.functional.interpolate(torch.rand(1, 3, 10, 12), (40, 40), mode='bicubic')
    first = first.clamp(0, 1)
    second = first.roll((1, 3), (2, 3))
    with torch.inference_mode():
        expected = network(first, second, matched=1)[-1]        # (there are two levels)
        monkeypatch.setattr(accelerated, 'served', lambda device: True)
        called = set()
        for kernels, name in KERNELS:
            plain = getattr(kernels, name)
            monkeypatch.setattr(kernels, name, lambda *args, plain=plain, name=name: (
                called.add(name), plain(*args))[1])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            flow = network.to(DEVICE)(first.to(DEVICE), second.to(DEVICE), matched=1)[-1].cpu()
    assert called == {name for _, name in KERNELS}
    assert (flow - expected).norm(dim=1).median() < 1e-4
    assert (flow - expected).norm(dim=1).mean() < 0.01


LOOKS = {'empty', 'empty_like', 'new_empty', 'reshape', 'flatten', 'unflatten', 'view_as',
         'expand_as', 'narrow', 'mT', '_unsafe_view', '_reshape_alias'}


class Counting(TorchDispatchMode):
    """Count operators that compute, not those that only look at memory or ask for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.count += not function.is_view and name not in LOOKS
        return result


def operators_of_a_pair(monkeypatch, served):
    """Count the operators and kernels of lite at 640x480, full resolution, computing nothing."""
    network = load_lite(PACKAGED).eval().to('meta')
    frames = torch.rand(2, 1, 3, 480, 640, device='meta')
    monkeypatch.setattr(accelerated, 'served', lambda device: served)
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: contextlib.nullcontext())
    with torch.inference_mode(), Counting() as counting:
        def launched(kernel, grid):
            def launch(*args, **kwargs):
                counting.count += 1
            return launch

        monkeypatch.setattr(type(evidence_cuda.median_kernel), '__getitem__', launched,
                            raising=False)
        network(*frames)                        # (keeps what depends on sizes only)
        counting.count = 0
        network(*frames)
    return counting.count


@pytest.mark.slow
def test_a_pair_takes_few_launches(monkeypatch):
    """On a GPU they, not the work, are what a pair costs."""
    with_kernels, without = (operators_of_a_pair(monkeypatch, served) for served in (True, False))
    print(f'operators and kernels of a pair: {with_kernels}, {without} without kernels')
    assert 500 < with_kernels < 1450 and without > 3 * with_kernels


@pytest.mark.slow
def test_a_batch_of_training_pairs_takes_few_launches(monkeypatch):
    """As many as one of few pairs: all layers of all pairs are made at once."""
    bank = textures.Textures()

    def blank(pixels, crops, height, width):        # one kernel
        return pixels.new_zeros(len(crops), 3, height, width, dtype=torch.float32)

    monkeypatch.setattr(textures, 'cut', blank)
    counts = []
    for pairs in (8, 64):
        torch.manual_seed(3)
        with Counting() as counting:
            make_pairs(pairs, 64, 64, bank, Motion(largest=100, both_ways=True))
        counts.append(counting.count)
    print(f'operators of a batch of 8 and 64 pairs: {counts}')
    assert max(counts) < 1000 and counts[1] < 1.3 * counts[0]


def test_what_triton_cannot_do_is_told_and_done_without(monkeypatch):
    """A cache that cannot be written, say: PyTorch serves instead."""
    def fails(flow):
        raise PermissionError('/root/.triton')

    monkeypatch.setattr(evidence_cuda, 'median', fails)
    monkeypatch.setattr(accelerated, 'on', lambda device: contextlib.nullcontext())
    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: zeros(size))
    with pytest.warns(UserWarning, match='PermissionError: /root/.triton'):
        assert not accelerated.served.__wrapped__(torch.device('cuda', 0))


def test_gradients_and_gpus_without_triton_do_without_kernels(monkeypatch):
    x = torch.rand(1, 2, 4, 4, requires_grad=True)
    monkeypatch.setattr(evidence_cuda, 'median', lambda flow: flow)
    assert not torch.equal(evidence.median(x), x)       # a CPU is not served
    monkeypatch.setattr(accelerated, 'served', lambda device: True)
    evidence.median(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(evidence.median(x.detach()), x)
