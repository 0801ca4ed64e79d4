# SPDX-License-Identifier: Apache-2.0
"""Flow between two image files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import time

import numpy as np
from perceiver_flow_ros.commands.options import add_estimator_arguments, estimator_from

HELP = 'estimate the optical flow between two images'
EXAMPLE = 'perceiver_flow estimate frame1.png frame2.png -o flow.flo --color flow.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('frame1', type=Path, help='the previous frame')
    parser.add_argument('frame2', type=Path, help='the current frame, of the same size')
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        metavar='OUT',
        help='.flo (Middlebury), .png (KITTI, 16 bit) or .npy',
    )
    parser.add_argument(
        '--color', type=Path, metavar='OUT.png', help="also a picture in Middlebury's colours"
    )
    parser.add_argument('--json', action='store_true', help='print what was done as JSON')
    add_estimator_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Estimate, write the files, say what was seen."""
    from perceiver_flow_ros.flow.color import flow_to_color
    from perceiver_flow_ros.flow.files import read_image, write_flow, write_image

    check_outputs(args)
    frames = [read_image(path) for path in (args.frame1, args.frame2)]
    if frames[0].shape != frames[1].shape:
        sizes = [
            f'{path} is {f.shape[1]}x{f.shape[0]}'
            for path, f in zip((args.frame1, args.frame2), frames)
        ]
        raise ValueError(f'frames differ in size: {sizes[0]}, {sizes[1]}; a pair needs one size')

    estimator = estimator_from(args)
    start = time.perf_counter()
    flow = estimator(*frames)
    seconds = time.perf_counter() - start

    if args.output:
        write_flow(args.output, flow)
    if args.color:
        write_image(args.color, flow_to_color(flow))

    speed = np.linalg.norm(flow, axis=2)
    files = [str(path) for path in (args.output, args.color) if path]
    report = {
        'model': estimator.name,
        'device': estimator.device,
        'precision': estimator.precision,
        'query_stride': estimator.query_stride,
        'image_size': [frames[0].shape[1], frames[0].shape[0]],
        'flow_size': [flow.shape[1], flow.shape[0]],
        'mean_motion_px': float(speed.mean()),
        'max_motion_px': float(speed.max()),
        'seconds': seconds,
        'files': files,
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f'{estimator.name} ({estimator.device}, {estimator.precision}): '
            f'{flow.shape[1]}x{flow.shape[0]} vectors in {seconds:.2f} s, '
            f'motion {speed.mean():.2f} px mean, {speed.max():.2f} px largest'
        )
        print('wrote ' + ', '.join(files))
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before the long work, what could not be written after it, or would cost a frame."""
    from perceiver_flow_ros.flow.files import check_suffix, FLOW_SUFFIXES, IMAGE_SUFFIXES

    output, color = args.output, args.color
    if not (output or color):
        raise ValueError('nothing to write: give -o OUT.flo|.png|.npy or --color OUT.png')
    if output and color and output.resolve() == color.resolve():
        raise ValueError(f'{output}: -o and --color name the same file')
    for path, suffixes in ((output, FLOW_SUFFIXES), (color, IMAGE_SUFFIXES)):
        if path and path.resolve() in (args.frame1.resolve(), args.frame2.resolve()):
            raise ValueError(f'{path}: that is one of the frames; it would be replaced')
        if path:
            check_suffix(path, suffixes)
            if not path.resolve().parent.is_dir():
                raise FileNotFoundError(2, 'No such folder to write to', str(path.parent))
