# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every network beside the transformers implementation, in one run.

Each line of the table is a process of its own, so that its memory is its own. The official network
has random weights, large enough to make its attention peaky: parity then proves something, and
speed does not depend on the values.
"""
from __future__ import annotations

import argparse
from importlib.util import find_spec
from itertools import product
import json
import os
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

HELP = 'measure speed and memory beside the transformers implementation, and check parity with it'
EXAMPLE = 'perceiver_flow benchmark --repeat 3'
OFTEN = 20      # what takes tenths of a second is timed so many times

PARITY = 1e-4           # relative error allowed in float32
VGA = (480, 640)
SETTINGS = ('fast', 'balanced', 'best')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('--height', type=int, default=368, metavar='PX',
                        help='height of the official network on a CPU (default: 368)')
    parser.add_argument('--width', type=int, default=496, metavar='PX',
                        help='width of the official network on a CPU (default: 496)')
    parser.add_argument('--device', default='cpu', metavar='cpu|cuda|cuda:N',
                        help='cuda: a table of its own, in some minutes (default: cpu)')
    parser.add_argument('--repeat', type=int, default=3, metavar='N',
                        help='measurements of a line on a CPU, after a warm-up (default: 3)')
    parser.add_argument('--no-peer', action='store_true',
                        help='leave out transformers; parity is checked with the reference')
    parser.add_argument('--json', nargs='?', const='-', metavar='OUT',
                        help='also write the figures as JSON, to a file or instead of the table')


def run(args: argparse.Namespace) -> int:
    """Measure line by line; 1 when parity fails or a line cannot be measured."""
    from perceiver_flow_ros.flow.files import write_whole

    path = Path(args.json or '-')
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise ValueError(f'--json is {path}, expected a file in a folder that is there')
    if args.device != 'cpu':
        return on_cuda(args)
    if min(args.height, args.width, args.repeat) < 1:
        raise ValueError('--height, --width and --repeat must be at least 1')
    out = sys.stderr if args.json == '-' else sys.stdout
    report: dict[str, Any] = {
        'machine': machine(), 'size': [args.width, args.height], 'precision': 'float32',
        'repeat': args.repeat, 'compared_with': None, 'lines': []}
    print(headline(report), file=out, flush=True)

    official: list[dict[str, Any]] = []         # lines that are compared with the first of them
    flows: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        for spec in plan(args):
            spec['flow'] = str(Path(folder) / 'flow.npy')
            line = measure(spec)
            if 'height' in spec and 'error' not in line:
                official.append(line)
                flows.append(np.load(spec['flow']))
                compare(official, flows, spec.get('stride', 1))
            report['lines'].append(line)
            print(row(line), file=out, flush=True)

    report['compared_with'] = official[0]['name'] if official else None
    failed = report['failed'] = [
        line['name'] for line in report['lines']
        if 'error' in line or line.get('relative_error', 0) > PARITY]
    print('\n' + footnote(report, args.no_peer), file=out)
    if args.json == '-':
        print(json.dumps(report, indent=2))
    elif args.json:
        write_whole(path, (json.dumps(report, indent=2) + '\n').encode())
    return 1 if failed else 0


def on_cuda(args: argparse.Namespace) -> int:
    """Measure on a GPU; ValueError where there is none, or no Triton."""
    from perceiver_flow_ros.flow.estimator import resolve_device
    if resolve_device(args.device) == 'cpu' or not find_spec('triton'):
        raise ValueError(f'--device {args.device}: this needs a GPU and Triton')
    from perceiver_flow_ros.commands import _benchmark_cuda
    return _benchmark_cuda.run(args, resolve_device(args.device))


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """List what to measure; the first line is what the official network's others are held to."""
    common = {'height': args.height, 'width': args.width, 'repeat': args.repeat}
    peer = [] if args.no_peer or not find_spec('transformers') else ['transformers']
    lines = [{**common, 'name': name, 'network': name} for name in (*peer, 'reference')]
    for stride in (1, 2, 4, 8):
        name = f'folded, stride {stride}' if stride > 1 else 'folded'
        lines.append({**common, 'name': name, 'network': 'folded', 'stride': stride})
    for model, quality in product(('lite', 'dis'), SETTINGS):
        lines.append({'name': f'{model} {quality}, 640x480', 'network': 'estimator',
                      'model': model, 'quality': quality, 'repeat': max(args.repeat, OFTEN)})
    return lines


def footnote(report: dict[str, Any], no_peer: bool) -> str:
    """Say what the columns mean, and what is missing or wrong."""
    notes = []
    baseline = [line['baseline_memory'] for line in report['lines'] if 'error' not in line]
    if baseline:
        notes.append(f'Peak memory is that of the process, {max(baseline) / 1e9:.2f} GB of it '
                     'Python and PyTorch. Speed-up and relative error are against '
                     f"{report['compared_with']}, parity means at most {PARITY:.0e}.")
    if not no_peer and not find_spec('transformers'):
        notes.append('transformers is not installed (pip install transformers): parity was '
                     'checked with the reference network only.')
    notes.append(f"FAILED: {'; '.join(report['failed'])}" if report['failed'] else 'Parity holds.')
    return '\n'.join(notes)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one line in a process of its own."""
    child = subprocess.run([sys.executable, '-m', __name__, json.dumps(spec)],
                           capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or [f'exit code {child.returncode}'])[-1]
        return {'name': spec['name'], 'error': last}
    return {'name': spec['name'], **json.loads(child.stdout.splitlines()[-1])}


def compare(lines: list[dict[str, Any]], flows: list[np.ndarray], stride: int) -> None:
    """Complete the last line: against the first one, at the pixels that it decoded."""
    first, last = lines[0], lines[-1]
    last['speedup'] = first['seconds'] / last['seconds']
    expected = flows[0][::stride, ::stride]
    last['relative_error'] = float(np.linalg.norm(flows[-1] - expected) / np.linalg.norm(expected))


def machine() -> dict[str, Any]:
    """Describe what the figures were measured on."""
    import torch

    names = [line.partition(':')[2].strip() for line in
             Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
    cpu = [*names, platform.processor() or platform.machine()][0]
    return {'cpu': cpu, 'cpus': len(os.sched_getaffinity(0)), 'threads': torch.get_num_threads(),
            'python': platform.python_version(), 'torch': torch.__version__}


def headline(report: dict[str, Any]) -> str:
    """Say what is measured, above the columns."""
    m, (width, height) = report['machine'], report['size']
    return (f"{m['cpu']}, {m['cpus']} CPUs, {m['threads']} threads, PyTorch {m['torch']}, "
            f"Python {m['python']}\nofficial network {width}x{height}, float32, random peaky "
            f"weights; a pair of frames; median of {report['repeat']}, of lite and dis of "
            f"{max(report['repeat'], OFTEN)} (fastest - slowest)\n\n"
            f"{'':24}{'time':>10}{'':18}{'peak memory':>14}{'speed-up':>11}{'rel. error':>13}")


def row(line: dict[str, Any]) -> str:
    """Write a line of the table."""
    if 'error' in line:
        return f"{line['name']:24}failed: {line['error']}"
    spread = f"({line['fastest']:.3f} - {line['slowest']:.3f})"
    text = (f"{line['name']:24}{line['seconds']:8.3f} s{spread:>18}"
            f"{line['peak_memory'] / 1e9:11.2f} GB")
    if 'speedup' in line:
        text += f"{line['speedup']:10.2f}x{line['relative_error']:13.1e}"
    return text


# In the processes that measure: a network and its input, a call to time, the memory it took.


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """Set up what a line measures, time it, tell its memory."""
    import torch

    baseline = peak_memory()                                    # Python's, NumPy's and PyTorch's
    call = globals()[spec['network']](spec)
    with torch.inference_mode():
        flow = np.asarray(call())                               # warm-up
        seconds = []
        for _ in range(spec['repeat']):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    np.save(spec['flow'], flow)
    return {'seconds': statistics.median(seconds), 'fastest': min(seconds),
            'slowest': max(seconds), 'peak_memory': peak_memory(), 'baseline_memory': baseline}


def peak_memory() -> int:
    """Largest resident memory of this process, bytes (ru_maxrss would count its parent's)."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition('VmHWM:')[2].split()[0])


def frame_pair(height: int, width: int) -> np.ndarray:
    """Frames (2, H, W, 3) uint8: smooth noise that moves by a few pixels."""
    import cv2

    noise = np.random.default_rng(0).integers(0, 256, (height + 8, width + 8, 3), np.uint8)
    scene = cv2.GaussianBlur(noise, (0, 0), 2)
    scene = cv2.normalize(scene, scene, 0, 255, cv2.NORM_MINMAX)
    return np.stack([scene[8:, 8:], scene[5:-3, 3:-5]])


def peaky_network(height: int, width: int, **sizes: int) -> Any:
    """Make an `OfficialNetwork` with random weights that give a peaky attention."""
    from perceiver_flow_ros.model.official import OfficialConfig, OfficialNetwork
    import torch

    network = OfficialNetwork(OfficialConfig(train_size=(height, width), **sizes)).eval()
    random = torch.Generator().manual_seed(0)
    for name, weight in network.requires_grad_(False).named_parameters():
        noise = torch.randn(weight.shape, generator=random)
        if name == 'latents':
            weight.copy_(noise)
        elif weight.ndim == 2:
            weight.copy_(noise * 2 / weight.shape[1] ** 0.5)
        else:
            weight.copy_(0.2 * noise + ('layernorm' in name and name.endswith('weight')))
    return network


def transformers_peer(network: Any) -> Any:
    """Make transformers' PerceiverForOpticalFlow with the weights of an `OfficialNetwork`."""
    from dataclasses import asdict

    from perceiver_flow_ros.model.official import TOKEN
    from perceiver_flow_ros.model.weights import transformers_name
    from transformers import PerceiverConfig, PerceiverForOpticalFlow

    config = PerceiverConfig(**asdict(network.config), d_model=TOKEN, num_cross_attention_heads=1)
    peer = PerceiverForOpticalFlow(config).eval()
    peer.load_state_dict({transformers_name(name): weight
                          for name, weight in network.state_dict().items()})
    return peer


def transformers(spec: dict[str, Any]) -> Any:
    """Set up transformers' network."""
    from perceiver_flow_ros.model.official import patches
    import torch

    frames = torch.from_numpy(frame_pair(spec['height'], spec['width']))[None]
    peer = transformers_peer(peaky_network(spec['height'], spec['width']))

    def call() -> Any:
        x = patches(frames).unflatten(-1, (2, 27)).permute(0, 3, 4, 1, 2)
        return 20 * peer(inputs=x).logits[0]
    return call


def reference(spec: dict[str, Any]) -> Any:
    """Set up this package's network that is written to be read."""
    import torch

    frames = torch.from_numpy(frame_pair(spec['height'], spec['width']))[None]
    network = peaky_network(spec['height'], spec['width'])
    return lambda: network(frames)[0]


def folded(spec: dict[str, Any]) -> Any:
    """Set up this package's fast network, the one that is used."""
    from perceiver_flow_ros.model.folded import FoldedNetwork
    import torch

    frames = torch.from_numpy(frame_pair(spec['height'], spec['width']))[None]
    network = FoldedNetwork(peaky_network(spec['height'], spec['width']))
    columns = slice(0, None, spec['stride'])
    queries = [(y, columns) for y in range(0, spec['height'], spec['stride'])]

    def call() -> Any:
        pixels, latents = network.encode(frames)
        return torch.stack(network.decode(pixels[0], latents[0], queries))
    return call


def estimator(spec: dict[str, Any]) -> Any:
    """Set up any other estimator."""
    from perceiver_flow_ros.flow.estimator import load_estimator

    network = load_estimator(spec['model'], quality=spec['quality'], device='cpu')
    frames = frame_pair(*VGA)
    return lambda: network(*frames)


if __name__ == '__main__':
    print(json.dumps(work(json.loads(sys.argv[1]))))
