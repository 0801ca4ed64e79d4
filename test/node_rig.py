# SPDX-License-Identifier: Apache-2.0
"""A FlowNode and a peer that feeds and reads it over real topics, in one process."""

from __future__ import annotations

import array
import os
import time

from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from rcl_interfaces.srv import SetParametersAtomically
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, Image, TimeReference

from perceiver_flow_ros.flow.estimator import load_estimator
from perceiver_flow_ros.ros.node import FlowNode

# One domain per pytest-xdist worker; what runs in one worker runs in turn.
DOMAIN = 40 + int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:]) % 20
TIMEOUT = 20.0  # s, for what takes milliseconds
OUTPUTS = {'flow': Image, 'flow/previous': TimeReference, 'flow/color': Image}


def texture(height=120, width=160, seed=0):
    """Blurred noise, (height, width, 3) uint8: something to follow."""
    noise = np.random.default_rng(seed).random((height // 4 + 1, width // 4 + 1, 3))
    fine = noise.repeat(4, 0).repeat(4, 1)[:height, :width]
    for axis in (0, 1):
        fine = (fine + np.roll(fine, 1, axis) + np.roll(fine, 2, axis)) / 3
    return (fine * 255).astype(np.uint8)


def picture(shift=0, height=96, width=128):
    """A texture that has moved `shift` pixels to the right."""
    return texture(height, width + 64)[:, 32 - shift : 32 - shift + width]


def image_message(pixels, stamp, encoding='rgb8', **fields):
    """An image message, field by field: not made by what is tested."""
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.step = pixels[0].nbytes
    message.data = array.array('B', pixels.tobytes())
    message.header.frame_id = 'camera'
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(stamp * 1e9), 10**9)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def seconds(stamp):
    return stamp.sec + stamp.nanosec / 1e9


def flow_of(message):
    """(H, W, 2) float32 of a 32FC2 message."""
    assert message.encoding == '32FC2' and message.step == message.width * 8
    assert not message.is_bigendian and len(message.data) == message.step * message.height
    return np.frombuffer(message.data, '<f4').reshape(message.height, message.width, 2)


class Estimator:
    """A stand-in that returns a flow of (1, 2) and remembers what it was asked."""

    name, device, precision, query_stride = 'stand-in', 'cpu', 'float32', 1

    def __init__(self):
        self.pairs = []
        self.before = lambda: None  # runs in every call

    def __call__(self, previous, current):
        if previous.any() or current.any():  # not the warm-up
            self.pairs.append((previous, current))
            self.before()
        return np.full((*previous.shape[:2], 2), (1, 2), np.float32)


class Rig:
    """The node under test, a peer, and the executor that runs both."""

    def __init__(self, loader=load_estimator, start=True, arguments=(), **parameters):
        parameters = {'diagnostics_period': 0.05, **parameters}
        self.context = Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        try:
            self.node = FlowNode(
                loader=loader,
                context=self.context,
                cli_args=['--ros-args', *arguments] if arguments else None,
                parameter_overrides=[Parameter(k, value=v) for k, v in parameters.items()],
            )
        except Exception:
            rclpy.shutdown(context=self.context)
            raise
        self.peer = Node('peer', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.executor.add_node(self.peer)
        self.received = {name: [] for name in OUTPUTS}
        self.statuses = {}
        self.peer.create_subscription(DiagnosticArray, '/diagnostics', self._report, 10)
        self.camera = self.info = None
        if start:
            self.node.trigger_configure()
            self.node.trigger_activate()

    def _report(self, message):
        for status in message.status:
            status.values = {pair.key: pair.value for pair in status.values}
            self.statuses[status.name.split(': ')[1]] = status

    def until(self, condition, what=''):
        """Spin until a condition holds."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, f'waited {TIMEOUT} s in vain {what}: {self.said()}'
            self.executor.spin_once(timeout_sec=0.05)

    def said(self):
        return {name: status.message for name, status in self.statuses.items()}

    def connect(self, outputs=('flow', 'flow/previous'), qos=10):
        """Publish images, then subscribe to outputs; return when all of it is matched."""
        self.camera = self.peer.create_publisher(Image, self.node.image_topic, qos)
        # Nobody subscribes to the outputs yet: not even looked at.
        self.publish(Image(width=1, height=1))
        self.settle()
        name = self.node.get_name()
        for output in outputs:
            self.peer.create_subscription(
                OUTPUTS[output],
                f'/{name}/{output}',
                self.received[output].append,
                QoSProfile(depth=50),
            )
        publishers = {p.topic_name: p for p in self.node.publishers}
        for output in outputs:
            matched = publishers[f'/{name}/{output}'].get_subscription_count
            self.until(lambda: matched() > 0, f'for {output} to be matched')  # noqa: B023
        return self

    def settle(self):
        """Wait until every image sent has been taken off the queue and worked on."""
        c = self.node.worker.counts
        self.until(lambda: c.received == c.processed + c.dropped, 'for the worker to be idle')

    def send(self, pixels, stamp, **fields):
        """Publish an image and wait until the node is done with it."""
        self.publish(image_message(pixels, stamp, **fields))
        self.settle()

    def publish(self, message):
        """Publish an image and wait until the node has it; once more where it got lost."""
        received = self.node.worker.counts.received
        for _ in range(10):
            self.camera.publish(message)
            end = time.monotonic() + TIMEOUT / 10
            while time.monotonic() < end:
                self.executor.spin_once(timeout_sec=0.05)
                if self.node.worker.counts.received > received:
                    return
        raise AssertionError(f'an image does not arrive: {self.said()}')

    def flows(self, count):
        """Wait for so many flows in all; return the stamps (previous, current) of each."""
        flow, previous = self.received['flow'], self.received['flow/previous']
        self.until(lambda: min(len(flow), len(previous)) >= count, f'for {count} flows')
        assert len(flow) == len(previous) == count
        assert [m.header for m in flow] == [m.header for m in previous]
        return [(seconds(m.time_ref), seconds(m.header.stamp)) for m in previous]

    def status(self, name, text):
        """Wait until a status says a text; return the status."""
        self.until(lambda: name in self.statuses and text in self.statuses[name].message, text)
        return self.statuses[name]

    def describe(self, width, height, focal=100.0, **fields):
        """Publish a camera_info until the node reports it."""
        self.info = self.info or self.peer.create_publisher(
            CameraInfo, self.node.camera_info_topic, 10
        )
        message = CameraInfo(width=width, height=height, **fields)
        message.k[0] = focal
        self.info.publish(message)

    def call(self, service, name, request):
        """Call one of the node's services."""
        client = self.peer.create_client(service, f'/{self.node.get_name()}/{name}')
        self.until(client.service_is_ready)
        future = client.call_async(request)
        self.until(future.done)
        return future.result()

    def set(self, **parameters):
        """Set parameters at once, as `ros2 param set` does; return why it was refused, or ''."""
        request = SetParametersAtomically.Request()
        request.parameters = [
            Parameter(k, value=v).to_parameter_msg() for k, v in parameters.items()
        ]
        result = self.call(SetParametersAtomically, 'set_parameters_atomically', request).result
        return '' if result.successful else result.reason

    def close(self):
        self.executor.shutdown()
        assert self.node.close()
        self.peer.destroy_node()
        rclpy.shutdown(context=self.context)
