# SPDX-License-Identifier: Apache-2.0
"""What can be chosen of the odometry, what comes out of it, and why nothing may come out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
import enum
import math

import numpy as np

SCALES = ('none', 'camera_height', 'depth', 'range')
GYRO_USES = ('ignore', 'check', 'replace')  # (YAML reads a bare off as false)
UNKNOWN = 1e6  # variance of what is not known, (m/s)^2: a km/s, yet no number that breaks a filter


class Reason(str, enum.Enum):
    """Why a pair of frames gave no motion, or no metres; NONE where all is well."""

    NONE = ''
    NO_CAMERA = 'no_camera'  # no camera_info, or one that was refused
    NO_TRANSFORM = 'no_transform'  # where the camera is on the base is not known
    SIZE = 'size'  # flow or images do not fit the camera
    BAD_FLOW = 'bad_flow'  # wrong shape or type, or not a single number in it
    BAD_STAMPS = 'bad_stamps'  # the time between the frames is not positive
    GAP = 'gap'  # it is too long
    REPEATED = 'repeated'  # both images are the same, bit by bit: the camera is stuck
    DARK = 'dark'
    TEXTURELESS = 'textureless'
    BLURRED = 'blurred'
    FEW_PIXELS = 'few_pixels'
    NO_CONSENSUS = 'no_consensus'  # no motion explains enough of the pixels
    AMBIGUOUS = 'ambiguous'  # two motions explain them as well
    GYRO = 'gyro'  # the gyro says otherwise
    NO_DEPTH = 'no_depth'
    DEPTH_SIZE = 'depth_size'
    DEPTH_STAMP = 'depth_stamp'
    DEPTH_UNKNOWN = 'depth_unknown'  # NaN, Inf or 0 (nearly) everywhere
    NO_HEIGHT = 'no_height'  # no range, or none that is a distance
    NO_GROUND = 'no_ground'  # no plane below the camera, or not where it must be
    ERROR = 'error'  # unexpected; the message has it


class Refused(Exception):
    """Raised inside the odometry where a pair can give nothing; `update` turns it into words."""

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason, self.message = reason, message


def _number(default, low, high, unit, what):
    """Describe a setting that is a number within a range."""
    return field(default=default, metadata={'range': (low, high), 'unit': unit, 'what': what})


@dataclass(frozen=True)
class Settings:
    """
    What can be chosen; ranges, units and meanings are in the fields' metadata.

    Raises
    ------
    ValueError
        For a value that is not one of the choices, or out of its range.

    """

    scale: str = field(
        default='none',
        metadata={'choices': SCALES, 'what': 'where metres come from'},
    )
    camera_height: float = _number(
        0.0, 0.0, 100.0, 'm', 'height of the camera above the ground; for scale camera_height'
    )
    grid: int = _number(8, 1, 64, 'px', 'spacing of the flow vectors that are used')
    max_samples: int = _number(4000, 200, 100_000, '', 'vectors used at most, on a wider grid')
    min_samples: int = _number(100, 20, 100_000, '', 'usable vectors needed')
    max_gap: float = _number(1.0, 0.001, 3600.0, 's', 'time between the frames at most')
    flow_noise: float = _number(
        0.05, 0.001, 10.0, 'px', 'noise of flow that is assumed at least: less is no motion'
    )
    gyro: str = field(
        default='check',
        metadata={'choices': GYRO_USES, 'what': 'whether a gyro checks or replaces the rotation'},
    )
    gyro_noise: float = _number(0.01, 1e-5, 1.0, 'rad/s', 'deviation of its mean rate, per axis')
    depth_min: float = _number(0.1, 0.0, 1000.0, 'm', 'nearer depth is unknown')
    depth_max: float = _number(20.0, 0.01, 10_000.0, 'm', 'farther depth is unknown')
    depth_max_offset: float = _number(
        0.05, 0.0, 10.0, 's', 'between the stamps of depth and image'
    )

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if 'choices' in entry.metadata:
                if value not in entry.metadata['choices']:
                    choices = ', '.join(map(repr, entry.metadata['choices']))
                    raise ValueError(f'{entry.name} is {value!r}, expected one of {choices}')
                continue
            low, high = entry.metadata['range']
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high:
                unit = entry.metadata['unit']
                raise ValueError(
                    f'{entry.name} is {value!r}, expected {low} to {high} {unit}'.rstrip()
                )
        if self.scale == 'camera_height' and not self.camera_height > 0:
            raise ValueError(
                "scale 'camera_height' needs camera_height, the metres of the camera above the "
                f'ground; it is {self.camera_height}'
            )
        if self.depth_min >= self.depth_max:
            raise ValueError(f'depth_min {self.depth_min} is not below depth_max {self.depth_max}')


def _nan(*shape: int):
    return field(default_factory=lambda: np.full(shape, math.nan))


@dataclass(frozen=True)
class Estimate:
    """
    What a pair of frames tells of the camera's motion; see the fields.

    Twists are [v, w], m/s and rad/s, with (6, 6) covariances. Where `metric` is false v is NaN,
    and its variances `UNKNOWN`.
    """

    valid: bool = False  # else nothing but the pose means anything
    metric: bool = False  # the translation is in metres
    reason: Reason = Reason.NONE  # why not valid, or why not metric though a source is set
    message: str = ''  # the same for people: what was wrong, what was expected, what to do
    kind: str = ''  # 'stationary' | 'rotation' | 'general' | 'planar'
    dt: float = math.nan  # seconds
    motion: np.ndarray = _nan(4, 4)
    """T_previous_current: the current camera in the previous one's frame; the translation is
    exactly 0 for stationary and rotation, and of unit length where not metric."""
    direction: np.ndarray = _nan(3)  # unit vector of the camera's motion, current camera frame
    base_direction: np.ndarray = _nan(3)  # the same of the base, in the base frame
    twist: np.ndarray = _nan(6)  # of the camera, in the camera optical frame
    twist_covariance: np.ndarray = _nan(6, 6)
    base_twist: np.ndarray = _nan(6)  # of the base, in the base frame, lever arm included
    base_twist_covariance: np.ndarray = _nan(6, 6)
    pose: np.ndarray = field(default_factory=lambda: np.eye(4))  # T_odom_base
    pose_covariance: np.ndarray = field(default_factory=lambda: np.zeros((6, 6)))
    """(x, y, z, rotX, rotY, rotZ) about the axes of odom, as nav_msgs/Odometry wants it."""
    focus_of_expansion: np.ndarray = _nan(2)  # px, current image; NaN where there is none
    moving: float = math.nan  # 0..1, share of the samples that move against the ego-motion
    noise: float = math.nan  # px, residual of the flow
    samples: int = 0
    inliers: int = 0

    @property
    def usable(self) -> bool:
        """The twist may be published: valid, and metric (or never asked to be)."""
        return self.valid and self.reason == Reason.NONE
