# SPDX-License-Identifier: Apache-2.0
"""What a navigation stack reads off flow and motion: contact, confidence, movers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.geometry import cross, inverse
from perceiver_flow_ros.odometry.settings import Estimate

SIGNIFICANT = 3.0  # deviations of the flow's noise, below which parallax tells nothing


def focus_of_expansion(motion: np.ndarray, camera: Camera) -> np.ndarray:
    """
    Give the pixel (2,) of the current image that the camera moves towards, or away from.

    It is the epipole, where translation t projects to (Longuet-Higgins and Prazdny 1980); NaN
    where there is no translation, or it is parallel to the image.

    Parameters
    ----------
    motion : (4, 4) T_previous_current of the camera.

    """
    heading = motion[:3, :3].T @ motion[:3, 3]
    length = np.linalg.norm(heading)
    if not length > 0 or abs(heading[2]) < 1e-3 * length:
        return np.full(2, np.nan)
    return camera.project(heading[None] * np.sign(heading[2]))[0]


def time_to_contact(
    flow: np.ndarray, camera: Camera, estimate: Estimate, stride: int = 1
) -> np.ndarray:
    """
    Give the seconds until each pixel's point is level with the camera, if nothing changes.

    With the rotation taken out, x' ~ R x + q t, where q is the inverse depth in translations a
    frame; at the current stamp depth is z' = (R x)_z / q + t_z and falls by -t_z a frame:
    time = dt z' / -t_z. Needs no scale.

    Parameters
    ----------
    flow : (h, w, 2) px, at the pixels [::stride, ::stride].

    Returns
    -------
    (h, w) float32 on the flow's grid; NaN where the flow is unknown, contradicts the motion or
    shows no parallax beyond its noise, and everywhere where the camera does not come nearer.

    """
    h, w = flow.shape[:2]
    out = np.full((h, w), np.nan, np.float32)
    if not estimate.valid or not estimate.motion[:3, 3].any():
        return out
    known, _, q, z, error, parallax = _depths(flow, camera, estimate, stride)
    t = inverse(estimate.motion)[:3, 3]
    if t[2] >= 0:  # points recede
        return out
    limit = SIGNIFICANT * estimate.noise
    good = (error <= limit) & (parallax > limit) & (q > 0) & (z > 0)
    with np.errstate(divide='ignore', invalid='ignore'):
        seconds = np.where(good, estimate.dt * z / -t[2], np.nan)
    out[known] = seconds
    return out


def against_motion(
    flow: np.ndarray, camera: Camera, estimate: Estimate, stride: int = 1
) -> np.ndarray:
    """Tell (h, w) bool which pixels move as no resting point would, by more than the noise."""
    out = np.zeros(flow.shape[:2], bool)
    if estimate.valid:
        known, total, q, z, error, parallax = _depths(flow, camera, estimate, stride)
        limit = SIGNIFICANT * estimate.noise
        if estimate.motion[:3, 3].any():
            out[known] = (error > limit) | ((q < 0) & (parallax > limit)) | (z <= 0)
        else:
            out[known] = total > limit
    return out


def _depths(flow: np.ndarray, camera: Camera, estimate: Estimate, stride: int):
    """
    Split the flow of known pixels into what a resting point may show and what it may not.

    Returns the mask (h, w) of known pixels and, for these, (N,): all motion left without the
    rotation, px; the inverse depth q (translations a frame); the depth z' at the current stamp, in
    the units of the translation; the distance from the epipolar line, px; the parallax along it,
    px.
    """
    h, w = flow.shape[:2]
    points, rays = _grid(camera, h, w, stride)
    seen = camera.rays(points + flow.reshape(-1, 2).astype(np.float64)).T
    known = np.isfinite(rays[0]) & np.isfinite(seen[0])
    rays, seen = rays[:, known], seen[:, known]
    change = inverse(estimate.motion)
    # Not @: BLAS's threads would go on waiting for more, and take a core from the next inference.
    y, t = np.einsum('ij,jn->in', change[:3, :3], rays), change[:3, 3]
    (xx, xy), (yx, yy) = camera.projection_jacobian(seen.T).transpose(1, 2, 0)
    with np.errstate(divide='ignore', invalid='ignore'):
        bx, by = seen[0] - y[0] / y[2], seen[1] - y[1] / y[2]
        total = np.hypot(xx * bx + xy * by, yx * bx + yy * by)
        ax, ay = t[0] - seen[0] * t[2], t[1] - seen[1] * t[2]
        q = (ax * bx + ay * by) * y[2] / (ax * ax + ay * ay)
        m = cross(t, y)
        slope = np.hypot(yy * m[0] - yx * m[1], xx * m[1] - xy * m[0]) / (xx * yy - xy * yx)
        error = np.abs(m[0] * seen[0] + m[1] * seen[1] + m[2]) / np.abs(slope)
        parallax = np.sqrt(np.maximum(total**2 - error**2, 0))
        z = y[2] / q + t[2]
    return known.reshape(h, w), total, q, z, error, parallax


@lru_cache(maxsize=2)  # the same for every image: through a lens it takes as long as all else
def _grid(camera: Camera, h: int, w: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Give the pixels (N, 2) of a flow's grid and their rays (3, N)."""
    points = np.stack(np.meshgrid(np.arange(w) * stride, np.arange(h) * stride), -1).reshape(-1, 2)
    return points, camera.rays(points).T


def confidence(flow: np.ndarray, backward: np.ndarray, stride: int = 1) -> np.ndarray:
    """
    Give how well flow there and back agree, 0..1: (h, w) float32, 0 where unknown or out of view.

    exp(-|f + b|^2 / (0.01 (|f|^2 + |b|^2) + 0.5)), b taken where f points: the occlusion test of
    Sundaram et al. (2010), made smooth.

    Parameters
    ----------
    flow, backward : (h, w, 2) px, previous -> current and current -> previous, both at the pixels
        [::stride, ::stride].

    """
    h, w = flow.shape[:2]
    row, column = (a.ravel() for a in np.mgrid[:h, :w])
    return confidence_at(flow, backward, row, column, stride).reshape(h, w).astype(np.float32)


def confidence_at(
    flow: np.ndarray, backward: np.ndarray, row: np.ndarray, column: np.ndarray, stride: int = 1
) -> np.ndarray:
    """Give the `confidence` (N,) of some elements of the flow only."""
    h, w = flow.shape[:2]
    there = flow[row, column].astype(np.float64)
    with np.errstate(invalid='ignore', over='ignore'):
        x, y = column + there[:, 0] / stride, row + there[:, 1] / stride
        inside = (x >= 0) & (x <= w - 1) & (y >= 0) & (y <= h - 1)
        x, y = np.where(inside, x, 0), np.where(inside, y, 0)
        left = np.minimum(x.astype(int), max(w - 2, 0))
        top = np.minimum(y.astype(int), max(h - 2, 0))
        right, bottom = np.minimum(left + 1, w - 1), np.minimum(top + 1, h - 1)
        fx, fy = (x - left)[:, None], (y - top)[:, None]
        back = (1 - fy) * ((1 - fx) * backward[top, left] + fx * backward[top, right])
        back += fy * ((1 - fx) * backward[bottom, left] + fx * backward[bottom, right])
        gap = ((there + back) ** 2).sum(axis=1)
        size = (there**2).sum(axis=1) + (back**2).sum(axis=1)
        agreement = np.exp(-gap / (0.01 * size + 0.5))
    return np.where(inside & np.isfinite(agreement), agreement, 0.0)
