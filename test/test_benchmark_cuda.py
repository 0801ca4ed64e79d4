# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark, all of it, at a small size: on a GPU, or with interpreted kernels."""

from dataclasses import replace
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip('triton', reason='kernels need Triton (CUDA builds of torch bring it)')

from perceiver_flow_ros.commands import _benchmark_cuda
from perceiver_flow_ros.commands._benchmark_cuda import (
    benchmark,
    graphed,
    judged,
    line,
    Setup,
    work,
)
from perceiver_flow_ros.commands._kernel_checks import Check, Sizes
from perceiver_flow_ros.flow import official_cuda
from perceiver_flow_ros.flow.lite import SETTINGS
from perceiver_flow_ros.model.launch import Blocks
from perceiver_flow_ros.model.official import OfficialConfig

DEVICE = torch.device('cpu' if os.environ.get('TRITON_INTERPRET') == '1' else 'cuda')
SMALL = Setup(
    size=(6, 20), network={'num_latents': 20, 'd_latents': 32, 'num_self_attends_per_block': 1,
                           'num_self_attention_heads': 2},
    checks=Sizes(2, 2, 9, 17, 24), lite_checks=(1, 4, 8), images=((6, 24),),
    precisions=(torch.float32, torch.float16), strides=(4,), matrix=64, copied=1024, repeat=1,
    blocks=Blocks(read=(32, 32), write=(4, 8, 32, 64), attend=(16, 16), read_stages=1,
                  write_stages=1))


@pytest.mark.slow
def test_everything_is_measured_and_checked(monkeypatch):
    monkeypatch.setattr(official_cuda, 'OVERLAP', 4)              # such small tiles can
    said = []
    report = benchmark(DEVICE, SMALL, said.append)
    table = '\n'.join(said)
    assert report['failed'] == [] and 'All checks passed.' in table
    assert len(report['checks']) == 25 and all(c['passed'] for c in report['checks'])
    rows = {row['name']: row for row in report['rows']}
    assert all('error' not in row and 0 < row['fastest'] <= row['seconds'] <= row['slowest']
               for row in rows.values()), rows
    assert set(rows) >= {'float32 20x6, 1 tiles, stride 4', 'float16 20x6, 1 tiles, stride 4',
                         'lite fast, 24x6', 'lite balanced, 24x6', 'lite best, 24x6'}
    assert rows['float32 20x6, 1 tiles, stride 4']['relative_error'] < 1e-4
    assert 0 < rows['float16 20x6, 1 tiles, stride 4']['pixels'] < 0.05
    assert all(rows[f'lite {quality}, 24x6']['pixels'] < 1e-3 for quality in SETTINGS)
    assert report['ceilings']['copy'] > 0 and min(report['ceilings']['matrix'].values()) > 0


def test_a_wrong_kernel_or_row_fails(monkeypatch):
    """No row is left out: what cannot be measured says why, and the others go on."""
    monkeypatch.setattr(_benchmark_cuda, 'check_kernels', lambda *_: [
        Check('read', torch.float32, 1.)])
    monkeypatch.setattr(_benchmark_cuda, 'check_lite_kernels', lambda *_: [])

    def rows(*_):
        yield _benchmark_cuda.measured('broken', lambda: 1 / torch.zeros(2).reshape(3), DEVICE,
                                       1)[0]
        yield judged({'name': 'float32', 'seconds': 1., 'host': 1., 'memory': 0},
                     np.full((2, 2, 2), 1.1), np.ones((2, 2, 2)), torch.float32)

    monkeypatch.setattr(_benchmark_cuda, 'rows', rows)
    said = []
    report = benchmark(DEVICE, replace(SMALL, precisions=(torch.float32,)), said.append)
    assert report['failed'] == ['read float32', 'broken', 'float32']
    assert 'FAILED: RuntimeError: shape' in '\n'.join(said)


def test_what_crashes_costs_nothing_else(monkeypatch):
    """A kernel that does not compile, a network that cannot be prepared: Triton's own errors."""
    def crash(*_):
        raise Exception('out of resource: shared memory')

    def crash_later(*_):
        yield Check('read', torch.float32, 0.)
        crash()

    kept = []
    monkeypatch.setattr(_benchmark_cuda, 'check_kernels', crash_later)
    monkeypatch.setattr(_benchmark_cuda, 'check_lite_kernels', crash_later)
    monkeypatch.setattr(_benchmark_cuda, 'CudaNetwork', crash)
    monkeypatch.setattr(_benchmark_cuda, 'SETTINGS', ['fast'])
    setup = replace(SMALL, precisions=(torch.float32,), peer=False)
    report = benchmark(DEVICE, setup, lambda _: None, lambda report: kept.append(len(report)))
    assert report['failed'] == ['kernels float32', 'kernels of lite', 'float32']
    assert report['rows'][0]['error'] == 'Exception: out of resource: shared memory'
    assert report['rows'][1]['name'] == 'lite fast, 24x6' and len(kept) == 5


def test_what_is_not_captured_fails():
    row = {'name': 'float16', 'passed': True}
    for stream, captured in ((None, False), (1, True), (1, False)):
        judged_row = graphed(row, SimpleNamespace(stream=stream, captured=captured))
        assert judged_row['passed'] == (stream is None or captured)


def test_half_precision_is_judged_in_pixels():
    """The error is that of a flow of 5 pixels on average; NaN never passes."""
    expected = np.zeros((3, 4, 2))
    expected[..., 0] = 0.5
    row = judged({'name': 'float16'}, expected + [0.004, 0], expected, torch.float16)
    assert row['passed'] and np.isclose(row['pixels'], 0.04)
    assert not judged({'name': 'x'}, expected + [0.006, 0], expected, torch.float16)['passed']
    assert not judged({'name': 'x'}, expected * np.nan, expected, torch.bfloat16)['passed']


def test_work_of_a_pair():
    """About 0.8 TFLOP a pair of 368x496 after folding; tiles and queries add up."""
    config, every = OfficialConfig(), 368 * 496
    assert 0.75e12 < work(config, 1, every) < 0.85e12
    assert np.isclose(work(config, 4, 4 * every), 4 * work(config, 1, every))
    assert work(config, 1, every // 16) < 0.65 * work(config, 1, every)


def test_table_row():
    text = line({'name': 'float16', 'seconds': 0.003, 'host': 0.0002, 'memory': 4e8,
                 'ceiling': 0.25, 'speedup': {'float32': 20., 'bfloat16': 6.}, 'pixels': 0.01,
                 'passed': True})
    for part in ('3.00 ms', '333.3', '0.20 ms', '0.40 GB', '25%', '20.0x (6.0x)', '0.010 px'):
        assert part in text
    assert 'FAILED' in line({'name': 'x', 'error': 'no memory'})
