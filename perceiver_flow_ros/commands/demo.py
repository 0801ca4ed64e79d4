# SPDX-License-Identifier: Apache-2.0
"""Camera, flow node and subscriber as real processes: a table, pictures and a bag of what came."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
import sys

HELP = 'run camera, node and subscriber on a rendered drive or your own frames'
EXAMPLE = 'perceiver_flow demo --output demo --frames 60'

NO_ROS = (
    'the demo needs ROS 2, and there is no rclpy in this Python. In a checkout, `./run demo` '
    'installs what it needs; on a robot, source ROS 2 first (. /opt/ros/DISTRO/setup.bash)'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        default=Path('perceiver_flow_demo'),
        metavar='DIR',
        help='where pictures and bag go (default: %(default)s)',
    )
    parser.add_argument(
        '--frames', type=int, default=60, metavar='N', help='at most; default: %(default)s'
    )
    parser.add_argument(
        '--rate', type=float, default=10.0, metavar='HZ', help="the camera's; default: %(default)g"
    )
    source = parser.add_argument_group(
        'frames', 'default: a rendered drive, whose flow is known exactly'
    ).add_mutually_exclusive_group()
    source.add_argument('--bag', type=Path, help='the images of a ROS 2 bag (mcap, sqlite3)')
    source.add_argument('--video', type=Path, metavar='FILE', help='the frames of a video')
    source.add_argument(
        '--images',
        type=Path,
        metavar='DIR',
        help='images in the order of their names (or DIR/*.jpg)',
    )
    parser.add_argument(
        '--image-topic', metavar='TOPIC', help='of the bag (default: its only image topic)'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the rendered street (default: 0)')
    node = parser.add_argument_group('node')
    node.add_argument(
        '--model', default='lite', metavar='lite|official|dis|PATH|HF_ID', help='default: lite'
    )
    node.add_argument(
        '--device', default='auto', metavar='auto|cpu|cuda[:N]', help='default: auto'
    )
    node.add_argument(
        '--quality',
        default='auto',
        choices=('auto', 'fast', 'balanced', 'best'),
        help='speed against accuracy of lite and dis',
    )
    node.add_argument(
        '--domain-id',
        type=int,
        metavar='N',
        help='ROS_DOMAIN_ID, to look on with your own tools (default: one of 80 to 99)',
    )
    node.add_argument(
        '--timeout',
        type=float,
        default=120.0,
        metavar='SECONDS',
        help='longest wait for the first flow, model loading included (default: %(default)g)',
    )
    parser.add_argument('--json', action='store_true', help='print the figures as JSON')


def run(args: argparse.Namespace) -> int:
    """Run the demo: 0 when flows came, 1 when none did."""
    check(args)
    from perceiver_flow_ros.commands import _demo_motion as motion
    from perceiver_flow_ros.commands import _demo_report as reports
    from perceiver_flow_ros.commands._demo_frames import Footage
    from perceiver_flow_ros.commands._demo_run import record_flow
    from perceiver_flow_ros.commands._processes import own_domain, RunError, temporary_folder
    from perceiver_flow_ros.flow.files import write_image

    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    footage = Footage(args)
    with temporary_folder() as folder:
        try:
            recording = record_flow(
                footage.store,
                Path(folder),
                rate=args.rate,
                parameters={
                    'model': model, 'device': args.device, 'quality': args.quality,
                    **footage.parameters,
                },
                domain=own_domain() if args.domain_id is None else args.domain_id,
                timeout=args.timeout,
            )
        except RunError as error:
            print(f'perceiver_flow demo: {error}', file=sys.stderr)
            return 1
        args.output.mkdir(parents=True, exist_ok=True)  # now that there is something to put there
        flows = reports.read_flows(recording, footage)
        report = reports.figures(recording, footage, flows, args.rate)
        pictures = reports.pictures(footage, flows, report)
        if footage.views:
            moves = motion.read_motions(recording, footage)
            report |= motion.figures(moves)
            if moves:
                pictures['trajectory'] = motion.trajectory(moves, *reports.headings(report))
        bag = args.output / 'drive.mcap'
        reports.write_bag(recording, bag)
    files = {'bag': bag}
    for name, picture in pictures.items():
        files[name] = args.output / f'{name}.png'
        write_image(files[name], picture)
    report['files'] = {name: str(file) for name, file in files.items()}
    print(json.dumps(report, indent=2) if args.json else reports.table(report))
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is started."""
    if importlib.util.find_spec('rclpy') is None:
        raise ImportError(NO_ROS)
    if not 2 <= args.frames <= 10_000:
        raise ValueError(f'--frames is {args.frames}, expected 2 to 10000')
    if not 0.1 <= args.rate <= 1000:
        raise ValueError(f'--rate is {args.rate:g}, expected 0.1 to 1000 Hz')
    if not 0 < args.timeout <= 86400:
        raise ValueError(f'--timeout is {args.timeout:g}, expected up to 86400 seconds')
    if args.domain_id is not None and not 0 <= args.domain_id <= 232:
        raise ValueError(f'--domain-id is {args.domain_id}, expected 0 to 232')
    if args.image_topic and not args.bag:
        raise ValueError('--image-topic goes with --bag')
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(20, 'The output is not a folder', str(args.output))
    folder = args.images.parent if args.images and '*' in args.images.name else args.images
    for source in (args.bag, args.video, folder):
        if source is not None and not source.exists():
            raise FileNotFoundError(2, 'No such file or folder', str(source))
