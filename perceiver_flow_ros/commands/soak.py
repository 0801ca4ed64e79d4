# SPDX-License-Identifier: Apache-2.0
"""Leave the node running under a camera's load, and see whether it stays as it was."""

from __future__ import annotations

import argparse
import json
from typing import Any, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from perceiver_flow_ros.commands._soak_run import Run

HELP = 'run camera and node for a long time: frames, memory and latency beside their bars'
EXAMPLE = 'perceiver_flow soak --minutes 30 --rate 30 --model lite'

WARM_UP = 0.1  # of the run
MEMORY = 20.0  # MB that it may grow after that
GROWTH = 1.2, 10.0  # factor, ms: what the median latency of the last third may be of the first's
LATE = 1.5, 30.0  # factor of the inference, ms: what the 95th percentile of the latency may be
OVERHEAD = 8.0  # ms that the node may add to the inference at VGA
START_UP = 3.0  # s from the imports of the node to the first flow at VGA
OVERHEAD_RUN = 15.0, 10.0  # s, Hz, with the fastest model: nothing waits
VGA = 640, 480


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('--minutes', type=float, default=30.0, help='default: 30')
    parser.add_argument('--rate', type=float, default=30.0, metavar='HZ', help='default: 30')
    parser.add_argument('--model', default='lite', help='as of the node (default: lite)')
    parser.add_argument(
        '--quality', default='auto', choices=('auto', 'fast', 'balanced', 'best'),
        help='as of the node (default: auto)',
    )  # fmt: skip
    parser.add_argument(
        '--threads', type=int, default=0, metavar='N',
        help='as of the node (default: 0, those of the machine)',
    )  # fmt: skip
    parser.add_argument('--size', default='640x480', metavar='WxH', help='default: 640x480')
    parser.add_argument(
        '--no-overhead', action='store_true', help='leave out the two short runs before'
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON')


def run(args: argparse.Namespace) -> int:
    """Soak, print the report: 0 when every bar is held, 1 when one is not."""
    seconds = args.minutes * 60
    if not 5 <= seconds < 1e6 or not 0.1 <= args.rate <= 1000:
        raise ValueError('expected --minutes of at least 0.1 and --rate from 0.1 to 1000 Hz')
    try:
        width, height = (int(side) for side in args.size.split('x'))
    except ValueError:
        raise ValueError(f'--size is {args.size!r}, expected WxH such as 640x480') from None
    try:
        from perceiver_flow_ros.commands import _soak_run as processes
    except ImportError as error:
        raise ValueError(f'a soak runs the node, which needs ROS 2: {error}') from None
    parameters = {'model': args.model, 'quality': args.quality, 'threads': args.threads}
    common: dict[str, Any] = {'width': width, 'height': height}
    try:
        overhead = started = None
        if not args.no_overhead:
            fast = {'model': 'dis', 'quality': 'fast'}
            long, rate = OVERHEAD_RUN
            short = processes.run(
                seconds=long, rate=rate, parameters=fast, title='overhead', **common
            )
            overhead = overhead_of(short)
            started = processes.start_up(rate=args.rate, parameters=parameters, **common)
        soaked = processes.run(
            seconds=seconds, rate=args.rate, parameters=parameters, title='soaking', **common
        )
    except processes.RunError as error:
        raise ValueError(str(error)) from None
    report = judge(soaked, overhead, started, (width, height) == VGA)
    report = {'model': args.model, 'rate': args.rate, 'size': [width, height], **report}
    print(json.dumps(report, indent=2) if args.json else text(report))
    return 0 if all(report['holds'].values()) else 1


def overhead_of(short: Run) -> dict[str, float]:
    """
    Give what a flow takes beyond its inference, medians in ms.

    `node`: subscription, conversion and publication; `subscriber`: its arrival there included.
    """
    after = [s for s in short.samples if np.isfinite(s.inference)]
    inference = float(np.median([s.inference for s in after]))
    return {
        'node': float(np.nanmedian([s.published for s in after])) - inference,
        'subscriber': float(np.median(short.latency(WARM_UP))) - inference,
    }


def judge(
    soaked: Run, overhead: dict[str, float] | None, started: dict[str, float] | None, vga: bool
) -> dict[str, Any]:
    """Compare a run, and the short ones before it, with the bars."""
    counts = soaked.counts
    after = [s for s in soaked.samples if s.time >= WARM_UP * soaked.samples[-1].time]
    memory = np.array([s.memory for s in after])  # with what an inference holds for a moment
    third = max(len(memory) // 3, 1)
    first, last = float(np.median(memory[:third])), float(np.median(memory[-third:]))
    inference = float(np.nanmean([s.inference for s in after]))
    thirds = [soaked.latency(WARM_UP + 0.3 * i, WARM_UP + 0.3 * (i + 1)) for i in range(3)]
    table = [
        {'p50': float(np.median(t)), 'p95': float(np.percentile(t, 95))} for t in thirds if t.size
    ]
    p95 = float(np.percentile(soaked.latency(WARM_UP), 95))
    holds = {
        'accounted': counts['received'] == counts['processed'] + counts['dropped'],
        'none failed': counts['failed'] == 0,
        'memory': last - first <= MEMORY,
        'latency does not grow': len(table) == 3
        and table[2]['p50'] <= GROWTH[0] * table[0]['p50'] + GROWTH[1],
        'latency p95': p95 <= LATE[0] * inference + LATE[1],
    }
    if overhead is not None and vga:
        holds['overhead'] = overhead['node'] <= OVERHEAD
    if started is not None and vga:
        holds['start'] = started['first flow'] - started['imports'] <= START_UP
    return {
        'seconds': soaked.samples[-1].time,
        'sent': soaked.sent,
        **counts,
        'memory': {'first third': first, 'last third': last, 'largest': float(memory.max())},
        'inference': inference,
        'latency': {'p95': p95, 'limit': LATE[0] * inference + LATE[1], 'thirds': table},
        'overhead': overhead,
        'start': started,
        'holds': holds,
    }  # fmt: skip


def text(report: dict[str, Any]) -> str:
    """Write the report as a table."""
    memory, latency, holds = report['memory'], report['latency'], report['holds']

    def verdict(name: str) -> str:
        return 'holds' if holds[name] else 'DOES NOT HOLD'

    width, height = report['size']
    thirds = ', '.join(f'{t["p50"]:.0f} / {t["p95"]:.0f}' for t in latency['thirds'])
    lines = [
        f'{report["model"]}, {width}x{height} at {report["rate"]:g} Hz '
        f'for {report["seconds"] / 60:.1f} minutes',
        '',
        f'  frames    {report["sent"]} sent, {report["received"]} received = '
        f'{report["processed"]} processed + {report["dropped"]} dropped: {verdict("accounted")}',
        f'  flows     {report["flows"]}, failed {report["failed"]}: {verdict("none failed")}',
        f'  memory    median of the first third {memory["first third"]:.0f} MB, of the last '
        f'{memory["last third"]:.0f} MB (bar: + {MEMORY:.0f} MB), at most '
        f'{memory["largest"]:.0f} MB: {verdict("memory")}',
        f'  latency   p50 / p95 of the three thirds: {thirds} ms: '
        f'{verdict("latency does not grow")}',
        f'            p95 {latency["p95"]:.0f} ms, inference {report["inference"]:.0f} ms '
        f'(bar: {latency["limit"]:.0f} ms): {verdict("latency p95")}',
    ]
    if report['overhead'] is not None:
        bar = f' (bar: {OVERHEAD:.0f} ms): {verdict("overhead")}' if 'overhead' in holds else ''
        lines.append(
            f'  overhead  {report["overhead"]["node"]:.1f} ms of the node beyond the inference'
            f'{bar}; {report["overhead"]["subscriber"]:.1f} ms up to a subscriber'
        )
    if report['start'] is not None:
        first, imports = report['start']['first flow'], report['start']['imports']
        bar = f' (bar: {START_UP:.0f} s): {verdict("start")}' if 'start' in holds else ''
        lines.append(
            f'  start     {first:.1f} s from the start of the process to the first flow, '
            f'{first - imports:.1f} s beyond its imports{bar}'
        )
    return '\n'.join(lines)
