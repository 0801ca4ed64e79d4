# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for a GPU that need not be there: ``compile_kernels.py PRECISION [CC]``.

PRECISION is that of the official network, or ``lite``: the kernels of lite and of its training.
Prints, as JSON, what each needs of the GPU. Not a test: `test_kernels_compile` runs it.
"""

import itertools
import json
from pathlib import Path
import re
import subprocess
import sys
import tempfile

from perceiver_flow_ros.model import (
    choice_cuda,
    evidence_cuda,
    kernels,
    launch,
    layers_cuda,
    perceiver_cuda,
    propagation_cuda,
    pyramid_cuda,
)
from perceiver_flow_ros.training import textures_cuda
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {90: 227 * 1024, 86: 99 * 1024}      # bytes that a program may have: H100, GeForce
DTYPES = {'float32': '*fp32', 'bfloat16': '*bf16', 'float16': '*fp16'}
INTEGERS = {'image_height', 'image_width', 'tile_stride', 'height', 'width', 'latents', 'splits',
            'row_blocks', 'stripes', 'channels', 'rows', 'columns', 'heads', 'images', 'batch',
            'tokens', 'count', 'reach', 'most', 'inputs', 'outputs'}
NUMBERS = {'price', 'sharpness', 'darker', 'close', 'stiff', 'steep', 'nearest', 'epsilon'}
# By 16, at the full size
DIVISIBLE = {'height', 'width', 'latents', 'channels', 'heads', 'inputs', 'outputs'}


def variants_of_lite():
    """Yield the same of every kernel of lite, whose tensors are float32 but for some weights."""
    many, few = {'BLOCK': evidence_cuda.BLOCK}, {'BLOCK': evidence_cuda.FEW}
    radius = {'RADIUS': 3}
    yield evidence_cuda.warp_kernel, set(), many, {}
    yield evidence_cuda.contrast_kernel, set(), {'REACH': 4, **many}, {}
    yield evidence_cuda.difference_kernel, set(), {**radius, **few}, {}
    yield evidence_cuda.match_kernel, set(), {**radius, 'COUNT': 64, **few}, {}
    yield evidence_cuda.gradient_kernel, set(), few, {}
    yield evidence_cuda.solve_kernel, set(), many, {}
    yield evidence_cuda.median_kernel, set(), many, {}
    yield pyramid_cuda.upsample_kernel, set(), few, {}
    for diagonal in (True, False):
        yield propagation_cuda.try_kernel, set(), {'DIAGONAL': diagonal, **many}, {}
        yield propagation_cuda.take_kernel, set(), {'DIAGONAL': diagonal, **many}, {}
    yield layers_cuda.plane_kernel, set(), {'BLOCK': layers_cuda.BLOCK}, {'num_warps': 8}
    yield choice_cuda.look_kernel, set(), few, {}
    yield (choice_cuda.measure_kernel, set(), {'MEASURES': choice_cuda.MEASURES, **few},
           {'num_warps': 1})
    for dtype, block in itertools.product((torch.float32, torch.float16), (16, 64)):
        half = {'weight', 'bias'} if dtype == torch.float16 else set()
        yield (perceiver_cuda.dense_kernel, half,
               {'NORM': True, 'GELU': True, 'ADD': True, 'PRECISION': launch.product_of(dtype),
                'BLOCK_M': block, 'BLOCK_N': 32, 'BLOCK_K': 32}, {})
    yield textures_cuda.cut_kernel, set(), {'BLOCK': textures_cuda.BLOCK}, {}


def variants(precision, cc):
    """Yield kernel, its arguments in the network's precision, constants, options; as `launch`."""
    dtype = getattr(torch, precision)
    blocks = launch.blocks_for(dtype, SHARED[cc])
    read, write = blocks.read, blocks.write
    multiply = {'PRECISION': launch.product_of(dtype)}
    yield (kernels.preprocess_kernel, {'pixels'},
           {'BLOCK': 64, 'PRECISION': launch.product_of(torch.float32)}, {'num_warps': 4})
    yield (kernels.read_kernel, {'pixels', 'content'},
           {'BLOCK_L': read[0], 'BLOCK_X': read[1], **multiply},
           {'num_warps': blocks.read_warps, 'num_stages': blocks.read_stages})
    yield (kernels.combine_kernel, {'out'}, {'BLOCK_L': 32, 'BLOCK_X': read[1], 'BLOCK': 64},
           {'num_warps': 4})
    for even in (True, False):
        yield (kernels.attend_kernel, {'qkv', 'out'},
               {'WIDTH': 32, 'BLOCK_Q': blocks.attend[0], 'BLOCK_K': blocks.attend[1],
                'EVEN': even, **multiply},
               {'num_warps': blocks.attend_warps, 'num_stages': blocks.attend_stages})
    yield kernels.add_norm_kernel, {'y', 'x'}, {'BLOCK': 512}, {'num_warps': 2}
    for grid in (True, False):
        yield (kernels.write_kernel, {'pixels', 'keys', 'values', 'dense'},
               {'ROWS': write[0], 'COLUMNS': write[1],
                'BLOCK_L': blocks.latents(grid=grid), 'BLOCK_H': write[3],
                'GRID': grid, 'SPLIT': dtype != torch.float32, **multiply},
               {'num_warps': blocks.write_warps, 'num_stages': blocks.write_stages})


def pointer(kernel, name, precise, precision):
    """Give the type of an argument as Triton writes it."""
    if name in INTEGERS and not (kernel is kernels.read_kernel and name in ('rows', 'columns')):
        return 'i32'
    if name in NUMBERS:
        return 'fp32'
    if name in ('corners', 'ys', 'xs'):
        return '*i32'
    if kernel is textures_cuda.cut_kernel and name in ('pixels', 'crops'):
        return {'pixels': '*u8', 'crops': '*i64'}[name]
    return '*u8' if name == 'frames' else DTYPES[precision] if name in precise else '*fp32'


def compiled(kernel, precise, constants, options, precision, capability):
    """Compile; give registers, spilled bytes, shared memory and tensor core instructions."""
    names = kernel.arg_names
    signature = {name: 'constexpr' if name in constants else
                 pointer(kernel, name, precise, precision) for name in names}
    aligned = {(p.num,): [['tt.divisibility', 16]] for p in kernel.params
               if signature[p.name].startswith('*')
               or p.name in DIVISIBLE and not p.do_not_specialize}
    source = ASTSource(kernel, signature,
                       {(names.index(name),): value for name, value in constants.items()}, aligned)
    done = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(done.asm['cubin'])
        file.flush()
        usage, code = (subprocess.run([tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout for option in ('-res-usage', '-sass'))
    registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
    return {'kernel': kernel.__name__, 'grid': constants.get('GRID'), 'registers': int(registers),
            'stack': int(stack), 'shared': done.metadata.shared, 'room': SHARED[capability],
            'wgmma': len(re.findall(r'\bHGMMA', code)), 'mma': len(re.findall(r'\bHMMA', code))}


if __name__ == '__main__':
    wanted, cc = sys.argv[1], int((sys.argv[2:] or ['90'])[0])
    lite = wanted == 'lite'
    for variant in variants_of_lite() if lite else variants(wanted, cc):
        print(json.dumps(compiled(*variant, 'float16' if lite else wanted, cc)), flush=True)
