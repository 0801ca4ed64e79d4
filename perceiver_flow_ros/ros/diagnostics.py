# SPDX-License-Identifier: Apache-2.0
"""
What the node reports on /diagnostics: its input, its flow, its calibration.

diagnostic_updater's own tasks for rates and stamps keep a clock of their own, which ignores
simulated time and alarms under bag replay; here every time is the node's, in seconds.
"""

from __future__ import annotations

from collections import deque
import threading
from typing import Any, TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
import numpy as np
from perceiver_flow_ros.ros.frames import SKIPPED
from perceiver_flow_ros.ros.notices import Notices, without_numbers
from perceiver_flow_ros.ros.rates import durations, Rate, resident_memory
from rclpy.clock import Clock, ClockType
from rclpy.timer import Timer
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

if TYPE_CHECKING:
    from perceiver_flow_ros.ros.node import FlowNode

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR
PLAUSIBLE_LATENCY = 60.0  # s; above it or below zero, stamps and node are on different clocks
LONGEST_TEXT = 500  # characters: a broken message may hold an encoding of any length
MUCH_LOST = 0.1  # of the images since the last report
IMAGE_TYPES = {'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'}
LOST_REMEDY = (
    'give camera and node the Fast DDS profile config/fastdds.xml '
    '(FASTDDS_DEFAULT_PROFILES_FILE), or set image_reliability to reliable'
)


class Diagnostics:
    """
    Notes what happens, from both threads, and reports it every `diagnostics_period` seconds.

    The timer is steady, so that reports also come while simulated time stands still.
    """

    def __init__(self, node: FlowNode) -> None:
        self.notices = Notices(node.get_logger())
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._timer: Timer | None = None
        self._lock = threading.Lock()
        self._arrivals, self._flows = Rate(), Rate()
        self._latency: deque[float] = deque(maxlen=100)
        self._inference: deque[float] = deque(maxlen=100)
        self._counts = {'flows': 0, 'failed': 0, 'skipped': 0, 'restarted': 0, 'lost': 0}
        self._counts_before: dict[str, int] = {}  # in the last report
        self._waiting_since = 0.0
        self._failing = False  # the last image should have given a flow and did not
        self._last_error = self._last_restart = self._incompatible = ''
        self._format: tuple[int, int, str] | None = None  # width, height, encoding of an image
        self._camera_info: CameraInfo | None = None
        self.start_timer()

    def start_timer(self) -> None:
        """Start the reports, or start them again with another period."""
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
        period = self._node.settings.diagnostics_period
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._timer = self._node.create_timer(period, self.report, clock=steady)

    # What happens

    def activated(self) -> None:
        """Note that images are expected from now on."""
        self._waiting_since = self._now()
        self._format = self._camera_info = None
        self._failing = False
        self._incompatible = ''

    def arrived(self, message: Image | CompressedImage) -> None:
        """Note an image from the subscription."""
        now = self._now()
        with self._lock:
            self._arrivals.tick(now)
            self._waiting_since = now
        if isinstance(message, Image):  # else they are known when it is decoded
            self._format = message.width, message.height, message.encoding

    def decoded(self, height: int, width: int, kind: str) -> None:
        """Note what a compressed image was."""
        self._format = width, height, kind

    def described(self, info: CameraInfo) -> None:
        """Note a camera_info."""
        self._camera_info = info

    def lost(self, count: int) -> None:
        """Note images that were sent but did not arrive."""
        with self._lock:
            self._counts['lost'] += count

    def input_incompatible(self, policy: str) -> None:
        """Note a publisher whose QoS does not fit."""
        fix = 'set image_reliability to best_effort' if policy == 'reliability' else 'change one'
        self._incompatible = (
            f'a publisher of {self._node.image_topic} or of its camera_info offers another '
            f'{policy} than this node asks for, so nothing comes from it: {fix}'
        )
        self.notices.warn('input_incompatible', self._incompatible)

    def output_incompatible(self, topic: str, policy: str) -> None:
        """Note a subscriber whose QoS does not fit."""
        self.notices.warn(
            topic,
            f'a subscriber of {topic} asks for another {policy} than this node offers, so it '
            f'receives nothing: change it, or set qos_overrides.{topic}.publisher.{policy}',
        )

    def flowed(self, stamp: float, inference: float) -> None:
        """Note a published flow, its image's stamp and the seconds it took to compute."""
        now = self._now()
        with self._lock:
            self._flows.tick(now)
            self._latency.append(now - stamp)
            self._inference.append(inference)
            self._counts['flows'] += 1
            self._failing = False

    def failed(self, kind: str, error: str) -> None:
        """Note, and log, an image that gave no flow."""
        with self._lock:
            self._counts['failed'] += 1
            self._failing = True
            self._last_error = error = error[:LONGEST_TEXT]
        self.notices.error(f'{kind}: {without_numbers(error)}', error)

    def restarted(self, kind: str, reason: str) -> None:
        """Note, and log, that an image makes no pair with the one before."""
        with self._lock:
            self._counts['skipped' if kind in SKIPPED else 'restarted'] += 1
            self._last_restart = reason
        self.notices.warn(kind, reason)

    # What is said of it

    def report(self) -> None:
        """Publish all statuses."""
        now = self._now()
        with self._lock:
            counts = {**self._counts, **vars(self._node.pipeline.worker.counts)}
        new = {key: count - self._counts_before.get(key, 0) for key, count in counts.items()}
        self._counts_before = counts
        name = self._node.get_fully_qualified_name().strip('/')
        message = DiagnosticArray()
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.status = [
            _status(f'{name}: input', *self._input(now, new), self._input_values(now, counts)),
            _status(f'{name}: flow', *self._flow(now, new), self._flow_values(now, counts)),
            _status(f'{name}: camera_info', *self._calibration()),
            _status(f'{name}: odometry', *self._odometry(), self._node.pipeline.cues.values()),
        ]
        self._publisher.publish(message)

    def _input(self, now: float, new: dict[str, int]) -> tuple[bytes, str]:
        if not self._node.active:
            return OK, 'not subscribed'
        if self._node.get_parameter('use_sim_time').value and now == 0:
            return self._warning('clock', 'use_sim_time is true, but nothing publishes /clock')
        with self._lock:
            if now < self._waiting_since or self._waiting_since == 0:
                self._waiting_since = now  # the clock was set back, or has only now begun
        silence = now - self._waiting_since
        if silence > self._node.settings.image_timeout:
            text = f'no image for {silence:.1f} s: {self._why_silent()}'
            return self._warning('silence', text)
        sent = new['lost'] + new['received']
        if new['lost'] > MUCH_LOST * sent:
            text = f'{new["lost"]} of the last {sent} images were lost on the way'
            return self._warning('lost', f'{text} ({self._node.image_topic}): {LOST_REMEDY}')
        return OK, f'{self._arrivals.hz(now):.1f} images per second'

    def _why_silent(self) -> str:
        topic = self._node.image_topic
        publishers = self._node.count_publishers(topic)
        if publishers == 0:
            own = self._node.get_fully_qualified_name()
            outputs = tuple(out.removeprefix(own) for out in self._node.pipeline.subscribers())
            found = ', '.join(  # neither what others wait for, nor what a flow node makes
                name
                for name, types in self._node.get_topic_names_and_types()
                if IMAGE_TYPES & {*types} and not name.endswith(outputs)
                and self._node.count_publishers(name)
            )  # fmt: skip
            hint = '-r image:=TOPIC; for TOPIC/compressed set image_transport to compressed'
            other = f'there is {found} (remap: {hint})' if found else 'nor any other image topic'
            return f'nothing publishes {topic}; {other}'
        if self._incompatible:
            return self._incompatible
        return f'{topic} has {publishers} publisher(s); if they do send, {LOST_REMEDY}'

    def _input_values(self, now: float, counts: dict[str, int]) -> dict[str, Any]:
        return {
            'topic': self._node.image_topic,
            'format': '{}x{} {}'.format(*self._format) if self._format else 'none yet',
            'rate': f'{self._arrivals.hz(now):.2f} Hz',
            'received': counts['received'],
            'lost in transport': counts['lost'],
        }

    def _flow(self, now: float, new: dict[str, int]) -> tuple[bytes, str]:
        node = self._node
        if node.reason:
            return ERROR, node.reason
        if not node.active:
            return OK, 'inactive' if node.pipeline.estimator else 'unconfigured'
        flow = node.resolve_topic_name('~/flow')
        if node.count_publishers(flow) > 1:
            text = f'another node publishes {flow}, too: give one another name or namespace'
            return self._warning('twice', text)
        if not node.pipeline.wanted():
            return OK, 'idle: nobody subscribes'
        if self._failing:
            return ERROR, self._last_error
        if new['failed']:
            return WARN, self._last_error
        if new['dropped'] and node.settings.process_every_frame:
            text = f'{new["dropped"]} images dropped: play the bag slower or raise queue_size'
            return self._warning('overflow', text)
        if new['restarted'] or new['skipped']:
            return WARN, self._last_restart
        return OK, f'{self._flows.hz(now):.1f} flows per second'

    def _flow_values(self, now: float, counts: dict[str, int]) -> dict[str, Any]:
        with self._lock:
            latency, inference = list(self._latency), list(self._inference)
        estimator, settings = self._node.pipeline.estimator, self._node.settings
        subscribers = self._node.pipeline.subscribers()
        middle = float(np.median(latency)) if latency else 0.0
        plausible = 0 <= middle <= PLAUSIBLE_LATENCY
        return {
            'model': estimator.name if estimator else settings.model,
            'device': estimator.device if estimator else settings.device,
            'precision': estimator.precision if estimator else settings.precision,
            'rate': f'{self._flows.hz(now):.2f} Hz',
            'latency': durations(latency)
            if plausible
            else f'unknown: image stamps are {middle:.0f} s off the clock of this node',
            'inference': durations(inference),
            'memory': resident_memory(),
            'GPU memory': self._node.pipeline.gpu_memory(),
            **counts,
            'last error': self._last_error or 'none',
            **{f'subscribers of {topic}': count for topic, count in subscribers.items()},
        }

    def _calibration(self) -> tuple[bytes, str, dict[str, Any]]:
        """Compare the camera_info with the images; flow needs no calibration, odometry does."""
        info, seen = self._camera_info, self._format
        values: dict[str, Any] = {'topic': self._node.camera_info_topic}
        if info is None:
            return OK, 'missing (flow needs none)', values
        width = (info.roi.width or info.width) // max(info.binning_x, 1)
        height = (info.roi.height or info.height) // max(info.binning_y, 1)
        values |= {'size': f'{width}x{height}', 'distortion': info.distortion_model or 'none'}
        if seen and seen[:2] != (width, height):
            text = f'it describes {width}x{height} pixels, images have {seen[0]}x{seen[1]}'
            return WARN, text, values
        return OK, 'calibrated' if info.k[0] else 'uncalibrated (K[0] is 0)', values

    def _odometry(self) -> tuple[bytes, str]:
        level, text = self._node.pipeline.cues.state()
        return {'ok': OK, 'warn': WARN, 'error': ERROR}[level], text

    def _warning(self, kind: str, text: str) -> tuple[bytes, str]:
        self.notices.warn(kind, text)
        return WARN, text

    def _now(self) -> float:
        return self._node.get_clock().now().nanoseconds / 1e9


def _status(name: str, level: bytes, message: str, values: dict[str, Any]) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=str(value)) for key, value in values.items()]
    return DiagnosticStatus(name=name, level=level, message=message, values=pairs)
