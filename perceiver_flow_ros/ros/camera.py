# SPDX-License-Identifier: Apache-2.0
"""
A camera for demonstrations: publishes stored images at a fixed rate, stamped as they leave.

`python -m perceiver_flow_ros.ros.camera IMAGES.npy CAMERA_INFO.bin --rate 10 --subscribers 2`

The messages are stored serialised (CDR) and only their stamps are filled in, so that publishing
costs next to nothing. Topics: `image`, `camera_info`. At the end the stamps are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import struct
import sys

import numpy as np
import rclpy
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, Image

STAMP = struct.Struct('<iI')  # header.stamp, behind the 4 bytes that tell the encoding
STAMP_OFFSET = 4


class Camera(Node):
    """
    Publishes one image and one camera_info a period, from when enough subscribers listen.

    Parameters
    ----------
    images : (N, L) uint8, serialised sensor_msgs/Image, one a row.
    camera_info : serialised sensor_msgs/CameraInfo.
    rate : Hz.
    subscribers : of either topic, to wait for.
    count : of images in all; they begin again where there are fewer. 0: each once.

    """

    def __init__(
        self, images: np.ndarray, camera_info: bytes, rate: float, subscribers: int, count: int = 0
    ):
        super().__init__('camera')
        self.done: Future[list[int]] = Future()
        self.stamps: list[int] = []
        self._images, self._info, self._subscribers = images, bytearray(camera_info), subscribers
        self._count = count or len(images)
        self._image_publisher = self.create_publisher(Image, 'image', 10)
        self._info_publisher = self.create_publisher(CameraInfo, 'camera_info', 10)
        self.create_timer(1 / rate, self._tick)

    def _tick(self) -> None:
        publishers = self._image_publisher, self._info_publisher
        if not self.stamps:
            if min(p.get_subscription_count() for p in publishers) < self._subscribers:
                return
        if len(self.stamps) == self._count:
            if not self.done.done():
                for publisher in publishers:
                    publisher.wait_for_all_acked(Duration(seconds=2.0))
                self.done.set_result(self.stamps)
            return
        image = bytearray(self._images[len(self.stamps) % len(self._images)])
        now = self.get_clock().now().nanoseconds
        for publisher, message in zip(publishers, (image, self._info)):
            STAMP.pack_into(message, STAMP_OFFSET, *divmod(now, 10**9))
            publisher.publish(bytes(message))
        self.stamps.append(now)


def main(arguments: list[str] | None = None) -> int:
    """Publish all images once; 0 when done, 1 when stopped before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument('images', type=Path)
    parser.add_argument('camera_info', type=Path)
    parser.add_argument('--rate', type=float, default=10.0)
    parser.add_argument('--subscribers', type=int, default=1)
    parser.add_argument('--count', type=int, default=0)
    args = parser.parse_args(rclpy.utilities.remove_ros_args(arguments)[1:])
    rclpy.init(args=arguments)
    images = np.load(args.images, mmap_mode='r')
    info = args.camera_info.read_bytes()
    camera = Camera(images, info, args.rate, args.subscribers, args.count)
    executor = SingleThreadedExecutor()
    executor.add_node(camera)
    try:
        executor.spin_until_future_complete(camera.done)
        print(json.dumps(camera.stamps), flush=True)
        return 0 if camera.done.done() else 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 1
    finally:
        camera.destroy_node()
        rclpy.try_shutdown()


if __name__ == '__main__':
    sys.exit(main(sys.argv))
