# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for a data-centre GPU (Hopper) and fit on it, with or without one."""

import json
import os
from pathlib import Path
import platform
import subprocess
import sys

import pytest

pytest.importorskip('triton', reason='kernels need Triton (CUDA builds of torch bring it)')

pytestmark = pytest.mark.slow
intel = pytest.mark.skipif(platform.machine() != 'x86_64',
                           reason='Triton brings its tools for x86-64')


def compiled(precision, capability, folder):
    environment = {**os.environ, 'TRITON_CACHE_DIR': str(folder)}
    environment.pop('TRITON_INTERPRET', None)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('compile_kernels.py'), precision, capability],
        capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == (20 if precision == 'lite' else 8)
    return built


@intel
@pytest.mark.parametrize('precision', ['float16', 'float32'])
def test_every_kernel_fits_on_a_smaller_gpu(precision, tmp_path):
    for kernel in compiled(precision, '86', tmp_path):
        assert kernel['shared'] <= kernel['room'], kernel


@intel
@pytest.mark.parametrize('precision', ['bfloat16', 'float16', 'float32', 'lite'])
def test_every_kernel_compiles_and_fits(precision, tmp_path):
    for kernel in compiled(precision, '90', tmp_path):
        assert kernel['shared'] <= kernel['room'], kernel
        if kernel['kernel'] in ('read_kernel', 'write_kernel'):
            assert kernel['wgmma'] and not kernel['mma'], kernel        # Hopper's own matrix units
        if precision != 'float32':
            assert kernel['stack'] <= 128, kernel                       # registers that spill
