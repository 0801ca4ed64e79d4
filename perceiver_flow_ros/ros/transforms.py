# SPDX-License-Identifier: Apache-2.0
"""Poses of frames in each other: from a parameter, from TF, or not at all; never a guess."""

from __future__ import annotations

from collections.abc import Iterable
import math
from typing import Any, TYPE_CHECKING

import numpy as np
from perceiver_flow_ros.odometry.geometry import inverse, transform

if TYPE_CHECKING:
    from rclpy.node import Node


class NoTransform(LookupError):
    """A pose that nobody told; the text names both frames and the fix."""


def pose_of_text(text: str, name: str) -> np.ndarray | None:
    """
    Read a pose (4, 4) from "x y z roll pitch yaw" or "x y z qx qy qz qw"; None where it is empty.

    Angles are radians about the fixed axes x, y, z in this order (REP-103).

    Raises
    ------
    ValueError
        When it is neither; `name` is the parameter's.

    """
    if not text.strip():
        return None
    expected = f'{name} is {text!r}, expected "x y z roll pitch yaw" or "x y z qx qy qz qw"'
    try:
        numbers = [float(word) for word in text.replace(',', ' ').split()]
    except ValueError:
        raise ValueError(expected) from None
    if len(numbers) not in (6, 7) or not all(map(math.isfinite, numbers)):
        raise ValueError(expected)
    if len(numbers) == 7:
        length = math.hypot(*numbers[3:])
        if abs(length - 1) > 0.01:
            raise ValueError(f'{name}: the quaternion has length {length:.3f}, expected 1')
        return transform(turn_of_quaternion(numbers[3:]), np.array(numbers[:3]))
    return transform(turn_of_angles(*numbers[3:]), np.array(numbers[:3]))


def turn_of_angles(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Give the rotation (3, 3) about the fixed axes x, y, z."""
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    return np.array([
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ])  # fmt: skip


def turn_of_quaternion(quaternion: Iterable[float]) -> np.ndarray:
    """Give the rotation (3, 3) of (x, y, z, w), of any length but zero."""
    q = np.array(list(quaternion), float)
    x, y, z, w = q / np.linalg.norm(q)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def quaternion_of_turn(turn: np.ndarray) -> np.ndarray:
    """Give (x, y, z, w), w >= 0, of a rotation (3, 3)."""
    # The largest of the four is found without loss; the others follow from sums (Shepperd 1978).
    diagonal = np.array([*np.diag(turn), np.trace(turn)])
    i = int(np.argmax(diagonal))
    if i == 3:
        q = np.array([
            turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1],
            1 + diagonal[3],
        ])  # fmt: skip
    else:
        j, k = (i + 1) % 3, (i + 2) % 3
        q = np.empty(4)
        q[i] = 1 + turn[i, i] - turn[j, j] - turn[k, k]
        q[j], q[k] = turn[i, j] + turn[j, i], turn[i, k] + turn[k, i]
        q[3] = turn[k, j] - turn[j, k]
    return q / np.linalg.norm(q) * (1 if q[3] >= 0 else -1)


def pose_of_message(message: Any) -> np.ndarray:
    """Give (4, 4) of a geometry_msgs/Transform; NoTransform where it is none."""
    t, q = message.translation, message.rotation
    length = math.hypot(q.x, q.y, q.z, q.w)
    if not (0.9 < length < 1.1 and all(map(math.isfinite, (t.x, t.y, t.z)))):
        raise NoTransform(f'it has a quaternion of length {length:.3f}, expected 1, and goes '
                          f'({t.x:g}, {t.y:g}, {t.z:g}) m')
    return transform(turn_of_quaternion((q.x, q.y, q.z, q.w)), np.array([t.x, t.y, t.z]))


class StaticTree:
    """
    Poses from the transforms that a bag has stored, without tf2.

    A transform that changes counts as it was stored first: a camera sits where it sits.
    """

    def __init__(self) -> None:
        self._parents: dict[str, tuple[str, Any]] = {}

    def add(self, message: Any) -> None:
        """Take a tf2_msgs/TFMessage."""
        for t in message.transforms:
            parent, child = t.header.frame_id.strip('/'), t.child_frame_id.strip('/')
            self._parents.setdefault(child, (parent, t.transform))

    def __call__(self, target: str, source: str) -> np.ndarray:
        """Give the pose (4, 4) of `source` in `target`; NoTransform where none is known."""
        (root, pose), (other, reference) = self._to_root(source), self._to_root(target)
        if root != other:
            raise NoTransform(
                f'no transform from {source!r} to {target!r} in /tf_static or /tf of the bag: set '
                'base_from_camera (base_from_imu for an imu), or base_frame'
            )
        return inverse(reference) @ pose

    def _to_root(self, frame: str) -> tuple[str, np.ndarray]:
        frame, pose, passed = frame.strip('/'), np.eye(4), set()
        while frame in self._parents and frame not in passed:
            passed.add(frame)
            child, (frame, step) = frame, self._parents[frame]
            try:
                pose = pose_of_message(step) @ pose
            except NoTransform as error:
                raise NoTransform(f'the transform from {child!r} to {frame!r} in the bag is '
                                  f'none: {error}') from None
        return frame, pose


class Tf:
    """Poses from tf2_ros, imported at the first question: no registry of packages has it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._buffer: Any = None

    def listen(self) -> None:
        """Begin to listen, so that the transforms are there when they are asked for."""
        if self._buffer is None:
            try:
                import tf2_ros
            except ImportError:
                return  # said when it is asked for
            self._buffer = tf2_ros.Buffer()
            self._listener = tf2_ros.TransformListener(self._buffer, self._node)

    def __call__(self, target: str, source: str) -> np.ndarray:
        """Give the pose (4, 4) of `source` in `target`; NoTransform where none is known."""
        what = f'no transform from {source!r} to {target!r}'
        fix = 'set base_from_camera (base_from_imu for an imu)'
        if not source:
            raise NoTransform(f'{what}: the message has no frame_id; the driver must set it')
        self.listen()
        if self._buffer is None:
            raise NoTransform(f'{what}: tf2_ros is not installed; install it, or {fix}')
        from rclpy.time import Time

        try:
            found = self._buffer.lookup_transform(target, source, Time())
            return pose_of_message(found.transform)
        except Exception as error:  # tf2 has many kinds, all of them say what is missing
            raise NoTransform(
                f'{what} ({error}): publish it (robot_state_publisher, '
                f'static_transform_publisher), or {fix}'
            ) from None
