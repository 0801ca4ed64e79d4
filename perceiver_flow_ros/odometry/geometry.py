# SPDX-License-Identifier: Apache-2.0
"""Rotations and rigid motions: exponentials, logarithms, adjoints (Sola et al. 2018)."""

from __future__ import annotations

import math

import numpy as np


def skew(v: np.ndarray) -> np.ndarray:
    """Give [v]x (3, 3), so that [v]x w = v x w."""
    return np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]], float)


def rotation(vector: np.ndarray) -> np.ndarray:
    """Exp of a rotation vector (3,), radians: (3, 3), by Rodrigues' formula."""
    angle = math.sqrt(vector[0] ** 2 + vector[1] ** 2 + vector[2] ** 2)
    w = skew(vector)
    if angle < 1e-6:
        return np.eye(3) + w + 0.5 * w @ w
    a, b = math.sin(angle) / angle, (1 - math.cos(angle)) / angle**2
    return np.eye(3) + a * w + b * w @ w


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Log of a rotation (3, 3): (3,), radians, up to pi."""
    axis = 0.5 * np.array(
        [
            matrix[2, 1] - matrix[1, 2],
            matrix[0, 2] - matrix[2, 0],
            matrix[1, 0] - matrix[0, 1],
        ]
    )
    sine, cosine = float(np.linalg.norm(axis)), 0.5 * (float(np.trace(matrix)) - 1)
    angle = math.atan2(sine, cosine)
    if sine > 1e-6:
        return axis * (angle / sine)
    if cosine > 0:
        return axis
    square = 0.5 * (matrix + np.eye(3))  # near pi: the axis is a column of R + 1
    column = square[:, np.argmax(np.diag(square))]
    return column / np.linalg.norm(column) * angle


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Give the rotation next to a matrix (3, 3): numbers drift, rotations must not."""
    u, _, v = np.linalg.svd(matrix)
    return u @ np.diag([1, 1, np.linalg.det(u @ v)]) @ v


def transform(turn: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Put a rotation (3, 3) and a translation (3,) into one T (4, 4)."""
    t = np.eye(4)
    t[:3, :3], t[:3, 3] = turn, shift
    return t


def inverse(t: np.ndarray) -> np.ndarray:
    """Invert a rigid motion (4, 4)."""
    return transform(t[:3, :3].T, -t[:3, :3].T @ t[:3, 3])


def left_jacobian(vector: np.ndarray) -> np.ndarray:
    """V (3, 3) with Exp([v, w]) = [Exp(w), V(w) v]."""
    angle = float(np.linalg.norm(vector))
    w = skew(vector)
    if angle < 1e-4:
        return np.eye(3) + 0.5 * w + w @ w / 6
    return (
        np.eye(3)
        + (1 - math.cos(angle)) / angle**2 * w
        + (angle - math.sin(angle)) / angle**3 * w @ w
    )


def motion_vector(t: np.ndarray) -> np.ndarray:
    """Log of a rigid motion (4, 4): (6,) [v, w], metres and radians."""
    w = rotation_vector(t[:3, :3])
    return np.concatenate([np.linalg.solve(left_jacobian(w), t[:3, 3]), w])


def adjoint(t: np.ndarray) -> np.ndarray:
    """
    Give Ad_T (6, 6): a twist [v, w] of frame b, seen in frame a, T = T_a_b.

    v_a = R v_b + p x (R w_b), w_a = R w_b: the lever arm of a rigid body.
    """
    ad = np.zeros((6, 6))
    ad[:3, :3] = ad[3:, 3:] = t[:3, :3]
    ad[:3, 3:] = skew(t[:3, 3]) @ t[:3, :3]
    return ad


def tangent(direction: np.ndarray) -> np.ndarray:
    """Complete a unit vector (3,) to an orthogonal frame by two more (3, 2) (Duff et al. 2017)."""
    x, y, z = (float(c) for c in direction)
    sign = -1.0 if z < 0 else 1.0
    a = -1 / (sign + z)
    b = x * y * a
    return np.array([[1 + sign * x * x * a, b], [sign * b, sign + y * y * a], [-sign * x, -y]])


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Give a x b of columns (3, ...); either may be one vector (3,)."""
    first = a[1] * b[2] - a[2] * b[1]
    out = np.empty((3, *first.shape))
    out[0] = first
    out[1] = a[2] * b[0] - a[0] * b[2]
    out[2] = a[0] * b[1] - a[1] * b[0]
    return out
