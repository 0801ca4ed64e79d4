# SPDX-License-Identifier: Apache-2.0
"""From flow to motion: the whole way, a pair of frames at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from perceiver_flow_ros.odometry import cues, depth as depths, egomotion, ground
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.egomotion import CERTAIN, Ego, Prior
from perceiver_flow_ros.odometry.geometry import (
    adjoint,
    inverse,
    motion_vector,
    nearest_rotation,
    rotation,
    rotation_vector,
    skew,
    transform,
)
from perceiver_flow_ros.odometry.motions import Motion
from perceiver_flow_ros.odometry.samples import Samples, choose
from perceiver_flow_ros.odometry.settings import (
    UNKNOWN,
    Estimate,
    Reason,
    Refused,
    Settings,
)

SURFACE = 2  # grids between the points of a depth image
MEMORY = 1.0  # s after which the last motion predicts nothing
SPEED = 1.0  # m/s and rad/s assumed for pairs without an estimate, where none went before


class Odometry:
    """
    Motion of a camera, and of the base it is mounted on, from flow.

    Parameters
    ----------
    settings : see `Settings`.
    base_from_camera : (4, 4) pose of the camera optical frame in the base frame (REP-103: x
    forward,
        y left, z up); None takes the camera optical frame as the base.

    """

    def __init__(
        self, settings: Settings | None = None, base_from_camera: np.ndarray | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.base_from_camera = base_from_camera
        self.reset()

    def reset(self) -> None:
        """Forget the pose, the ground and the last motion."""
        self._pose, self._covariance = np.eye(4), np.zeros((6, 6))
        self._last: Estimate | None = None
        self._last_stamp = -math.inf
        self._planes: tuple[np.ndarray, ...] = ()
        self._planes_stamp = -math.inf  # seconds, when they were there
        self._ground: ground.Ground | None = None

    def update(
        self,
        flow: np.ndarray,
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
        gyro: np.ndarray | None = None,
    ) -> Estimate:
        """
        Estimate the motion between two frames and add it to the pose. Raises nothing.

        Parameters
        ----------
        flow : (h, w, 2) px, previous -> current, at the pixels [::stride, ::stride] of the
        previous
            image; NaN where unknown.
        camera : None where there is no calibration that can be used.
        previous_stamp, stamp : seconds.
        previous_image, image : (H, W) or (H, W, 3) uint8: weights from texture, and the reason
            where there is none.
        backward : as flow, current -> previous: weights from forward-backward confidence.
        depth : (H, W), see `depth.metres`, registered to the previous image and taken with it.
        depth_stamp : seconds; None is not checked.
        current_depth : the same of the current image, optional: its surface counts, too.
        height : metres to what is on the optical axis of the previous image.
        gyro : (3,) rad/s, mean rate between the frames in the camera optical frame.

        Returns
        -------
        The estimate; where it is not valid, `reason` and `message` say why.

        """
        dt = float(stamp) - float(previous_stamp)
        try:
            check_pair(flow, camera, dt, stride, self.settings, previous_image, image, backward)
            prior = self._prior(float(previous_stamp), dt, gyro)
            previous_image, image = grey(previous_image), grey(image)
            samples = choose(flow, camera, self.settings, stride, previous_image, backward)
            if self.settings.scale == 'depth':
                off = 0.0 if depth_stamp is None else abs(float(depth_stamp - previous_stamp))
                found = self._with_depth(samples, camera, prior, depth, off, current_depth)
            else:
                both = previous_image is not None and image is not None
                images = (previous_image, image) if both else None
                found = self._from_flow(samples, camera, prior, height, images)
            estimate = self._told(*found, camera, dt, gyro)
        except Refused as refused:
            self._planes = getattr(refused, 'planes', ())
            estimate = Estimate(reason=refused.reason, message=refused.message, dt=dt)
        except Exception as error:  # whatever came in: the camera goes on
            text = f'{type(error).__name__}: {error}'
            estimate = Estimate(reason=Reason.ERROR, message=text, dt=dt)
        return self._integrated(estimate, float(stamp))

    def _prior(self, previous_stamp: float, dt: float, gyro: np.ndarray | None) -> Prior:
        """Gather what is known before the flow is looked at."""
        prior = Prior(dt=dt)
        settings = self.settings
        fresh = abs(previous_stamp - self._last_stamp) <= MEMORY
        if self._last is not None and fresh:
            change = inverse(self._last.motion)
            turn = rotation(rotation_vector(change[:3, :3]) * (dt / self._last.dt))
            prior.last = Motion(turn, change[:3, 3])
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
        return ego, ego.motion.shift, ego.covariance, True, Estimate()

    def _from_flow(self, samples: Samples, camera: Camera, prior: Prior, height, images):
        """Find the motion up to its length, and the length where there is a source of it."""
        settings = self.settings
        ego = egomotion.estimate(samples, camera.focal, camera.width, settings.flow_noise, prior)
        self._planes = ego.planes
        try:
            if settings.scale == 'none':
                return ego, ego.motion.shift, ego.covariance, False, Estimate()
            if settings.scale == 'range' and not (height is not None and 0 < height < math.inf):
                raise Refused(
                    Reason.NO_HEIGHT,
                    f"scale 'range' got {'no range' if height is None else f'a range of {height}'}"
                    ' for this pair, expected metres above 0',
                )
            if not ego.motion.shift.any():  # as little as the flow can tell, at that distance
                distance = height if settings.scale == 'range' else 3 * settings.camera_height
                least = distance * max(ego.noise, settings.flow_noise) / camera.focal
                covariance = ego.covariance.copy()
                covariance[3:, 3:] = np.eye(3) * least**2
                return ego, ego.motion.shift, covariance, True, Estimate()
            if settings.scale == 'range':
                length, joint = ground.along_axis(samples, ego, height, images)
            else:
                length, joint = self._ground.length(samples, ego, images)
        except Refused as refused:
            failed = Estimate(reason=refused.reason, message=refused.message)
            return ego, ego.motion.shift, ego.covariance, False, failed
        # t = length * direction
        spread = np.zeros((6, 7))
        spread[:3, :3] = np.eye(3)
        spread[3:, 3:6], spread[3:, 6] = length * np.eye(3), ego.motion.shift
        return ego, length * ego.motion.shift, spread @ joint @ spread.T, True, Estimate()

    def _told(self, ego: Ego, shift, covariance, metric, said, camera, dt, gyro) -> Estimate:
        """Put a motion into twists, in both frames, with covariances."""
        change = transform(ego.motion.turn, shift)  # T_current_previous
        motion = inverse(change)
        # Errors as a twist of the current camera: T <- T Exp(-[rho, phi]), rho = dt + t x dphi.
        lift = np.zeros((6, 6))
        lift[:3, 3:], lift[:3, :3], lift[3:, :3] = np.eye(3), skew(shift), np.eye(3)
        covariance = lift @ covariance @ lift.T
        if gyro is not None and self.settings.gyro == 'check':
            self._check_gyro(motion, covariance, np.asarray(gyro, float).reshape(3), dt)
        twist = motion_vector(motion) / dt
        rates = covariance / dt**2
        heading = motion[:3, :3].T @ motion[:3, 3]
        moves = shift.any()
        base = np.eye(4) if self.base_from_camera is None else np.asarray(self.base_from_camera)
        if not metric:
            twist[:3] = np.nan
            rates = unknown_velocity(rates)
        ad = adjoint(base)
        if metric:
            base_twist, base_rates = ad @ twist, ad @ rates @ ad.T
            base_heading = base_twist[:3]
        else:
            base_twist = np.concatenate([np.full(3, np.nan), ad[3:, 3:] @ twist[3:]])
            base_rates = np.zeros((6, 6))
            base_rates[3:, 3:] = ad[3:, 3:] @ rates[3:, 3:] @ ad[3:, 3:].T
            base_rates = unknown_velocity(base_rates)
            base_heading = base[:3, :3] @ heading  # the lever arm has no length to compare with
        return replace(
            said,
            valid=True,
            metric=metric,
            kind=ego.kind,
            dt=dt,
            motion=motion,
            direction=direction(heading) if moves else np.full(3, np.nan),
            base_direction=direction(base_heading) if moves else np.full(3, np.nan),
            twist=twist,
            twist_covariance=symmetric(rates),
            base_twist=base_twist,
            base_twist_covariance=symmetric(base_rates),
            focus_of_expansion=cues.focus_of_expansion(motion, camera),
            moving=float(1 - np.mean(ego.inliers)),
            noise=ego.noise,
            samples=len(ego.inliers),
            inliers=int(np.count_nonzero(ego.inliers)),
        )

    def _check_gyro(self, motion, covariance, gyro, dt) -> None:
        off = rotation_vector(rotation(gyro * dt).T @ motion[:3, :3])
        allowed = covariance[3:, 3:] + np.eye(3) * (self.settings.gyro_noise * dt) ** 2
        if not off @ np.linalg.solve(allowed, off) <= CERTAIN:
            raise Refused(
                Reason.GYRO,
                f'flow and gyro differ by {np.degrees(np.linalg.norm(off)) / dt:.1f} deg/s: '
                'something large moves, or the imu is not where its frame says',
            )

    def _integrated(self, estimate: Estimate, stamp: float) -> Estimate:
        """Add a motion to the pose, on SE(3); without one the pose stays, and is worth less."""
        base = np.eye(4) if self.base_from_camera is None else np.asarray(self.base_from_camera)
        step = np.eye(4)
        lost = np.full(6, SPEED)
        if self._last is not None:
            lost = np.abs(np.nan_to_num(self._last.base_twist, nan=SPEED)) + 0.1
        dt = estimate.dt if 0 < estimate.dt < math.inf else 0.0
        q = np.diag((lost * dt) ** 2)
        if estimate.valid:
            camera_step = estimate.motion.copy()
            if not estimate.metric:
                camera_step[:3, 3] = 0
            step = base @ camera_step @ inverse(base)
            if estimate.metric:
                q = estimate.base_twist_covariance * dt**2
            else:
                step[:3, 3] = 0
                q[3:, 3:] = estimate.base_twist_covariance[3:, 3:] * dt**2
        # Errors in the frame of the base: P <- Ad(step^-1) P Ad(step^-1)^T + Q.
        ad = adjoint(inverse(step))
        self._covariance = symmetric(ad @ self._covariance @ ad.T + q)
        pose = self._pose
        if estimate.valid:
            pose = pose @ step
            pose[:3, :3] = nearest_rotation(pose[:3, :3])
            self._pose = pose
        # nav_msgs/Odometry: along and about the axes of odom.
        turn = np.kron(np.eye(2), pose[:3, :3])
        estimate = replace(
            estimate,
            pose=pose.copy(),
            pose_covariance=symmetric(turn @ self._covariance @ turn.T),
        )
        if estimate.valid:
            self._last, self._last_stamp = estimate, stamp
        return estimate


def check_pair(flow, camera, dt, stride, settings, previous_image, image, backward) -> None:
    """Refuse what makes no pair."""
    if not (math.isfinite(dt) and dt > 0):
        raise Refused(
            Reason.BAD_STAMPS,
            f'the frames are {dt:.6f} s apart, expected more than 0: time jumped',
        )
    if dt > settings.max_gap:
        raise Refused(
            Reason.GAP, f'the frames are {dt:.3f} s apart, more than max_gap {settings.max_gap} s'
        )
    if camera is None:
        raise Refused(
            Reason.NO_CAMERA, 'no usable camera_info: publish one that fits the image, calibrated'
        )
    shaped = isinstance(flow, np.ndarray) and flow.ndim == 3 and flow.shape[2] == 2
    if not shaped or not np.issubdtype(flow.dtype, np.floating):
        kind = (
            f'{flow.shape} {flow.dtype}' if isinstance(flow, np.ndarray) else type(flow).__name__
        )
        raise Refused(Reason.BAD_FLOW, f'flow is {kind}, expected (h, w, 2) float pixels')
    size = -(-camera.height // stride), -(-camera.width // stride)
    if flow.shape[:2] != size:
        raise Refused(
            Reason.SIZE,
            f'flow is {flow.shape[1]}x{flow.shape[0]} at stride {stride}, the camera_info '
            f'{camera.width}x{camera.height}: they belong to different images',
        )
    if backward is not None and np.shape(backward) != flow.shape:
        raise Refused(
            Reason.BAD_FLOW, f'backward flow is {np.shape(backward)}, the forward one {flow.shape}'
        )
    for frame in (previous_image, image):
        if frame is None:
            continue
        good = isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim in (2, 3)
        if not good or frame.shape[:2] != (camera.height, camera.width):
            raise Refused(
                Reason.SIZE,
                f'an image is {np.shape(frame)}, the camera_info {camera.width}x{camera.height}',
            )
    if image is not None and previous_image is not None and np.array_equal(previous_image, image):
        raise Refused(
            Reason.REPEATED, 'both images are the same, bit by bit: the camera repeats its frames'
        )


def grey(image: np.ndarray | None) -> np.ndarray | None:
    """Give an image one channel."""
    if image is None or image.ndim == 2:
        return image
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def unknown_velocity(covariance: np.ndarray) -> np.ndarray:
    """Mark the velocity of a twist's covariance (6, 6) as not known."""
    out = covariance.copy()
    out[:3], out[:, :3] = 0, 0
    out[:3, :3] = UNKNOWN * np.eye(3)
    return out


def symmetric(covariance: np.ndarray) -> np.ndarray:
    """Remove what rounding does to a covariance: asymmetry, and variances of nothing."""
    return 0.5 * (covariance + covariance.T) + 1e-12 * np.eye(len(covariance))


def direction(v: np.ndarray) -> np.ndarray:
    """Give a vector the length 1, NaN where it has none."""
    length = np.linalg.norm(v)
    return v / length if length > 0 else np.full(len(v), np.nan)
