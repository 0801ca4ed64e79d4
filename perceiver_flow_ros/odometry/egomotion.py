# SPDX-License-Identifier: Apache-2.0
"""Rotation and direction of translation from flow alone, and which kind of motion it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from perceiver_flow_ros.odometry import candidates, motions
from perceiver_flow_ros.odometry.geometry import rotation_vector, tangent
from perceiver_flow_ros.odometry.motions import Motion
from perceiver_flow_ros.odometry.robust import Block, evaluate, Fit, refine
from perceiver_flow_ros.odometry.samples import Samples
from perceiver_flow_ros.odometry.settings import Reason, Refused

FEW = 800  # samples that the candidates are compared on
WORST = 3.0  # px of noise for an image of 640 px, beyond which no motion was found
CERTAIN = 16.27  # chi^2 with 3 degrees of freedom, 99.9 %
AT_REST = 0.5  # share of the samples that may be the world, and the others movers
MINIMAL = 20  # samples that tell a plane
TIGHT, TIGHT_SHARE = 0.5, 0.221  # squared noises that so many samples at rest stay within
VAGUE = 0.35  # rad, deviation of a direction that is none
STEADY = 0.03  # rad/s, deviation of the rate of turning from what was expected
ODDS = 3.0  # log of 20 : 1, which decides between the two motions past a plane
PLACE = 0.002  # rad, deviation of a plane from where the last pair puts it, beside both errors
HORIZON = 0.02  # of a ray along the normal of a plane, below which it is as good as parallel
UNEXPLAINED = 0.25  # of a parallax, up to which a plane explains it
MOUNTED = 0.1  # rad, deviation of a plane from where it is expected below, or before, the camera


class Crept(NamedTuple):
    """The sum of translations too small to tell from noise, of late; together they may tell."""

    shift: np.ndarray  # (3,) m
    covariance: np.ndarray  # (3, 3)

    def significant(self, certain: float) -> bool:
        """Tell whether it is more than noise, by chi^2 with 3 degrees of freedom."""
        return bool(self.shift @ np.linalg.solve(self.covariance, self.shift) > certain)


@dataclass
class Prior:
    """What is known of a pair before looking at its flow; None where nothing is."""

    dt: float = 0.1  # s
    last: Motion | None = None  # the motion if nothing has changed; shift in metres, if known
    gyro: np.ndarray | None = None  # (3, 3) measured rotation that takes the place of our own
    gyro_deviation: float = 0.0  # rad, its standard deviation per axis
    normal: np.ndarray | None = None  # (3,) of the plane we look at, if it is one
    planes: tuple[np.ndarray, ...] = ()  # normals that the last pair, seen as a plane, predicts
    crept: Crept | None = None  # of the pairs before, which seemed to be at rest


@dataclass
class Ego:
    """The motion X_current = R X_previous + t, and how well it is known."""

    kind: str  # as in `Estimate`
    motion: Motion  # t of length 1 or 0; metres from `depth.align`
    covariance: np.ndarray  # (6, 6) of the steps of R (3), left, and t (3)
    noise: float  # px
    inliers: np.ndarray  # (N,) bool
    planes: tuple[np.ndarray, ...] = ()  # normals, in the current frame, of the plane it may be
    crept: Crept | None = None  # where this pair seems to be at rest


class Twofold(Refused):
    """A plane that two motions show alike: the next pair may tell, by where each puts it."""

    def __init__(self, planes: tuple[np.ndarray, ...]):
        super().__init__(
            Reason.AMBIGUOUS,
            'a plane fills the view, and two motions show it alike: more frames, a gyro, or more '
            'than the plane would tell them apart',
        )
        self.planes = planes


def estimate(samples: Samples, focal: float, width: int, floor: float, prior: Prior) -> Ego:
    """
    Estimate the motion between two views.

    Parameters
    ----------
    focal, width : of the image, pixels a radian, pixels.
    floor : px of flow noise assumed at least (`Settings.flow_noise`).

    Raises
    ------
    Refused
        When no motion explains the flow, or more than one does.

    """
    # Every kind of motion on a few samples; the simplest that explains them, on all.
    few = samples[:: -(-len(samples) // FEW)]
    found = candidates.find(few, focal, prior.gyro, prior.last)
    kind = choose(few, found, floor, prior)
    start = found[kind].state
    if kind == 'rotation':
        ego = turning(samples, start, floor, prior)
    elif kind == 'planar':
        ego = past_plane(samples, start, prior)
    else:
        model = motions.general(samples)
        ego = ego_of('general', *fitted(model, start, samples.cells, prior))
    consistent(ego, width)
    vague = np.sqrt(np.linalg.eigvalsh(ego.covariance[3:, 3:])[-1])
    if vague > VAGUE:
        raise Refused(
            Reason.AMBIGUOUS,
            f'the direction of translation is only known to {np.degrees(vague):.0f} deg: the '
            'camera moves too little for what it sees',
        )
    return ego


def consistent(ego: Ego, width: int) -> Ego:
    """Pass a motion that explains the flow; Refused for one that does not."""
    if ego.noise > WORST * max(width / 640, 0.5):
        raise Refused(
            Reason.NO_CONSENSUS,
            f'no rigid motion explains the flow, the best leaves {ego.noise:.1f} px: most of what '
            'is seen moves by itself, or the flow is wrong',
        )
    return ego


def choose(samples: Samples, found: dict[str, Fit], floor: float, prior: Prior) -> str:
    """Choose the kind of motion by GRIC; say so where movers would explain the flow as well."""
    richest = found.get('general') or found.get('planar') or found['rotation']
    noise = max(richest.scale, floor)
    kind = min(found, key=lambda name: candidates.gric(found[name], name, noise))
    at_rest = np.mean(found['rotation'].squared <= TIGHT * noise**2) / TIGHT_SHARE
    if kind == 'rotation' or at_rest < AT_REST:
        return kind
    # Half of the image only turns. Either the rest is near while that is far, or the rest moves.
    if prior.normal is not None and is_parallax_of(prior.normal, samples, found, kind, noise):
        return kind
    if prior.last is not None:
        if not prior.last.shift.any():
            return 'rotation'
        if unit(prior.last.shift) @ unit(found[kind].state.shift) > 0.9:
            return kind
    raise Refused(
        Reason.AMBIGUOUS,
        f'{100 * at_rest:.0f} % of the image show a camera that does not translate, the rest one '
        'that does: something large moves, or all but a little is far away',
    )


def is_parallax_of(
    normal: np.ndarray, samples: Samples, found: dict[str, Fit], kind: str, noise: float
) -> bool:
    """
    Tell whether what a rotation leaves open is the parallax of a plane, half of it at least.

    Something that moves before a camera at rest does not look like the ground, which is the
    faster the lower it is seen.
    """
    left = found['rotation'].squared
    moving = left > (3 * noise) ** 2
    nearness = normal @ samples.rays  # 1 / depth, in distances from the plane
    plane = moving & (nearness > HORIZON)
    if 2 * np.count_nonzero(plane) <= max(np.count_nonzero(moving), 2 * MINIMAL):
        return False
    model = motions.rigid(samples[plane], 1 / nearness[plane])
    fit = refine([Block(model[0])], model[1], found['rotation'].state, close=candidates.CLOSE)
    explained = np.count_nonzero(fit.squared < UNEXPLAINED**2 * left[plane])
    ahead = unit(fit.state.shift) @ unit(found[kind].state.shift)
    return bool(2 * explained > np.count_nonzero(moving) and ahead > 0.9)


def fitted(model: motions.Model, start: Motion, cells: np.ndarray, prior: Prior, *more: Block):
    """
    Refine on all samples: the Fit, and the covariance of all the model's parameters.

    `more` are other kinds of residuals with the same parameters.
    """
    if prior.gyro is None:
        fit = refine([Block(model[0], cells), *more], model[1], start)
        return fit, fit.covariance
    blocks = [Block(motions.held(b.linearize), b.cells, share=b.share) for b in more]
    blocks.insert(0, Block(motions.held(model[0]), cells))
    fit = refine(blocks, motions.still(model[1]), start)
    # What the gyro's error does to the rest: d(rest) = -A_rest,rest^-1 A_rest,turn d(turn).
    every = [Block(model[0]), *more]
    a = np.sum([b.share * b.weigh(fit.state).normal()[0] for b in every], axis=0)
    drag = np.concatenate([np.eye(3), -np.linalg.solve(a[3:, 3:], a[3:, :3])])
    covariance = drag @ drag.T * prior.gyro_deviation**2
    covariance[3:, 3:] += fit.covariance
    return fit, covariance


def ego_of(kind: str, fit: Fit, covariance: np.ndarray) -> Ego:
    """Bring a fit to a unit translation and to the covariance of (R, t)."""
    length = np.linalg.norm(fit.state.shift)
    t = fit.state.shift / length
    spread = np.zeros((6, len(covariance)))
    spread[:3, :3] = np.eye(3)
    if kind == 'general':
        spread[3:, 3:5] = tangent(t)
    else:
        spread[3:, 3:6] = (np.eye(3) - np.outer(t, t)) / length
    motion = fit.state._replace(shift=t)
    return Ego(kind, motion, spread @ covariance @ spread.T, fit.scale, fit.inliers)


def turning(samples: Samples, start: Motion, floor: float, prior: Prior) -> Ego:
    """Estimate a pure rotation, and whether it is one at all."""
    model = motions.rotation_only(samples)
    covariance = np.zeros((6, 6))
    fit = refine([Block(model[0], samples.cells)], model[1], start)
    covariance[:3, :3] = fit.covariance
    turn = rotation_vector(fit.state.turn)
    significant = turn @ np.linalg.solve(covariance[:3, :3], turn) > CERTAIN
    still = evaluate([Block(model[0])], motions.STILL)
    if significant and still.scale > floor:
        if prior.gyro is not None:  # the flow has told that it turns, the gyro tells how much
            fit = evaluate([Block(model[0])], start)
            covariance[:3, :3] = np.eye(3) * prior.gyro_deviation**2
        return Ego('rotation', fit.state, covariance, fit.scale, fit.inliers)
    covariance[:3, :3] += np.outer(turn, turn)  # what is taken for none may be there
    return Ego('stationary', motions.STILL, covariance, still.scale, still.inliers)


def past_plane(samples: Samples, start: Motion, prior: Prior) -> Ego:
    """Estimate the motion past a plane, and which of the two that look the same it is."""
    model = motions.planar(samples)
    fit, covariance = fitted(model, start, samples.cells, prior)
    if prior.gyro is not None:
        return ego_of('planar', fit, covariance)
    state = fit.state
    both = candidates.decompose(state.turn + np.outer(state.shift, state.normal), samples.rays)
    if not both:  # rounding
        both = [state]
    blocks = [Block(model[0], samples.cells)]
    fits = [refine(blocks, model[1], m, iterations=2) for m in both]
    fit = fits[resolve(fits, prior)] if len(fits) > 1 else fits[0]
    ego = ego_of('planar', fit, fit.covariance)
    ego.planes = predicted(fits)
    return ego


def predicted(fits: list[Fit]) -> tuple[np.ndarray, ...]:
    """Give the normals of planes after the motion: n' = R n."""
    return tuple(fit.state.turn @ fit.state.normal for fit in fits)


def resolve(fits: list[Fit], prior: Prior) -> int:
    """
    Choose between two motions that show a plane alike; Twofold where nothing tells them apart.

    The odds add up: where the plane is expected (a mounted camera, or the last pair: the plane of
    the wrong motion does not stay in place), and a rate of turning that changes little.
    """
    if unit(fits[0].state.shift) @ unit(fits[1].state.shift) > 0.9998:  # 1.1 deg: one and the same
        return 0
    expected = np.zeros(3) if prior.last is None else rotation_vector(prior.last.turn)
    off = np.zeros(2)  # squared deviations
    for i, fit in enumerate(fits):
        rate = (rotation_vector(fit.state.turn) - expected) / prior.dt
        off[i] = min(rate @ rate / STEADY**2, 16.0)  # it may change at once: then it tells nothing
        n = fit.state.normal
        spread = 0.5 * np.trace(fit.covariance[6:, 6:]) + PLACE**2
        if prior.normal is not None:
            off[i] += np.sum(np.cross(n, prior.normal) ** 2) / MOUNTED**2
        elif prior.planes:
            off[i] += min(np.sum(np.cross(n, plane) ** 2) for plane in prior.planes) / spread
    better = int(np.argmin(off))
    if off[1 - better] - off[better] > 2 * ODDS and off[better] < 16.0:
        return better
    raise Twofold(predicted(fits))


def unit(v: np.ndarray) -> np.ndarray:
    """Give a vector the length 1; zero stays zero."""
    return v / max(np.linalg.norm(v), 1e-12)
