# SPDX-License-Identifier: Apache-2.0
"""From flow to motion: the whole way, a pair of frames at a time."""

from __future__ import annotations

from dataclasses import replace
import math

import numpy as np
from perceiver_flow_ros.odometry import depth as depths
from perceiver_flow_ros.odometry import egomotion, ground
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.egomotion import Crept, Ego, Prior
from perceiver_flow_ros.odometry.geometry import inverse, rotation, rotation_vector
from perceiver_flow_ros.odometry.inputs import checked, grey, ROUNDING
from perceiver_flow_ros.odometry.motions import Motion
from perceiver_flow_ros.odometry.samples import choose, Samples
from perceiver_flow_ros.odometry.settings import Estimate, Reason, Refused, Settings
from perceiver_flow_ros.odometry.twist import check_gyro, Pose, told

SURFACE = 2  # grids between the points of a depth image
MEMORY = 1.0  # s after which the last motion predicts nothing


class Odometry:
    """
    Motion of a camera, and of the base it is mounted on, from flow.

    Parameters
    ----------
    settings : see `Settings`.
    base_from_camera : (4, 4) pose of the camera optical frame in the base frame (REP-103: x
        forward, y left, z up); None takes the camera optical frame as the base.

    """

    def __init__(
        self, settings: Settings | None = None, base_from_camera: np.ndarray | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.base_from_camera = base_from_camera
        self.reset()

    def reset(self) -> None:
        """Forget the pose, the ground and the last motion."""
        self._pose = Pose()
        self._stamp = math.inf  # seconds, up to which the pose has come
        self._last: Estimate | None = None
        self._last_stamp = -math.inf
        self._planes: tuple[np.ndarray, ...] = ()
        self._planes_stamp = -math.inf  # seconds, when they were there
        self._ground: ground.Ground | None = None
        self._crept: Crept | None = None

    def update(
        self,
        flow: np.ndarray | None,
        camera: Camera | None,
        previous_stamp: float,
        stamp: float,
        *,
        stride: int = 1,
        previous_image: np.ndarray | None = None,
        image: np.ndarray | None = None,
        backward: np.ndarray | None = None,
        depth: np.ndarray | None = None,
        depth_stamp: float | None = None,
        current_depth: np.ndarray | None = None,
        height: float | None = None,
        height_stamp: float | None = None,
        gyro: np.ndarray | None = None,
    ) -> Estimate:
        """
        Estimate the motion between two frames and add it to the pose. Raises nothing.

        For the time since the last pair, if there is any, the pose is worth less.

        Parameters
        ----------
        flow : (h, w, 2) px, previous -> current, at the pixels [::stride, ::stride] of the
            previous image; NaN where unknown. None gives no motion.
        camera : None where there is no calibration that can be used.
        previous_stamp, stamp : seconds.
        previous_image, image : (H, W) or (H, W, 3) uint8: weights from texture, and the reason
            where there is none.
        backward : as flow, current -> previous: weights from forward-backward confidence.
        depth : (H, W), see `depth.metres`, registered to the previous image and taken with it.
        depth_stamp : seconds when it was taken; None is with the image.
        current_depth : the same of the current image, optional: its surface counts, too.
        height : metres to what is on the optical axis of the previous image.
        height_stamp : seconds when that was measured; None is when the image was taken.
        gyro : (3,) rad/s, mean rate between the frames in the camera optical frame.

        Returns
        -------
        The estimate; where it is not valid, `reason` and `message` say why.

        """
        before, now = float(previous_stamp), float(stamp)
        dt = now - before
        base = np.eye(4) if self.base_from_camera is None else np.asarray(self.base_from_camera)
        try:
            flow, camera = checked(
                flow, camera, dt, stride, self.settings, previous_image, image, backward
            )
            prior = self._prior(before, dt, gyro)
            previous_image, image = grey(previous_image), grey(image)
            samples = choose(flow, camera, self.settings, stride, previous_image, backward)
            if self.settings.scale == 'depth':
                off = 0.0 if depth_stamp is None else abs(float(depth_stamp) - before)
                found = self._with_depth(samples, camera, prior, depth, off, current_depth)
            else:
                both = previous_image is not None and image is not None
                images = (previous_image, image) if both else None
                off = 0.0 if height_stamp is None else abs(float(height_stamp) - before)
                found = self._from_flow(samples, camera, prior, height, off, images)
            ego, metric, failure = found
            estimate = told(ego, metric, camera, dt, base)
            if failure:
                estimate = replace(estimate, reason=failure.reason, message=failure.message)
            if gyro is not None and self.settings.gyro == 'check':
                check_gyro(estimate, np.asarray(gyro, float).reshape(3), self.settings.gyro_noise)
            constant = self.settings.gyro_noise if follows_gyro(ego, prior) else 0.0
        except Refused as refused:
            self._planes = getattr(refused, 'planes', ())
            estimate = Estimate(reason=refused.reason, message=refused.message, dt=dt)
        except Exception as error:  # whatever came in: the camera goes on
            text = f'{type(error).__name__}: {error}'
            estimate = Estimate(reason=Reason.ERROR, message=text, dt=dt)
        if before > self._stamp + ROUNDING:  # nobody asked, or there was no flow
            self._pose.add(Estimate(dt=before - self._stamp), base)
        self._stamp = now
        estimate = self._pose.add(estimate, base, constant if estimate.valid else 0.0)
        if estimate.valid:
            self._last, self._last_stamp = estimate, now
        return estimate

    def _prior(self, previous_stamp: float, dt: float, gyro: np.ndarray | None) -> Prior:
        """Gather what is known before the flow is looked at."""
        prior = Prior(dt=dt)
        settings = self.settings
        fresh = abs(previous_stamp - self._last_stamp) <= MEMORY
        if self._last is not None and fresh:
            change = inverse(self._last.motion)
            turn = rotation(rotation_vector(change[:3, :3]) * (dt / self._last.dt))
            prior.last = Motion(turn, change[:3, 3])
            prior.crept = self._crept
        self._crept = None
        if previous_stamp == self._planes_stamp:
            prior.planes = self._planes
        self._planes, self._planes_stamp = (), previous_stamp + dt
        if gyro is not None and settings.gyro == 'replace':
            prior.gyro = rotation(-np.asarray(gyro, float).reshape(3) * dt)
            prior.gyro_deviation = settings.gyro_noise * dt
        if settings.scale == 'camera_height':
            if self._ground is None:
                self._ground = ground.Ground(settings.camera_height, self._down())
            prior.normal = self._ground.normal
        elif settings.scale == 'range':
            prior.normal = np.array([0, 0, 1.0])
        return prior

    def _down(self) -> np.ndarray:
        """Give the direction to the ground in the camera frame: -z of the base, else y."""
        if self.base_from_camera is None:
            return np.array([0, 1.0, 0])
        return -np.asarray(self.base_from_camera, float)[2, :3]

    def _with_depth(self, samples, camera, prior, depth, off: float, current_depth):
        """Align points of known depth: a metric motion."""
        settings = self.settings
        if depth is None:
            raise Refused(Reason.NO_DEPTH, "scale 'depth' has no depth image of this pair")
        if not off <= settings.depth_max_offset:
            raise Refused(
                Reason.DEPTH_STAMP,
                f'the nearest depth image is {off:.3f} s off the image, more than '
                f'depth_max_offset {settings.depth_max_offset} s',
            )
        depth = depths.metres(depth, camera, settings)
        surface = None
        if current_depth is not None:
            current_depth = depths.metres(current_depth, camera, settings)
            surface = depths.surface(depth, current_depth, camera, SURFACE * settings.grid)
        z = depths.at(depth, samples.points)
        known = np.isfinite(z)
        count = np.count_nonzero(known)
        if count < settings.min_samples:
            raise Refused(
                Reason.DEPTH_UNKNOWN,
                f'{count} of {len(z)} flow vectors have a depth, {settings.min_samples} needed: '
                'it is unknown (NaN, 0, out of range) nearly everywhere',
            )
        samples = samples[known]
        noise = settings.flow_noise
        ego = depths.align(samples, z[known], camera.focal, camera.width, noise, prior, surface)
        self._crept = ego.crept
        # Meanwhile depth has changed: by what the camera goes, and by what it turns to.
        turned = np.linalg.norm(rotation_vector(ego.motion.turn))
        gone = np.linalg.norm(ego.motion.shift) / np.median(z[known])
        return lengthened(ego, off / prior.dt * (turned + gone)), True, None

    def _from_flow(self, samples: Samples, camera: Camera, prior: Prior, height, off, images):
        """Find the motion up to its length, and the length where there is a source of it."""
        settings = self.settings
        ego = egomotion.estimate(samples, camera.focal, camera.width, settings.flow_noise, prior)
        self._planes = ego.planes
        try:
            if settings.scale == 'none':
                return ego, False, None
            if settings.scale == 'range' and not (height is not None and 0 < height < math.inf):
                raise Refused(
                    Reason.NO_HEIGHT,
                    f"scale 'range' got {'no range' if height is None else f'a range of {height}'}"
                    ' for this pair, expected metres above 0',
                )
            if not ego.motion.shift.any():  # as little as the flow can tell, at that distance
                distance = height if settings.scale == 'range' else 3 * settings.camera_height
                least = distance * max(ego.noise, settings.flow_noise) / camera.focal
                # Along the axis less is seen: a point moves by its distance from the centre.
                away = np.sqrt(np.square(samples.rays[:2]).sum(0).mean())
                ego.covariance[3:, 3:] = np.diag([1, 1, 1 / min(away, 1) ** 2]) * least**2
                return ego, True, None
            if settings.scale == 'range':
                length, joint = ground.along_axis(samples, ego, height, images)
            else:
                assert self._ground is not None  # since `_prior`
                length, joint = self._ground.length(samples, ego, images)
        except Refused as refused:
            return ego, False, refused
        # t = length * direction
        spread = np.zeros((6, 7))
        spread[:3, :3] = np.eye(3)
        spread[3:, 3:6], spread[3:, 6] = length * np.eye(3), ego.motion.shift
        motion = ego.motion._replace(shift=length * ego.motion.shift)
        ego = replace(ego, motion=motion, covariance=spread @ joint @ spread.T)
        if settings.scale == 'range':  # meanwhile it has changed
            ego = lengthened(ego, off / prior.dt * abs(motion.shift[2]) / height)
        return ego, True, None


def lengthened(ego: Ego, doubt: float) -> Ego:
    """Have the length of a translation be known only to a share of it, beside all else."""
    covariance = ego.covariance.copy()
    covariance[3:, 3:] += doubt**2 * np.outer(ego.motion.shift, ego.motion.shift)
    return replace(ego, covariance=covariance)


def follows_gyro(ego: Ego, prior: Prior) -> bool:
    """Tell whether the rotation is that of a gyro."""
    return prior.gyro is not None and ego.kind != 'stationary'
