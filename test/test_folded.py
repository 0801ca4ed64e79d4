# SPDX-License-Identifier: Apache-2.0
"""The folded network is the reference network, at all pixels and at some, whatever the scores."""

import threading

import numpy as np
from perceiver_flow_ros.commands.benchmark import frame_pair, peaky_network
from perceiver_flow_ros.model import folded, processor
from perceiver_flow_ros.model.folded import FoldedNetwork
from perceiver_flow_ros.model.parallel import parallel, parts
from perceiver_flow_ros.model.perceiver import Layer
from perceiver_flow_ros.model.processor import Processor
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

HEIGHT, WIDTH = 37, 40
ALL = slice(None)


@pytest.fixture(scope='module')
def network():
    """More latents than one block has, and a last block that is not full."""
    return peaky_network(HEIGHT, WIDTH, num_latents=300, d_latents=64,
                         num_self_attends_per_block=2, num_self_attention_heads=4)


@pytest.fixture(scope='module')
def frames():
    first = frame_pair(HEIGHT, WIDTH)
    return torch.from_numpy(np.stack([first, 255 - first[::-1]]))


@pytest.fixture(scope='module')
def truth(network, frames):
    with torch.no_grad():
        return network(frames)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_parity_with_reference(network, frames, truth):
    """Two tiles at once; a tile's result does not depend on its neighbour's."""
    fast = FoldedNetwork(network)
    flow = fast(frames)
    assert relative_error(flow, truth) < 1e-4
    torch.testing.assert_close(fast(frames[1:])[0], flow[1], rtol=0, atol=1e-5)


def test_parity_holds_with_one_thread(network, frames, truth, one_thread):
    assert relative_error(FoldedNetwork(network)(frames[:1]), truth[:1]) < 1e-4


def test_half_precision_stays_close(network, frames, truth):
    """Only the self-attention is in half precision. It changes the network, so take a copy."""
    copy = peaky_network(HEIGHT, WIDTH, num_latents=300, d_latents=64,
                         num_self_attends_per_block=2, num_self_attention_heads=4)
    flow = FoldedNetwork(copy, torch.bfloat16)(frames[:1])
    assert flow.dtype == torch.float32 and relative_error(flow, truth[:1]) < 0.1


@pytest.mark.parametrize('stride', [2, 4, 8])
def test_sparse_is_dense_at_those_pixels(network, frames, truth, stride):
    fast = FoldedNetwork(network)
    pixels, z = fast.encode(frames)
    columns = slice(1, None, stride)
    sparse = torch.stack(fast.decode(
        pixels[1], z[1], [(y, columns) for y in range(1, HEIGHT, stride)]))
    dense = torch.stack(fast.decode(pixels[1], z[1], [(y, ALL) for y in range(HEIGHT)]))
    torch.testing.assert_close(sparse, dense[1::stride, columns], rtol=1e-4, atol=1e-5)
    assert relative_error(sparse, truth[1, 1::stride, columns]) < 1e-4


def test_work_is_what_is_asked_for(network, frames, monkeypatch, one_thread):
    """Counted: folding saves a third at this size (58 % at full size), a stride the decoding."""
    for module in (folded, processor):
        monkeypatch.setattr(module, 'parallel',
                            lambda task, items, device: list(map(task, items)))

    def product(_, a, b, *__, **___):
        return 2 * a[0] * a[1] * b[1]

    def work(task):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}
                             ) as counter, torch.no_grad():
            result = task()
        return result, counter.get_total_flops()

    def queries(stride):
        return [(y, slice(None, None, stride)) for y in range(0, HEIGHT, stride)]

    fast = FoldedNetwork(network)
    _, reference = work(lambda: network(frames[:1]))
    (pixels, z), encode = work(lambda: fast.encode(frames[:1]))
    _, fixed = work(lambda: fast.decode(pixels[0], z[0], []))               # keys and values
    _, dense = work(lambda: fast.decode(pixels[0], z[0], queries(1)))
    _, sparse = work(lambda: fast.decode(pixels[0], z[0], queries(4)))
    assert encode + dense < 0.65 * reference
    assert sparse - fixed < 0.1 * (dense - fixed)


def test_points_in_any_order(network, frames, truth):
    fast = FoldedNetwork(network)
    pixels, z = fast.encode(frames[:1])
    y = torch.tensor([5, 36, 0, 5, 5, 20])
    x = torch.tensor([7, 39, 0, 3, 7, 11])
    flow = fast.decode_at(pixels[0], z[0], y, x)
    assert relative_error(flow, truth[0, y, x]) < 1e-4
    assert fast.decode_at(pixels[0], z[0], y[:0], x[:0]).shape == (0, 2)


def test_scores_far_above_the_sample_are_found(network, frames, truth, monkeypatch):
    """Shifted so little that what exceeds the sample overflows, the encoder looks at all rows."""
    fast = FoldedNetwork(network)
    pixels = fast.preprocess(frames)[0]
    expected = fast.read(pixels)
    monkeypatch.setattr(folded, 'HEADROOM', -122.)
    monkeypatch.setattr(folded, 'SAMPLES', (36,))
    assert not fast.read(pixels).isfinite().all()
    monkeypatch.setattr(folded, 'HEADROOM', -101.)
    monkeypatch.setattr(folded, 'SAMPLES', (36, 1))
    torch.testing.assert_close(fast.read(pixels), expected, rtol=1e-3, atol=1e-4)


def test_self_attention_is_the_layer():
    torch.manual_seed(0)
    layer = Layer(64, qk_channels=64, v_channels=64, heads=4).requires_grad_(False)
    z = torch.randn(2, 300, 64)
    process = Processor(layer)
    torch.testing.assert_close(process(z), layer(z), rtol=1e-4, atol=1e-4)
    assert process.to('meta')(z.to('meta')).shape == z.shape        # as on a GPU: all at once


@pytest.mark.parametrize('count, threads, largest, lengths', [
    (10, 1, 4, [4, 4, 2]), (10, 4, 4, [3, 3, 3, 1]), (10, 16, 4, [1] * 10), (0, 2, 4, [])])
def test_parts_are_enough_for_all_threads(monkeypatch, count, threads, largest, lengths):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    items = list(range(count))
    cut = [items[part] for part in parts(count, largest, torch.device('cpu'))]
    assert [len(some) for some in cut] == lengths and sum(cut, []) == items
    assert parts(count, largest, torch.device('cuda')) == [slice(0, count)][:count]


def test_parallel_is_map_and_leaves_threads_alone():
    cpu, threads = torch.device('cpu'), torch.get_num_threads()
    assert parallel(lambda i: i * i, range(100), cpu) == [i * i for i in range(100)]
    assert set(parallel(lambda _: torch.get_num_threads(), range(9), cpu)) == {1}
    assert not any(parallel(lambda _: torch.is_grad_enabled(), range(9), cpu))
    assert torch.get_num_threads() == threads
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]
    with pytest.raises(ZeroDivisionError):
        parallel(lambda i: 1 / i, range(3), cpu)
