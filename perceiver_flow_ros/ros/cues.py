# SPDX-License-Identifier: Apache-2.0
"""The node's odometry: its inputs, its outputs, and what diagnostics say of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, TYPE_CHECKING

from geometry_msgs.msg import PointStamped, TwistWithCovarianceStamped
from nav_msgs.msg import Odometry
import numpy as np
from perceiver_flow_ros.odometry import cues, Reason
from perceiver_flow_ros.ros import messages
from perceiver_flow_ros.ros.frames import Frame
from perceiver_flow_ros.ros.motion import Motion, Outcome, time_to_contact
from perceiver_flow_ros.ros.parameters import Settings
from perceiver_flow_ros.ros.topics import create_input, create_output
from perceiver_flow_ros.ros.transforms import Tf
from rclpy.subscription import Subscription
from sensor_msgs.msg import Image, Imu, Range

if TYPE_CHECKING:
    from perceiver_flow_ros.ros.node import FlowNode

OUTPUTS = {
    'twist': TwistWithCovarianceStamped,
    'odometry': Odometry,
    'focus_of_expansion': PointStamped,
    'time_to_contact': Image,
    'confidence': Image,
}
DEPTH = 10  # messages that may wait
IMU_DEPTH = 200  # an imu sends many between two images
STATIC = (Reason.NO_TRANSFORM, Reason.NO_CAMERA)  # what does not pass by itself


class Cues:
    """
    What is published beside the flow.

    Parameters
    ----------
    node : whose settings hold, and whose diagnostics are told what goes wrong.

    """

    def __init__(self, node: FlowNode) -> None:
        self._node = node
        self._maker = messages.ros_maker()
        self._tf = Tf(node)
        self._broadcaster: Any = None
        self.motion = Motion(node.settings, self._tf)
        self.outputs = {
            name: create_output(node, kind, f'~/{name}', node.diagnostics.output_incompatible)
            for name, kind in OUTPUTS.items()
        }
        self._outcome: Outcome | None = None  # of the last pair
        self._seconds: deque[float] = deque(maxlen=100)
        self._counts = {'estimates': 0, 'not published': 0}

    def check(self, settings: Settings) -> None:
        """Raise ValueError where settings do not go together, or need what is not installed."""
        _ = settings.odometry
        if settings.publish_tf:
            try:
                import tf2_msgs.msg  # noqa: F401
            except ImportError as error:
                raise ValueError(f'publish_tf needs the ROS package tf2_msgs ({error})') from None

    def adopt(self, settings: Settings) -> None:
        """Follow other settings, which were checked, from the next pair on."""
        if settings.publish_tf and self._broadcaster is None:
            from tf2_msgs.msg import TFMessage

            self._broadcaster = self._node.create_publisher(TFMessage, '/tf', 100)
        if settings.base_frame and not settings.base_from_camera.strip():
            self._tf.listen()
        self.motion.settings = settings

    def subscribe(self, reliability: str) -> Iterator[Subscription]:
        """Subscribe to what the settings make use of."""
        settings, motion = self._node.settings, self.motion
        inputs = {
            'depth': (Image, motion.depth_came, DEPTH, settings.scale_source == 'depth'),
            'range': (Range, motion.range_came, DEPTH, settings.scale_source == 'range'),
            'imu': (Imu, motion.imu_came, IMU_DEPTH, settings.gyro != 'ignore'),
        }
        for name, (kind, callback, depth, wanted) in inputs.items():
            if wanted:
                yield create_input(
                    self._node, kind, name, callback, depth=depth, reliability=reliability,
                    on_incompatible=partial(self._incompatible, name),
                )  # fmt: skip

    def _incompatible(self, name: str, policy: str) -> None:
        topic = self._node.resolve_topic_name(name)
        self._node.diagnostics.notices.warn(topic, (
            f'a publisher of {topic} offers another {policy} than this node asks for, so nothing '
            f'comes from it: change it, or set qos_overrides.{topic}.subscription.{policy}'
        ))  # fmt: skip

    def activated(self) -> None:
        """Begin anew."""
        self.motion.clear()
        self._outcome = None

    def wanted(self) -> set[str]:
        """Name the outputs that somebody subscribes to, and 'tf' where it is published."""
        names = {name for name, out in self.outputs.items() if out.get_subscription_count()}
        return names | ({'tf'} if self._node.settings.publish_tf else set())

    # In the worker's thread

    def missed(self, previous: Frame, current: Frame) -> None:
        """Have the pose know of a time without flow."""
        self._outcome = self.motion.follow(previous, current, None)

    def follow(
        self, previous: Frame, current: Frame, flow: np.ndarray, stride: int,
        backward: np.ndarray | None, wanted: set[str],
    ) -> None:
        """Estimate the motion of a pair and publish what is wanted of it."""
        header, stamp, maker = current.header, current.header.stamp, self._maker
        if 'confidence' in wanted and backward is not None:
            share = cues.confidence(flow, backward, stride)[..., None]
            self.outputs['confidence'].publish(maker.image(share, '32FC1', header))
        if not wanted - {'confidence'}:
            return
        outcome = self.motion.follow(previous, current, flow, stride=stride, backward=backward)
        self._note(outcome)
        estimate, frames = outcome.estimate, outcome.frames
        if estimate.usable:
            if 'twist' in wanted:
                twist = messages.twist(maker, stamp, estimate, frames)
                self.outputs['twist'].publish(twist)
            if estimate.metric and 'odometry' in wanted:
                odometry = messages.odometry(maker, stamp, estimate, frames)
                self.outputs['odometry'].publish(odometry)
            # (no lifecycle publisher: it may be made while the node is active)
            sends = self._broadcaster is not None and self._node.active
            if estimate.metric and 'tf' in wanted and sends:
                self._broadcaster.publish(messages.tf(maker, stamp, estimate, frames))
        if estimate.valid and 'focus_of_expansion' in wanted:
            point = messages.focus_of_expansion(maker, header, estimate)
            if point is not None:
                self.outputs['focus_of_expansion'].publish(point)
        if 'time_to_contact' in wanted:
            seconds = time_to_contact(outcome, flow, stride)
            if seconds is not None:
                self.outputs['time_to_contact'].publish(maker.image(seconds, '32FC1', header))

    def _note(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._seconds.append(outcome.seconds)
        self._counts['estimates'] += 1
        notices, reason = self._node.diagnostics.notices, outcome.reason
        if reason:
            self._counts['not published'] += 1
            say = notices.error if reason in STATIC else notices.warn
            say(f'odometry {reason}', f'no motion: {outcome.estimate.message}')
        elif outcome.remark:
            notices.warn('odometry remark', outcome.remark)

    # For diagnostics

    def state(self) -> tuple[str, str]:
        """Tell 'ok', 'warn' or 'error', and why in words."""
        if not self._node.active or not self.wanted():
            return 'ok', 'idle: nobody subscribes' if self._node.active else 'inactive'
        outcome = self._outcome
        if outcome is None:
            return 'ok', 'no pair of images yet'
        estimate = outcome.estimate
        if outcome.reason:
            level = 'error' if outcome.reason in STATIC else 'warn'
            return level, f'no motion ({outcome.reason}): {estimate.message}'
        if outcome.remark:
            return 'warn', outcome.remark
        metres = '' if estimate.metric else ', no metres (scale_source is none)'
        return 'ok', f'{estimate.kind} motion{metres}'

    def values(self) -> dict[str, Any]:
        """Give the figures of the last pair."""
        settings, outcome = self._node.settings, self._outcome
        values: dict[str, Any] = {
            'scale source': settings.scale_source,
            'base frame': settings.base_frame or 'none (camera optical frame)',
            **self._counts,
        }
        if outcome is None:
            return values
        estimate, camera = outcome.estimate, outcome.camera
        values['reason'] = outcome.reason or 'none'
        if camera is not None:
            scaled = ', scaled to the images' if camera.scaled else ''
            values['camera'] = f'fx {camera.fx:.1f} fy {camera.fy:.1f} {camera.model}{scaled}'
        if estimate.valid:
            values |= {
                'motion': estimate.kind,
                'inliers': f'{estimate.inliers} of {estimate.samples}',
                'moving share': f'{estimate.moving:.3f}',
                'flow noise': f'{estimate.noise:.3f} px',
            }
        if self._seconds:
            ms = 1e3 * np.array(self._seconds)
            values['time'] = f'mean {ms.mean():.1f} ms, p95 {np.percentile(ms, 95):.1f} ms'
        return values
