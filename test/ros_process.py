# SPDX-License-Identifier: Apache-2.0
"""
What the process tests run beside the node, each in a process of its own.

    ros_process.py camera FRAMES.npy STAMPS    send each frame when its predecessor's flow is there
    ros_process.py camera ... --burst          send four frames while the flow of one is computed
    ros_process.py camera ... --until-begun    end when an estimator has begun
    ros_process.py malformed IMAGES.pickle     send bad images, good ones in between
    ros_process.py flood                       send VGA images at 30 Hz until losses are reported
    ros_process.py operator PARAMETERS         correct and start a node that could not configure
    ros_process.py reader COUNT                receive so many flows and colour images
    ros_process.py slow-node [--ros-args ...]  the node, with an estimator that waits for the four

All but the node print what they saw as one line of JSON.
"""

import json
import pickle
import sys
import threading

from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
import numpy as np
from perceiver_flow_ros.ros import node as node_module
from rcl_interfaces.srv import SetParametersAtomically
import rclpy
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data, QoSProfile, ReliabilityPolicy
from ros_images import image_message
from sensor_msgs.msg import CameraInfo, Image, TimeReference
from std_msgs.msg import String

TIMEOUT = 60.0  # s
BEHIND = 4  # frames that come while the slow estimator works
LAST = 29  # frame, after which none comes
FOUND = '/reader_has_found_the_node'  # a topic that says so by being there


class Process(Node):
    """Spins until something holds."""

    def until(self, condition, seconds=TIMEOUT):
        end = self.get_clock().now().nanoseconds + seconds * 1e9
        while not condition():
            if self.get_clock().now().nanoseconds > end:
                return False
            rclpy.spin_once(self, timeout_sec=0.1)
        return True


class Camera(Process):
    """Sends frames over best effort, as camera drivers do, and waits for what comes of each."""

    def __init__(self, frames, stamps):
        super().__init__('camera')
        self.frames, self.stamps = frames, stamps
        self.values, self.messages, self.flow_stamps, self.events = {}, {}, [], set()
        qos = qos_profile_sensor_data
        self.image = self.create_publisher(Image, '/camera/image_raw', qos)
        self.info = self.create_publisher(CameraInfo, '/camera/camera_info', qos)
        self.create_subscription(DiagnosticArray, '/diagnostics', self.on_diagnostics, 10)
        self.previous = self.create_subscription(
            TimeReference, '/perceiver_flow/flow/previous', self.on_flow, QoSProfile(depth=50)
        )
        self.create_subscription(String, '/slow_node', lambda m: self.events.add(m.data), 50)

    def on_diagnostics(self, message):
        self.values = {s.name: {v.key: v.value for v in s.values} for s in message.status}
        self.messages = {s.name: s.message for s in message.status}

    def on_flow(self, message):
        self.flow_stamps.append((message.header.stamp.sec, message.header.stamp.nanosec))

    def count(self, name):
        return int(self.values.get('perceiver_flow: flow', {}).get(name, 0))

    def send(self, index, done):
        """Send a frame, now and then again (a repeated stamp is skipped), until it is done."""
        message = image_message(self.frames[index], 0, 'bgr8')
        message.header.stamp.sec, message.header.stamp.nanosec = self.stamps[index]
        info = CameraInfo(header=message.header, height=message.height, width=message.width)
        info.k[0] = 500.0
        tries = 6 if index else 60  # the first ones go out before the node has matched
        for _ in range(tries):
            self.info.publish(info)
            self.image.publish(message)
            if self.until(done, TIMEOUT / tries):
                return
        raise SystemExit(f'frame {index} came to nothing: {self.messages} {self.events}')

    def feed(self, burst=False, until_begun=False):
        """Send all frames and print the diagnostics after the last."""
        # Each end finds the other by itself; what is sent before both have is lost. The node
        # counts the reader's subscriptions and the one here; the reader tells of its own.
        wanted = {'flow': 1, 'flow/previous': 2, 'flow/color': 1}
        for name, count in wanted.items():
            subscribers = f'subscribers of /perceiver_flow/{name}'
            assert self.until(lambda: self.count(subscribers) == count)  # noqa: B023
        assert self.until(lambda: self.previous.get_publisher_count())
        assert self.until(lambda: self.count_publishers(FOUND))
        told = {'received 0'} if burst or until_begun else set()
        self.send(0, lambda: self.count('processed') > 0 and told <= self.events)
        if until_begun:
            self.send(1, lambda: 'begun 1' in self.events)
            print(json.dumps(self.values))
            return
        for i in range(1, len(self.frames)):
            if burst:
                self.send(i, lambda: f'received {i}' in self.events)  # noqa: B023
                if i % BEHIND == 1:
                    assert self.until(lambda: f'begun {i}' in self.events)  # noqa: B023
            else:
                self.send(i, lambda: self.stamps[i] in self.flow_stamps)  # noqa: B023
        sent = len(self.frames)
        assert self.until(lambda: self.count('processed') + self.count('dropped') >= sent)
        print(json.dumps(self.values))

    def feed_malformed(self, good, bad):
        """Send each bad image after a good one, then two good ones; print what the node said."""
        self.create_subscription(Image, '/perceiver_flow/flow', lambda m: None, 10)
        assert self.until(lambda: self.count('subscribers of /perceiver_flow/flow') == 1)
        self.frames = [good] * (2 + 2 * len(bad))
        self.stamps = [(100 + i, 0) for i in range(len(self.frames))]
        self.send(0, lambda: self.count('processed') > 0)
        said = []
        for i, (pixels, fields) in enumerate(bad):
            message = image_message(pixels, 100 + 2 * i + 0.5, **fields)
            self.image.publish(message)
            assert self.until(lambda: self.count('failed') == i + 1), self.messages  # noqa: B023
            said.append(self.values['perceiver_flow: flow']['last error'])
            for k in (2 * i + 1, 2 * i + 2):
                self.send(k, lambda: self.stamps[k] in self.flow_stamps)  # noqa: B023
        print(json.dumps(said))

    def flood(self):
        """Send VGA images at 30 Hz until the node reports losses; print what it says."""
        message = image_message(np.zeros((480, 640, 3), np.uint8), 0)

        def publish():
            message.header.stamp = self.get_clock().now().to_msg()
            self.image.publish(message)

        self.create_timer(1 / 30, publish)
        name = 'perceiver_flow: input'
        assert self.until(lambda: 'lost' in self.messages.get(name, '')), self.messages
        print(json.dumps(self.messages[name]))


def operate(parameters):
    """Do what an operator does with a node that could not configure."""
    node = Process('operator')
    said = {}
    keep = lambda m: said.update({s.name: s.message for s in m.status})  # noqa: E731
    node.create_subscription(DiagnosticArray, '/diagnostics', keep, 10)

    def call(kind, name, **fields):
        client = node.create_client(kind, f'/perceiver_flow/{name}')
        assert node.until(client.service_is_ready)
        future = client.call_async(kind.Request(**fields))
        assert node.until(future.done)
        return future.result()

    def state():
        return call(GetState, 'get_state').current_state.label

    assert node.until(lambda: 'cannot' in said.get('perceiver_flow: flow', '')), said
    result = {'diagnostics': said['perceiver_flow: flow'], 'before': state()}
    changes = [Parameter(k, value=v).to_parameter_msg() for k, v in parameters.items()]
    answer = call(SetParametersAtomically, 'set_parameters_atomically', parameters=changes)
    assert answer.result.successful, answer
    for number in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
        assert call(ChangeState, 'change_state', transition=Transition(id=number)).success
    print(json.dumps({**result, 'after': state()}))


def read(count):
    """Receive flows, their previous stamps and colour images; print what they are."""
    node = Process('reader')
    received = {name: [] for name in ('flow', 'flow/previous', 'flow/color')}
    qos = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
    inputs = [
        node.create_subscription(kind, f'/perceiver_flow/{name}', received[name].append, qos)
        for name, kind in zip(received, (Image, TimeReference, Image))
    ]
    assert node.until(lambda: all(i.get_publisher_count() for i in inputs))
    node.create_publisher(String, FOUND, 1)

    def is_complete():  # colour images may be fewer: the newest counts
        flow, previous, color = received.values()
        newest = flow and color and flow[-1].header == color[-1].header
        return newest and len(flow) == len(previous) == count

    complete = node.until(is_complete)
    result = {'complete': complete}
    for name, messages in received.items():
        result[name] = [
            {
                'stamp': [m.header.stamp.sec, m.header.stamp.nanosec],
                'frame_id': m.header.frame_id,
                **(
                    {'previous': [m.time_ref.sec, m.time_ref.nanosec]}
                    if name == 'flow/previous'
                    else {
                        'size': [m.width, m.height], 'encoding': m.encoding, 'step': m.step,
                        'bytes': len(m.data), 'mean': mean(m),
                    }
                ),
            }
            for m in messages
        ]  # fmt: skip
    print(json.dumps(result))


def mean(message):
    """Mean flow, or mean colour."""
    kind = {'32FC2': '<f4', 'rgb8': np.uint8}[message.encoding]
    values = np.frombuffer(message.data, kind).reshape(message.height, message.width, -1)
    return values.astype(float).mean((0, 1)).tolist()


class SlowNode(node_module.FlowNode):
    """
    Tells what it does on /slow_node.

    Frame k is known by its first pixel. Its flow takes until frame k + BEHIND has arrived.
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.newest = -1
        super().__init__(loader=self.load_slow)
        self.teller = self.create_publisher(String, '/slow_node', 50)

    def load_slow(self, model, **settings):
        return SlowEstimator(node_module.load_estimator(model, **settings), self)

    def on_image(self, message):
        super().on_image(message)
        index = message.data[2]  # red of bgr8
        with self.changed:
            self.newest = index
            self.changed.notify_all()
        self.tell(f'received {index}')

    def tell(self, text):
        self.teller.publish(String(data=text))


class SlowEstimator:
    def __init__(self, estimator, node):
        self.estimator, self.node = estimator, node
        self.name, self.device, self.precision = estimator.name, 'cpu', 'float32'
        self.query_stride = estimator.query_stride

    def __call__(self, previous, current):
        if current.any():  # not the warm-up
            index = int(current[0, 0, 0])
            self.node.tell(f'begun {index}')
            with self.node.changed:
                last = min(index + BEHIND, LAST)
                self.node.changed.wait_for(lambda: self.node.newest >= last, TIMEOUT)
        return self.estimator(previous, current)


if __name__ == '__main__':
    role, *arguments = sys.argv[1:]
    if role == 'slow-node':
        node_module.FlowNode = SlowNode
        sys.exit(node_module.main([sys.argv[0], *arguments]))
    rclpy.init(args=[])
    if role == 'camera':
        stamps = [tuple(stamp) for stamp in json.loads(arguments[1])]
        camera = Camera(np.load(arguments[0]), stamps)
        camera.feed('--burst' in arguments, '--until-begun' in arguments)
    elif role == 'malformed':
        with open(arguments[0], 'rb') as file:
            Camera([], []).feed_malformed(**pickle.load(file))
    elif role == 'flood':
        Camera([], []).flood()
    elif role == 'operator':
        operate(json.loads(arguments[0]))
    else:
        read(int(arguments[0]))
    rclpy.shutdown()
