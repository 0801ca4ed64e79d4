# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures in processes of their own, and fails when parity does."""

import json

import numpy as np
from perceiver_flow_ros.commands import benchmark
from perceiver_flow_ros.commands.main import main
import pytest
import torch

FLOW = np.random.default_rng(0).normal(size=(16, 24, 2)).astype(np.float32)


@pytest.fixture
def canned(monkeypatch):
    """No process is started; every network takes 1 s and gives this flow."""
    flows = {}

    def measure(spec):
        stride = spec.get('stride', 1)
        np.save(spec['flow'], flows.get(spec['network'], FLOW)[::stride, ::stride])
        return {'name': spec['name'], 'seconds': 2 if spec['network'] == 'transformers' else 0.5,
                'fastest': 0.4, 'slowest': 3, 'peak_memory': 1e9, 'baseline_memory': 2e8}

    monkeypatch.setattr(benchmark, 'measure', measure)
    return flows


def test_table_and_json(canned, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, 'find_spec', lambda name: True)
    path = tmp_path / 'figures.json'
    assert main(['benchmark', '--height', '16', '--width', '24', '--json', str(path)]) == 0
    table = capsys.readouterr().out
    assert 'folded, stride 8' in table and '4.00x' in table and 'Parity holds' in table
    report = json.loads(path.read_text())
    assert report['compared_with'] == 'transformers' and report['machine']['threads'] >= 1
    lines = {line['name']: line for line in report['lines']}
    assert lines['folded']['speedup'] == 4 and lines['folded, stride 4']['relative_error'] == 0
    assert [name for name in lines if '640x480' in name] == [
        f'{model} {quality}, 640x480' for model in ('lite', 'dis')
        for quality in ('fast', 'balanced', 'best')]


def test_a_size_that_no_stride_divides(canned):
    flow = np.random.default_rng(1).normal(size=(20, 24, 2)).astype(np.float32)
    canned.update(dict.fromkeys(('reference', 'folded'), flow))
    assert main(['benchmark', '--height', '20', '--width', '24', '--no-peer']) == 0


def test_lost_parity_fails(canned, capsys):
    canned['folded'] = FLOW + 0.001
    assert main(['benchmark', '--no-peer', '--json']) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)['failed'] == [
        'folded', 'folded, stride 2', 'folded, stride 4', 'folded, stride 8']
    assert 'FAILED: folded' in output.err


def test_without_transformers(canned, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'find_spec', lambda name: None)
    assert main(['benchmark']) == 0
    assert 'transformers is not installed (pip install transformers)' in capsys.readouterr().out


@pytest.mark.slow
def test_a_line_that_cannot_be_measured():
    line = benchmark.measure({'name': 'lite', 'network': 'estimator', 'model': '/no/such.bin',
                              'quality': 'auto', 'repeat': 1, 'flow': ''})
    assert line['name'] == 'lite' and 'no such file or folder' in line['error']
    assert 'failed: ' in benchmark.row(line)


def test_bad_arguments(capsys):
    assert main(['benchmark', '--repeat', '0']) == 2
    assert 'must be at least 1' in capsys.readouterr().err


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('name', ['none/figures.json', ''])
def test_figures_that_could_not_be_written_are_not_measured(capsys, tmp_path, device, name):
    path = tmp_path / name
    assert main(['benchmark', '--device', device, '--json', str(path)]) == 2
    output = capsys.readouterr()
    assert f'--json is {path}, expected a file in a folder' in output.err and not output.out


@pytest.mark.slow
def test_for_real(tmp_path, monkeypatch):
    """The whole network on a small image, beside transformers where it is installed."""
    monkeypatch.setattr(benchmark, 'OFTEN', 2)
    path = tmp_path / 'figures.json'
    assert main(['benchmark', '--height', '16', '--width', '24', '--repeat', '1',
                 '--json', str(path)]) == 0
    report = json.loads(path.read_text())
    for line in report['lines']:
        assert 0 < line['fastest'] <= line['seconds'] <= line['slowest']
        assert 0 < line['baseline_memory'] < line['peak_memory']
        assert line.get('relative_error', 0) < 1e-4


def test_cuda_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip('there is a GPU here')
    assert main(['benchmark', '--device', 'cuda']) == 2
    assert 'no CUDA device' in capsys.readouterr().err
