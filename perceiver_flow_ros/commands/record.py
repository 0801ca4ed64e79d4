# SPDX-License-Identifier: Apache-2.0
"""A folder of images or a video as a ROS 2 bag, as a camera driver would have published it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
import json
import math
from pathlib import Path
import re
import sys

import numpy as np

HELP = 'turn a folder of images or a video into a bag with image_raw and camera_info'
EXAMPLE = 'perceiver_flow record frames/ -o drive.mcap --fps 10 --calibration camera.yaml'

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
Frame = tuple[int, str, np.ndarray]
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
        help='camera_info YAML (as camera_calibration writes it; of its matrices '
        'rectification_matrix and projection_matrix may be missing) or KITTI calib.txt',
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
    from perceiver_flow_ros.commands.bagfile import BagWriter, header_message, image_message
    from perceiver_flow_ros.commands.calibration import camera_info, read_calibration
    from tqdm import tqdm

    check_options(args)
    frames, announced = open_source(args)
    calibration = None
    if args.calibration:
        calibration = read_calibration(args.calibration, args.kitti_camera)
    image_topic = args.image_topic
    info_topic = args.camera_info_topic or image_topic.rpartition('/')[0] + '/camera_info'

    stamps, kind = [], None
    total = announced if announced > 0 else None
    with BagWriter(args.output, storage=args.storage, force=args.force) as bag:
        for stamp, name, image in tqdm(
            frames, total=total, unit='frame', disable=None, file=sys.stderr
        ):
            if stamp >= 2**31 * 10**9:
                raise ValueError(f'{name}: its stamp of {stamp / 1e9:.0f} s is beyond what ROS '
                                 'holds; give another --start or --fps')
            height, width = image.shape[:2]
            encoding = encoding_of(image, name)
            if kind is None:
                kind = (width, height, encoding)
                info = camera_info(calibration, width, height)
            if kind != (width, height, encoding):
                raise ValueError(
                    f'{name}: {width}x{height} {encoding}, but the first frame is '
                    f'{kind[0]}x{kind[1]} {kind[2]}; choose one kind with --pattern'
                )
            info.header = header_message(stamp, args.frame_id)
            message = image_message(image, encoding, info.header)
            bag.write(image_topic, 'sensor_msgs/msg/Image', message, stamp)
            bag.write(info_topic, 'sensor_msgs/msg/CameraInfo', info, stamp)
            stamps.append(stamp)

    report = {
        'bag': str(args.output),
        'storage': bag.storage,
        'frames': len(stamps),
        'size': [width, height],
        'encoding': encoding,
        'seconds': (stamps[-1] - stamps[0]) / 1e9,
        'calibrated': calibration is not None,
        'image_topic': image_topic,
        'camera_info_topic': info_topic,
    }
    if len(stamps) < announced:
        print(
            f'{args.source}: only {len(stamps)} of {announced} frames are there', file=sys.stderr
        )
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(
            f'{args.output}: {len(stamps)} frames of {width}x{height} {encoding} over '
            f'{report["seconds"]:.2f} s on {image_topic}, '
            f'{"" if calibration else "uncalibrated "}camera_info on {info_topic}'
        )
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse values that no bag could be made with."""
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f'--fps is {args.fps}, expected a positive number')
    if args.start is not None and not 0 <= args.start < 2**31:
        raise ValueError(f'--start is {args.start}, expected seconds from 0 to {2**31 - 1}')
    if Path(args.pattern).is_absolute():
        raise ValueError(
            f"--pattern is {args.pattern!r}, expected names below the folder such as '*.color.jpg'"
        )
    for topic in filter(None, (args.image_topic, args.camera_info_topic)):
        if not re.fullmatch(r'(/[A-Za-z_]\w*)+', topic, re.ASCII):
            raise ValueError(f'{topic!r} is not an absolute topic name such as /camera/image_raw')


# Frames and their stamps


def open_source(args: argparse.Namespace) -> tuple[Iterator[Frame], int]:
    """Give an iterator of (stamp in nanoseconds, name, image as OpenCV has it) and its length."""
    if args.source.is_dir():
        found = args.source.glob(args.pattern)
        files = sorted((f for f in found if f.suffix.lower() in IMAGE_SUFFIXES), key=natural)
        if not files:
            raise ValueError(
                f'{args.source}: no images match {args.pattern!r} (of {", ".join(IMAGE_SUFFIXES)})'
            )
        if args.fps:
            times = [FIRST_STAMP + i / args.fps for i in range(len(files))]
        else:
            times = read_times(args.source, len(files))
        start = times[0] if args.start is None else args.start
        return read_images(files, [start + t - times[0] for t in times]), len(files)
    if not args.source.exists():
        raise FileNotFoundError(2, 'No such folder or video', str(args.source))
    return open_video(args.source, args.fps, FIRST_STAMP if args.start is None else args.start)


def read_images(files: list[Path], times: list[float]) -> Iterator[Frame]:
    """Read images one after the other."""
    import cv2

    for file, time in zip(files, times):
        data = np.frombuffer(file.read_bytes() or b'\0', np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ValueError(f'{file}: not a whole image that OpenCV reads')
        if image.ndim == 3 and image.dtype == np.uint16:  # no driver publishes 48-bit colour
            image = (image // 256).astype(np.uint8)
        yield round(time * 1e9), str(file), image


def open_video(source: Path, fps: float | None, start: float) -> tuple[Iterator[Frame], int]:
    """Open a video: its frames at its own or the given rate, and how many it announces."""
    import cv2

    video = cv2.VideoCapture(str(source))
    if not video.isOpened():
        raise ValueError(f'{source}: neither a folder nor a video that OpenCV reads')
    rate = fps or video.get(cv2.CAP_PROP_FPS)
    if not fps and not 0 < rate < 1000:
        raise ValueError(f'{source}: the video does not tell its frame rate; give --fps')

    def frames() -> Iterator[Frame]:
        index = 0
        while (frame := video.read())[0]:
            yield round((start + index / rate) * 1e9), f'{source}, frame {index}', frame[1]
            index += 1
        if not index:
            raise ValueError(f'{source}: no frame of this video could be read')

    return frames(), int(video.get(cv2.CAP_PROP_FRAME_COUNT))


def read_times(source: Path, count: int) -> list[float]:
    """Read times.txt in the folder of images or beside it (KITTI): seconds, one per image."""
    for file in (source / 'times.txt', source.resolve().parent / 'times.txt'):
        if file.is_file():
            try:
                times = [float(word) for word in file.read_text().split()]
            except ValueError as error:
                raise ValueError(f'{file}: {error}; expected a time in seconds a line') from None
            if len(times) != count:
                raise ValueError(
                    f'{file}: {len(times)} times for {count} images; mend it or give --fps'
                )
            if not all(a < b < math.inf for a, b in zip([-1e-9, *times], times)):
                raise ValueError(f'{file}: the times do not increase from 0 or later')
            if times[-1] >= 2**31:  # no stamp of ROS holds more
                raise ValueError(
                    f'{file}: ends at {times[-1]:.10g}, expected seconds below {2**31}; divide '
                    'nanoseconds by 1e9 or give --fps'
                )
            return times
    raise ValueError(f'{source}: no times.txt in it or beside it; give the frame rate with --fps')


def natural(path: Path) -> list:
    """Sort frame_2 before frame_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', path.name)]


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
