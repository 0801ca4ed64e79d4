# SPDX-License-Identifier: Apache-2.0
"""A FlowNode and a peer that feeds and reads it over real topics, in one process."""

from __future__ import annotations

import fcntl
from pathlib import Path
import tempfile
import time

from diagnostic_msgs.msg import DiagnosticArray
import numpy as np
from perceiver_flow_ros.flow.estimator import load_estimator
from perceiver_flow_ros.ros import cues
from perceiver_flow_ros.ros.node import FlowNode
from rcl_interfaces.srv import SetParametersAtomically
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from ros_images import image_message, seconds
from sensor_msgs.msg import CameraInfo, Image, TimeReference

DOMAINS = range(41, 60)
TIMEOUT = 60.0  # s, for what takes milliseconds
OUTPUTS = {
    'flow': Image, 'flow/previous': TimeReference, 'flow/color': Image, **cues.OUTPUTS,
}  # fmt: skip


def _own_domain():
    """Take a ROS domain that no other test run on this machine has; the open file keeps it."""
    for domain in DOMAINS:
        lock = open(Path(tempfile.gettempdir()) / f'perceiver_flow_ros_domain_{domain}', 'w')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
        else:
            return domain, lock
    raise RuntimeError(f'all ROS domains of {DOMAINS} are taken by other test runs')


DOMAIN, _LOCK = _own_domain()


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
        self.statuses, self.unseen, self.clients = {}, {}, {}
        self.peer.create_subscription(DiagnosticArray, '/diagnostics', self._report, 10)
        self.camera = self.info = None
        if start:
            self.node.trigger_configure()
            self.node.trigger_activate()

    def _report(self, message):
        for status in message.status:
            status.values = {pair.key: pair.value for pair in status.values}
            name = status.name.split(': ')[1]
            self.statuses[name] = status
            self.unseen.setdefault(name, []).append(status)

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
        publishers = {p.topic_name: p for p in self.node.publishers}
        for output in outputs:
            subscription = self.peer.create_subscription(
                OUTPUTS[output],
                f'/{name}/{output}',
                self.received[output].append,
                QoSProfile(depth=50),
            )
            # Each end finds the other by itself.
            ends = publishers[subscription.topic_name], subscription
            self.until(
                lambda: ends[0].get_subscription_count() and ends[1].get_publisher_count(),  # noqa: B023
                f'for {output} to be matched',
            )
        return self

    def settle(self):
        """Wait until every image sent has been taken off the queue and worked on."""
        c = self.node.pipeline.worker.counts
        self.until(lambda: c.received == c.processed + c.dropped, 'for the worker to be idle')

    def send(self, pixels, stamp, **fields):
        """Publish an image and wait until the node is done with it."""
        self.publish(image_message(pixels, stamp, **fields))
        self.settle()

    def publish(self, message):
        """Publish an image and wait until the node has it; once more where it got lost."""
        received = self.node.pipeline.worker.counts.received
        for _ in range(10):
            self.camera.publish(message)
            end = time.monotonic() + TIMEOUT / 10
            while time.monotonic() < end:
                self.executor.spin_once(timeout_sec=0.05)
                if self.node.pipeline.worker.counts.received > received:
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
        """Find the next report, past or to come, in which a status says a text; return it."""
        unseen = self.unseen.setdefault(name, [])

        def is_said():
            while unseen:
                if text in unseen[0].message:
                    return True
                del unseen[0]
            return False

        self.until(is_said, text)
        return unseen[0]

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
        if name not in self.clients:
            path = f'/{self.node.get_name()}/{name}'
            self.clients[name] = self.peer.create_client(service, path)
        client = self.clients[name]
        self.until(client.service_is_ready, f'for the service {name}')
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
