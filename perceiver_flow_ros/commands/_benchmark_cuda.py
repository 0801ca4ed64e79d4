# SPDX-License-Identifier: Apache-2.0
"""`benchmark --device cuda`: kernels checked, ceilings measured, then every network timed.

Times are those of the device (events), medians, over inputs that take turns; a row's host time is
what one pair keeps the CPU busy. The official network has random, peaky weights, see `benchmark`.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
import itertools
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from perceiver_flow_ros.commands._cuda_tasks import (
    moving_parts,
    of_lite,
    of_pairs,
    of_peer,
    Task,
)
from perceiver_flow_ros.commands._gpu import ceilings, ENOUGH, gpu, seconds
from perceiver_flow_ros.commands._kernel_checks import ALLOWED, check_kernels, Sizes
from perceiver_flow_ros.commands._lite_checks import check_lite_kernels
from perceiver_flow_ros.commands.benchmark import (
    frame_pair,
    machine,
    PARITY,
    peaky_network,
    transformers_peer,
    VGA,
)
from perceiver_flow_ros.flow import official_cuda
from perceiver_flow_ros.flow.files import write_whole
from perceiver_flow_ros.flow.lite import LiteEstimator, SETTINGS
from perceiver_flow_ros.flow.official_cuda import CudaFlow
from perceiver_flow_ros.flow.replay import Replay
from perceiver_flow_ros.flow.tiling import tile_grid
from perceiver_flow_ros.model.cuda import CudaNetwork
from perceiver_flow_ros.model.launch import Blocks
from perceiver_flow_ros.model.official import OfficialConfig, TOKEN
import torch

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
TYPICAL = 5.            # pixels: flows are scaled to this mean before half precisions are judged
ALLOWED_PIXELS = 0.05
STRIDES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Setup:
    """What is measured; smaller only in the tests."""

    size: tuple[int, int] = (368, 496)
    network: dict[str, int] = field(default_factory=dict)
    checks: Sizes = Sizes()
    lite_checks: tuple[int, int, int] = (2, 60, 84)     # pairs, height, width
    images: tuple[tuple[int, int], ...] = (VGA, (720, 1280))
    precisions: tuple[torch.dtype, ...] = PRECISIONS
    strides: tuple[int, ...] = STRIDES
    matrix: int = 8192
    copied: int = 2 ** 31
    repeat: int = 50
    peer: bool = True
    blocks: Blocks | None = None


def run(args: argparse.Namespace, device: str) -> int:
    """Measure everything; 1 when a check fails or something cannot be measured."""
    out = sys.stderr if args.json == '-' else sys.stdout
    torch.cuda.set_device(device)       # where Triton launches

    def keep(report: dict[str, Any]) -> None:
        if args.json and args.json != '-':      # after every row: a crash costs none of them
            write_whole(args.json, (json.dumps(report, indent=2) + '\n').encode())

    report = benchmark(torch.device(device), Setup(peer=not args.no_peer),
                       lambda text: print(text, file=out, flush=True), keep)
    if args.json == '-':
        print(json.dumps(report, indent=2))
    return 1 if report['failed'] else 0


def benchmark(device: torch.device, setup: Setup, say: Callable[[str], None],
              keep: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    """Do all of it, telling and keeping the results as they come; give them all."""
    started = time.perf_counter()
    report: dict[str, Any] = {'machine': {**machine(), **gpu(device)}, 'failed': []}
    say('{gpu}, PyTorch {torch}, Triton {triton}'.format(**report['machine']))

    say('\nkernels against float64, random inputs')
    report['checks'] = []
    seed = time.time_ns() % 2 ** 31
    suites = {name_of(precision): check_kernels(device, setup.checks, precision, seed,
                                                setup.blocks) for precision in setup.precisions}
    suites['of lite'] = check_lite_kernels(device, *setup.lite_checks, seed)
    for suite, checks in suites.items():
        try:
            for check in checks:
                name = name_of(check.precision)
                report['checks'].append({'kernel': check.kernel, 'precision': name,
                                         'error': check.error, 'passed': check.passed})
                say(f'  {check.kernel:16}{name:10}{check.error:10.1e}   ' + (
                    'ok' if check.passed else f'FAILED: at most {ALLOWED[check.precision]:.0e}'))
                if not check.passed:
                    report['failed'].append(f'{check.kernel} {name}')
        except Exception as error:      # one that does not compile, say: the others go on
            say(f'  {suite}: FAILED: {in_a_line(error)}')
            report['failed'].append(f'kernels {suite}')
        keep(report)

    report['ceilings'] = ceilings(device, setup.matrix, setup.copied)
    say('\nceilings: ' + ', '.join(f'{rate / 1e12:.0f} TFLOP/s {name}' for name, rate in
                                   report['ceilings']['matrix'].items())
        + f', {report["ceilings"]["copy"] / 1e12:.2f} TB/s copied')

    say(f'\n{"":38}{"device":>10}{"pairs/s":>9}{"host":>10}{"memory":>9}{"of ceiling":>12}'
        f'{"speed-up":>10}{"error":>9}')
    report['rows'] = []
    for row in rows(device, setup, report['ceilings']):
        report['rows'].append(row)
        say(line(row))
        if 'error' in row or not row.get('passed', True):
            report['failed'].append(row['name'])
        keep(report)

    report['seconds'] = time.perf_counter() - started
    keep(report)
    say(f'\nSpeed-up: against transformers float32 (in brackets: bfloat16). Error: relative '
        f'(float32: at most {PARITY:.0e}), or of flows scaled to a mean of {TYPICAL:.0f} px (at '
        f'most {ALLOWED_PIXELS} px); of lite: from the CPU, in pixels (in float32 at most '
        f'{ALLOWED_PIXELS}). Memory: peak above the weights.')
    say('FAILED: ' + '; '.join(report['failed']) if report['failed'] else 'All checks passed.')
    return report


def name_of(precision: torch.dtype) -> str:
    """Give 'float32' for torch.float32."""
    return str(precision).removeprefix('torch.')


def work(config: OfficialConfig, tiles: int, queries: int) -> float:
    """Count the operations that the folded network needs."""
    (height, width), latents, d = config.train_size, config.num_latents, config.d_latents
    read = 4 * latents * height * width * 64 + 2 * latents * (64 + height + width) * d
    layer = 12 * latents * d * d + 4 * latents ** 2 * d
    keys = 2 * latents * d * (64 + height + width + TOKEN)
    write = 2 * latents * (64 + TOKEN) + 2 * TOKEN * TOKEN
    layers = config.num_self_attends_per_block * layer + 4 * latents * d * d
    return float(tiles * (read + layers + keys) + queries * write)


def rows(device: torch.device, setup: Setup, limits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure the networks one by one; what they have in common is made once."""
    network = peaky_network(*setup.size, **setup.network)
    expected, baseline = None, {}
    if setup.peer and find_spec('transformers'):
        peer = transformers_peer(network).to(device)
        for precision in (torch.float32, torch.bfloat16):
            row, flow = measured(f'transformers {name_of(precision)}',
                                 partial(of_peer, peer, precision, setup.size, device), device,
                                 max(setup.repeat // 5, 1))
            baseline[precision] = row.get('seconds')
            yield judged(row, flow, expected, precision)
            expected = flow if expected is None else expected
        del peer
    network = network.to(device)
    if expected is None:
        with torch.inference_mode():
            frames = torch.from_numpy(frame_pair(*setup.size))[None].to(device)
            expected = network(frames)[0].cpu().numpy()

    for precision in setup.precisions:
        try:
            prepared = CudaNetwork(network, precision, setup.blocks)
        except Exception as error:
            yield {'name': name_of(precision), 'error': in_a_line(error)}
            continue
        rate = limits['matrix'][{torch.float32: 'tf32'}.get(precision, name_of(precision))]
        rate /= 3 if precision == torch.float32 else 1          # three products of TF32
        for size, stride in itertools.chain(
                itertools.product([setup.size], setup.strides),
                itertools.product(setup.images, sorted({*setup.strides[:1], 4}))):
            tiles = len(tile_grid(*size, setup.size, official_cuda.OVERLAP))
            name = f'{name_of(precision)} {size[1]}x{size[0]}, {tiles} tiles, stride {stride}'
            flow_of = CudaFlow(prepared, query_stride=stride)
            row, flow = measured(
                name, partial(of_pairs, flow_of, flow_of.replay, size, device), device,
                setup.repeat)
            if 'seconds' in row:
                asked = work(network.config, tiles, tiles * -(-setup.size[0] // stride)
                             * -(-setup.size[1] // stride))
                row.update(tiles=tiles, operations=asked, ceiling=asked / row['seconds'] / rate)
                if size == setup.size and baseline:
                    row['speedup'] = {name_of(p): t / row['seconds']
                                      for p, t in baseline.items() if t}
            yield graphed(judged(row, flow, expected[::stride, ::stride] if size == setup.size
                                 else None, precision), flow_of.replay)
        del prepared, flow_of

    parts = moving_parts(*setup.images[0])
    for quality in SETTINGS:
        on_cpu, expected = LiteEstimator(quality=quality), None
        for precision in setup.precisions:
            exact = precision == torch.float32
            name = f'lite {quality}' + ('' if exact else ' ' + name_of(precision))
            name += f', {setup.images[0][1]}x{setup.images[0][0]}'
            estimator = LiteEstimator(device=str(device), quality=quality,
                                      precision=name_of(precision))
            row, flow = measured(name, partial(of_lite, estimator, setup.images[0], device),
                                 device, setup.repeat)
            if flow is not None:
                on_cpu.setting = estimator.setting
                expected = on_cpu.launch(*parts).numpy() if expected is None else expected
                pixels = float(np.linalg.norm(flow - expected, axis=-1).mean())
                # (In half precision a choice between motions may fall otherwise: not judged.)
                row.update(pixels=pixels, passed=not exact or pixels <= ALLOWED_PIXELS)
            yield graphed(row, estimator.replay)


def judged(row: dict[str, Any], flow: np.ndarray | None, expected: np.ndarray | None,
           precision: torch.dtype) -> dict[str, Any]:
    """Complete a row: whether its flow is the expected one."""
    if flow is None or expected is None:
        return row
    if precision == torch.float32:
        difference = np.linalg.norm(flow - expected) / np.linalg.norm(expected)
        return {**row, 'relative_error': float(difference), 'passed': bool(difference <= PARITY)}
    scale = TYPICAL / np.linalg.norm(expected, axis=-1).mean()
    pixels = float(scale * np.linalg.norm(flow - expected, axis=-1).mean())
    ours = not row['name'].startswith('transformers')
    return {**row, 'pixels': pixels, 'passed': not ours or pixels <= ALLOWED_PIXELS}


def graphed(row: dict[str, Any], replay: Replay) -> dict[str, Any]:
    """Complete a row: on CUDA its pairs are replayed, or it fails."""
    if replay.stream is None or replay.captured:
        return row
    return {**row, 'captured': False, 'passed': False}


def in_a_line(error: Exception) -> str:
    """Say what went wrong."""
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def measured(name: str, make: Callable[[], Task], device: torch.device, repeat: int
             ) -> tuple[dict[str, Any], np.ndarray | None]:
    """Time what ``make`` sets up: the task on the device, the whole pair on the host."""
    cuda = device.type == 'cuda'
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            task, pair, result = make()
            flow = result()
            peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
            took = seconds(task, device, repeat)
            host: list[float] = []
            for i in range(len(took)):
                if len(host) >= 5 and sum(host) > ENOUGH:
                    break
                if cuda:
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                pair(i)
                host.append(time.perf_counter() - start)
    except Exception as error:          # whatever it is, the other rows go on
        return {'name': name, 'error': in_a_line(error)}, None
    return {'name': name, 'seconds': statistics.median(took), 'fastest': min(took),
            'slowest': max(took), 'host': statistics.median(host), 'memory': peak}, flow


def line(row: dict[str, Any]) -> str:
    """Write a row of the table."""
    if 'error' in row:
        return f"{row['name']:38}FAILED: {row['error']}"
    speedup = row.get('speedup', {})
    text = (f"{row['name']:38}{1e3 * row['seconds']:7.2f} ms{1 / row['seconds']:9.1f}"
            f"{1e3 * row['host']:7.2f} ms{row['memory'] / 1e9:6.2f} GB")
    text += f"{row['ceiling']:11.0%} " if 'ceiling' in row else 12 * ' '
    text += f"{speedup['float32']:9.1f}x" if 'float32' in speedup else 10 * ' '
    text += f" ({speedup['bfloat16']:.1f}x)" if 'bfloat16' in speedup else ''
    text += f"{row['relative_error']:9.0e}" if 'relative_error' in row else ''
    text += f"{row['pixels']:6.3f} px" if 'pixels' in row else ''
    return text + ('' if row.get('passed', True) else '  FAILED')
