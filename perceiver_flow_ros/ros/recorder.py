# SPDX-License-Identifier: Apache-2.0
"""
A subscriber for demonstrations: keeps what a camera and the flow node publish.

`python -m perceiver_flow_ros.ros.recorder FILE`

It listens to the node's outputs first, and to `image` and `camera_info` only once the node's
publishers are there: a camera that waits for its subscribers then starts when all are connected.
Messages are kept serialised, as pickled (topic, type, nanoseconds of arrival, bytes). The stamp of
every flow whose `flow`, `flow/previous` and `flow/color` have come is printed, and so is, after
"error: ", what the diagnostics call an error, unless it concerns the odometry alone.
"""

from __future__ import annotations

from collections import Counter
import pickle
import struct
import sys
import time
from typing import BinaryIO

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import TwistWithCovarianceStamped
from nav_msgs.msg import Odometry
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CameraInfo, Image, TimeReference

OUTPUTS = {'flow': Image, 'flow/previous': TimeReference, 'flow/color': Image}
MORE = {'twist': TwistWithCovarianceStamped, 'odometry': Odometry}  # not of every flow
INPUTS = {'image': Image, 'camera_info': CameraInfo}
STAMP = struct.Struct('<iI')  # header.stamp, behind the 4 bytes that tell the encoding


class Recorder(Node):
    """Writes every message of the topics above, and of /diagnostics, to a file."""

    def __init__(self, file: BinaryIO):
        super().__init__('recorder')
        self._file = file
        self._parts: Counter[int] = Counter()  # outputs that have come, by stamp
        for name, kind in OUTPUTS.items():
            self._subscribe(kind, name, self._count)
        for name, kind in MORE.items():
            self._subscribe(kind, name)
        self._subscribe(DiagnosticArray, '/diagnostics', self._complain)
        self._waiting = self.create_timer(0.05, self._listen_to_camera)

    def _listen_to_camera(self) -> None:
        if all(self.count_publishers(self.resolve_topic_name(name)) for name in OUTPUTS):
            self.destroy_timer(self._waiting)
            for name, kind in INPUTS.items():
                self._subscribe(kind, name)

    def _subscribe(self, kind: type, name: str, further=None) -> None:
        topic = self.resolve_topic_name(name)
        type_name = f'{kind.__module__.split(".")[0]}/msg/{kind.__name__}'

        def keep(data: bytes) -> None:
            pickle.dump((topic, type_name, time.time_ns(), data), self._file)
            if further is not None:
                further(data)

        self.create_subscription(kind, name, keep, QoSProfile(depth=50), raw=True)

    def _count(self, data: bytes) -> None:
        seconds, nanoseconds = STAMP.unpack_from(data, 4)
        stamp = seconds * 10**9 + nanoseconds
        self._parts[stamp] += 1
        if self._parts[stamp] == len(OUTPUTS):
            print(stamp, flush=True)

    def _complain(self, data: bytes) -> None:
        for status in deserialize_message(data, DiagnosticArray).status:
            if status.level == DiagnosticStatus.ERROR and not status.name.endswith('odometry'):
                print(f'error: {status.message}', flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Record until told to end."""
    (path,) = rclpy.utilities.remove_ros_args(arguments)[1:]
    rclpy.init(args=arguments)
    with open(path, 'wb') as file:
        recorder = Recorder(file)
        executor = SingleThreadedExecutor()
        executor.add_node(recorder)
        try:
            executor.spin()
        except (KeyboardInterrupt, ExternalShutdownException):
            pass
        recorder.destroy_node()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
