# SPDX-License-Identifier: Apache-2.0
"""
Every parameter of the node, in one table; rclpy is imported only where a node is at hand.

The node declares them from it and checks changes against it; `parameter_file` makes the config
file from it.
"""

from __future__ import annotations

from dataclasses import dataclass
import re
from types import SimpleNamespace
from typing import Any, TYPE_CHECKING

from perceiver_flow_ros.flow.estimator import PRECISIONS, QUALITIES, QUERY_STRIDES, TILINGS
from perceiver_flow_ros.odometry import Settings as OdometrySettings
from perceiver_flow_ros.odometry.settings import GYRO_USES, SCALES
from perceiver_flow_ros.ros.transforms import pose_of_text

if TYPE_CHECKING:
    from rcl_interfaces.msg import ParameterDescriptor
    from rclpy.node import Node


@dataclass(frozen=True)
class Setting:
    """One parameter: its default (which gives its type), its meaning, the values it takes."""

    name: str
    default: bool | int | float | str
    description: str
    low: Any = None
    high: Any = None
    choices: tuple = ()
    reloads: bool = False  # a change loads the model again
    fixed: bool = False  # set at start only
    optional: bool = False  # a text that may be empty

    @property
    def values(self) -> str:
        """The values it takes, in words; '' for any."""
        if self.choices:
            return ', '.join(str(choice) for choice in self.choices)
        return '' if self.low is None else f'{self.low} to {self.high}'

    @property
    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows and rclpy enforces."""
        from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

        result = ParameterDescriptor(description=self.description, read_only=self.fixed)
        if self.choices:
            result.additional_constraints = f'one of {self.values}'
        elif isinstance(self.default, float):
            limits = FloatingPointRange(from_value=self.low, to_value=self.high)
            result.floating_point_range = [limits]
        elif self.low is not None:
            result.integer_range = [IntegerRange(from_value=self.low, to_value=self.high, step=1)]
        return result

    def problem(self, value: Any) -> str:
        """Why a value is refused, beyond the type and range that rclpy checks; '' if it is not."""
        if self.choices and value not in self.choices:
            return f'{self.name} is {value!r}, expected one of {self.values}'
        if isinstance(value, str) and not value.strip() and not self.optional:
            return f'{self.name} is empty'
        return ''


SETTINGS = (
    Setting(
        'model', 'lite', reloads=True,
        description="Which estimator: lite (packaged weights), official (DeepMind's checkpoint "
        "in the local Hugging Face cache), dis (OpenCV's DIS, the classical baseline), a path to "
        'weights (a folder, .safetensors, pytorch_model.bin) or a Hugging Face id.',
    ),
    Setting(
        'device', 'auto', reloads=True,
        description='Where it runs: cpu, cuda, cuda:N, or auto (CUDA where there is one).',
    ),
    Setting(
        'precision', 'auto', choices=('auto', *PRECISIONS), reloads=True,
        description='auto is float32, the exact one; for official on CUDA it is a half precision '
        'where its flow differs by less than 0.05 px on a fixed pair. The others save time and '
        'memory on a GPU.',
    ),
    Setting(
        'quality', 'auto', choices=QUALITIES, reloads=True,
        description='Speed against accuracy of lite (auto: balanced) and dis (auto: best). On '
        'CUDA lite stops at half (fast) or full resolution and only best is refined. The official '
        'model has one setting.',
    ),
    Setting(
        'tiling', 'tile', choices=TILINGS, reloads=True,
        description='What the official model does with images that are not 368x496: blend tiles '
        'at full resolution, or resize to one tile (faster, coarser).',
    ),
    Setting(
        'query_stride', 1, choices=QUERY_STRIDES, reloads=True,
        description='Flow at every n-th row and column: the flow image has ceil(H/n) x ceil(W/n) '
        'vectors, still in pixels of the camera image.',
    ),
    Setting(
        'allow_download', False, reloads=True,
        description='Fetch missing weights from the Hugging Face hub when the model loads. '
        'Better: run fetch_weights at deploy time.',
    ),
    Setting(
        'threads', 0, low=0, high=256, reloads=True,
        description='CPU threads of PyTorch and OpenCV; 0 leaves their defaults.',
    ),
    Setting(
        'max_frame_gap', 1.0, low=0.001, high=3600.0,
        description='Seconds between two images, by their stamps, beyond which they make no pair.',
    ),
    Setting(
        'process_every_frame', False, fixed=True,
        description='Queue images instead of keeping the newest only. For bags: a slow model then '
        'falls behind a live camera.',
    ),
    Setting(
        'queue_size', 30, low=1, high=10000, fixed=True,
        description='Images that may wait with process_every_frame; then the oldest is dropped.',
    ),
    Setting(
        'image_reliability', 'best_effort', choices=('best_effort', 'reliable'), fixed=True,
        description='QoS reliability asked of the publishers of image, camera_info, depth, range '
        'and imu. best_effort receives from both kinds; reliable only from reliable ones, but '
        'loses nothing on the way.',
    ),
    Setting(
        'image_transport', 'raw', choices=('raw', 'compressed'), fixed=True,
        description='compressed subscribes to sensor_msgs/CompressedImage (JPEG or PNG) on '
        'image/compressed instead of image.',
    ),
    Setting(
        'scale_source', 'none', choices=SCALES,
        description='Where metres come from: camera_height (of a forward camera above the '
        'ground), depth (registered depth images on `depth`), range (distance along the '
        'optical axis of a downward camera, on `range`), or none: then only rotation and '
        'directions are published.',
    ),
    Setting(
        'camera_height', 0.0, low=0.0, high=100.0,
        description='Metres of the camera above the ground, for scale_source camera_height.',
    ),
    Setting(
        'base_frame', '', optional=True,
        description='Frame whose motion is published (base_link). Empty: that of the camera, in '
        'its optical frame.',
    ),
    Setting(
        'odom_frame', 'odom',
        description='Frame that ~/odometry starts in, at the first pair.',
    ),
    Setting(
        'base_from_camera', '', optional=True,
        description='Pose of the camera optical frame in base_frame: "x y z roll pitch yaw" '
        '(metres, radians) or "x y z qx qy qz qw". Empty: looked up in TF, which needs tf2_ros.',
    ),
    Setting(
        'base_from_imu', '', optional=True,
        description='Pose of the imu in base_frame (or in the camera optical frame where there is '
        'none), written like base_from_camera; only its rotation counts. Empty: looked up in TF.',
    ),
    Setting(
        'publish_tf', False,
        description='Publish the transform odom_frame -> base_frame; needs base_frame and the '
        'package tf2_msgs. Leave it to the filter (robot_localization) where there is one.',
    ),
    Setting(
        'rectified', False,
        description='The images are rectified: P of camera_info counts, not K and D.',
    ),
    Setting(
        'gyro', 'check', choices=GYRO_USES,
        description='What angular velocities on `imu` do: check (an estimate that disagrees is '
        'not published), replace (they are the rotation), or ignore.',
    ),
    Setting(
        'gyro_noise', 0.01, low=0.00001, high=1.0,
        description='Standard deviation of the angular velocity on `imu`, bias included, rad/s; '
        'in the pose it counts as the same error all the time.',
    ),
    Setting(
        'sync_tolerance', 0.05, low=0.0, high=10.0,
        description="Seconds by which the stamps of depth and range may differ from the image's; "
        'what may have changed meanwhile is in the covariance.',
    ),
    Setting(
        'depth_min', 0.1, low=0.0, high=1000.0,
        description='Metres; nearer depth is taken as unknown.',
    ),
    Setting(
        'depth_max', 20.0, low=0.01, high=10000.0,
        description='Metres; farther depth is taken as unknown.',
    ),
    Setting(
        'odometry_grid', 8, low=1, high=64,
        description='Pixels between the flow vectors that the motion is estimated from.',
    ),
    Setting(
        'forward_backward', False,
        description='Estimate the flow backward too, a second inference for each image, and weigh '
        'the motion by how well both agree. A subscriber of ~/confidence has the same effect.',
    ),
    Setting(
        'image_timeout', 5.0, low=0.1, high=3600.0,
        description='Seconds without an image after which the node warns and says why.',
    ),
    Setting(
        'color_max_magnitude', 0.0, low=0.0, high=10000.0,
        description='Pixels of motion shown in full colour on ~/flow/color; 0 takes the largest '
        'of each image.',
    ),
    Setting(
        'diagnostics_period', 1.0, low=0.05, high=3600.0,
        description='Seconds between two messages on /diagnostics.',
    ),
    Setting(
        'autostart', True, fixed=True,
        description='Configure and activate at start. false leaves both to a lifecycle manager.',
    ),
)
NAMES = {
    r"\bscale '": "scale_source '", r'\bmax_gap\b': 'max_frame_gap',
    r'\bdepth_max_offset\b': 'sync_tolerance',
}  # fmt: skip
BY_NAME = {setting.name: setting for setting in SETTINGS}


class Settings(SimpleNamespace):
    """The parameters' values, one attribute each; replaced as a whole, never changed."""

    @property
    def capacity(self) -> int:
        """How many images may wait for the estimator."""
        return self.queue_size if self.process_every_frame else 1

    def but(self, changes: dict[str, Any]) -> Settings:
        """Make a copy with some values changed."""
        return Settings(**{**vars(self), **changes})

    @property
    def inputs(self) -> tuple[str, bool]:
        """What decides which topics are subscribed to."""
        return self.scale_source, self.gyro == 'ignore'

    @property
    def odometry(self) -> OdometrySettings:
        """The settings of the odometry; ValueError where they do not go together."""
        if self.publish_tf and not self.base_frame:
            raise ValueError('publish_tf needs base_frame: the camera optical frame is no base')
        if self.publish_tf and self.base_frame == self.odom_frame:
            raise ValueError(f'publish_tf: odom_frame and base_frame are both {self.base_frame!r}')
        if self.base_from_camera.strip() and not self.base_frame:
            raise ValueError('base_from_camera needs base_frame, the frame it is given in')
        for name in ('base_from_camera', 'base_from_imu'):
            pose_of_text(getattr(self, name), name)
        try:
            return self._odometry()
        except ValueError as error:
            raise ValueError(in_words_of_the_node(str(error))) from None

    def _odometry(self) -> OdometrySettings:
        return OdometrySettings(
            scale=self.scale_source, camera_height=self.camera_height, grid=self.odometry_grid,
            max_gap=self.max_frame_gap, gyro=self.gyro, gyro_noise=self.gyro_noise,
            depth_min=self.depth_min, depth_max=self.depth_max,
            depth_max_offset=self.sync_tolerance,
        )  # fmt: skip

    def serves(self, other: Settings) -> bool:
        """Tell whether the estimator loaded for these settings also serves the others."""
        return all(getattr(self, s.name) == getattr(other, s.name) for s in SETTINGS if s.reloads)


def in_words_of_the_node(text: str) -> str:
    """Call the library's settings by the names of the node's parameters."""
    for pattern, name in NAMES.items():
        text = re.sub(pattern, name, text)
    return text


def declare(node: Node) -> Settings:
    """Declare all; an exception names a value given at start that is refused."""
    from rclpy.exceptions import InvalidParameterValueException

    values: dict[str, Any] = {}
    for s in SETTINGS:
        values[s.name] = node.declare_parameter(s.name, s.default, s.descriptor).value
        problem = s.problem(values[s.name])
        if problem:
            raise InvalidParameterValueException(s.name, values[s.name], problem)
    for name in node._parameter_overrides:  # rclpy offers no other way to see what was misspelled
        if not node.has_parameter(name) and not name.startswith('qos_overrides.'):
            node.get_logger().warning(f'{name!r} is no parameter of this node: ignored')
    settings = Settings(**values)
    _ = settings.odometry  # refused here, before anything is loaded
    return settings


def defaults() -> Settings:
    """Give every parameter at its default."""
    return Settings(**{s.name: s.default for s in SETTINGS})
