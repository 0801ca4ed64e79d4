# SPDX-License-Identifier: Apache-2.0
"""Flow and motion of every image of a bag, offline: what the node would publish, without ROS."""

from __future__ import annotations

import argparse
from collections import Counter, deque
from collections.abc import Iterator
import json
from pathlib import Path
import sys
from typing import Any

HELP = 'compute the flow and motion of every image of a bag, offline'
EXAMPLE = (
    'perceiver_flow bag drive.mcap flow.mcap --params-file mine.yaml '
    '--tum drive.tum'
)
AHEAD = 0.5  # s of the bag that are read ahead of an image: depth and imu may be stored after it
NODE = '/perceiver_flow'
KINDS = {'image': 'Image', 'camera_info': 'CameraInfo', 'depth': 'Image', 'range': 'Range',
         'imu': 'Imu'}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('source', type=Path, metavar='IN', help='a ROS 2 bag (mcap, sqlite3)')
    parser.add_argument(
        'output', type=Path, metavar='OUT', help='NAME.mcap, NAME.db3 or a bag folder'
    )
    parser.add_argument('--image-topic', metavar='TOPIC', help='default: the only image topic')
    parser.add_argument(
        '--camera-info-topic', metavar='TOPIC', help='default: camera_info beside the image topic'
    )
    for name, kind in (('depth', 'Image'), ('range', 'Range'), ('imu', 'Imu')):
        parser.add_argument(
            f'--{name}-topic', metavar='TOPIC', help=f'sensor_msgs/{kind}, where it is made use of'
        )
    parser.add_argument(
        '--params-file', type=Path, metavar='YAML', help="the node's own (default: its defaults)"
    )
    for name in ('model', 'device'):
        parser.add_argument(f'--{name}', help='instead of what the parameters say')
    parser.add_argument(
        '--topics',
        nargs='+',
        metavar='NAME',
        help='write only these: flow flow/previous flow/color twist odometry focus_of_expansion '
        'time_to_contact confidence (default: all; confidence where forward_backward is set)',
    )
    parser.add_argument(
        '--tum', type=Path, metavar='FILE', help='write the trajectory: t x y z qx qy qz qw'
    )
    parser.add_argument('--force', action='store_true', help='replace files that are there')
    parser.add_argument('--json', action='store_true', help='print the figures as JSON')


def run(args: argparse.Namespace) -> int:
    """Read the bag once, write another one, say what is in it."""
    from perceiver_flow_ros.commands._bag_pairs import Results
    from perceiver_flow_ros.commands.bagfile import BagWriter
    from perceiver_flow_ros.ros.parameter_file import read_yaml
    from perceiver_flow_ros.ros.parameters import defaults
    from tqdm import tqdm

    settings = read_yaml(args.params_file) if args.params_file else defaults()
    settings = settings.but({k: v for k in ('model', 'device') if (v := getattr(args, k))})
    _ = settings.odometry  # refused here, before anything is read
    check_outputs(args)
    writer = BagWriter(args.output, force=args.force)  # its complaints come before the work
    with open_bag(args.source) as reader:
        topics = choose_topics(args, reader, settings)
        results = Results(settings, args.topics)
        images = [c for c in reader.connections if c.topic == topics['image']]
        progress = tqdm(
            total=sum(c.msgcount for c in images), unit='frame', disable=None, file=sys.stderr
        )
        written: Counter[str] = Counter()
        with writer as bag, progress:
            for event in in_order(reader, topics, results):
                for topic, kind, message in results.of_image(event.message):
                    name = topic if topic.startswith('/') else f'{NODE}/{topic}'
                    bag.write(name, kind, message, event.time)
                    written[topic] += 1
                progress.update()
            if results.frames < 2:
                why = results.why_so_few()
                raise ValueError(
                    f'{args.source}: {results.frames} images on {topics["image"]}; flow needs two'
                    + (f': {why}' if why else '')
                )
            empty = [name for name in args.topics or () if not written[name]]
            if empty and not written:
                raise ValueError(f'{args.source}: nothing to write on {", ".join(empty)}: '
                                 f'{results.why_no_motion() or "see scale_source"}')
    if args.tum:  # after the bag: what goes wrong here costs nothing of it
        results.write_tum(args.tum)
    report = {'bag': str(args.output), 'topics': topics, 'empty': empty, **results.summary()}
    if args.tum:
        report['tum'] = str(args.tum)
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that would replace what must stay, or each other, before anything is read."""
    source, output = args.source.resolve(), args.output.resolve()
    if source == output:
        raise ValueError(f'{args.output}: input and output are the same bag')
    if source in output.parents:
        raise ValueError(f'{args.output} is inside the input: choose another place')
    if args.tum is None:
        return
    tum = args.tum.resolve()
    if tum in (source, output) or {source, output} & {*tum.parents}:
        raise ValueError(f'--tum {args.tum} is, or is inside, the input or the output: choose '
                         'another place')
    if args.tum.exists() and not args.force:
        raise FileExistsError(17, 'The file exists already; give --force to replace it', args.tum)
    if not tum.parent.is_dir():
        raise FileNotFoundError(2, 'No such folder to write the trajectory to', args.tum.parent)


def describe(report: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    lines = [
        f'{report["bag"]}: {report["flows"]} flows of {report["frames"]} images by '
        f'{report["model"]} on {report["device"]}'
    ]
    lines.append(
        f'motion of {report["motions"]} of {report["flows"]} pairs, scale source '
        f'{report["scale_source"]}'
    )
    if report['distance_m'] is not None:
        lines.append(f'{report["distance_m"]:.2f} m travelled in {report["seconds"]:.2f} s')
    for why, count in report['without_motion'].items():
        text = report['explained'][why]
        lines.append(f'  {count} x {why}' + (f': {text}' if text else ''))
    lines += [f'  {count} x {why}' for why, count in report['no_pair'].items()]
    lines += [f'  {count} x {why}' for why, count in report['remarks'].items()]
    if report['empty']:
        lines.append(f'nothing on {", ".join(report["empty"])}')
    if 'tum' in report:
        held = '' if report['distance_m'] else ' that stay in place'
        if report['distance_m'] is None:
            held += ': without a scale_source only the rotations count'
        lines.append(f'{report["tum"]}: trajectory of {report["frames"]} frames{held}')
    return '\n'.join(lines)


def open_bag(path: Path) -> Any:
    """Make a reader of a bag; ValueError where it is none."""
    from perceiver_flow_ros.commands.bagfile import TYPES
    from rosbags.highlevel import AnyReader, AnyReaderError

    if not path.exists():
        raise FileNotFoundError(2, 'No such bag', str(path))
    if path.suffix == '.bag':
        raise ValueError(f'{path}: a bag of ROS 1; make a ROS 2 bag of it: rosbags-convert '
                         f'--src {path} --dst {path.with_suffix("")}')

    class Reader(AnyReader):

        def __enter__(self) -> Any:
            try:
                return super().__enter__()
            except Exception as error:  # the storages raise whatever they meet
                raise ValueError(f'{path}: not a bag that can be read: {error}') from None

        def messages(self, *given: Any, **more: Any) -> Any:
            try:
                yield from super().messages(*given, **more)
            except Exception as error:
                raise ValueError(f'{path}: the bag is damaged: {error}') from None

        def deserialize(self, data: Any, kind: str) -> Any:
            try:
                return super().deserialize(data, kind)
            except Exception as error:
                raise ValueError(f'{path}: a {kind} in it is damaged: {error}') from None

    try:
        return Reader([path], default_typestore=TYPES)
    except AnyReaderError as error:
        raise ValueError(f'{path}: not a bag that can be read: {error}') from None


def choose_topics(args: argparse.Namespace, reader: Any, settings: Any) -> dict[str, str]:
    """Find the topic of every input; what is needed and not there is a ValueError."""
    from perceiver_flow_ros.commands._demo_frames import choose_topic

    types = {c.topic: c.msgtype for c in reader.connections}
    cameras = {topic: kind for topic, kind in types.items() if topic != args.depth_topic}
    image = choose_topic(args.source, cameras, args.image_topic)
    topics = {'image': image}
    beside = image.removesuffix('/compressed').rpartition('/')[0] + '/camera_info'
    if args.camera_info_topic or beside in types:
        topics['camera_info'] = args.camera_info_topic or beside
    used = {'depth': settings.scale_source == 'depth', 'range': settings.scale_source == 'range',
            'imu': settings.gyro != 'ignore'}  # fmt: skip
    for name, is_used in used.items():
        topic = getattr(args, f'{name}_topic')
        if topic and not is_used:
            key = 'gyro' if name == 'imu' else 'scale_source'
            raise ValueError(f'--{name}-topic is given, but {key} is {getattr(settings, key)}')
        if topic:
            topics[name] = topic
        elif is_used and name != 'imu':
            raise ValueError(f'scale_source is {name}: give --{name}-topic')
    for name, topic in topics.items():
        kind = f'sensor_msgs/msg/{KINDS[name]}'
        found = types.get(topic)
        if found != kind and not (name == 'image' and found):
            there = ', '.join(sorted(t for t, k in types.items() if k == kind)) or 'none'
            raise ValueError(
                f'{args.source}: {topic} is no {kind} topic of it; these are: {there}'
            )
    return topics


class Event:
    """An image of the bag, and when it was stored (nanoseconds)."""

    def __init__(self, time: int, message: Any) -> None:
        self.time, self.message = time, message


def in_order(reader: Any, topics: dict[str, str], results: Any) -> Iterator[Event]:
    """Give the images one by one, once what belongs to them has been told to `results`."""
    from perceiver_flow_ros.ros.frames import nanoseconds
    from perceiver_flow_ros.ros.stamped import REWIND

    names = {topic: name for name, topic in topics.items()}
    connections = [c for c in reader.connections if c.topic in names or is_tf(c)]
    waiting: deque[Event] = deque()
    newest: dict[str, int] = {}
    for connection, time, data in reader.messages(connections):
        message = reader.deserialize(data, connection.msgtype)
        while waiting and time - waiting[0].time > AHEAD * 1e9:
            yield waiting.popleft()
        name = names.get(connection.topic, 'tf')
        if name != 'tf':
            stamp = nanoseconds(message.header.stamp)
            end = stamp + REWIND * 1e9
            if newest.get(name, stamp) > end:  # it makes `results` forget what was before
                while waiting and nanoseconds(waiting[0].message.header.stamp) > end:
                    yield waiting.popleft()
            newest[name] = stamp
        if name == 'image':
            waiting.append(Event(time, message))
        else:
            results.take(name, message)
    yield from waiting


def is_tf(connection: Any) -> bool:
    """Tell the topics of transforms."""
    return connection.topic in ('/tf', '/tf_static') and 'TFMessage' in connection.msgtype
