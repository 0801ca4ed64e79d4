# SPDX-License-Identifier: Apache-2.0
"""
What a soak run listens with: how late each flow comes, and what the node says of itself.

`python -m perceiver_flow_ros.ros.meter`

With every message on /diagnostics it prints a line of JSON: `latency`, the milliseconds from the
stamp of an image to the arrival of its flow, of the flows since the last line; `first`, the time
of the first flow's arrival (Unix time, null before); `values` and `messages`, what the statuses of
the node hold, by the second half of their names.
"""

from __future__ import annotations

import json
import struct
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image

STAMP = struct.Struct('<iI')  # header.stamp, behind the 4 bytes that tell the encoding


class Meter(Node):
    """Subscribes to `flow` and /diagnostics."""

    def __init__(self) -> None:
        super().__init__('meter')
        self._latency: list[float] = []
        self._first: float | None = None
        self.create_subscription(Image, 'flow', self._arrived, QoSProfile(depth=5), raw=True)
        self.create_subscription(DiagnosticArray, '/diagnostics', self._report, 10)

    def _arrived(self, data: bytes) -> None:
        seconds, nanoseconds = STAMP.unpack_from(data, 4)
        now = time.time_ns()
        self._first = self._first or now / 1e9
        self._latency.append((now - seconds * 10**9 - nanoseconds) / 1e6)

    def _report(self, message: DiagnosticArray) -> None:
        names = [status.name.split(': ')[-1] for status in message.status]
        line = {
            'latency': [round(late, 3) for late in self._latency],
            'first': self._first,
            'messages': {n: s.message for n, s in zip(names, message.status)},
            'values': {n: {v.key: v.value for v in s.values}
                       for n, s in zip(names, message.status)},
        }  # fmt: skip
        self._latency = []
        print(json.dumps(line), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print what comes until told to end."""
    rclpy.init(args=arguments)
    meter = Meter()
    executor = SingleThreadedExecutor()
    executor.add_node(meter)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    meter.destroy_node()
    rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
