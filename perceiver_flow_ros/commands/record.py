# SPDX-License-Identifier: Apache-2.0
"""A folder of images or a video as a ROS 2 bag, as a camera driver would have published it."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HELP = 'turn a folder of images or a video into a bag with image_raw and camera_info'
EXAMPLE = 'perceiver_flow record frames/ -o drive.mcap --fps 10 --calibration camera.yaml'

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
FIRST_STAMP = 1.0  # s; zero means "no stamp" to much of ROS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument(
        'source', type=Path, help='a folder of images (in the order of their names) or a video'
    )
    parser.add_argument(
        '-o',
        '--output',
        type=Path,
        required=True,
        metavar='BAG',
        help='NAME.mcap, NAME.db3 or a bag folder',
    )
    parser.add_argument(
        '--storage', choices=('mcap', 'sqlite3'), help='of a bag folder (default: mcap)'
    )
    parser.add_argument(
        '--pattern', default='*', metavar='GLOB', help="which images of the folder: '*.color.jpg'"
    )
    parser.add_argument(
        '--fps',
        type=float,
        metavar='HZ',
        help="frame rate (default: times.txt beside the images, or the video's)",
    )
    parser.add_argument(
        '--start',
        type=float,
        metavar='SECONDS',
        help='stamp of the first frame (default: that of times.txt, or 1)',
    )
    parser.add_argument(
        '--calibration',
        type=Path,
        metavar='FILE',
        help='camera_info YAML (camera_calibration_parsers) or KITTI calib.txt',
    )
    parser.add_argument(
        '--kitti-camera',
        type=int,
        default=0,
        metavar='N',
        help='which P of a KITTI calib.txt (default: 0)',
    )
    parser.add_argument('--image-topic', default='/camera/image_raw', help='default: %(default)s')
    parser.add_argument(
        '--camera-info-topic',
        help="default: camera_info beside the image topic (image_transport's convention)",
    )
    parser.add_argument('--frame-id', default='camera_optical_frame', help='default: %(default)s')
    parser.add_argument('--force', action='store_true', help='replace a bag that is there already')
    parser.add_argument('--json', action='store_true', help='print what was written as JSON')


def run(args: argparse.Namespace) -> int:
    """Write the bag, say what is in it."""
    from tqdm import tqdm

    from perceiver_flow_ros.commands.bagfile import BagWriter, header_message, image_message

    check_options(args)
    frames, stamps = open_source(args)
    calibration = (
        read_calibration(args.calibration, args.kitti_camera) if args.calibration else None
    )
    info_topic = args.camera_info_topic or args.image_topic.rpartition('/')[0] + '/camera_info'
    bag = BagWriter(args.output, storage=args.storage, force=args.force)

    count, first = 0, None
    with (
        bag,
        tqdm(frames, total=len(stamps), unit='frame', disable=None, file=sys.stderr) as progress,
    ):
        for stamp, (name, image) in zip(stamps, progress):
            encoding = encoding_of(image, name)
            if first is None:
                first = (image.shape, encoding)
                info = camera_info(calibration, width=image.shape[1], height=image.shape[0])
            if (image.shape, encoding) != first:
                raise ValueError(
                    f'{name}: {image.shape[1]}x{image.shape[0]} {encoding}, but the first frame '
                    f'is {first[0][1]}x{first[0][0]} {first[1]}; choose one kind with --pattern'
                )
            header = header_message(stamp, args.frame_id)
            info.header = header
            bag.write(
                args.image_topic,
                'sensor_msgs/msg/Image',
                image_message(image, encoding, header),
                stamp,
            )
            bag.write(info_topic, 'sensor_msgs/msg/CameraInfo', info, stamp)
            count += 1
        if first is None:
            raise ValueError(f'{args.source}: no frame could be read from this video')

    report = {
        'bag': str(args.output),
        'storage': bag.storage,
        'frames': count,
        'size': [first[0][1], first[0][0]],
        'encoding': first[1],
        'seconds': (stamps[count - 1] - stamps[0]) / 1e9,
        'calibrated': calibration is not None,
        'image_topic': args.image_topic,
        'camera_info_topic': info_topic,
    }
    if count < len(stamps):
        print(
            f'{args.source}: only {count} of {len(stamps)} announced frames could be read',
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f'{args.output}: {count} frames of {first[0][1]}x{first[0][0]} {first[1]} over '
            f'{report["seconds"]:.2f} s on {args.image_topic}, '
            f'{"" if calibration else "uncalibrated "}camera_info on {info_topic}'
        )
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that no bag could be made with."""
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f'--fps is {args.fps}, expected a positive number')
    if args.start is not None and not 0 <= args.start < 2**31:
        raise ValueError(f'--start is {args.start}, expected seconds from 0 to {2**31 - 1}')
    for topic in filter(None, (args.image_topic, args.camera_info_topic)):
        if not re.fullmatch(r'(/[A-Za-z_]\w*)+', topic, re.ASCII):
            raise ValueError(f'{topic!r} is not an absolute topic name such as /camera/image_raw')


# Frames and their stamps


def open_source(args: argparse.Namespace) -> tuple[Iterator[tuple[str, np.ndarray]], list[int]]:
    """Give an iterator of (name, image as OpenCV has it) and the stamps in nanoseconds."""
    if args.source.is_dir():
        files = [
            f
            for f in args.source.glob(args.pattern)
            if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
        ]
        files.sort(key=natural)
        if not files:
            raise ValueError(
                f'{args.source}: no images match {args.pattern!r} (of {", ".join(IMAGE_SUFFIXES)})'
            )
        return read_images(files), stamps_of(len(files), args, times=find_times(args, len(files)))
    if not args.source.exists():
        raise FileNotFoundError(2, 'No such folder or video', str(args.source))
    return open_video(args)


def read_images(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Read images one after the other."""
    import cv2

    for file in files:
        image = cv2.imdecode(
            np.frombuffer(file.read_bytes() or b'\0', np.uint8), cv2.IMREAD_UNCHANGED
        )
        if image is None:
            raise ValueError(f'{file}: not a whole image that OpenCV reads')
        if image.ndim == 3 and image.dtype == np.uint16:  # no driver publishes 48-bit colour
            image = (image >> 8).astype(np.uint8)
        yield str(file), image


def open_video(args: argparse.Namespace) -> tuple[Iterator[tuple[str, np.ndarray]], list[int]]:
    """Open a video: its frames and stamps at its own or the given rate."""
    import cv2

    video = cv2.VideoCapture(str(args.source))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if not video.isOpened() or count <= 0:
        raise ValueError(f'{args.source}: neither a folder nor a video that OpenCV reads')
    rate = video.get(cv2.CAP_PROP_FPS)
    if args.fps is None and not 0 < rate < 1000:
        raise ValueError(f'{args.source}: the video does not tell its frame rate; give --fps')

    def frames() -> Iterator[tuple[str, np.ndarray]]:
        while True:
            there, image = video.read()
            if not there:
                video.release()
                return
            yield str(args.source), image

    return frames(), stamps_of(count, args, rate=rate)


def find_times(args: argparse.Namespace, count: int) -> list[float] | None:
    """Read times.txt beside the images or their folder (KITTI), unless a rate is given."""
    if args.fps is not None:
        return None
    for file in (args.source / 'times.txt', args.source.resolve().parent / 'times.txt'):
        if file.is_file():
            try:
                times = [float(word) for word in file.read_text().split()]
            except ValueError as error:
                raise ValueError(f'{file}: {error}; expected a time in seconds a line') from None
            if len(times) != count:
                raise ValueError(
                    f'{file}: {len(times)} times for {count} images; mend it or give --fps'
                )
            if (
                not all(a < b for a, b in zip([-math.inf, *times], [*times, math.inf]))
                or times[0] < 0
            ):
                raise ValueError(f'{file}: the times do not increase from 0 or later')
            return times
    raise ValueError(
        f'{args.source}: no times.txt in it or beside it; give the frame rate with --fps'
    )


def stamps_of(
    count: int,
    args: argparse.Namespace,
    *,
    times: list[float] | None = None,
    rate: float | None = None,
) -> list[int]:
    """Give the stamps in nanoseconds: the times, or evenly spaced ones."""
    if times is None:
        start = FIRST_STAMP if args.start is None else args.start
        times = [start + i / (args.fps or rate) for i in range(count)]
    elif args.start is not None:
        times = [args.start + t - times[0] for t in times]
    return [round(t * 1e9) for t in times]


def natural(path: Path) -> list:
    """Sort frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path.name)]


# Messages


@dataclass
class Calibration:
    """What camera_info says of a camera; `size` (width, height) is None where it is not told."""

    k: list[float]
    p: list[float]
    size: tuple[int, int] | None = None
    model: str = 'plumb_bob'
    d: list[float] = field(default_factory=lambda: [0.0] * 5)
    r: list[float] = field(default_factory=lambda: [1.0, 0, 0, 0, 1, 0, 0, 0, 1])


def read_calibration(path: Path, kitti_camera: int = 0) -> Calibration:
    """Read a camera_info YAML (camera_calibration_parsers) or row PN of a KITTI calib.txt."""
    import yaml

    text = path.read_text(errors='replace')
    try:
        if path.suffix.lower() == '.txt':
            return kitti_calibration(text, kitti_camera)
        content = yaml.safe_load(text)
        return Calibration(
            size=(int(content['image_width']), int(content['image_height'])),
            model=str(content['distortion_model']),
            d=matrix(content, 'distortion_coefficients', None),
            k=matrix(content, 'camera_matrix', 9),
            r=matrix(content, 'rectification_matrix', 9),
            p=matrix(content, 'projection_matrix', 12),
        )
    except KeyError as error:
        raise ValueError(f'{path}: no {error} in this camera_info YAML') from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f'{path}: not a calibration: {error}; expected a camera_info YAML or a KITTI calib.txt'
        ) from None


def kitti_calibration(text: str, camera: int) -> Calibration:
    """Take row N of 12 numbers, labelled "PN:" or not; such images are rectified already."""
    rows = [line.rpartition(':') for line in text.splitlines() if line.strip()]
    numbers = {label.strip() or f'P{i}': row for i, (label, _, row) in enumerate(rows)}
    if f'P{camera}' not in numbers:
        raise ValueError(f'it has no P{camera}')
    p = [float(word) for word in numbers[f'P{camera}'].split()]
    if len(p) != 12:
        raise ValueError(f'P{camera} has {len(p)} numbers, expected 12')
    return Calibration(k=[*p[0:3], *p[4:7], *p[8:11]], p=p)


def matrix(content: dict, name: str, size: int | None) -> list[float]:
    """Read the numbers of a matrix of a camera_info YAML."""
    data = [float(number) for number in content[name]['data']]
    if size is not None and len(data) != size:
        raise ValueError(f'{name} has {len(data)} numbers, expected {size}')
    return data


def encoding_of(image: np.ndarray, name: str) -> str:
    """Name the ROS encoding of an image as OpenCV reads it."""
    channels = 1 if image.ndim == 2 else image.shape[2]
    encodings = {
        ('uint8', 1): 'mono8',
        ('uint16', 1): 'mono16',
        ('uint8', 3): 'bgr8',
        ('uint8', 4): 'bgra8',
    }
    encoding = encodings.get((image.dtype.name, channels))
    if encoding is None:
        raise ValueError(
            f'{name}: {channels} channels of {image.dtype}; expected grey or colour of 8 bits, '
            'or grey of 16'
        )
    return encoding


def camera_info(calibration: Calibration | None, width: int, height: int):
    """Make the sensor_msgs/CameraInfo; without a calibration K is zero, which says so."""
    if calibration and calibration.size not in (None, (width, height)):
        raise ValueError(
            f'the calibration is for {calibration.size[0]}x{calibration.size[1]} images, '
            f'these are {width}x{height}'
        )
    from perceiver_flow_ros.commands.bagfile import camera_info_message

    known = calibration or Calibration(k=[0.0] * 9, p=[0.0] * 12, model='', d=[], r=[0.0] * 9)
    return camera_info_message(width, height, known.model, known.d, known.k, known.r, known.p)
