# SPDX-License-Identifier: Apache-2.0
"""
The motions that two views may show, each linearised for `robust.refine`.

A point X of the previous camera frame is at R X + t in the current one. The previous pixel is
exact (it is the grid's), the current one has the noise of the flow; the depth of every point is
eliminated, so that each residual is the distance, in flow noise, from where the model allows the
point to be: a maximum-likelihood estimate (Hartley and Zisserman 2004, chapter 11) without one
unknown a point.

Steps: rotations d of R <- Exp(d) R; directions along the two columns of `tangent(t)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from perceiver_flow_ros.odometry.geometry import cross, rotation, tangent
from perceiver_flow_ros.odometry.robust import Linear
from perceiver_flow_ros.odometry.samples import Samples


class Motion(NamedTuple):
    """A rotation R and a translation t of unit length (any length for `planar` and `rigid`)."""

    turn: np.ndarray  # (3, 3)
    shift: np.ndarray  # (3,)
    normal: np.ndarray = np.zeros(3)  # unit normal of the plane; 0 but for `planar`


LEVER = 9.0  # squared lengths of its flow that a point must be off the epipole to count fully
STILL = Motion(np.eye(3), np.zeros(3))
Model = tuple[Callable[[Motion], Linear], Callable[[Motion, np.ndarray], Motion]]
"""linearize and retract, as `robust.refine` takes them"""


def ahead(y: np.ndarray, seen: np.ndarray, t: np.ndarray) -> np.ndarray:
    """
    Tell (N,) bool where x' ~ R x + q t with positive depths: inverse depth q > 0, z' > 0.

    Least squares over the line through R x (`y`, (3, N)) and t: q = a . b / a . a with
    a = t - x' t_z, b = x' y_z - y; z' = y_z + q t_z.
    """
    ax, ay = t[0] - seen[0] * t[2], t[1] - seen[1] * t[2]
    ab = ax * (seen[0] * y[2] - y[0]) + ay * (seen[1] * y[2] - y[1])
    return (ab >= 0) & (y[2] * (ax * ax + ay * ay) + ab * t[2] > 0)


def turned(motion: Motion, step: np.ndarray) -> Motion:
    """R <- Exp(d) R."""
    return motion._replace(turn=rotation(step[:3]) @ motion.turn)


def held(linearize: Callable[[Motion], Linear]) -> Callable[[Motion], Linear]:
    """Hold the rotation: the first three parameters vanish."""

    def shorter(motion: Motion) -> Linear:
        linear = linearize(motion)
        return Linear(linear.residual, linear.jacobian[3:], linear.extra)

    return shorter


def still(retract: Callable[[Motion, np.ndarray], Motion]) -> Callable:
    """Hold the rotation in a step, too."""
    return lambda motion, step: retract(motion, np.concatenate([np.zeros(3), step]))


# Rotation only: x' ~ R x


def rotation_only(samples: Samples) -> Model:
    """Residual of pure rotation, 2 numbers a sample; parameters: rotation (3)."""
    whiten = Whitening(samples)

    def linearize(motion: Motion) -> Linear:
        y = motion.turn @ samples.rays
        return whiten.reprojection(y, _about(y))

    return linearize, turned


# General motion: the epipolar constraint


def general(samples: Samples) -> Model:
    """
    Residual of the essential matrix, one number a sample; parameters: rotation (3), direction (2).

    The distance of x' from its epipolar line m = t x R x, in units of its noise S:
    r = m . x' / sqrt(m^T S m). The derivatives are taken at the point of the line next to x',
    which its noise does not touch: so the estimate is free of the bias of errors in variables
    (Kanatani 1996). What lies on the line's wrong half, behind the camera, is as far off as the
    end of the half, the point at infinity R x.

    Next to the epipole the line turns by as much as it likes when t moves a little: there r is
    not linear, and would promise a direction that nobody saw. So the length of the flow counts as
    noise of the lever m, three times: d r / d t is never above that far from the epipole.
    """
    x2, (sxx, sxy, syy) = samples.seen, samples.noise
    det = sxx * syy - sxy * sxy

    def linearize(motion: Motion) -> Linear:
        y, t = motion.turn @ samples.rays, motion.shift
        m = cross(t, y)
        sx, sy = sxx * m[0] + sxy * m[1], sxy * m[0] + syy * m[1]
        variance = m[0] * sx + m[1] * sy + 1e-30
        e = m[0] * x2[0] + m[1] * x2[1] + m[2]
        at = x2.copy()
        at[0] -= sx * e / variance
        at[1] -= sy * e / variance
        # t x (at - R x): how far along its line the flow moves the point, seen from the epipole.
        px, py, _ = cross(t, at - y / y[2])
        s = np.sqrt(variance + LEVER * (sxx * px * px + 2 * sxy * px * py + syy * py * py))
        along = cross(y, at) / s
        j = np.concatenate([cross(y, cross(at, t)) / s, tangent(t).T @ along])
        # Behind the camera: then it should be at the point at infinity.
        bx, by = at[0] - y[0] / y[2], at[1] - y[1] / y[2]
        gone = (syy * bx * bx - 2 * sxy * bx * by + sxx * by * by) / det
        gone[ahead(y, at, t)] = 0
        return Linear((e / s)[None], j[:, None], gone)

    def retract(motion: Motion, step: np.ndarray) -> Motion:
        shift = motion.shift + tangent(motion.shift) @ step[3:]
        return turned(motion, step)._replace(shift=shift / np.linalg.norm(shift))

    return linearize, retract


# A plane n . X = d: x' ~ (R + m n^T) x, m = t / d


def planar(samples: Samples) -> Model:
    """Residual of a homography, 2 numbers; parameters: rotation (3), m (3), normal (2)."""
    whiten = Whitening(samples)
    x = samples.rays

    def linearize(motion: Motion) -> Linear:
        y = motion.turn @ x
        depth = motion.normal @ x  # inverse depth times d
        turn = _about(y)
        move = np.eye(3)[:, :, None] * depth
        tilt = motion.shift[None, :, None] * (tangent(motion.normal).T @ x)[:, None]
        return whiten.reprojection(
            y + motion.shift[:, None] * depth, np.concatenate([turn, move, tilt])
        )

    def retract(motion: Motion, step: np.ndarray) -> Motion:
        normal = motion.normal + tangent(motion.normal) @ step[6:]
        return turned(motion, step)._replace(
            shift=motion.shift + step[3:6], normal=normal / np.linalg.norm(normal)
        )

    return linearize, retract


# Known depth: x' ~ R X + t


def rigid(samples: Samples, depth: np.ndarray) -> Model:
    """Residual of a rigid motion of points at depth (N,), 2 numbers; rotation (3), t (3)."""
    whiten = Whitening(samples)
    inverse = 1 / depth
    move = np.eye(3)[:, :, None] * inverse

    def linearize(motion: Motion) -> Linear:
        y = motion.turn @ samples.rays
        return whiten.reprojection(
            y + motion.shift[:, None] * inverse, np.concatenate([_about(y), move])
        )

    def retract(motion: Motion, step: np.ndarray) -> Motion:
        return turned(motion, step)._replace(shift=motion.shift + step[3:])

    return linearize, retract


def _about(y: np.ndarray) -> np.ndarray:
    """Give the derivative (3, 3, N) of Exp(d) y by d: row i is e_i x y."""
    out = np.zeros((3, *y.shape))
    out[0, 1], out[0, 2] = -y[2], y[1]
    out[1, 0], out[1, 2] = y[2], -y[0]
    out[2, 0], out[2, 1] = -y[1], y[0]
    return out


class Whitening:
    """Residuals of the current pixel in units of its noise, by the Cholesky factor of S^-1."""

    def __init__(self, samples: Samples):
        xx, xy, yy = samples.noise
        self._seen = samples.seen
        # S^-1 = L^T L with L = [[a, b], [0, c]]
        det = xx * yy - xy * xy
        self._a = np.sqrt(yy / det)
        self._b = -xy / det / self._a
        self._c = 1 / np.sqrt(yy)

    def reprojection(self, y: np.ndarray, dy: np.ndarray) -> Linear:
        """Residual of points y (3, N), with derivatives dy (p, 3, N)."""
        z = np.where(y[2] > 1e-6, y[2], 1e-6)
        px, py = y[0] / z, y[1] / z
        rx, ry = px - self._seen[0], py - self._seen[1]
        jx, jy = dy[:, 0] - px * dy[:, 2], dy[:, 1] - py * dy[:, 2]
        a, b, c = self._a / z, self._b / z, self._c / z
        j = np.empty((len(dy), 2, len(z)))
        j[:, 0], j[:, 1] = a * jx + b * jy, c * jy
        return Linear(np.stack([self._a * rx + self._b * ry, self._c * ry]), j)
