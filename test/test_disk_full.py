# SPDX-License-Identifier: Apache-2.0
"""Commands on a full disk: one line that names the file, code 2, and nothing half-written."""

import os
from pathlib import Path
import resource
import subprocess
import sys

import numpy as np
from perceiver_flow_ros.flow.files import write_image
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ROOM = 65536  # bytes that a file may have


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Make some images, and a bag of them."""
    folder = tmp_path_factory.mktemp('full')
    (folder / 'frames').mkdir()
    random = np.random.default_rng(0)
    for i in range(4):
        noise = random.integers(0, 256, (120, 160, 3), np.uint8)
        write_image(folder / 'frames' / f'{i}.png', noise)
    done = command(folder, 'record', 'frames', '-o', 'in.mcap', '--fps', '10', room=None)
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, *arguments, room=ROOM):
    """Run a perceiver_flow command whose files may not grow beyond some room."""
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])

    def fill_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.run(
        [sys.executable, '-m', 'perceiver_flow_ros', *arguments], cwd=folder, text=True,
        env={**os.environ, 'PYTHONPATH': path}, capture_output=True,
        preexec_fn=fill_disk if room else None,
    )  # fmt: skip


FRAMES = ['frames/0.png', 'frames/1.png']
CASES = {
    'estimate .flo': ['estimate', *FRAMES, '--model', 'dis', '-o', 'out.flo'],
    'estimate .npy': ['estimate', *FRAMES, '--model', 'dis', '-o', 'out.npy'],
    'record mcap': ['record', 'frames', '--fps', '10', '-o', 'out.mcap'],
    'record sqlite3': ['record', 'frames', '--fps', '10', '-o', 'out.db3'],
    'record folder': ['record', 'frames', '--fps', '10', '-o', 'out', '--storage', 'sqlite3'],
    'bag mcap': ['bag', 'in.mcap', 'out.mcap', '--model', 'dis'],
    'bag sqlite3': ['bag', 'in.mcap', 'out.db3', '--model', 'dis'],
}


@pytest.mark.parametrize('arguments', CASES.values(), ids=CASES)
def test_a_full_disk(folder, arguments):
    before = sorted(folder.rglob('*'))
    done = command(folder, *arguments)
    (output,) = (word for word in arguments if word.startswith('out'))
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr and f'perceiver_flow: error: {output}: ' in error
    assert sorted(folder.rglob('*')) == before


def test_what_was_there_before_stays(folder):
    bag = folder / 'old.db3'
    done = command(folder, 'record', 'frames', '--fps', '10', '-o', bag.name, room=None)
    assert done.returncode == 0, done.stderr
    old = bag.read_bytes()
    again = ['record', 'frames', '--fps', '20', '-o', bag.name, '--force']
    assert command(folder, *again).returncode == 2
    assert bag.read_bytes() == old
    bag.unlink()


def test_standard_output_on_a_full_disk(folder):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [
                sys.executable, '-m', 'perceiver_flow_ros', 'estimate', *FRAMES,
                '--model', 'dis', '-o', 'out.flo', '--json',
            ],
            cwd=folder, text=True, stdout=full, stderr=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': str(ROOT)},
        )  # fmt: skip
    (folder / 'out.flo').unlink()
    assert done.returncode != 0 and 'No space left on device' in done.stderr
