# SPDX-License-Identifier: Apache-2.0
"""
From flow and the other sensors' messages to an estimate of motion; needs no ROS.

Messages are any objects with the fields of the ROS ones. They may come from another thread than
the flow; each is looked up by its stamp when a pair of images asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
import time
from typing import Any

import numpy as np
from perceiver_flow_ros.odometry import (
    Camera,
    CameraError,
    cues,
    Estimate,
    GyroGap,
    mean_rate,
    Odometry,
    Reason,
)
from perceiver_flow_ros.odometry.geometry import inverse
from perceiver_flow_ros.ros.conversion import BadImage, to_depth
from perceiver_flow_ros.ros.frames import Frame, nanoseconds
from perceiver_flow_ros.ros.messages import Frames
from perceiver_flow_ros.ros.parameters import in_words_of_the_node, Settings
from perceiver_flow_ros.ros.stamped import Stamped
from perceiver_flow_ros.ros.transforms import NoTransform, pose_of_text

IMAGES, SAMPLES = 200, 20_000  # of a topic that wait at most: depth images, all else,
AN_IMAGE = 4, 40  # and as many more of each for an image that waits
APART = 0.2  # of the time between two images, by which that between their depths may differ
CAMERAS = 30  # calibrations that are kept
GYRO_GAP = 0.1  # s without a gyro sample at most
NEW_POSE = ('scale_source', 'camera_height', 'base_frame', 'base_from_camera', 'odom_frame')


@dataclass(frozen=True)
class Outcome:
    """What is known after a pair of images."""

    estimate: Estimate
    frames: Frames
    camera: Camera | None = None
    remark: str = ''  # what could not be used though it was given
    seconds: float = 0.0  # that it took

    @property
    def reason(self) -> str:
        """Why the twist is not published, in a word; '' where it is."""
        return self.estimate.reason.value


class Motion:
    """
    The odometry of one camera.

    Parameters
    ----------
    settings : the node's parameters.
    lookup : gives the pose (4, 4) of a frame (second argument) in another (first), or raises
        NoTransform.

    """

    def __init__(self, settings: Settings, lookup: Callable[[str, str], np.ndarray]) -> None:
        self._lookup = lookup
        depths, samples = (per * settings.capacity for per in AN_IMAGE)
        self._depths = Stamped(IMAGES + depths)
        self._infos, self._ranges, self._rates = (Stamped(SAMPLES + samples) for _ in range(3))
        self._cameras: dict[tuple, Camera] = {}
        self._adopted: Settings | None = None
        self._forget = True
        self.settings = settings

    # What comes from other topics

    def described(self, info: Any) -> None:
        """Take a sensor_msgs/CameraInfo."""
        self._infos.put(_seconds(info), info)

    def depth_came(self, image: Any) -> None:
        """Take a depth image (sensor_msgs/Image)."""
        self._depths.put(_seconds(image), image)

    def range_came(self, message: Any) -> None:
        """Take a sensor_msgs/Range."""
        self._ranges.put(_seconds(message), message)

    def imu_came(self, message: Any) -> None:
        """Take a sensor_msgs/Imu."""
        if message.angular_velocity_covariance[0] == -1:  # "no gyro", as the message defines it
            return
        w = message.angular_velocity
        self._rates.put(_seconds(message), ((w.x, w.y, w.z), message.header.frame_id))

    def reset(self) -> None:
        """Have the next pair start a new pose."""
        self._forget = True

    def passed(self, stamp: float) -> None:
        """Drop what came before an image (s): no older one will be asked about."""
        for topic in (self._infos, self._depths, self._ranges, self._rates):
            topic.forget(stamp - GYRO_GAP)

    def clear(self) -> None:
        """Forget what came, and the pose."""
        for topic in (self._infos, self._depths, self._ranges, self._rates):
            topic.clear()
        self.reset()

    # The motion

    def follow(
        self, previous: Frame, current: Frame, flow: np.ndarray | None, *, stride: int = 1,
        backward: np.ndarray | None = None,
    ) -> Outcome:
        """
        Estimate the motion between two frames and add it to the pose. Raises nothing.

        Parameters
        ----------
        flow : (h, w, 2) px at the pixels [::stride, ::stride] of the previous image; None where
            the frames make no pair: the pose stays, and is worth less.
        backward : the same from current to previous, or None.

        """
        begin = time.perf_counter()
        settings = self.settings
        before, now = previous.stamp / 1e9, current.stamp / 1e9
        self.passed(before)
        frames = Frames(settings.base_frame or current.header.frame_id, settings.odom_frame)
        try:
            if not frames.base:
                raise NoTransform('the images have no frame_id: the driver must set it, or set '
                                  'base_frame and base_from_camera')
            self._adopt(settings, current.header.frame_id)
        except NoTransform as error:
            return Outcome(Estimate(reason=Reason.NO_TRANSFORM, message=str(error)), frames)
        camera, complaint = self._camera(previous, current, settings.rectified)
        sources, remark = self._sources(settings, before, now, current.header.frame_id)
        estimate = self._odometry.update(
            flow, camera, before, now, stride=stride, backward=backward,
            previous_image=previous.image, image=current.image, **sources,
        )  # fmt: skip
        if estimate.reason == Reason.NO_CAMERA:
            estimate = replace(estimate, message=complaint)
        elif remark and estimate.reason in (Reason.NO_DEPTH, Reason.NO_HEIGHT):
            estimate, remark = replace(estimate, message=remark), ''
        estimate = replace(estimate, message=in_words_of_the_node(estimate.message))
        return Outcome(estimate, frames, camera, remark, time.perf_counter() - begin)

    def _adopt(self, settings: Settings, camera_frame: str) -> None:
        """Bring the odometry to the settings; some of them start the pose anew."""
        old = self._adopted
        if self._forget or old is None or any(
            getattr(old, name) != getattr(settings, name) for name in NEW_POSE
        ):
            pose = self._base_from(camera_frame, settings.base_from_camera, settings)
            self._odometry = Odometry(settings.odometry, pose)
            self._forget = False
        elif old is not settings:
            self._odometry.settings = settings.odometry
        self._adopted = settings

    def _base_from(self, frame: str, told: str, settings: Settings) -> np.ndarray | None:
        """Give the pose of a frame in the base: as told, else by TF; None where it is the base."""
        pose = pose_of_text(told, '')
        if pose is not None or settings.base_frame in ('', frame):
            return pose
        return self._lookup(settings.base_frame, frame)

    def _camera(
        self, previous: Frame, current: Frame, rectified: bool
    ) -> tuple[Camera | None, str]:
        """Give the camera of both frames, or None and why there is none."""
        if current.size != previous.size:
            return None, 'the images changed their size'
        infos = [self._infos.valid_at(frame.stamp / 1e9) for frame in (previous, current)]
        if infos[0] is None:
            return None, 'no camera_info has come: publish it beside the images, or remap it'
        try:
            cameras = [self._camera_of(info, current.size, rectified) for info in infos]
        except CameraError as error:
            return None, str(error)
        if cameras[0] != cameras[1]:
            return None, 'camera_info changed between the two images'
        return cameras[0], ''

    def _camera_of(self, info: Any, size: tuple[int, int], rectified: bool) -> Camera:
        roi = info.roi.x_offset, info.roi.y_offset, info.roi.width, info.roi.height
        key = (
            info.width, info.height, *info.k, *info.d, *info.p, info.distortion_model,
            info.binning_x, info.binning_y, *roi, rectified, size,
        )  # fmt: skip
        if key not in self._cameras:
            if len(self._cameras) > CAMERAS:  # a zoom lens: another camera at every image
                self._cameras.clear()
            self._cameras[key] = Camera.from_info(
                info.width, info.height, list(info.k), list(info.d), list(info.r), list(info.p),
                info.distortion_model, binning_x=info.binning_x, binning_y=info.binning_y,
                roi=roi, rectified=rectified, image_size=size,
            )  # fmt: skip
        return self._cameras[key]

    def _sources(
        self, settings: Settings, before: float, now: float, camera_frame: str
    ) -> tuple[dict[str, Any], str]:
        """Look up depth, range and gyro for a pair; what is missing or bad is remarked."""
        found: dict[str, Any] = {}
        remarks = []
        for name, look in (('depth', self._depth), ('range', self._height)):
            if settings.scale_source == name:
                try:
                    found |= look(before, now)
                except ValueError as error:
                    remarks.append(str(error))
        if settings.gyro != 'ignore':
            try:
                found |= self._gyro(settings, before, now, camera_frame)
            except (GyroGap, NoTransform) as error:
                remarks.append(f'gyro not used: {error}')
        return found, '; '.join(remarks)

    def _depth(self, before: float, now: float) -> dict[str, Any]:
        """Give the depth of the previous image; of the current one, too, where it has come."""
        found, newer = self._depths.nearest(before), self._depths.nearest(now)
        if found is None or newer is None:
            raise ValueError('no depth image has come: remap depth to a registered depth topic')
        try:
            depths = {'depth': to_depth(found[1]), 'depth_stamp': found[0]}
            apart, dt = newer[0] - found[0], now - before
            if abs(apart - dt) <= APART * dt:  # else they show another motion
                depths['current_depth'] = to_depth(newer[1])
            return depths
        except BadImage as error:
            raise ValueError(f'depth image refused: {error}') from None

    def _height(self, before: float, now: float) -> dict[str, Any]:
        found = self._ranges.nearest(before)
        if found is None:
            raise ValueError('no range has come: remap range to the sensor that looks down')
        off, message = abs(found[0] - before), found[1]
        if off > self.settings.sync_tolerance:
            limit = self.settings.sync_tolerance
            raise ValueError(
                f'the nearest range is {off:.3f} s off the image, more than sync_tolerance '
                f'({limit:g} s)'
            )
        low, high = message.min_range, message.max_range
        # REP-117: Inf is beyond the sensor's reach, NaN a failed measurement.
        known = np.isfinite(message.range) and message.range >= low
        if not known or (high > low and message.range > high):
            reach = f'the sensor says {low:g} to {high:g}'
            raise ValueError(f'the range is {message.range:g} m, {reach}')
        return {'height': float(message.range), 'height_stamp': found[0]}

    def _gyro(
        self, settings: Settings, before: float, now: float, camera_frame: str
    ) -> dict[str, Any]:
        samples = self._rates.between(before - GYRO_GAP, now + GYRO_GAP)
        if not samples:
            if settings.gyro == 'replace':
                raise GyroGap('no imu message has come: remap imu, or set gyro to ignore')
            return {}
        frame = samples[-1][1][1]
        times, rates = zip(*((stamp, item[0]) for stamp, item in samples))
        rate = mean_rate(np.array(times), np.array(rates), before, now, GYRO_GAP)
        return {'gyro': self._camera_from_imu(settings, camera_frame, frame) @ rate}

    def _camera_from_imu(self, settings: Settings, camera_frame: str, frame: str) -> np.ndarray:
        """Give the rotation (3, 3) of the imu's axes in the camera's."""
        told = pose_of_text(settings.base_from_imu, '')
        base = self._odometry.base_from_camera
        if told is not None:
            return (told if base is None else inverse(np.asarray(base)) @ told)[:3, :3]
        if frame == camera_frame:
            return np.eye(3)
        if base is not None and frame == settings.base_frame:
            return np.asarray(base)[:3, :3].T
        return self._lookup(camera_frame, frame)[:3, :3]


def _seconds(message: Any) -> float:
    return nanoseconds(message.header.stamp) / 1e9


def time_to_contact(outcome: Outcome, flow: np.ndarray, stride: int) -> np.ndarray | None:
    """Give (h, w, 1) seconds on the flow's grid, or None where there is no estimate."""
    if not outcome.estimate.valid or outcome.camera is None:
        return None
    return cues.time_to_contact(flow, outcome.camera, outcome.estimate, stride)[..., None]
