# SPDX-License-Identifier: Apache-2.0
"""
The node: images in, optical flow out.

Two threads. The executor's takes images off the subscription, answers services and parameter
changes, and reports. The worker's (`FrameWorker`) owns the estimator: whenever it is free it takes
the newest image and publishes the flow from the one it took before.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
import gc
import os
import signal
import sys
import threading
import time
from typing import Any

import cv2
import numpy as np
from rcl_interfaces.msg import SetParametersResult
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image, TimeReference
from std_srvs.srv import Trigger

from perceiver_flow_ros.flow.color import flow_to_color
from perceiver_flow_ros.flow.estimator import FlowEstimator, load_estimator
from perceiver_flow_ros.ros import parameters
from perceiver_flow_ros.ros.conversion import BadImage, to_frame, to_message
from perceiver_flow_ros.ros.diagnostics import Diagnostics
from perceiver_flow_ros.ros.frames import Frame, FrameWorker, why_no_pair
from perceiver_flow_ros.ros.notices import explain
from perceiver_flow_ros.ros.topics import create_input, create_output

WARM_UP_SIZE = (368, 496)  # one tile of the official model
STOP_TIMEOUT = 1.5  # s that a running inference is given at exit
SENSOR_DATA_DEPTH = 5
OUTPUTS = (Image, '~/flow'), (TimeReference, '~/flow/previous'), (Image, '~/flow/color')
DEFAULT_THREADS: dict[str, int] = {}  # before the first change
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
        self.image_topic = self.resolve_topic_name('image')
        self.camera_info_topic = self.resolve_topic_name('camera_info')
        self.estimator: FlowEstimator | None = None
        self.active = False
        self.reason = ''  # why the node could not be configured
        self._loader = loader
        self._replacement: FlowEstimator | None = None  # loaded for a parameter change under way
        self._previous: Frame | None = None
        self._forget = False  # the previous frame, when the next one comes
        self._inputs: list = []

        self.add_on_set_parameters_callback(self._check_parameters)
        self.settings = parameters.declare(self)
        self.add_post_set_parameters_callback(self._adopt_parameters)
        self.worker = FrameWorker(self._process, self._capacity())
        self.diagnostics = Diagnostics(self)
        self._flow, self._time, self._color = (
            create_output(self, kind, name, self.diagnostics.output_incompatible)
            for kind, name in OUTPUTS
        )
        self.create_service(Trigger, '~/reset', self._reset)
        self.worker.start()

    # Lifecycle. A step that fails is logged and undone; it can be tried again.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load and warm the model."""
        try:
            self.estimator = e = self._run_in_worker(lambda: self._load(self.settings))
        except Exception as error:
            return self._failed('configure', error)
        self.reason = ''
        self.get_logger().info(f'{e.name} is ready on {e.device} in {e.precision}')
        return super().on_configure(state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe."""
        super().on_activate(state)
        self._forget = self.active = True
        self.diagnostics.activated()
        try:
            self._subscribe()
        except Exception as error:  # a QoS override that means nothing
            self.on_deactivate(state)
            return self._failed('activate', error)
        self.reason = ''
        self.get_logger().info(f'flow of {self.image_topic} on {self._flow.topic_name}')
        return SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe. A flow that is being computed is not published."""
        self.active = False
        while self._inputs:
            self.destroy_subscription(self._inputs.pop())
        self.worker.clear()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        self._run_in_worker(self._free)
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Unsubscribe and free the model."""
        self.on_deactivate(state)
        return self.on_cleanup(state)

    def _failed(self, step: str, error: Exception) -> TransitionCallbackReturn:
        self.reason = f'cannot {step}: {explain(error)}'
        again = f'ros2 lifecycle set {self.get_fully_qualified_name()} {step}'
        then = ', then activate' if step == 'configure' else ''
        if self.context.ok():  # else it came of the shutdown
            self.get_logger().error(f'{self.reason} | correct the parameter and {again}{then}')
        return FAILURE

    def close(self) -> bool:
        """Stop the worker and destroy the node; tell whether the worker stopped in time."""
        stopped = self.worker.stop(STOP_TIMEOUT)
        self.destroy_node()
        return stopped

    # Images, in the executor's thread

    def on_image(self, message: Image) -> None:
        """Take an image from the subscription; the work is the worker's."""
        self.diagnostics.arrived(message)
        self.worker.put(message)

    def is_wanted(self) -> bool:
        """Tell whether anybody subscribes to an output."""
        return any(self.subscribers().values())

    def subscribers(self) -> dict[str, int]:
        """Count those of each output."""
        outputs = self._flow, self._time, self._color
        return {output.topic_name: output.get_subscription_count() for output in outputs}

    # Images, in the worker's thread

    def _process(self, message: Image) -> None:
        """Work on one image. Whatever is wrong with it, the node lives and says so."""
        try:
            self._follow(message)
        except BadImage as error:
            self.diagnostics.failed('image', f'image of {self.image_topic} refused: {error}')
        except Exception as error:
            if self.context.ok():  # else it came of the shutdown
                self.diagnostics.failed('inference', f'no flow: {explain(error)}')

    def _follow(self, message: Image) -> None:
        estimator = self.estimator
        if estimator is None or not self.is_wanted():
            self._previous = None
            return
        frame = Frame(message.header, to_frame(message))
        previous, self._previous = (None if self._forget else self._previous), frame
        self._forget = False
        if previous is None:
            return
        obstacle = why_no_pair(previous, frame, self.settings.max_frame_gap)
        if obstacle:
            self.diagnostics.restarted(*obstacle)
            return
        start = time.perf_counter()
        flow = estimator(previous.image, frame.image)
        took = time.perf_counter() - start
        self._publish(previous, frame, flow)
        self.diagnostics.flowed(frame.stamp / 1e9, took)

    def _publish(self, previous: Frame, frame: Frame, flow: np.ndarray) -> None:
        """Publish what is subscribed to, under the header of the image that the flow leads to."""
        if self._time.get_subscription_count():
            reference = TimeReference(header=frame.header, time_ref=previous.header.stamp)
            reference.source = 'previous image'
            self._time.publish(reference)
        if self._flow.get_subscription_count():
            self._flow.publish(to_message(flow, '32FC2', frame.header))
        if self._color.get_subscription_count():
            color = flow_to_color(flow, self.settings.color_max_magnitude or None)
            self._color.publish(to_message(color, 'rgb8', frame.header))

    def _load(self, settings: parameters.Settings) -> FlowEstimator:
        """Load an estimator and run it once, so that the first image need not wait."""
        s = settings
        estimator = self._loader(
            s.model, device=s.device, precision=s.precision, tiling=s.tiling, quality=s.quality,
            query_stride=s.query_stride, allow_download=s.allow_download,
        )  # fmt: skip
        _set_threads(s.threads)
        blank = np.zeros((*WARM_UP_SIZE, 3), np.uint8)
        estimator(blank, blank)
        return estimator

    # Parameters

    def _check_parameters(self, changes: list[Parameter]) -> SetParametersResult:
        """Refuse bad values. A new model is loaded first; if it fails the present one goes on."""
        self._replacement = None
        values = {p.name: p.value for p in changes if p.name in parameters.BY_NAME}
        for name, value in values.items():
            problem = parameters.BY_NAME[name].problem(value)
            if problem:
                return SetParametersResult(successful=False, reason=problem)
        if self.estimator is not None:
            wanted = self.settings.but(values)
            try:
                if not self.settings.serves(wanted):
                    self._replacement = self._run_in_worker(lambda: self._load(wanted))
            except Exception as error:
                return SetParametersResult(successful=False, reason=explain(error))
        return SetParametersResult(successful=True)

    def _adopt_parameters(self, changes: list[Parameter]) -> None:
        before = self.settings
        self.settings = before.but(
            {p.name: p.value for p in changes if p.name in parameters.BY_NAME}
        )
        if self._replacement is not None:
            self.estimator, self._replacement = self._replacement, None
        if self.settings.diagnostics_period != before.diagnostics_period:
            self.diagnostics.start_timer()

    # Parts

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._forget = True
        response.success, response.message = True, 'the next image starts a new pair'
        return response

    def _run_in_worker(self, job: Callable[[], Any]) -> Any:
        """Run a job between two images and wait for it, unless the process is told to end."""
        future = self.worker.submit(job)
        while self.context.ok():
            if wait([future], timeout=0.1).done:
                return future.result()
        raise KeyboardInterrupt

    def _capacity(self) -> int:
        return self.settings.queue_size if self.settings.process_every_frame else 1

    def _subscribe(self) -> None:
        qos = {
            'depth': max(self._capacity(), SENSOR_DATA_DEPTH),
            'reliability': self.settings.image_reliability,
            'on_incompatible': self.diagnostics.input_incompatible,
        }
        lost, described = self.diagnostics.lost, self.diagnostics.described
        self._inputs = [
            create_input(self, Image, 'image', self.on_image, on_lost=lost, **qos),
            create_input(self, CameraInfo, 'camera_info', described, **qos),
        ]

    def _free(self) -> None:
        self.estimator = self._previous = None
        gc.collect()
        torch = sys.modules.get('torch')
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _set_threads(count: int) -> None:
    """Set the CPU threads of OpenCV and of PyTorch, if loaded; 0 for their defaults."""
    cv2.setNumThreads(count or -1)
    torch = sys.modules.get('torch')
    if torch is not None:
        DEFAULT_THREADS.setdefault('torch', torch.get_num_threads())
        torch.set_num_threads(count or DEFAULT_THREADS['torch'])


def main(arguments: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM and return 0; 2 where it cannot start."""
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
    stopped = node.close()
    rclpy.try_shutdown()
    if not stopped:  # the interpreter cannot end cleanly under a thread that computes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


if __name__ == '__main__':
    sys.exit(main())
