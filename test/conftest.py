# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where measured data lies; a ROS environment that stays on this machine."""

import contextlib
import fcntl
import os
from pathlib import Path
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / 'shared' / 'data'

# Before rclpy starts, here and in every process that a test starts.
os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
os.environ['FASTDDS_DEFAULT_PROFILES_FILE'] = str(ROOT / 'config' / 'fastdds.xml')
# Before torch starts: on a busy machine its threads would spin while they wait, ten times slower.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')
# Before Triton starts: without a GPU its kernels run in its interpreter, on CPU tensors.
if not list(Path('/dev').glob('nvidia[0-9]*')):
    os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_sessionfinish():
    """
    Remove the shared memory of processes that tests killed, 70 MB each, as `fastdds shm clean`.

    A process that lives holds a lock on the file beside its segment.
    """
    for lock in Path('/dev/shm').glob('fastdds_*_el'):
        with lock.open() as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.with_name(lock.name.removesuffix('_el')).unlink(missing_ok=True)
            lock.unlink()


def _data(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f'no ../shared/data/{name} here: real data is measured with, never shipped')
    return folder


@pytest.fixture(scope='module')
def one_thread():
    """Let torch compute in one thread: interpreted kernels wait for more."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flow_data() -> Path:
    """Give the folder of real image pairs with true flow; skip where it is absent."""
    return _data('flow')


@pytest.fixture
def sequence_data() -> Path:
    """Give the folder of real posed sequences; skip where it is absent."""
    return _data('seq')
