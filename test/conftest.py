# SPDX-License-Identifier: Apache-2.0
"""What all tests share: where measured data lies; a ROS environment that stays on this machine."""

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


def _data(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f'no ../shared/data/{name} here: real data is measured with, never shipped')
    return folder


@pytest.fixture
def flow_data() -> Path:
    """Give the folder of real image pairs with true flow; skip where it is absent."""
    return _data('flow')


@pytest.fixture
def sequence_data() -> Path:
    """Give the folder of real posed sequences; skip where it is absent."""
    return _data('seq')
