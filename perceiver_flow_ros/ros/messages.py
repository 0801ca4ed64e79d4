# SPDX-License-Identifier: Apache-2.0
"""
What is said of a pair of images, as messages: for the node and, without ROS, for bags.

Every function takes a `Maker`, which makes messages of a type from all of their fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import importlib
from typing import Any

import numpy as np
from perceiver_flow_ros.odometry import Estimate
from perceiver_flow_ros.odometry.settings import UNKNOWN
from perceiver_flow_ros.ros.transforms import quaternion_of_turn

IMAGE = 'sensor_msgs/msg/Image'
FLOW = {'flow': IMAGE, 'flow/previous': 'sensor_msgs/msg/TimeReference', 'flow/color': IMAGE}
CUES = {
    'twist': 'geometry_msgs/msg/TwistWithCovarianceStamped',
    'odometry': 'nav_msgs/msg/Odometry',
    'focus_of_expansion': 'geometry_msgs/msg/PointStamped',
    'time_to_contact': IMAGE,
    'confidence': IMAGE,
}
TF = 'tf2_msgs/msg/TFMessage'


@dataclass(frozen=True)
class Maker:
    """Makes messages: `make(type, **fields)`, and `image(array, encoding, header)`."""

    make: Callable[..., Any]
    image: Callable[[np.ndarray, str, Any], Any]


def ros_maker() -> Maker:
    """Give the maker of the installed ROS's messages."""
    from perceiver_flow_ros.ros.conversion import to_message

    def make(kind: str, **fields: Any) -> Any:
        package, _, name = kind.split('/')
        return getattr(importlib.import_module(f'{package}.msg'), name)(**fields)

    return Maker(make, to_message)


@dataclass(frozen=True)
class Frames:
    """The names of the frames of one estimate; `base` is the camera's where no base is set."""

    base: str
    odom: str


def time_reference(maker: Maker, header: Any, previous: Any) -> Any:
    """Tell the stamp of the image that a flow starts from."""
    return maker.make(
        FLOW['flow/previous'], header=header, time_ref=previous, source='previous image'
    )


def twist(maker: Maker, stamp: Any, estimate: Estimate, frames: Frames) -> Any:
    """Make ~/twist; a velocity without metres is zero with a variance of 1e6."""
    return maker.make(
        CUES['twist'], header=_header(maker, stamp, frames.base), twist=_twist(maker, estimate)
    )


def odometry(maker: Maker, stamp: Any, estimate: Estimate, frames: Frames) -> Any:
    """Make ~/odometry: the pose in odom, the twist in the base."""
    pose = maker.make(
        'geometry_msgs/msg/Pose',
        position=_vector(maker, 'Point', estimate.pose[:3, 3]),
        orientation=_quaternion(maker, estimate.pose),
    )
    return maker.make(
        CUES['odometry'],
        header=_header(maker, stamp, frames.odom),
        child_frame_id=frames.base,
        pose=maker.make(
            'geometry_msgs/msg/PoseWithCovariance',
            pose=pose,
            covariance=np.ascontiguousarray(estimate.pose_covariance, np.float64).ravel(),
        ),
        twist=_twist(maker, estimate),
    )


def tf(maker: Maker, stamp: Any, estimate: Estimate, frames: Frames) -> Any:
    """Make the transform odom -> base for /tf."""
    transform = maker.make(
        'geometry_msgs/msg/Transform',
        translation=_vector(maker, 'Vector3', estimate.pose[:3, 3]),
        rotation=_quaternion(maker, estimate.pose),
    )
    stamped = maker.make(
        'geometry_msgs/msg/TransformStamped',
        header=_header(maker, stamp, frames.odom),
        child_frame_id=frames.base,
        transform=transform,
    )
    return maker.make(TF, transforms=[stamped])


def focus_of_expansion(maker: Maker, header: Any, estimate: Estimate) -> Any | None:
    """Make ~/focus_of_expansion, z = 1 where the camera nears it, -1 where it leaves; or None."""
    x, y = estimate.focus_of_expansion
    if not np.isfinite([x, y]).all():
        return None
    side = float(np.sign(estimate.direction[2]))
    return maker.make(
        CUES['focus_of_expansion'], header=header, point=_vector(maker, 'Point', (x, y, side))
    )


def _twist(maker: Maker, estimate: Estimate) -> Any:
    values = np.array(estimate.base_twist, np.float64)
    covariance = np.array(estimate.base_twist_covariance, np.float64)
    unknown = ~np.isfinite(values)
    values[unknown] = 0.0  # NaN would poison a filter that looks at values before variances
    covariance[unknown], covariance[:, unknown] = 0.0, 0.0
    covariance[unknown, unknown] = UNKNOWN
    return maker.make(
        'geometry_msgs/msg/TwistWithCovariance',
        twist=maker.make(
            'geometry_msgs/msg/Twist',
            linear=_vector(maker, 'Vector3', values[:3]),
            angular=_vector(maker, 'Vector3', values[3:]),
        ),
        covariance=covariance.ravel(),
    )


def _header(maker: Maker, stamp: Any, frame: str) -> Any:
    return maker.make('std_msgs/msg/Header', stamp=stamp, frame_id=frame)


def _vector(maker: Maker, kind: str, xyz: Any) -> Any:
    x, y, z = (float(n) for n in xyz)
    return maker.make(f'geometry_msgs/msg/{kind}', x=x, y=y, z=z)


def _quaternion(maker: Maker, pose: np.ndarray) -> Any:
    x, y, z, w = (float(n) for n in quaternion_of_turn(pose[:3, :3]))
    return maker.make('geometry_msgs/msg/Quaternion', x=x, y=y, z=z, w=w)
