# SPDX-License-Identifier: Apache-2.0
"""The frames that the demo's camera publishes: a rendered drive, or the user's own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
import itertools
import os
from pathlib import Path
import sys
from typing import Any

import numpy as np
from perceiver_flow_ros.commands.bagfile import (
    camera_info_message,
    header_message,
    image_message,
    TYPES,
)
from perceiver_flow_ros.commands.record import encoding_of, open_source
from perceiver_flow_ros.training import scene
from rosbags.highlevel import AnyReader, AnyReaderError

IMAGE, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
CAMERA_INFO = 'sensor_msgs/msg/CameraInfo'
FRAME_ID = 'camera_optical_frame'
HEIGHT = 1.5  # m of the rendered camera above the road
HEADER = header_message(0, FRAME_ID)  # the camera fills in the stamp


class Footage:
    """
    Frames for the camera, and the truth where it is known.

    Parameters
    ----------
    args : of the demo: frames, rate, seed, and one of bag (image_topic), video, images or none.

    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.views: list[scene.View] = []  # of a rendered drive
        self.parameters: dict[str, Any] = {}  # of the node, for these frames
        self._args = args
        self._images: np.ndarray | None = None
        source = args.bag or args.video or args.images
        self.name = str(source) if source else 'rendered drive'
        if not source:
            self.parameters = {'scale_source': 'camera_height', 'camera_height': HEIGHT}

    def store(self, folder: Path) -> tuple[Path, Path, int]:
        """
        Write what `ros/camera.py` publishes: paths of the images and the camera_info, and a count.

        Raises
        ------
        ValueError
            When there are fewer than two frames, or they are not all alike.

        """
        args = self._args
        if args.bag:
            messages, info = read_bag(args.bag, args.image_topic)
        elif args.video or args.images:
            messages, info = read_files(args.video or args.images, args.rate), None
        else:
            messages, info = self._render()
        messages = itertools.islice(messages, args.frames)
        first = next(messages, None)
        if first is None:
            raise ValueError(f'{self.name}: there is no image in it')
        data = serialize(first)
        paths = folder / 'images.npy', folder / 'camera_info.bin'
        # Grown to its size at the end: how many frames there are is not known before.
        shape = (args.frames, len(data))
        images = np.lib.format.open_memmap(paths[0], 'w+', np.uint8, shape)
        images[0], count = np.frombuffer(data, np.uint8), 1
        for message in messages:
            data = serialize(message)
            if kind(message) != kind(first) or len(data) != shape[1]:
                hint = ' (choose some: --images "DIR/*.jpg")' if args.images else ''
                raise ValueError(
                    f'{self.name}: frame {count + 1} is {kind(message)}, the first is '
                    f'{kind(first)}; the frames must be alike{hint}'
                )
            images[count] = np.frombuffer(data, np.uint8)
            count += 1
        if count < 2:
            raise ValueError(f'{self.name}: a single frame has no flow; at least two are needed')
        if count < args.frames:
            np.save(folder / 'fewer.npy', images[:count])
            os.replace(folder / 'fewer.npy', paths[0])
        self._images = np.load(paths[0], mmap_mode='r')
        if info is None:
            info = camera_info_message(
                first.width, first.height, '', [], [0] * 9, [0] * 9, [0] * 12
            )
        info.header = HEADER
        paths[1].write_bytes(TYPES.serialize_cdr(info, CAMERA_INFO))
        return *paths, count

    def image(self, i: int) -> Any:
        """Give a stored sensor_msgs/Image."""
        assert self._images is not None, 'nothing is stored yet'
        return TYPES.deserialize_cdr(self._images[i].tobytes(), IMAGE)

    def _render(self) -> tuple[Iterator[Any], Any]:
        from tqdm import tqdm

        args, camera = self._args, scene.Camera()
        street = scene.Scene.street(args.seed)

        def render(i: int) -> scene.View:
            time = i / args.rate
            pose = scene.swerve(time, height=HEIGHT)
            return street.render(pose, camera, time, noise=1.0, seed=i)

        def messages() -> Iterator[Any]:
            pool = ThreadPoolExecutor(os.cpu_count())
            try:
                views = pool.map(render, range(args.frames))
                options = {'total': args.frames, 'unit': 'frame', 'disable': None}
                for view in tqdm(views, 'rendering', file=sys.stderr, **options):
                    self.views.append(view)
                    yield image_message(view.image, 'rgb8', HEADER)
            finally:
                pool.shutdown(cancel_futures=True)  # Ctrl-C need not wait for all of them

        k = camera.matrix.ravel().tolist()
        p = np.column_stack([camera.matrix, np.zeros(3)]).ravel().tolist()
        size = camera.width, camera.height
        info = camera_info_message(*size, 'plumb_bob', [0.0] * 5, k, np.eye(3).ravel().tolist(), p)
        return messages(), info


def serialize(message: Any) -> bytes:
    """Serialise a sensor_msgs/Image."""
    return bytes(TYPES.serialize_cdr(message, IMAGE))


def kind(message: Any) -> str:
    """Say what an image is like."""
    return f'{message.width}x{message.height} {message.encoding}'


def read_files(source: Path, rate: float) -> Iterator[Any]:
    """Read images of a folder (or FOLDER/PATTERN), or a video, as messages."""
    folder, pattern = (source.parent, source.name) if is_pattern(source) else (source, '*')
    options = argparse.Namespace(source=folder, pattern=pattern, fps=rate, start=None)
    frames, _ = open_source(options)
    for _, name, image in frames:
        yield image_message(image, encoding_of(image, name), HEADER)


def is_pattern(source: Path) -> bool:
    """Tell whether the images are those of a folder that match a pattern."""
    return '*' in source.name and not source.exists()


def read_bag(bag: Path, image_topic: str | None) -> tuple[Iterator[Any], Any]:
    """
    Read a bag's images, and its camera_info where there is one.

    Raises
    ------
    ValueError
        When it is no bag, or the topic is not clear.

    """
    if not bag.exists():
        raise FileNotFoundError(2, 'No such bag', str(bag))
    try:
        with AnyReader([bag], default_typestore=TYPES) as reader:
            topics = {c.topic: c.msgtype for c in reader.connections}
            image_topic = choose_topic(bag, topics, image_topic)
            name = image_topic.removesuffix('/compressed')
            info_topic = name.rpartition('/')[0] + '/camera_info'
            infos = [c for c in reader.connections if c.topic == info_topic]
            info = None
            if infos and infos[0].msgtype == CAMERA_INFO:
                for connection, _, data in reader.messages(infos):
                    info = reader.deserialize(data, connection.msgtype)
                    break
                if not hasattr(info, 'k'):  # ROS 1 calls it K
                    info = None
    except (AnyReaderError, OSError) as error:
        raise ValueError(f'{bag}: not a bag that can be read: {error}') from None
    return bag_images(bag, image_topic), info


def choose_topic(bag: Path, topics: dict[str, str], wanted: str | None) -> str:
    """Choose the image topic: the one asked for, or the only one, or the only raw camera.

    An image is preferred to its own compressed one; another camera's counts as one more.
    """
    images = [t for t, k in topics.items() if k == IMAGE]
    every = images + [t for t, k in topics.items() if k == COMPRESSED]
    if wanted in every:
        return wanted
    cameras = [t for t in every if t in images or t.rpartition('/')[0] not in images]
    raw = [t for t in cameras if t.endswith('/image_raw') and 'depth' not in t]
    for candidates in (cameras, raw):
        if wanted is None and len(candidates) == 1:
            return candidates[0]
    found = ', '.join(sorted(every)) or 'none'
    if wanted is None:
        raise ValueError(f'{bag}: its image topics: {found}; choose one with --image-topic')
    raise ValueError(f'{bag}: {wanted} is no image topic of it; these are: {found}')


def bag_images(bag: Path, topic: str) -> Iterator[Any]:
    """Read the images of a topic; compressed ones are decoded."""
    from perceiver_flow_ros.ros.compressed import decode
    from perceiver_flow_ros.ros.conversion import BadImage

    with AnyReader([bag], default_typestore=TYPES) as reader:
        connections = [c for c in reader.connections if c.topic == topic]
        for connection, _, data in reader.messages(connections):
            message: Any = reader.deserialize(data, connection.msgtype)
            if connection.msgtype == IMAGE:
                message.header = HEADER
                yield message
                continue
            try:
                image = decode(message)
            except BadImage as error:
                raise ValueError(f'{bag}: an image of {topic}: {error}') from None
            if image.ndim == 3:
                image = np.ascontiguousarray(image[..., ::-1])
            yield image_message(image, 'bgr8' if image.ndim == 3 else 'mono8', HEADER)
