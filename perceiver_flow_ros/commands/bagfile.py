# SPDX-License-Identifier: Apache-2.0
"""Writing ROS 2 bags without ROS (through `rosbags`): a bag appears whole or not at all."""

from __future__ import annotations

from contextlib import closing
import errno
import os
from pathlib import Path
import shutil
import sqlite3
import sys
from typing import Final

import numpy as np
from rosbags.interfaces import Connection
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import get_typestore, Stores

SUFFIXES = {'mcap': '.mcap', 'sqlite3': '.db3'}
MCAP_START, SQLITE_START = b'\x89MCAP0\r\n', b'SQLite format 3\0'
METADATA_VERSION: Final = 8  # what every ROS 2 since Iron reads
TYPES = get_typestore(Stores.ROS2_KILTED)


class BagWriter:
    """
    Context manager that writes a bag beside its place and moves it there at the end.

    Parameters
    ----------
    path : the bag. ``NAME.mcap`` and ``NAME.db3`` are single files; any other name is a folder as
        `ros2 bag record` makes it, with its ``metadata.yaml``.
    storage : 'mcap' or 'sqlite3'; None follows the suffix, and is mcap for a folder.
    force : replace a bag that is there already; nothing but a bag is ever replaced.

    Raises
    ------
    ValueError
        When storage and suffix disagree, or the path holds something else.
    FileExistsError
        When a bag is there and `force` is not given.

    """

    def __init__(
        self, path: str | Path, *, storage: str | None = None, force: bool = False
    ) -> None:
        self.path = Path(path)
        by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}.get(self.path.suffix)
        self.single_file = by_suffix is not None
        self.storage = storage or by_suffix or 'mcap'
        if self.storage not in SUFFIXES:
            raise ValueError(
                f'bag storage {storage!r} is unknown; expected {" or ".join(SUFFIXES)}'
            )
        if by_suffix and self.storage != by_suffix:
            raise ValueError(
                f'{path}: {self.path.suffix} is {by_suffix}, but storage {storage!r} is asked for'
            )
        if not self.path.resolve().parent.is_dir():
            raise FileNotFoundError(2, 'No such folder to write the bag to', str(self.path.parent))
        if os.path.lexists(self.path):
            if not self._is_bag():
                raise ValueError(f'{path}: is there already and is not a bag; choose another name')
            if not force:
                raise FileExistsError(
                    17, 'Bag exists already; give --force to replace it', str(path)
                )
        self._partial = self.path.with_name(f'.{self.path.name}.{os.getpid()}.partial')

    def __enter__(self) -> BagWriter:
        """Begin to write."""
        shutil.rmtree(self._partial, ignore_errors=True)
        # The file inside a bag bears the bag's name, so that one is made under its final name.
        bag = self._partial / (self.path.stem if self.single_file else self.path.name)
        plugin = StoragePlugin[self.storage.upper()]
        self._connections: dict[str, Connection] = {}
        try:
            self._writer = Writer(bag, version=METADATA_VERSION, storage_plugin=plugin)
            self._writer.open()
        except BaseException:  # a signal, too: `__exit__` is not called then
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        return self

    def write(self, topic: str, msgtype: str, message: object, stamp: int) -> None:
        """Add a message, a `rosbags` one or its CDR bytes, that came at `stamp` nanoseconds."""
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, msgtype, typestore=TYPES)
        data = (
            message
            if isinstance(message, (bytes, memoryview))
            else TYPES.serialize_cdr(message, msgtype)
        )
        try:
            self._writer.write(self._connections[topic], stamp, data)
        except (OSError, sqlite3.Error) as error:
            raise self._unwritten(error) from error

    def __exit__(self, kind, error, traceback) -> None:
        """Move the whole bag to its place, or clear away what there is of it."""
        try:
            if kind is not None:
                self._writer.abort()
                return
            self._writer.close()
            bag = self._writer.path
            self._install(bag / (bag.name + SUFFIXES[self.storage]) if self.single_file else bag)
        except (OSError, sqlite3.Error) as failure:
            if kind is None:  # else what went wrong first is told
                raise self._unwritten(failure) from failure
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _unwritten(self, error: Exception) -> OSError:
        """Name the bag: neither a full disk nor SQLite does."""
        number = getattr(error, 'errno', None) or errno.EIO
        text = getattr(error, 'strerror', None) or f'{error} (is the disk full?)'
        return OSError(number, text, str(self.path))

    def _install(self, bag: Path) -> None:
        replaced = self._partial / '.replaced'
        if self.path.is_dir():  # a bag: __init__ has looked
            self.path.rename(replaced)
        try:
            os.replace(bag, self.path)
        except OSError:
            if replaced.exists():
                replaced.rename(self.path)
            raise

    def _is_bag(self) -> bool:
        if self.path.is_dir():
            others = [file for file in self.path.iterdir() if file.name != 'metadata.yaml']
            return (self.path / 'metadata.yaml').is_file() and all(
                file.suffix == '.zstd' or holds_messages(file) for file in others
            )
        return self.single_file and holds_messages(self.path)


def holds_messages(path: Path) -> bool:
    """Tell by its contents whether a file is an MCAP or a database of rosbag2."""
    if not path.is_file():
        return False
    with open(path, 'rb') as file:
        start = file.read(len(SQLITE_START))
    if start != SQLITE_START:
        return start.startswith(MCAP_START)
    address = f'{path.absolute().as_uri()}?mode=ro&immutable=1'  # makes no files beside it
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            return bool(database.execute("PRAGMA table_info('topics')").fetchall())
    except sqlite3.Error:
        return False


def header_message(stamp: int, frame_id: str):
    """Make a std_msgs/Header; `stamp` in nanoseconds."""
    time = TYPES.types['builtin_interfaces/msg/Time'](sec=stamp // 10**9, nanosec=stamp % 10**9)
    return TYPES.types['std_msgs/msg/Header'](stamp=time, frame_id=frame_id)


def image_message(image: np.ndarray, encoding: str, header):
    """Make a sensor_msgs/Image of (H, W) or (H, W, C) in the byte order of this machine."""
    height, width = image.shape[:2]
    return TYPES.types['sensor_msgs/msg/Image'](
        header=header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(sys.byteorder == 'big'),
        step=image.nbytes // height,
        data=np.ascontiguousarray(image).reshape(-1).view(np.uint8),
    )


def camera_info_message(width: int, height: int, model: str, d: list, k: list, r: list, p: list):
    """Make a sensor_msgs/CameraInfo, its header still empty."""
    roi = TYPES.types['sensor_msgs/msg/RegionOfInterest'](0, 0, 0, 0, False)
    return TYPES.types['sensor_msgs/msg/CameraInfo'](
        header=header_message(0, ''),
        height=height,
        width=width,
        distortion_model=model,
        d=np.array(d, np.float64),
        k=np.array(k, np.float64),
        r=np.array(r, np.float64),
        p=np.array(p, np.float64),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )
