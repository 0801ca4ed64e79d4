# SPDX-License-Identifier: Apache-2.0
"""Metres from a depth image: the depth of each sample, and the motion that explains it."""

from __future__ import annotations

from dataclasses import replace
import math

import cv2
import numpy as np
from perceiver_flow_ros.odometry import motions
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.candidates import CLOSE, SEEDS, THRESHOLD
from perceiver_flow_ros.odometry.egomotion import (
    CERTAIN,
    consistent,
    Crept,
    Ego,
    FEW,
    fitted,
    Prior,
    turning,
)
from perceiver_flow_ros.odometry.geometry import cross
from perceiver_flow_ros.odometry.motions import Motion, STILL
from perceiver_flow_ros.odometry.robust import Block, independent, Linear, refine
from perceiver_flow_ros.odometry.samples import cells, Samples
from perceiver_flow_ros.odometry.settings import Reason, Refused, Settings

NEIGHBOUR = 3  # px; depth that changes by more than EDGE so near may be that of something else
EDGE = 0.05  # relative
NORMAL = 4  # px to either side, over which the normal of a surface is taken
RANGE, QUADRATIC = 0.001, 0.002  # noise of depth: m + 1/m x depth^2 (structured light, stereo)
ENOUGH = 100  # points of the surface
OUTSIDE = 1e6
FADES = 0.95  # of what crept, per pair: some twenty of them count together
LIKELY = 6.25  # chi^2 with 3 degrees of freedom, 90 %
FLOW = 0.2  # px of noise that flow has by itself


def metres(depth: np.ndarray, camera: Camera, settings: Settings) -> np.ndarray:
    """
    Bring a depth image to (H, W) float32 metres along the optical axis, NaN where unknown.

    Parameters
    ----------
    depth : (H, W) float metres, or uint16 millimetres (REP-118); NaN, Inf, 0 (and 65535 mm)
    unknown.

    Raises
    ------
    Refused
        When it does not fit the camera, or is no depth image.

    """
    depth = np.asarray(depth)
    if depth.shape != (camera.height, camera.width):
        raise Refused(
            Reason.DEPTH_SIZE,
            f'depth is {"x".join(map(str, depth.shape[::-1]))}, the image {camera.width}x'
            f'{camera.height}: depth must be registered to it (register_depth, depth_image_proc)',
        )
    if depth.dtype == np.uint16:
        depth = np.where(depth == 65535, 0, depth).astype(np.float32) * np.float32(1e-3)
    elif not np.issubdtype(depth.dtype, np.floating):
        raise Refused(
            Reason.DEPTH_SIZE,
            f'depth is {depth.dtype}, expected float metres or uint16 millimetres',
        )
    depth = depth.astype(np.float32)  # a copy
    with np.errstate(invalid='ignore'):
        known = (depth >= max(settings.depth_min, 1e-6)) & (depth <= settings.depth_max)
    depth[~known] = np.nan
    return depth


def at(depth: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Depth (N,) at pixels (2, N), NaN beside its edges: who knows which side is seen there."""
    h, w = depth.shape
    x, y = points.round().astype(int)
    centre = depth[y, x]
    near = [
        depth[np.clip(y + dy, 0, h - 1), np.clip(x + dx, 0, w - 1)]
        for dx, dy in ((-NEIGHBOUR, 0), (NEIGHBOUR, 0), (0, -NEIGHBOUR), (0, NEIGHBOUR))
    ]
    with np.errstate(invalid='ignore'):
        edge = np.max([np.abs(d / centre - 1) for d in near], axis=0)  # NaN where one is unknown
        return np.where(edge <= EDGE, centre, np.nan).astype(np.float64)


def align(
    samples: Samples,
    depth: np.ndarray,
    focal: float,
    width: int,
    floor: float,
    prior: Prior,
    surface: Block | None = None,
) -> Ego:
    """
    Find the rigid motion, in metres, of points whose depth is known: robust 3D-2D alignment.

    Minimises the distance of where R X + t is seen from where the flow says, in its noise, over
    all six parameters, together with the distance from the current depth image where there is one;
    each counts as much as the correlation of its errors leaves of it. A t that is not significant
    is zero, unless it is together with those of the pairs before: a camera that creeps.

    Parameters
    ----------
    samples, depth : flow vectors, and the depth (N,) of each in metres.
    focal, width, floor, prior : as in `egomotion.estimate`; the shift of `prior.last` in metres.
    surface : see `surface`.

    """
    chosen = slice(None, None, -(-len(samples) // FEW))
    linearize, retract = motions.rigid(samples[chosen], depth[chosen])
    starts = [STILL]
    if prior.gyro is not None:
        starts = [STILL._replace(turn=prior.gyro)]
        linearize, retract = motions.held(linearize), motions.still(retract)
    elif prior.last is not None:
        starts.append(prior.last)
    fits = [refine([Block(linearize)], retract, start, close=CLOSE) for start in starts]
    # Random sets of points only where what was expected does not lead to an explanation.
    if prior.gyro is None and min(fit.scale for fit in fits) > THRESHOLD:
        guess = three_points(samples, depth, focal)
        if guess is not None:
            fits.append(refine([Block(linearize)], retract, guess, close=CLOSE))
    best = min(fits, key=lambda fit: fit.scale)
    model = motions.rigid(samples, depth)
    more = []
    if surface is not None:
        flow = worth(Block(model[0], samples.cells), best.state, FLOW)
        more = [replace(surface, share=worth(surface, best.state, 1.0) / flow)]
    fit, covariance = fitted(model, best.state, samples.cells, prior, *more)
    moved = prior.last is not None and prior.last.shift.any()  # what moves goes on moving
    least = floor * np.median(depth) / focal  # m that can be seen
    ego = Ego('general', fit.state, covariance, fit.scale, fit.inliers)
    own = Crept(fit.state.shift, covariance[3:, 3:])
    if not (own.significant(LIKELY if moved else CERTAIN) and np.linalg.norm(own.shift) > least):
        before = prior.crept or Crept(np.zeros(3), np.zeros((3, 3)))
        crept = Crept(own.shift + FADES * before.shift,
                      own.covariance + FADES**2 * before.covariance)  # fmt: skip
        if not (crept.significant(CERTAIN) and np.linalg.norm(crept.shift) > least):
            ego = turning(samples, Motion(fit.state.turn, np.zeros(3)), floor, prior)
            # What is taken for zero may be there.
            ego.covariance[3:, 3:] = own.covariance + np.outer(own.shift, own.shift)
        ego.crept = crept
    return consistent(ego, width)


def three_points(samples: Samples, depth: np.ndarray, focal: float) -> Motion | None:
    """Guess the motion from random sets of three points (P3P, scored by RANSAC of OpenCV)."""
    chosen = slice(None, None, -(-len(samples) // SEEDS))
    points = np.ascontiguousarray((samples.rays * depth)[:, chosen].T)
    seen = np.ascontiguousarray(samples.seen[:2, chosen].T)
    found, turn, shift, _ = cv2.solvePnPRansac(
        points, seen, np.eye(3), np.zeros(4), iterationsCount=100, flags=cv2.SOLVEPNP_AP3P,
        reprojectionError=THRESHOLD / focal, confidence=0.99,
    )  # fmt: skip
    return Motion(cv2.Rodrigues(turn)[0], shift[:, 0]) if found else None


def worth(block: Block, state: Motion, expected: float) -> float:
    """
    Tell what part of its number of samples a block is worth beside another.

    Errors that go together within a cell count once. So do residuals beyond the noise expected: a
    calibration that is a little off, or images taken a little apart, are wrong everywhere alike.
    """
    weighed = block.weigh(state)
    return independent(block, weighed) / max(weighed.scale / expected, 1.0) ** 2


def surface(previous: np.ndarray, current: np.ndarray, camera: Camera, grid: int) -> Block | None:
    """
    Distances of the previous depth image's points from the current one's surface, point to plane.

    r = n . (Q - X'), X' = R X + t, Q the current point at the pixel that shows X' and n its normal
    (Chen and Medioni 1992, with projective association), in units of the noise of depth, which
    grows with its square. None where too little is known.

    Parameters
    ----------
    previous, current : (H, W) metres, NaN where unknown.
    grid : px between the points.

    """
    h, w = previous.shape
    x, y = (a.ravel() for a in np.meshgrid(np.arange(grid, w, grid), np.arange(grid, h, grid)))
    pixels = np.stack([x, y]).astype(float)
    z = at(previous, pixels)
    rays = camera.rays(pixels.T).T
    good = np.isfinite(z) & np.isfinite(rays[0])
    if np.count_nonzero(good) < ENOUGH:
        return None
    points = rays[:, good] * z[good]

    def linearize(motion: Motion) -> Linear:
        turned = motion.turn @ points
        moved = turned + motion.shift[:, None]
        q, n, known = _surface_at(current, camera, moved)
        difference = np.where(known, q - moved, 0)
        deviation = RANGE + QUADRATIC * moved[2] ** 2
        residual = np.einsum('in,in->n', n, difference) / deviation
        j = -np.concatenate([cross(turned, n), n]) / deviation
        residual[~known] = OUTSIDE  # far beyond all noise: no weight
        return Linear(residual[None], j[:, None])

    if np.count_nonzero(_surface_at(current, camera, points)[2]) < max(ENOUGH, len(z) // 4):
        return None
    return Block(linearize, cells(pixels[:, good], camera))


def _surface_at(depth: np.ndarray, camera: Camera, points: np.ndarray):
    """Points Q, normals n (3, N) of a depth image where points (3, N) are seen; and if known."""
    h, w = depth.shape
    pixels = camera.project(points.T).T
    with np.errstate(invalid='ignore'):
        inside = (pixels >= NORMAL).all(axis=0)
        inside &= (pixels[0] <= w - 1 - NORMAL) & (pixels[1] <= h - 1 - NORMAL)
    nearest = np.where(inside, pixels, NORMAL).round()
    x, y = nearest.astype(int)
    rays = points / points[2]
    bend = camera.pixel_jacobian(np.where(inside, rays, [[0], [0], [1]]).T)
    rays[:2] += np.einsum('nij,jn->in', bend, nearest - pixels)  # of the pixel that has the depth
    q = rays * depth[y, x]
    sides = []
    for axis, (dx, dy) in enumerate(((1, 0), (0, 1))):
        ends = []
        for sign in (1, -1):
            ray = rays.copy()
            ray[:2] += sign * NORMAL * bend[:, :, axis].T
            ends.append(ray * depth[y + sign * NORMAL * dy, x + sign * NORMAL * dx])
        sides.append(ends[0] - ends[1])
    n = cross(sides[0], sides[1])
    n = n / np.linalg.norm(n, axis=0)
    with np.errstate(invalid='ignore'):
        smooth = np.maximum(np.abs(sides[0][2]), np.abs(sides[1][2])) < EDGE * 2 * points[2]
        near = np.abs(q[2] - points[2]) < EDGE * points[2]
    known = inside & smooth & near & np.isfinite(n[0])
    return q, np.where(known, n, 0), known


def register_depth(
    depth: np.ndarray,
    depth_camera: Camera,
    camera: Camera,
    camera_from_depth: np.ndarray | None = None,
) -> np.ndarray:
    """
    Move a depth image onto another camera's pixels, the nearest surface winning.

    Parameters
    ----------
    depth : (h, w) float metres or uint16 millimetres, as `metres` takes it.
    depth_camera, camera : the camera it was taken with, and the one to see it from.
    camera_from_depth : (4, 4) pose of the depth camera in the other's frame; None is the identity.

    Returns
    -------
    (H, W) float32 metres, NaN where nothing is known.

    """
    depth = metres(depth, depth_camera, Settings(depth_min=0.0, depth_max=10_000.0))
    pose = np.eye(4) if camera_from_depth is None else np.asarray(camera_from_depth, float)
    row, column = np.nonzero(np.isfinite(depth))
    rays = depth_camera.rays(np.stack([column, row], axis=1))
    points = cv2.transform((rays * depth[row, column, None])[None], pose[:3])[0]
    pixels = camera.project(points)
    # One pixel of depth covers so many of the image: else a denser image would be full of holes.
    reach = math.ceil(max(camera.fx / depth_camera.fx, camera.fy / depth_camera.fy, 1.0)) - 1
    out = np.full((camera.height, camera.width), np.inf, np.float32)
    for dy in range(reach + 1):
        for dx in range(reach + 1):
            with np.errstate(invalid='ignore'):
                x, y = np.round(pixels[:, 0]) + dx, np.round(pixels[:, 1]) + dy
                good = (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
            at_pixel = y[good].astype(int), x[good].astype(int)
            np.minimum.at(out, at_pixel, points[good, 2].astype(np.float32))
    return np.where(np.isfinite(out), out, np.float32(np.nan))
