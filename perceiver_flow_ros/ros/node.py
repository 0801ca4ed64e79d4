# SPDX-License-Identifier: Apache-2.0
"""
The node: images in, optical flow out.

This file is what ROS sees of it: lifecycle, subscriptions, parameters, the process. What is done
with an image is in `pipeline`, in threads of its own: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
import os
import signal
import sys
import threading
from typing import Any

from perceiver_flow_ros.flow.estimator import FlowEstimator, load_estimator
from perceiver_flow_ros.ros import parameters
from perceiver_flow_ros.ros.diagnostics import Diagnostics
from perceiver_flow_ros.ros.notices import explain
from perceiver_flow_ros.ros.parameter_file import to_yaml
from perceiver_flow_ros.ros.pipeline import Pipeline
from perceiver_flow_ros.ros.topics import create_input
from rcl_interfaces.msg import SetParametersResult
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.subscription import Subscription
from rclpy.utilities import remove_ros_args
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import Trigger

SENSOR_DATA_DEPTH = 5
STOP_TIMEOUT = 1.5  # s that a running inference is given at exit
HELP = """usage: perceiver_flow_node --ros-args [-r image:=TOPIC] [-r camera_info:=TOPIC]
         [-r __ns:=NAMESPACE] [--params-file FILE] [-p NAME:=VALUE ...]

Optical flow of a camera's images, and what it tells of the camera's motion.
"""
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class FlowNode(LifecycleNode):
    """
    Optical flow of an image topic, as a managed node.

    Parameters
    ----------
    loader : called like `load_estimator`, whenever an estimator is needed.
    arguments : passed on to `rclpy.lifecycle.LifecycleNode`.

    """

    def __init__(
        self, *, loader: Callable[..., FlowEstimator] = load_estimator, **arguments: Any
    ) -> None:
        super().__init__('perceiver_flow', **arguments)
        self.camera_info_topic = self.resolve_topic_name('camera_info')
        self.active = False
        self.reason = ''  # why a lifecycle step failed
        self._inputs: list[Subscription] = []
        self._sensors: list[Subscription] = []
        self._replacement: FlowEstimator | None = None  # loaded for a parameter change under way

        self.settings = parameters.declare(self)
        self.image_topic = self.resolve_topic_name('image')
        if self.settings.image_transport == 'compressed':  # image_transport's convention
            self.image_topic = self.resolve_topic_name(f'{self.image_topic}/compressed')
        self.diagnostics = Diagnostics(self)
        self.pipeline = Pipeline(self, loader)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.add_post_set_parameters_callback(self._adopt_parameters)
        self.create_service(Trigger, '~/reset', self._reset)

    # Lifecycle. A step that fails is logged and undone; it can be tried again.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm the model."""
        try:
            self.pipeline.cues.check(self.settings)
            self.pipeline.cues.adopt(self.settings)
            estimator = self._run_in_worker(lambda: self.pipeline.load(self.settings))
        except Exception as error:
            return self._failed('configure', error)
        self.pipeline.estimator = estimator
        self.reason = ''
        what = f'{estimator.name} is ready on {estimator.device} in {estimator.precision}'
        self.get_logger().info(what)
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe."""
        super().on_activate(state)
        self.active = True
        self.pipeline.restart()
        self.pipeline.cues.activated()
        self.diagnostics.activated()
        try:
            self._subscribe()
        except Exception as error:  # a QoS override that means nothing
            self.on_deactivate(state)
            return self._failed('activate', error)
        self.reason = ''
        output = self.resolve_topic_name('~/flow')
        self.get_logger().info(f'flow of {self.image_topic} on {output}')
        return SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe. A flow that is being computed is not published."""
        self.active = False
        self._unsubscribe(self._inputs)
        self._unsubscribe(self._sensors)
        self.pipeline.clear()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        self._run_in_worker(self.pipeline.free)
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and free the model."""
        self.on_deactivate(state)
        return self.on_cleanup(state)

    def _failed(self, step: str, error: Exception) -> TransitionCallbackReturn:
        self.reason = f'cannot {step}: {explain(error)}'
        again = f'ros2 lifecycle set {self.get_fully_qualified_name()} configure, then activate'
        remedy = f'correct the parameter and {again}; or start the node with another one'
        if step == 'activate':  # only QoS overrides, which are read once, make it fail
            remedy = 'correct the override and start the node again'
        if self.context.ok():  # else it came of the shutdown
            self.get_logger().error(f'{self.reason} | {remedy}')
        return FAILURE

    def close(self) -> bool:
        """Stop the threads and destroy the node; tell whether they stopped in time."""
        stopped = self.pipeline.stop(STOP_TIMEOUT)
        self.destroy_node()
        # rclpy leaves this one, and it keeps the DDS participant: without it every run would leave
        # a segment of shared memory behind, 70 MB with config/fastdds.xml.
        self._state_machine.destroy_when_not_in_use()
        return stopped

    # Inputs

    def _subscribe(self) -> None:
        qos = {
            'depth': max(self.settings.capacity, SENSOR_DATA_DEPTH),
            'reliability': self.settings.image_reliability,
            'on_incompatible': self.diagnostics.input_incompatible,
        }
        image = Image, 'image'
        if self.settings.image_transport == 'compressed':
            image = CompressedImage, self.image_topic
        lost = self.diagnostics.lost
        info = CameraInfo, 'camera_info'
        self._inputs.append(create_input(self, *image, self.on_image, on_lost=lost, **qos))
        self._inputs.append(create_input(self, *info, self.on_camera_info, **qos))
        self._subscribe_to_sensors()

    def _subscribe_to_sensors(self) -> None:
        """Subscribe to depth, range and imu, where the settings make use of them."""
        self._unsubscribe(self._sensors)
        for sensor in self.pipeline.cues.subscribe(self.settings.image_reliability):
            self._sensors.append(sensor)

    def _unsubscribe(self, inputs: list[Subscription]) -> None:
        while inputs:
            self.destroy_subscription(inputs.pop())

    def on_image(self, message: Image | CompressedImage) -> None:
        """Take an image from the subscription."""
        self.diagnostics.arrived(message)
        self.pipeline.worker.put(message)

    def on_camera_info(self, message: CameraInfo) -> None:
        """Take the calibration of the images."""
        self.diagnostics.described(message)
        self.pipeline.cues.motion.described(message)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self.pipeline.restart()
        response.success = True
        response.message = 'the next image starts a new pair, the next pair a new pose'
        return response

    # Parameters

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Refuse bad values. A new model is loaded first; if it fails the present one goes on."""
        self._replacement = None
        values = {p.name: p.value for p in changes if p.name in parameters.BY_NAME}
        for name, value in values.items():
            problem = parameters.BY_NAME[name].problem(value)
            if problem:
                return SetParametersResult(successful=False, reason=problem)
        wanted = self.settings.but(values)
        try:
            self.pipeline.cues.check(wanted)
        except ValueError as error:
            return SetParametersResult(successful=False, reason=explain(error))
        if self.pipeline.estimator is not None and not self.settings.serves(wanted):
            try:
                self._replacement = self._run_in_worker(lambda: self.pipeline.load(wanted))
            except Exception as error:
                return SetParametersResult(successful=False, reason=explain(error))
        return SetParametersResult(successful=True)

    def _adopt_parameters(self, changes: list[Parameter]) -> None:
        before = self.settings
        self.settings = before.but(
            {p.name: p.value for p in changes if p.name in parameters.BY_NAME}
        )
        if self._replacement is not None:
            self.pipeline.replace(self._replacement)
            self._replacement = None
        self.pipeline.cues.adopt(self.settings)
        if self.active and self.settings.inputs != before.inputs:
            try:
                self._subscribe_to_sensors()
            except Exception as error:  # a QoS override that means nothing
                text = f'cannot subscribe: {explain(error)} | correct the override and start again'
                self.diagnostics.notices.error('sensors', text)
        if self.settings.diagnostics_period != before.diagnostics_period:
            self.diagnostics.start_timer()

    def _run_in_worker(self, job: Callable[[], Any]) -> Any:
        """Run a job between two images and wait for it, unless the process is told to end."""
        future = self.pipeline.worker.submit(job)
        while self.context.ok():
            if wait([future], timeout=0.1).done:
                return future.result()
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM and exit with 0; return 2 where it cannot start."""
    if {'-h', '--help'}.intersection(sys.argv if arguments is None else arguments):
        print(HELP, to_yaml(), sep='\n', end='')
        return 0
    unknown = remove_ros_args(args=sys.argv if arguments is None else arguments)[1:]
    if unknown:
        print(f'perceiver_flow_node: error: unknown argument {unknown[0]!r}; parameters are given '
              'as --ros-args -p NAME:=VALUE (see --help)', file=sys.stderr)
        return 2
    # rclpy shuts its context down on both signals, and whatever runs below breaks off with one
    # exception or another. Python's own KeyboardInterrupt could also hit the closing: not wanted.
    told_to_end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told_to_end.set())
    try:
        rclpy.init(args=arguments)
        node = FlowNode()
        executor = SingleThreadedExecutor()
        executor.add_node(node)
    except Exception as error:
        if told_to_end.is_set():
            return 0
        print(f'perceiver_flow_node: error: {explain(error)}', file=sys.stderr)
        return 2
    try:
        if node.settings.autostart and node.trigger_configure() == SUCCESS:
            node.trigger_activate()
        executor.spin()
    except (KeyboardInterrupt, Exception):
        if node.context.ok():
            raise
    node.close()
    rclpy.try_shutdown()
    # Everything is closed. Python would still take PyTorch apart, for seconds on a busy machine,
    # and could not under a thread that computes.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == '__main__':
    sys.exit(main())
