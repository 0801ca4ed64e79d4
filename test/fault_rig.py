# SPDX-License-Identifier: Apache-2.0
"""A node as a process, and a peer in this one that feeds it, reads it and knows what is right."""

from __future__ import annotations

import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from node_rig import DOMAIN
import numpy as np
from rcl_interfaces.srv import SetParametersAtomically
import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from ros_images import flow_of, image_message, picture
from sensor_msgs.msg import Image, TimeReference

ROOT = Path(__file__).parents[1]
STREAM = Path(__file__).with_name('fault_process.py')
TIMEOUT = 40.0  # s, for what takes far less
FAST = {'model': 'dis'}
EVERY = {'process_every_frame': True, 'queue_size': 10000}


def start(arguments, log, **options):
    """Start a Python process in the tests' ROS domain, its output in a file."""
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    environment = {**os.environ, 'PYTHONPATH': path, 'ROS_DOMAIN_ID': str(DOMAIN)}
    with open(log, 'w') as file:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, **options)


class Faults:
    """The node's process and the peer; `good` proves that the node is alive and correct."""

    def __init__(self, folder, **parameters):
        self.folder, self.processes = folder, []
        parameters = {
            'diagnostics_period': 0.05, 'image_reliability': 'reliable', **FAST, **parameters,
        }  # fmt: skip
        self.node = self.start_node(parameters)
        self.context = Context()
        rclpy.init(context=self.context, domain_id=DOMAIN)
        self.peer = Node('peer', context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.peer)
        self.clients, self.values, self.messages, self.reports = {}, {}, {}, 0
        self.shifts = {}  # stamp of a good image, ns -> where its picture is, px
        self.previous = {}  # stamp of a flow -> stamp of the image before
        self.medians = {}  # stamp of a flow -> its median, px
        self.stamp = 10**9
        self.image = self.peer.create_publisher(Image, '/image', QoSProfile(depth=10000))
        deep = QoSProfile(depth=1000)
        subscribe = self.peer.create_subscription
        subscribe(DiagnosticArray, '/diagnostics', self._report, 10)
        outputs = [
            subscribe(TimeReference, '/perceiver_flow/flow/previous', self._previous, deep),
            subscribe(Image, '/perceiver_flow/flow', self._flow, deep),
        ]
        self.until(lambda: self.count('subscribers of /perceiver_flow/flow') > 0, 'a subscriber')
        self.until(lambda: self.count('subscribers of /perceiver_flow/flow/previous') > 0)
        self.until(lambda: self.image.get_subscription_count() > 0, 'the node to subscribe')
        # Each end finds the other by itself: what is sent before both have is lost.
        self.until(lambda: all(o.get_publisher_count() for o in outputs), 'to find the node')

    # Processes

    def start_node(self, parameters):
        given = [word for k, v in parameters.items() for word in ('-p', f'{k}:={_yaml(v)}')]
        self.log = self.folder / f'node{len(self.processes)}.log'
        arguments = ['-m', 'perceiver_flow_ros.ros.node', '--ros-args', *given]
        self.processes.append(start(arguments, self.log))
        return self.processes[-1]

    def stream(self, *arguments):
        """Start a helper process and wait until it says that it has begun."""
        log = self.folder / f'stream{len(self.processes)}.log'
        self.processes.append(start([STREAM, *arguments], log))
        self.until(lambda: 'begun' in log.read_text(), f'for {arguments}: {log.read_text()}')
        return self.processes[-1]

    def kill(self, process, number=signal.SIGKILL):
        process.send_signal(number)
        process.wait(TIMEOUT)

    def end(self, number=signal.SIGINT):
        """Have the node end; return its log."""
        self.node.send_signal(number)
        assert self.node.wait(TIMEOUT) == 0, self.log.read_text()
        assert 'Traceback' not in self.log.read_text(), self.log.read_text()
        return self.log.read_text()

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        self.executor.shutdown()
        self.peer.destroy_node()
        rclpy.shutdown(context=self.context)

    def memory(self):
        """Resident memory of the node, in MB, its threads, its open files."""
        fields = Path(f'/proc/{self.node.pid}/status').read_text().split('\n')
        status = dict(line.split(':', 1) for line in fields if ':' in line)
        files = len(os.listdir(f'/proc/{self.node.pid}/fd'))
        return int(status['VmRSS'].split()[0]) / 1024, int(status['Threads']), files

    # What comes from the node

    def _report(self, message):
        self.reports += 1
        for status in message.status:
            name = status.name.split(': ')[1]
            self.values[name] = {pair.key: pair.value for pair in status.values}
            self.messages[name] = (status.level, status.message)

    def _previous(self, message):
        self.previous[_nanoseconds(message.header.stamp)] = _nanoseconds(message.time_ref)

    def _flow(self, message):
        inner = flow_of(message)[8:-8, 8:-8]
        self.medians[_nanoseconds(message.header.stamp)] = np.median(inner, (0, 1))

    def count(self, name):
        return int(self.values.get('flow', {}).get(name, 0))

    def until(self, condition, what=''):
        """Spin until a condition holds."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self.node.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f'waited in vain {what}: {self.messages} {self.values}'
            self.executor.spin_once(timeout_sec=0.05)

    def settle(self):
        """Wait until nothing comes any more and all that came is accounted for."""
        seen = []

        def is_idle():
            state = self.reports, self.count('received')
            if not seen or state[0] != seen[-1][0]:
                seen.append(state)
            done = self.count('processed') + self.count('dropped')
            return len(seen) > 3 and done == seen[-1][1] == seen[-3][1]

        self.until(is_idle, 'for the node to be idle')

    # What goes to it

    def send(self, shift, stamp=None, height=96, width=128):
        """Send a good image whose picture has moved `shift` pixels to the right."""
        self.stamp = self.stamp + 10**8 if stamp is None else stamp
        message = image_message(picture(shift, height, width), 0)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(self.stamp, 10**9)
        self.shifts[self.stamp] = shift
        self.image.publish(message)
        return self.stamp

    def good(self):
        """Prove that the next two good images give their flow, and that it is right."""
        self.settle()
        received = self.count('received')
        self.send(0, self.stamp + 10**13)  # a new pair: far from whatever was before
        self.until(lambda: self.count('received') > received, 'for a good image')
        self.settle()
        last = self.send(3)
        self.until(lambda: last in self.medians and last in self.previous, 'for its flow')
        assert self.previous[last] == last - 10**8
        self.check(last)
        self.settle()

    def check(self, *stamps):
        for stamp in stamps:
            moved = self.shifts[stamp] - self.shifts[self.previous[stamp]]
            assert np.abs(self.medians[stamp] - (moved, 0)).max() < 0.3, stamp

    # What an operator does

    def call(self, kind, name, **fields):
        if name not in self.clients:
            self.clients[name] = self.peer.create_client(kind, f'/perceiver_flow/{name}')
        self.until(self.clients[name].service_is_ready, name)
        future = self.clients[name].call_async(kind.Request(**fields))
        self.until(future.done, name)
        return future.result()

    def change(self, transition):
        number = getattr(Transition, f'TRANSITION_{transition.upper()}')
        return self.call(ChangeState, 'change_state', transition=Transition(id=number)).success

    def state(self):
        return self.call(GetState, 'get_state').current_state.label

    def set(self, **parameters):
        """Set parameters; return why they were refused, or ''."""
        changes = [Parameter(k, value=v).to_parameter_msg() for k, v in parameters.items()]
        name = 'set_parameters_atomically'
        result = self.call(SetParametersAtomically, name, parameters=changes).result
        return '' if result.successful else result.reason


def _nanoseconds(stamp):
    return stamp.sec * 10**9 + stamp.nanosec


def _yaml(value):
    return str(value).lower() if isinstance(value, bool) else value
