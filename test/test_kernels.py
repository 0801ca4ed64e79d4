# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels and the network made of them: on a GPU where there is one, else interpreted.

`conftest` sets TRITON_INTERPRET before Triton is imported where there is no GPU.
"""

import os

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip('triton', reason='kernels need Triton (CUDA builds of torch bring it)')

from perceiver_flow_ros.commands._kernel_checks import check_kernels, Sizes
from perceiver_flow_ros.commands.benchmark import frame_pair, peaky_network
from perceiver_flow_ros.flow import official, official_cuda
from perceiver_flow_ros.flow.official_cuda import CudaFlow, pick_network
from perceiver_flow_ros.flow.replay import in_batches, Upload
from perceiver_flow_ros.model import launch
from perceiver_flow_ros.model.cuda import CudaNetwork
from perceiver_flow_ros.model.launch import Blocks

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
pytestmark = pytest.mark.usefixtures('one_thread')
DEVICE = torch.device('cpu' if INTERPRETED else 'cuda')
TILE = (8, 18)
# Small, so that sizes that take the interpreter a second have many blocks, the last one not full
BLOCKS = Blocks(read=(16, 16), write=(2, 8, 16, 64), attend=(16, 16), read_stages=1,
                write_stages=1)
LARGER = Blocks(read=(32, 32), write=(4, 8, 32, 64), attend=(16, 32), read_stages=1,
                write_stages=1)
HOST = {'tensor', 'as_tensor', 'new_tensor', 'from_numpy', 'cpu', 'numpy', 'item', 'tolist',
        'nonzero', 'unique', 'masked_select', '__bool__', '__int__', '__float__', '__index__'}
precisions = pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16, torch.float16],
                                     ids=lambda dtype: str(dtype).removeprefix('torch.'))
SIZES = {'one row': Sizes(3, 1, 16, 16, 32), 'odd': Sizes(2, 7, 21, 19, 24),
         'narrow': Sizes(2, 9, 5, 33, 20)}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Let some of the encoder's programs share a stripe of columns, some do not."""
    monkeypatch.setattr(launch, 'PROGRAMS', 12)


def make_network():
    return peaky_network(*TILE, num_latents=20, d_latents=32, num_self_attends_per_block=1,
                         num_self_attention_heads=2)


@pytest.fixture(scope='module')
def network():
    return make_network().to(DEVICE)


@pytest.fixture(scope='module')
def frames():
    first = frame_pair(*TILE)
    return torch.from_numpy(np.stack([first, 255 - first[::-1]]))


@pytest.fixture(scope='module')
def truth(frames):
    with torch.no_grad():
        return make_network()(frames)


def relative_error(a, b):
    a, b = torch.as_tensor(a).cpu(), torch.as_tensor(b)
    return float((a - b).norm() / b.norm())


@precisions
@pytest.mark.parametrize('sizes', ['one row', *(pytest.param(name, marks=pytest.mark.slow)
                                                for name in ('odd', 'narrow'))])
def test_every_kernel_against_float64(sizes, precision):
    """Sizes that are no multiples of the blocks, one row, narrower than a block, batch 3."""
    checks = list(check_kernels(DEVICE, SIZES[sizes], precision, 0, BLOCKS))
    assert len(checks) == 6
    assert not [check for check in checks if not check.passed]
    if precision == torch.float32:
        assert max(check.error for check in checks) < 3e-6


@pytest.mark.parametrize('heads', [1, 3, 4, 8])
def test_heads_of_any_width_attend(heads):
    """The kernel takes widths that are powers of 2 (32 of 96), PyTorch the others."""
    qkv = torch.randn(2, 21, 3 * 96)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=np.log(2))
    out = launch.attend(qkv.to(DEVICE), heads, BLOCKS)
    assert relative_error(out, expected.transpose(1, 2).flatten(2)) < 1e-5


def test_a_wrong_kernel_is_noticed(monkeypatch):
    """The check can fail: an output that is not written to, another that is off by a percent."""
    monkeypatch.setattr(launch, 'add_norm', lambda z, *_: torch.empty_like(z))
    monkeypatch.setattr(launch, 'read', lambda pixels, content, *rest, read=launch.read:
                        read(pixels, 1.01 * content, *rest))
    checks = check_kernels(DEVICE, Sizes(2, 3, 9, 16, 24), torch.float32, 0, BLOCKS)
    assert [c.kernel for c in checks if not c.passed] == ['read', 'add_norm']


@pytest.mark.slow
@pytest.mark.parametrize('precision', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parity_with_the_reference(network, frames, truth, precision):
    """Two tiles at once; each is the same alone; points are what the dense flow has there."""
    fast = CudaNetwork(network, precision, LARGER)
    flow = fast(frames.to(DEVICE))
    assert flow.dtype == torch.float32
    allowed = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.08}[precision]
    assert relative_error(flow, truth) < allowed
    pixels, z = fast.encode(frames[1:2].to(DEVICE))
    y, x = torch.tensor([5, 7, 0, 5]), torch.tensor([3, 17, 0, 3])
    points = fast.decode_at(pixels[0], z[0], y, x)
    torch.testing.assert_close(points, flow[1, y, x], rtol=allowed, atol=allowed)
    assert fast.decode_at(pixels[0], z[0], y[:0], x[:0]).shape == (0, 2)
    rows = fast.decode(pixels[0], z[0], [(6, slice(1, None, 4)), (2, torch.tensor([9]))])
    torch.testing.assert_close(torch.cat(rows), torch.cat([flow[1, 6, 1::4], flow[1, 2, 9:10]]),
                               rtol=allowed, atol=allowed)


@pytest.fixture
def loaded(monkeypatch):
    """Every estimator gets this network; tiles overlap by 4 pixels."""
    monkeypatch.setattr(official, 'load_official', lambda *_: make_network())
    monkeypatch.setattr(official, 'OVERLAP', 4)
    monkeypatch.setattr(official_cuda, 'OVERLAP', 4)


@pytest.mark.slow
@pytest.mark.parametrize(('tiling', 'size', 'stride'), [
    ('tile', (5, 7), 1), ('tile', (11, 29), 4), ('resize', TILE, 1), ('resize', (11, 29), 4)])
def test_any_image_is_what_the_cpu_says(network, loaded, tiling, size, stride):
    expected = official.OfficialEstimator('', tiling=tiling, query_stride=stride)
    fast = CudaFlow(CudaNetwork(network, blocks=LARGER), tiling, stride)
    first, second = frame_pair(*size)
    for pair in ((first, second), (second, first)):                     # twice by one graph
        flow = fast(*pair)
        assert relative_error(flow, expected(*pair)) < 1e-4
    points = np.argwhere(np.ones(size))[::17, ::-1].copy()
    assert relative_error(fast.at(*pair, *torch.from_numpy(points).T.flip(0)),
                          expected.at(*pair, points)) < 1e-4


@pytest.mark.slow
def test_automatic_precision_is_the_fastest_that_is_close(network, monkeypatch):
    tried = []

    class Recorded(CudaNetwork):
        def __init__(self, network, precision=torch.float32):
            super().__init__(network, precision, LARGER)
            tried.append(precision)

    monkeypatch.setattr(official_cuda, 'CudaNetwork', Recorded)
    assert pick_network(network, 'auto').precision == torch.float16
    assert pick_network(network, 'bfloat16').precision == torch.bfloat16
    monkeypatch.setattr(official_cuda, 'TOLERANCE', 1e-9)
    tried.clear()
    assert pick_network(network, 'auto').precision == torch.float32
    assert tried == [torch.float32, torch.float16, torch.bfloat16]


def test_no_points_are_no_flow(network):
    none = torch.zeros(0, dtype=torch.long)
    assert CudaFlow(CudaNetwork(network)).at(*frame_pair(8, 30), none, none).shape == (0, 2)


@pytest.mark.slow
def test_tiles_are_halved_until_they_fit(network, loaded, monkeypatch):
    """The last batch is remembered, and the flow is the same."""
    fast = CudaFlow(CudaNetwork(network, blocks=LARGER))
    fast.batch = 8
    real, tried = fast.network.encode, []

    def encode(frames, corners):
        tried.append(len(corners))
        if len(corners) > 1:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')
        return real(frames, corners)

    pair = frame_pair(8, 30)
    expected = fast(*pair)
    fast.replay.clear()
    monkeypatch.setattr(fast.network, 'encode', encode)
    np.testing.assert_allclose(fast(*pair), expected, rtol=1e-4, atol=1e-5)
    # With 8, 4, 2 and 1 at once; what is captured is run thrice.
    assert tried[:3] == [2, 2, 2] and {*tried[3:]} == {1} and fast.batch == 1
    assert len(tried) == 3 + 2 * (3 if DEVICE.type == 'cuda' else 1)


def test_memory_that_never_suffices_names_what_to_change():
    def compute(batch):
        raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    given_back = []
    with pytest.raises(torch.cuda.OutOfMemoryError,
                       match="one tile needs .* query_stride, set precision to 'float16'"):
        in_batches(compute, 4, lambda: given_back.append(1))
    assert len(given_back) == 2


def test_upload_keeps_the_previous_frame_only_if_it_is_the_same():
    upload = Upload(2, 3, DEVICE)
    a, b, c = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 3), np.uint8)
    for pair in ((a, b), (b, c), (a, c), (c, a)):
        upload(*pair)
        np.testing.assert_array_equal(upload.frames.cpu(), np.stack(pair))
    changed = a.copy()
    changed[1, 2, 0] ^= 1                                       # a camera that reuses its buffer
    upload(changed, b)
    np.testing.assert_array_equal(upload.frames.cpu(), np.stack([changed, b]))


@pytest.mark.skipif(INTERPRETED, reason='needs a GPU')
def test_a_pair_is_one_graph(network, loaded):
    fast = CudaFlow(CudaNetwork(network, blocks=LARGER))
    pair = frame_pair(*TILE)
    first = fast(*pair)
    (_, output), = fast.replay._graphs.values()
    assert output is not None                                   # captured, not just called
    np.testing.assert_array_equal(fast(*pair), first)


@pytest.mark.slow
@pytest.mark.parametrize('tiling', ['tile', 'resize'])
def test_a_pair_never_asks_the_host(network, loaded, tiling):
    """What a CUDA graph cannot hold: numbers from the host, and decisions on values."""
    class Watched(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert getattr(function, '__name__', '') not in HOST, function
            return function(*args, **(kwargs or {}))

    fast = CudaFlow(CudaNetwork(network, blocks=LARGER), tiling, 4)
    frames = torch.from_numpy(frame_pair(*TILE)).to(DEVICE)
    plan = fast._plan(*TILE)
    with torch.inference_mode(), Watched():
        plan(frames, 4)
    with torch.inference_mode(), pytest.raises(AssertionError), Watched():
        assert plan(frames, 4).isfinite().all()


@pytest.mark.slow
@precisions
def test_with_the_blocks_that_are_used(precision):
    checks = list(check_kernels(DEVICE, Sizes(2, 9, 75, 130, 512), precision, 1))
    assert not [check for check in checks if not check.passed]
