# SPDX-License-Identifier: Apache-2.0
"""
Metres from a plane whose distance is known: the ground below a forward camera, or before a range.

With the motion known up to the length of its translation, every sample has an inverse depth
q = |t| / Z, and on a plane n . X = d that is linear in its ray: q = p . x with p = n |t| / d. So a
robust linear fit of p gives |t| = d |p|, and along the optical axis, where Z = r is measured,
|t| = r p_z.
"""

from __future__ import annotations

import math

import numpy as np
from perceiver_flow_ros.odometry.egomotion import Ego, unit
from perceiver_flow_ros.odometry.geometry import rotation, tangent
from perceiver_flow_ros.odometry.motions import Motion
from perceiver_flow_ros.odometry.robust import Block, Fit, Linear, refine
from perceiver_flow_ros.odometry.samples import likeness, Samples
from perceiver_flow_ros.odometry.settings import Reason, Refused

AHEAD, ASIDE = 15.0, 2.5  # camera heights: the part of the ground that is looked at
ENOUGH = 60  # samples on it
ALIKE = 0.4  # correlation of the two ends of a flow vector
TILT = math.radians(8.0)  # by which the plane may differ from the expected one
DOUBT = 13.8  # chi^2 with 2 degrees of freedom, 99.9 %
MOUNT = math.radians(2.0)  # deviation of the ground from the base's plane, before it was seen
SWAY = math.radians(0.5)  # deviation of a frame's ground from the mean: suspension, steps
DRIFT = math.radians(0.05)  # by which the mean may change in a frame
PLANAR = 0.3  # share of the samples that must agree on a plane
DRAWS = 128  # planes tried
LEAST = 0.02  # px of noise assumed at least
UNEVEN = 0.03  # relative deviation of the distance told: kerbs, springs, tyres
STEPS = np.arange(0.7, 1.43, 0.01)  # distances, in those of the plane found, of one beside it
PRECISE = 0.03  # relative deviation of a sample's distance that tells a plane beside it
FADING = 0.95  # of the doubt which plane is the ground, a pair
VAGUE = 0.25  # relative deviation of a scale that is none
CONE = math.tan(math.radians(12.0))  # half the view of a range sensor


class Ground:
    """
    The ground below a camera of known height; remembers where it was seen.

    Parameters
    ----------
    height : metres.
    normal : (3,) from the camera down to the ground, in the camera frame, as mounted.

    """

    def __init__(self, height: float, normal: np.ndarray) -> None:
        self.height, self.normal, self.variance = height, normal, MOUNT**2
        self.doubt = 0.0  # relative variance: which of two planes it is

    def length(
        self, samples: Samples, ego: Ego, images: tuple | None = None
    ) -> tuple[float, np.ndarray]:
        """
        Give |t| in metres, and the covariance (7, 7) of R (3), t / |t| (3) and |t|.

        Parameters
        ----------
        images : the two images (H, W) uint8 grey, if known: what does not look alike is left out.

        Raises
        ------
        Refused
            When the ground is not seen well enough, or is not where it must be.

        """
        down = self.normal @ samples.rays
        aside = np.cross(self.normal, (0, 0, 1.0)) @ samples.rays
        region = (down * AHEAD > 1) & (np.abs(aside) < ASIDE * down)
        part = alike(samples[region], images)
        fit = plane(part, ego, self.normal)
        p, covariance = fit.state, fit.covariance

        # How far off is the normal, and is that by chance?
        axes = tangent(self.normal)
        spread = axes.T @ covariance @ axes
        allowed = (self.variance + SWAY**2) * (p @ p)
        off = axes.T @ p
        tilt = math.atan2(np.linalg.norm(off), self.normal @ p)
        surprise = off @ np.linalg.solve(spread + allowed * np.eye(2), off)
        if tilt > TILT and surprise > DOUBT or self.normal @ p <= 0 or surprise > 10 * DOUBT:
            raise Refused(
                Reason.NO_GROUND,
                f'the plane below the camera is tilted by {math.degrees(tilt):.0f} deg from where '
                'the ground must be: a slope, something in the way, or a wrong camera mount',
            )
        # Where it ought to be is worth a measurement; and what we see moves where it ought to be.
        gain = covariance @ axes @ np.linalg.inv(spread + allowed * np.eye(2))
        p = p - gain @ off
        kalman = self.variance / (self.variance + SWAY**2 + np.trace(spread) / 2 / (p @ p))
        self.normal = unit(self.normal + kalman * (axes @ off) / np.linalg.norm(p))
        self.variance = (1 - kalman) * self.variance + DRIFT**2

        n = unit(p)
        kept = np.eye(3) - gain @ axes.T  # of a change of the fitted plane
        variance = n @ kept @ covariance @ n
        length = self.height * float(np.linalg.norm(p))
        slope = self.height * slopes(part, ego, fit) @ kept.T @ n
        # The wheels come later to where the camera looks: a doubt goes slowly.
        self.doubt = max(rival(part, ego, p), FADING * self.doubt)
        own = variance * self.height**2 + self.doubt * length**2
        return length, joint(ego.covariance, slope, own, length)


def along_axis(
    samples: Samples, ego: Ego, distance: float, images: tuple | None = None
) -> tuple[float, np.ndarray]:
    """
    Give |t| in metres where the surface on the optical axis is `distance` metres away.

    Returns the length and covariance as `Ground.length`. The surface is taken as a plane within
    the view of the sensor.
    """
    axis = np.array([0, 0, 1.0])
    region = np.hypot(samples.rays[0], samples.rays[1]) < CONE
    part = alike(samples[region], images)
    fit = plane(part, ego, axis)
    slope = distance * slopes(part, ego, fit) @ axis
    length = distance * float(fit.state[2])
    if not length > 0:
        raise Refused(Reason.NO_GROUND, 'the surface before the range sensor is not seen to move')
    return length, joint(ego.covariance, slope, fit.covariance[2, 2] * distance**2, length)


def alike(samples: Samples, images: tuple | None) -> Samples:
    """Keep the samples whose two ends look alike: on plain ground flow often fails."""
    if images is None or not len(samples):
        return samples
    return samples[likeness(samples, *images) > ALIKE]


def plane(part: Samples, ego: Ego, normal: np.ndarray) -> Fit:
    """Fit p to the inverse depths of samples, starting from the plane most of them agree on."""
    if len(part) < ENOUGH:
        raise Refused(
            Reason.NO_GROUND,
            f'{len(part)} flow vectors on the surface whose distance is known, {ENOUGH} needed: '
            'it is out of view, or plain',
        )
    q, deviation = inverse_depths(part, ego.motion)
    noise = max(ego.noise, LEAST)
    start = consensus(part.rays, q, deviation * noise, normal)

    def linearize(p: np.ndarray) -> Linear:
        return Linear(((p @ part.rays - q) / deviation)[None], (part.rays / deviation)[:, None])

    fit = refine([Block(linearize, part.cells, ceiling=noise)], np.add, start)
    share = np.mean(fit.inliers)
    if share < PLANAR:
        raise Refused(
            Reason.NO_GROUND,
            f'{100 * share:.0f} % of the surface whose distance is known look like a plane, '
            f'{100 * PLANAR:.0f} % needed: something is in the way, or the flow fails there',
        )
    return fit


def consensus(
    rays: np.ndarray, q: np.ndarray, deviation: np.ndarray, normal: np.ndarray
) -> np.ndarray:
    """
    Find the plane p most samples agree with, of many through three of them each (MSAC).

    Flow fails on plain ground for more than half of it, so no median will do; but what noise
    the rest has, the motion's residual has told.
    """
    draw = np.random.default_rng(0).integers(0, len(q), (DRAWS, 3))
    a = rays[:, draw].transpose(1, 2, 0)
    p = np.linalg.solve(a + 1e-9 * np.eye(3), q[draw][..., None])[..., 0]
    upright = normal * np.median(q / np.maximum(normal @ rays, 1e-3))
    p = np.concatenate([p, upright[None]])
    cosine = p @ normal / np.maximum(np.linalg.norm(p, axis=1), 1e-12)
    cost = np.minimum(((p @ rays - q) / deviation) ** 2, 9.0).mean(axis=1)
    cost[cosine < math.cos(TILT)] += 9.0
    return p[np.argmin(cost)]


def rival(part: Samples, ego: Ego, p: np.ndarray) -> float:
    """
    Tell the relative variance of the distance for there being two planes, one above the other.

    Beside a road there is a pavement; which of them we are on, the flow does not tell. With shares
    1 - w and w of what looks like either, and d between them, the variance is w (1 - w) d^2.
    """
    q, deviation = inverse_depths(part, ego.motion)
    expected = p @ part.rays
    known = (q > 0) & (expected > 0)
    distance = expected[known] / q[known]
    spread = deviation[known] * max(ego.noise, LEAST) / q[known]
    precise = spread < PRECISE
    distance, spread = distance[precise], spread[precise]
    found = np.abs(distance - 1) < 3 * np.maximum(spread, 0.01)
    off = np.abs(distance[~found, None] - STEPS) < 2 * np.maximum(spread[~found, None], 0.005)
    votes = off.sum(axis=0)
    best = int(np.argmax(votes))
    share = votes[best] / max(votes[best] + np.count_nonzero(found), 1)
    return float(share * (1 - share) * (STEPS[best] - 1) ** 2)


def inverse_depths(samples: Samples, motion: Motion) -> tuple[np.ndarray, np.ndarray]:
    """Inverse depth |t| / Z (N,) in the previous frame, and its deviation for 1 px of noise."""
    y, t = motion.turn @ samples.rays, motion.shift
    xx, xy, yy = samples.noise
    x2 = samples.seen
    # x' (y_z + q t_z) = y + q t, two equations; weighted by the inverse covariance of x'.
    ax, ay = t[0] - x2[0] * t[2], t[1] - x2[1] * t[2]
    bx, by = x2[0] * y[2] - y[0], x2[1] * y[2] - y[1]
    wx, wy = yy * ax - xy * ay, xx * ay - xy * ax
    det = xx * yy - xy * xy
    information = (ax * wx + ay * wy) / det + 1e-30
    q = (bx * wx + by * wy) / det / information
    return q, np.abs(y[2] + q * t[2]) / np.sqrt(information) + 1e-12


def slopes(part: Samples, ego: Ego, fit: Fit) -> np.ndarray:
    """Give the derivatives (6, 3) of p by the steps of R (3) and t (3), by differences."""
    q, deviation = inverse_depths(part, ego.motion)
    heavy = part.rays * (fit.weights / deviation**2)
    solve = np.linalg.inv(heavy @ part.rays.T) @ heavy
    out = []
    for k in range(6):
        d = 1e-5 * np.eye(6)[k]
        moved = ego.motion._replace(
            turn=rotation(d[:3]) @ ego.motion.turn, shift=ego.motion.shift + d[3:]
        )
        out.append(solve @ (inverse_depths(part, moved)[0] - q) / 1e-5)
    return np.stack(out)


def joint(covariance: np.ndarray, slope: np.ndarray, own: float, length: float) -> np.ndarray:
    """Covariance (7, 7) of the motion (6) and a length that leans on it by `slope` (6,)."""
    if math.sqrt(own) > VAGUE * length:
        raise Refused(
            Reason.NO_GROUND,
            f'the length of the step is known to {100 * math.sqrt(own) / length:.0f} % only: '
            'the surface whose distance is known is plain, or moves too little',
        )
    lean = np.concatenate([np.eye(6), slope[None]])
    out = lean @ covariance @ lean.T
    out[6, 6] += own + (UNEVEN * length) ** 2
    return out
