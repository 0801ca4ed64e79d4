# SPDX-License-Identifier: Apache-2.0
"""Errors of an estimator on pairs with true flow, beside OpenCV DIS and beside no flow at all."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
import json
import os
from pathlib import Path
import sys
import time

import numpy as np
from perceiver_flow_ros.commands.options import add_estimator_arguments, estimator_from
from perceiver_flow_ros.flow.estimator import FlowEstimator, load_estimator

HELP = 'measure the flow error on image pairs with true flow, beside OpenCV DIS'
EXAMPLE = 'perceiver_flow evaluate datasets/Sintel --model lite'

LAYOUTS = """
  Middlebury    SCENE/frame10.png frame11.png flow10.flo, or other-data/ beside other-gt-flow/
  MPI Sintel    {clean,final}/SCENE/frame_NNNN.png beside flow/SCENE/frame_NNNN.flo (, invalid/)
                or {clean,final}/frame_NNNN.png with gt/frame_NNNN.flo (, gt/invalid/)
  KITTI         {image_2,colored_0,image_0}/NNNNNN_10.png _11.png beside flow_occ/ or flow_noc/
  FlyingChairs  NNNNN_img1.ppm _img2.ppm _flow.flo, or NNNNN-img0.ppm -img1.ppm -gt.flo"""


@dataclass
class Pair:
    """Two frames and the true flow between them; `invalid` marks pixels not to be counted."""

    name: str
    previous: Path
    current: Path
    truth: Path
    invalid: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument(
        'root', type=Path, help='a folder; every pair of a known layout below it is used'
    )
    parser.add_argument('--json', action='store_true', help='print the figures as JSON')
    parser.add_argument(
        '--confidence', action='store_true',
        help='estimate the flow back, too, and tell how well the confidence from both sorts the '
        'errors: AUSE, the area under the sparsification error (0 is perfect)',
    )  # fmt: skip
    parser.add_argument(
        '--non-occluded', action='store_true',
        help="only KITTI's layout, and of it what the second frame shows: flow_noc/",
    )  # fmt: skip
    add_estimator_arguments(parser)
    parser.epilog = f'{parser.epilog}\n\nlayouts:{LAYOUTS}'


def run(args: argparse.Namespace) -> int:
    """Evaluate every pair, print the table or JSON."""
    from tqdm import tqdm

    if not args.root.is_dir():
        raise NotADirectoryError(20, 'No such folder', str(args.root))
    pairs = sorted(find_pairs(args.root, args.non_occluded), key=lambda pair: pair.name)
    if not pairs:
        raise ValueError(
            f'{args.root}: no image pairs with true flow found in any of the layouts looked for: '
            'Middlebury (frame10.png frame11.png flow10.flo), MPI Sintel (clean/, final/ beside '
            'flow/, or gt/ in them), KITTI (image_2/, colored_0/ or image_0/ beside flow_occ/ or '
            'flow_noc/), FlyingChairs (_img1 _img2 _flow, or -img0 -img1 -gt)'
        )

    estimators = {'model': estimator_from(args)}
    if estimators['model'].name != 'dis':
        estimators['dis'] = load_estimator('dis', query_stride=args.query_stride)
    rows = []
    for pair in tqdm(pairs, unit='pair', disable=None, file=sys.stderr):
        rows.append(evaluate_pair(pair, estimators, args.confidence))
    report = {
        'model': estimators['model'].name,
        'device': estimators['model'].device,
        'precision': estimators['model'].precision,
        'quality': args.quality,
        'query_stride': args.query_stride,
        'pairs': rows,
        'mean': {
            name: {key: float(np.mean([row[name][key] for row in rows])) for key in rows[0][name]}
            for name in ('zero', *estimators)
        },
    }
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


def evaluate_pair(pair: Pair, estimators: dict, confidence: bool = False) -> dict:
    """Give the metrics of every estimator, and of zero flow, on one pair."""
    from perceiver_flow_ros.flow.files import read_flow, read_image
    from perceiver_flow_ros.flow.metrics import end_point_error, metrics, sparsification_error
    from perceiver_flow_ros.odometry import cues

    paths = pair.previous, pair.current, pair.invalid
    images = [(path, read_image(path)) for path in paths if path]
    truth = read_flow(pair.truth)
    for path, image in images:
        (h, w), (rows, columns) = image.shape[:2], truth.shape[:2]
        if (h, w) != (rows, columns):
            raise ValueError(f'{path} is {w}x{h}, but its true flow {pair.truth} {columns}x{rows}')
    frames = images[0][1], images[1][1]
    for _, mask in images[2:]:
        truth[mask[:, :, 0] > 0] = np.nan

    row: dict = {'name': pair.name, 'size': [truth.shape[1], truth.shape[0]]}
    for name, estimator in estimators.items():
        stride = estimator.query_stride
        if np.isnan(truth[::stride, ::stride]).all():
            raise ValueError(f'{pair.truth}: the flow is unknown everywhere; leave this pair out')
        flow, seconds = timed(estimator, frames)
        row[name] = {**metrics(flow, truth[::stride, ::stride]), 'seconds': seconds}
        if confidence:
            trust = cues.confidence(flow, estimator(*frames[::-1]), stride)
            error = end_point_error(flow, truth[::stride, ::stride])
            row[name]['ause'] = sparsification_error(error, trust)
        row['zero'] = metrics(np.zeros_like(flow), truth[::stride, ::stride])
    return row


def timed(estimator: FlowEstimator, frames: tuple) -> tuple[np.ndarray, float]:
    """Give the flow, and the seconds it takes once a pair of this size has been seen."""
    for _ in range(2):  # the first call on a new size prepares kernels
        start = time.perf_counter()
        flow = estimator(*frames)
        seconds = time.perf_counter() - start
        if seconds > 2:  # what was prepared does not count beside it
            break
    return flow, seconds


# Where pairs are found


def find_pairs(root: Path, non_occluded: bool = False) -> Iterator[Pair]:
    """Find the pairs of every known layout below a folder (see LAYOUTS)."""
    root = root.resolve()  # its parents are looked at
    files = list(files_below(root))
    for truth in () if non_occluded else (file for file in files if file.suffix == '.flo'):
        yield from middlebury(truth, root) or flying_chairs(truth, root) or sintel(truth, root)
    for truth in (file for file in files if file.name.endswith('_10.png')):
        yield from kitti(truth, root, non_occluded)


def files_below(root: Path) -> Iterator[Path]:
    """Find the files below a folder and below the folders linked into it, none of them twice."""
    seen = set(root.parents)  # a link to one of them is a circle
    waiting = [root]
    for start in waiting:  # links come last: what has a place of its own is named by it
        for folder, folders, files in os.walk(start):
            here, real = Path(folder), Path(folder).resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.endswith('.partial')]  # of `pairs`
            waiting += [here / name for name in folders if (here / name).is_symlink()]
            yield from (here / name for name in files)


def middlebury(truth: Path, root: Path) -> list[Pair]:
    """SCENE/frame10.png frame11.png flow10.flo, or the frames in other-data/SCENE/."""
    if truth.name != 'flow10.flo':
        return []
    folders = [truth.parent, truth.parents[1].parent / 'other-data' / truth.parent.name]
    name = label(truth.parent, root)
    return present(Pair(name, f / 'frame10.png', f / 'frame11.png', truth) for f in folders)[:1]


def flying_chairs(truth: Path, root: Path) -> list[Pair]:
    """NNNNN_img1.ppm _img2.ppm _flow.flo, or NNNNN-img0.ppm -img1.ppm -gt.flo."""
    for end, first, second in (('_flow.flo', '_img1', '_img2'), ('-gt.flo', '-img0', '-img1')):
        if truth.name.endswith(end):
            stem = truth.with_name(truth.name[: -len(end)])
            name = label(stem, root)
            frames = (
                (Path(f'{stem}{first}{s}'), Path(f'{stem}{second}{s}')) for s in ('.ppm', '.png')
            )
            return present(Pair(name, *pair, truth) for pair in frames)[:1]
    return []


def sintel(truth: Path, root: Path) -> list[Pair]:
    """frame_NNNN.flo in the training/ tree of MPI, or in a gt/ folder beside the frames."""
    number = truth.stem.rpartition('_')[2]
    if not (truth.stem.startswith('frame_') and number.isdigit()):
        return []
    names = f'{truth.stem}.png', f'frame_{int(number) + 1:0{len(number)}d}.png'
    if truth.parent.name == 'gt':
        folder, invalid = truth.parents[1], truth.parent / 'invalid' / names[0]
        folders = [folder]
    elif truth.parents[1].name == 'flow':
        base, scene = truth.parents[2], truth.parent.name
        folders, invalid = (
            [base / kind / scene for kind in ('clean', 'final')],
            base / 'invalid' / scene / names[0],
        )
    else:
        return []
    return present(
        Pair(
            label(f / truth.stem, root),
            f / names[0],
            f / names[1],
            truth,
            invalid if invalid.is_file() else None,
        )
        for f in folders
    )


def kitti(truth: Path, root: Path, non_occluded: bool = False) -> list[Pair]:
    """NNNNNN_10.png and _11.png beside flow_occ/ (else, or when told, flow_noc/), 2015 or 2012."""
    base = truth.parents[1]
    kinds = ['flow_noc'] if non_occluded else ['flow_occ', 'flow_noc']
    there = [kind for kind in kinds if (base / kind / truth.name).is_file()]
    if truth.parent.name not in there[:1]:
        return []
    second = truth.name.replace('_10.png', '_11.png')
    folders = [base / kind for kind in ('image_2', 'colored_0', 'image_0')]
    name = label(base / truth.stem, root)
    return present(Pair(name, f / truth.name, f / second, truth) for f in folders)[:1]


def present(pairs: Iterator[Pair]) -> list[Pair]:
    """Keep the pairs whose frames are both there."""
    return [pair for pair in pairs if pair.previous.is_file() and pair.current.is_file()]


def label(path: Path, root: Path) -> str:
    """Name a pair by its place below the root."""
    if path == root or not path.is_relative_to(root):  # the root is a scene, or a truth folder
        return path.name
    return path.relative_to(root).as_posix()


# What is printed


def table(report: dict) -> str:
    """Lay the report out for people."""
    beside_dis = 'dis' in report['mean']
    name = report['model']
    width = max(len('pair'), *(len(row['name']) for row in report['pairs']))
    head = f'{"pair":{width}}  {name + " EPE":>12} {"Fl %":>6} '
    head += f'{">1px %":>7} {">3px %":>7} {">5px %":>7} {"time s":>7}'
    sorts = 'ause' in report['mean']['model']
    head += f' {"AUSE":>6}' if sorts else ''
    head += f' | {"DIS EPE":>8} {"Fl %":>6} {"time s":>7}' if beside_dis else ''
    head += f' | {"zero EPE":>8}'
    lines = [head, '-' * len(head)]
    for row in [*report['pairs'], {'name': 'mean', **report['mean']}]:
        model, dis, zero = row['model'], row.get('dis'), row['zero']
        if row['name'] == 'mean':
            lines.append(lines[1])
        line = (
            f'{row["name"]:{width}}  {model["epe"]:12.2f} {model["fl"]:6.1f} {model["px1"]:7.1f} '
        )
        line += f'{model["px3"]:7.1f} {model["px5"]:7.1f} {model["seconds"]:7.2f}'
        line += f' {model["ause"]:6.2f}' if sorts else ''
        line += (
            f' | {dis["epe"]:8.2f} {dis["fl"]:6.1f} {dis["seconds"]:7.2f}' if beside_dis else ''
        )
        lines.append(f'{line} | {zero["epe"]:8.2f}')
    return '\n'.join(
        [
            *lines,
            '',
            f'{name}, {report["device"]}, {report["precision"]}; EPE in pixels, mean over pairs',
        ]
    )
