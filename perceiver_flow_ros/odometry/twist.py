# SPDX-License-Identifier: Apache-2.0
"""From a motion between two frames to twists of camera and base, and to a pose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from perceiver_flow_ros.odometry import cues
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.egomotion import CERTAIN, Ego
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
from perceiver_flow_ros.odometry.settings import Estimate, Reason, Refused, UNKNOWN

SPEED = 1.0  # m/s and rad/s assumed for pairs without an estimate, where none went before
LOST = 3600.0  # s without an estimate, beyond which a pose is worth no less


def told(ego: Ego, metric: bool, camera: Camera, dt: float, base: np.ndarray) -> Estimate:
    """
    Put a motion into twists of the camera and of the base, with covariances.

    The twist is constant over the pair: T_previous_current = Exp(dt [v, w]); the base, at T in
    its own frame, has v_b = R v + p x (R w), w_b = R w (`adjoint`).

    Parameters
    ----------
    ego : the motion; its t in metres where `metric`.
    base : (4, 4) pose of the camera in the base frame.

    """
    shift = ego.motion.shift
    motion = inverse(transform(ego.motion.turn, shift))
    # Errors as a twist of the current camera: T <- T Exp(-[rho, phi]), rho = dt + t x dphi.
    lift = np.zeros((6, 6))
    lift[:3, 3:], lift[:3, :3], lift[3:, :3] = np.eye(3), skew(shift), np.eye(3)
    twist, rates = motion_vector(motion) / dt, lift @ ego.covariance @ lift.T / dt**2
    heading = motion[:3, :3].T @ motion[:3, 3]
    ad = adjoint(base)
    base_twist, base_rates = ad @ twist, ad @ rates @ ad.T
    base_heading = base_twist[:3]
    if not metric:  # the lever arm has no length to compare with
        base_heading = base[:3, :3] @ heading
        twist[:3], base_twist[:3] = np.nan, np.nan
        rates, base_rates = unknown_velocity(rates), unknown_velocity(base_rates)
    moves = shift.any()
    return Estimate(
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


def check_gyro(estimate: Estimate, gyro: np.ndarray, noise: float) -> None:
    """Refuse a rotation that a gyro (3,) rad/s with a noise of so many rad/s contradicts."""
    dt = estimate.dt
    off = rotation_vector(rotation(gyro * dt).T @ estimate.motion[:3, :3]) / dt
    allowed = estimate.twist_covariance[3:, 3:] + np.eye(3) * noise**2
    if not off @ np.linalg.solve(allowed, off) <= CERTAIN:
        raise Refused(
            Reason.GYRO,
            f'flow and gyro differ by {np.degrees(np.linalg.norm(off)):.1f} deg/s: something '
            'large moves, or the imu is not where its frame says',
        )


class Pose:
    """The pose of the base in odom: motions added up on SE(3), with their covariances."""

    def __init__(self) -> None:
        self.matrix = np.eye(4)
        self._covariance = np.zeros((6, 6))  # in the frame of the base
        self._drift = np.zeros((6, 3))  # what a gyro does to it that is always wrong alike
        self._speed = np.full(6, SPEED)

    def add(self, estimate: Estimate, base: np.ndarray, constant: float = 0.0) -> Estimate:
        """
        Add a motion; without one (or without metres) the pose stays, and is worth less.

        Where the rotation is that of a gyro, its error is ``constant`` rad/s, the same in all
        pairs: these errors add up, those of the flow, which differ, only as their squares do.
        """
        dt = min(estimate.dt, LOST) if estimate.dt > 0 else 0.0
        q = np.diag((self._speed * dt) ** 2)
        step = np.eye(4)
        always: np.ndarray = np.zeros((6, 3))
        if estimate.valid:
            step = base @ estimate.motion @ inverse(base)
            if estimate.metric:
                q = estimate.base_twist_covariance * dt**2
                self._speed = np.abs(estimate.base_twist) + 0.1
            else:
                step[:3, 3] = 0
                q[3:, 3:] = estimate.base_twist_covariance[3:, 3:] * dt**2
            if constant:  # of the velocity what leans on the rotation
                lean = np.linalg.solve(q[3:, 3:], q[3:, :3]).T
                always += constant * dt * np.concatenate([lean, np.eye(3)])
                q -= always @ always.T
            self.matrix = self.matrix @ step
            self.matrix[:3, :3] = nearest_rotation(self.matrix[:3, :3])
        # P <- Ad(step^-1) P Ad(step^-1)^T + Q.
        ad = adjoint(inverse(step))
        self._covariance = symmetric(ad @ self._covariance @ ad.T + q)
        self._drift = ad @ self._drift + always
        # nav_msgs/Odometry: along and about the axes of odom.
        turn = np.kron(np.eye(2), self.matrix[:3, :3])
        covariance = self._covariance + self._drift @ self._drift.T
        covariance = symmetric(turn @ covariance @ turn.T)
        return replace(estimate, pose=self.matrix.copy(), pose_covariance=covariance)


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
