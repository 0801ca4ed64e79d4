# SPDX-License-Identifier: Apache-2.0
"""
What the motion may be: first guesses, refined on a few hundred vectors, and the choice of one.

Guesses are the direction the parallax of the best rotation points in, and the last motion. Unless
these two agree after refinement, also the best of random minimal sets (the essential matrix by the
five-point method of Nister 2004; a homography in any case), scored by MAGSAC++ (Barath et al.
2020). The choice is Torr's geometric robust information criterion (GRIC, 1998).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from perceiver_flow_ros.odometry import motions
from perceiver_flow_ros.odometry.geometry import cross, nearest_rotation
from perceiver_flow_ros.odometry.motions import Motion, STILL
from perceiver_flow_ros.odometry.robust import Block, evaluate, Fit, refine
from perceiver_flow_ros.odometry.samples import Samples

SEEDS = 300  # samples that minimal sets are drawn from
TRIES = 200  # minimal sets at most
THRESHOLD = 1.0  # px of MAGSAC++
CLOSE = 3e-5  # rad: candidates need not be better
PLANAR = 0.4  # share of the seeds a homography must explain to be looked at
SAME_TURN, SAME_DIRECTION = 3e-4, 0.02  # rad: guesses so close are refined to the same
DRAWS = 64  # minimal sets solved at once around a first answer

# GRIC: kind -> (dimension of the manifold in the 4 coordinates of a match, parameters)
SIZES = {'stationary': (2, 0), 'rotation': (2, 3), 'planar': (2, 8), 'general': (3, 5)}


def find(samples: Samples, focal: float, gyro: np.ndarray | None, last: Motion | None):
    """
    Fit every kind of motion: {'rotation': Fit, 'general': Fit, 'planar': Fit}.

    Parameters
    ----------
    focal : pixels a radian.
    gyro : (3, 3) a measured rotation to hold, or None.
    last : the motion expected if nothing has changed, one more guess.

    """

    def hold(model: motions.Model) -> motions.Model:
        if gyro is None:
            return model
        return motions.held(model[0]), motions.still(model[1])

    start = STILL if gyro is None else STILL._replace(turn=gyro)
    model = motions.rotation_only(samples)
    still = fitted(model, start) if gyro is None else evaluate([Block(model[0])], start)
    found = {'rotation': still}

    general = hold(motions.general(samples))
    guesses = [still.state._replace(shift=parallax_direction(samples, still.state))]
    if last is not None and last.shift.any():
        guesses.append(last._replace(shift=last.shift / np.linalg.norm(last.shift)))
    seeds = samples[:: -(-len(samples) // SEEDS)]
    a, b = (np.ascontiguousarray(rays[:2].T) for rays in (seeds.rays, seeds.seen))
    fits = refined(general, [_with_turn(guess, gyro) for guess in guesses])
    if gyro is None:
        if not (len(fits) > 1 and same(fits[0].state, fits[1].state)):
            fits += refined(general, drawn(a, b, focal, seeds))
        if fits:
            fits += refined(general, [redraw(seeds, explains_most(fits).state)])
    if fits:
        found['general'] = fitted(general, explains_most(fits).state)

    homography, near = cv2.findHomography(a, b, cv2.USAC_MAGSAC, THRESHOLD / focal, maxIters=TRIES)
    if homography is not None and np.count_nonzero(near) > PLANAR * len(a):
        planar = hold(motions.planar(samples))
        guesses = [_with_turn(m, gyro) for m in decompose(homography, seeds.rays)]
        fits = refined(planar, guesses if gyro is not None else guesses[:1])
        if fits:
            found['planar'] = fitted(planar, explains_most(fits).state)
    return found


def fitted(model: motions.Model, start: Motion, iterations: int = 6) -> Fit:
    """Refine a model of one kind of residual, without a covariance, to what a choice needs."""
    linearize, retract = model
    return refine([Block(linearize)], retract, start, iterations, CLOSE)


def usac(threshold: float) -> cv2.UsacParams:
    """Random sampling scored by MAGSAC++, without polish: `refine` does that."""
    params = cv2.UsacParams()
    params.score, params.sampler = cv2.SCORE_METHOD_MAGSAC, cv2.SAMPLING_UNIFORM
    params.loMethod, params.final_polisher = cv2.LOCAL_OPTIM_NULL, cv2.NONE_POLISHER
    params.confidence, params.maxIterations, params.threshold = 0.99, TRIES, threshold
    return params


def drawn(a: np.ndarray, b: np.ndarray, focal: float, seeds: Samples) -> list[Motion]:
    """Find a motion from random minimal sets; none or one."""
    essential, _ = cv2.findEssentialMat(  # type: ignore[call-overload]  # None: undistorted
        a, b, np.eye(3), np.eye(3), None, None, usac(THRESHOLD / focal)
    )
    if essential is None:
        return []
    turn, other, shift = cv2.decomposeEssentialMat(essential[:3])
    return [in_front(turn, other, shift, seeds)]


def refined(model: motions.Model, guesses: list[Motion]) -> list[Fit]:
    """Refine each guess a little; those that cannot be are left out."""
    fits = []
    for guess in guesses:
        try:
            fits.append(fitted(model, guess, iterations=2))
        except np.linalg.LinAlgError:
            continue
    return fits


def explains_most(fits: list[Fit]) -> Fit:
    """Give the fit with the least median residual."""
    return min(fits, key=lambda fit: fit.scale)


def same(one: Motion, other: Motion) -> bool:
    """Tell whether two guesses went to one and the same motion."""
    turn = np.abs(one.turn - other.turn).max()
    return turn < SAME_TURN and one.shift @ other.shift > math.cos(SAME_DIRECTION)


def redraw(samples: Samples, motion: Motion) -> Motion:
    """
    Look for a motion near another that explains half of the samples better.

    What moves by itself may fit a wrong motion of the camera so nearly that MAGSAC++, which counts
    what is near, prefers to explain all of it a little worse. So: Gauss-Newton from `motion` on
    many minimal sets at once, the least median of squares (Rousseeuw 1984) wins.
    """
    draw = np.random.default_rng(0).integers(0, len(samples), (DRAWS, 5))
    x, seen = samples.rays[:, draw], samples.seen[:, draw]  # (3, DRAWS, 5)
    turn, t = np.tile(motion.turn, (DRAWS, 1, 1)), np.tile(motion.shift, (DRAWS, 1))
    aside = np.eye(3)[np.argmin(np.abs(motion.shift))]
    for _ in range(4):
        y = np.einsum('kij,jkn->ikn', turn, x)
        along = cross(y, seen)
        e = np.einsum('ki,ikn->kn', t, along)  # = (t x y) . x'
        first = cross(t.T, aside)
        first /= np.linalg.norm(first, axis=0)
        axes = np.stack([first, cross(t.T, first)]).transpose(2, 1, 0)  # (DRAWS, 3, 2)
        about = cross(y, cross(seen, t.T[:, :, None]))
        j = np.concatenate([about, np.einsum('kia,ikn->akn', axes, along)]).transpose(1, 2, 0)
        j = j + 1e-9 * np.eye(5)  # degenerate sets go astray, and lose
        step = np.clip(np.linalg.solve(j, -e[..., None])[..., 0], -0.2, 0.2)
        w = np.zeros((DRAWS, 3, 3))
        w[:, (2, 0, 1), (1, 2, 0)], w[:, (1, 2, 0), (2, 0, 1)] = step[:, :3], -step[:, :3]
        turn = (np.eye(3) + w + 0.5 * w @ w) @ turn
        t = t + np.einsum('kia,ka->ki', axes, step[:, 3:])
        t /= np.linalg.norm(t, axis=1, keepdims=True)
    samples = samples[:: -(-len(samples) // (SEEDS // 2))]
    y = np.einsum('kij,jn->ikn', turn, samples.rays)
    m = cross(t.T[:, :, None], y)
    xx, xy, yy = samples.noise
    variance = xx * m[0] ** 2 + 2 * xy * m[0] * m[1] + yy * m[1] ** 2
    error = np.einsum('ikn,in->kn', m, samples.seen) ** 2 / np.maximum(variance, 1e-30)
    best = np.argmin(np.median(error, axis=1))
    return Motion(nearest_rotation(turn[best]), t[best])


def parallax_direction(samples: Samples, motion: Motion) -> np.ndarray:
    """
    Direction t (3,) that what a rotation leaves points in: the t most orthogonal to R x cross x'.

    t . (R x cross x') = 0 is the epipolar constraint; its robust linear least squares.
    """
    y = motion.turn @ samples.rays
    lines = cross(y, samples.seen)
    weights = np.ones(lines.shape[1])
    for _ in range(5):
        t = np.linalg.eigh((lines * weights) @ lines.T)[1][:, 0]
        error = (t @ lines) ** 2
        weights = 1 / (1 + error / max(4 * np.median(error), 1e-18)) ** 2
    forward, backward = (motions.ahead(y, samples.seen, s) @ weights for s in (t, -t))
    return t if forward >= backward else -t


def in_front(turn: np.ndarray, other: np.ndarray, shift: np.ndarray, samples: Samples) -> Motion:
    """Choose among the four motions of an essential matrix the one that sees what it saw."""
    t = shift[:, 0]
    votes = []
    for r in (turn, other):
        y = r @ samples.rays
        for s in (t, -t):
            count = np.count_nonzero(motions.ahead(y, samples.seen, s) & (y[2] > 0))
            votes.append((count, Motion(nearest_rotation(r), s)))
    return max(votes, key=lambda vote: vote[0])[1]


def decompose(homography: np.ndarray, rays: np.ndarray) -> list[Motion]:
    """
    Split H ~ R + m n^T, keeping the planes in front of the camera: one or two motions.

    Two where the translation points to the visible side of the plane: then a camera that moves
    along the normal past a plane across its path sees just the same (Longuet-Higgins 1986).
    """
    middle = np.linalg.svd(homography)[1][1]
    h = homography / middle
    if np.median((h @ rays)[2]) < 0:
        h = -h
    _, turns, shifts, normals = cv2.decomposeHomographyMat(h, np.eye(3))
    scored = []
    for turn, shift, normal in zip(turns, shifts, normals):
        m, n = (np.asarray(v, float)[:, 0] for v in (shift, normal))
        if np.abs(turn + np.outer(m, n) - h).max() > 1e-6:
            continue
        scored.append((np.mean(n @ rays > 0), Motion(turn, m, n)))
    scored.sort(key=lambda pair: -pair[0])
    return [motion for share, motion in scored if share > 0.99]


def gric(fit: Fit, kind: str, noise: float) -> float:
    """
    Torr's GRIC: sum of min(r^2 / s^2, 2 (4 - d)) + d n ln 4 + k ln 4n; the least is the best.

    d is the dimension of what a match may be under the model, k its number of parameters. Counted
    a sample, so that correlated samples change both sides alike.
    """
    d, k = SIZES[kind]
    n = len(fit.squared)
    cost = np.minimum(fit.squared / noise**2, 2 * (4 - d)).sum()
    return float(cost + d * n * math.log(4) + k * math.log(4 * n))


def _with_turn(motion: Motion, turn: np.ndarray | None) -> Motion:
    return motion if turn is None else motion._replace(turn=turn)
