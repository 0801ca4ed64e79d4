# SPDX-License-Identifier: Apache-2.0
"""The soak command: what it judges, and a short run of it with real processes."""

import json
import os
from pathlib import Path
import subprocess
import sys

from perceiver_flow_ros.commands import soak
from perceiver_flow_ros.commands._soak_run import Run, Sample
import pytest

ROOT = Path(__file__).parents[1]


def made_up(leak=0.0, slower=0.0, late=0.0, lost=0, failed=0):
    """Make a run of 100 s with one flow a second; `leak` MB and `slower` ms a second."""
    run = Run(sent=3000)
    for i in range(101):
        counts = {
            'received': 30 * i, 'processed': i, 'dropped': 29 * i - lost, 'flows': i,
            'failed': failed,
        }  # fmt: skip
        latency = [120 + late + slower * i]
        run.samples.append(Sample(float(i), latency, 110.0, 100.0, 300 + leak * i, counts))
    return run


@pytest.mark.parametrize(
    ('fault', 'broken'),
    [
        ({}, []),
        ({'leak': 0.1}, []),
        ({'leak': 0.4}, ['memory']),
        ({'slower': 0.4}, []),
        ({'slower': 0.65, 'late': -15}, ['latency does not grow']),
        ({'late': 70}, ['latency p95']),
        ({'lost': 1}, ['accounted']),
        ({'failed': 1}, ['none failed']),
    ],
)
def test_verdict(fault, broken):
    report = soak.judge(made_up(**fault), None, None, True)
    assert [name for name, holds in report['holds'].items() if not holds] == broken
    json.dumps(report)
    shown = soak.text({'model': 'lite', 'rate': 30.0, 'size': [640, 480], **report})
    assert shown.count('DOES NOT HOLD') == len(broken)


def test_overhead():
    overhead = soak.overhead_of(made_up())
    assert overhead == pytest.approx({'node': 10.0, 'subscriber': 20.0})
    for node, holds in ((8.0, True), (8.1, False)):
        report = soak.judge(made_up(), {'node': node, 'subscriber': 9.0}, None, True)
        assert report['holds']['overhead'] == holds


def test_start():
    for first, holds in ((6.4, True), (6.6, False)):
        report = soak.judge(made_up(), None, {'first flow': first, 'imports': 3.5}, True)
        assert report['holds']['start'] == holds
        shown = soak.text({'model': 'lite', 'rate': 30.0, 'size': [640, 480], **report})
        assert f'{first} s from the start' in shown


def test_what_makes_no_soak_is_refused():
    for wrong in (['--size', '640'], ['--minutes', '0'], ['--rate', '-1']):
        done = command(*wrong)
        assert done.returncode == 2 and done.stderr.startswith('perceiver_flow: error: ')
        assert len(done.stderr.splitlines()) == 1


def command(*arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    return subprocess.run(
        [sys.executable, '-m', 'perceiver_flow_ros', 'soak', *arguments, '--json'],
        env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_short_soak():
    """Frames and memory are judged here; times would be those of whatever else runs."""
    done = command('--minutes', '0.5', '--rate', '30', '--quality', 'fast')
    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert report['sent'] == 900 and 800 < report['received'] <= 900
    assert report['received'] == report['processed'] + report['dropped']
    assert report['flows'] > 10 and report['holds']['accounted'] and report['holds']['none failed']
    assert report['holds']['memory'], report['memory']
    assert report['start']['imports'] > 0 and report['start']['first flow'] > 0
    assert report['overhead']['node'] > 0 and report['latency']['p95'] > 0
