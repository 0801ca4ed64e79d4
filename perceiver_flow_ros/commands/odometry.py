# SPDX-License-Identifier: Apache-2.0
"""Errors of the ego-motion on sequences with true poses, beside OpenCV's plain estimates."""

from __future__ import annotations

import argparse
from collections import Counter
import json
from pathlib import Path
import sys
import time
from typing import Any, NamedTuple

import cv2
import numpy as np
from perceiver_flow_ros.commands._odometry_table import table
from perceiver_flow_ros.commands._sequences import find_sequence, Sequence
from perceiver_flow_ros.commands.options import add_estimator_arguments, estimator_from
from perceiver_flow_ros.flow.estimator import FlowEstimator
from perceiver_flow_ros.flow.files import read_image
from perceiver_flow_ros.odometry import Camera, Estimate, Odometry, Settings
from perceiver_flow_ros.odometry.geometry import inverse, rotation_vector, transform

HELP = 'measure the ego-motion on sequences with true poses, beside OpenCV five-point and PnP'
EXAMPLE = 'perceiver_flow odometry sequences/kitti_06 --model dis --camera-height 1.65'

LAYOUTS = """
  KITTI odometry  calib.txt poses.txt times.txt and one folder of images, of camera 0
  7-Scenes        frame-NNNNNN.color.png|jpg .depth.png .pose.txt (30 Hz; Kinect)"""
THRESHOLD = 1.0  # px, of OpenCV's RANSAC
MINIMAL = 6  # vectors that it is given at least
STILL = 0.02  # deg per axis, of the true rotations
CLOSURE_EVERY = 2  # frames from one start to the next
CHI2_MEDIAN = 2.366  # of chi^2 with 3 degrees of freedom
GRID = 6  # px, of the vectors OpenCV gets: the textured half of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('root', type=Path, help='the folder of a sequence')
    parser.add_argument(
        '--gaps', type=int, nargs='+', metavar='N', help='frames apart (default: 1; 7-Scenes: 1 5)'
    )
    parser.add_argument(
        '--camera-height', type=float, metavar='M', help='of the camera above the road: metres'
    )
    parser.add_argument('--every', type=int, default=1, metavar='N', help='use every n-th pair')
    parser.add_argument('--json', action='store_true', help='print the figures as JSON')
    add_estimator_arguments(parser)
    parser.epilog = f'{parser.epilog}\n\nlayouts:{LAYOUTS}'


def run(args: argparse.Namespace) -> int:
    """Evaluate the sequence, print the table or JSON."""
    if not args.root.is_dir():
        raise NotADirectoryError(20, 'No such folder', str(args.root))
    if args.every < 1 or any(gap < 1 for gap in args.gaps or ()):
        raise ValueError('--gaps and --every count frames: expected 1 or more')
    sequence = find_sequence(args.root)
    gaps = args.gaps or ([1] if sequence.depth is None else [1, 5])
    if max(gaps) >= len(sequence.images):
        raise ValueError(
            f'{args.root}: {len(sequence.images)} frames, none of them {max(gaps)} apart'
        )
    cv2.setNumThreads(1)  # what a pair costs is told for one core
    estimator = estimator_from(args)
    report = {
        'sequence': args.root.resolve().name,
        'layout': sequence.layout,
        'frames': len(sequence.images),
        'model': estimator.name,
        'gaps': [measure(sequence, estimator, gap, args) for gap in gaps],
        'closure': closure(sequence, estimator, args),
    }
    print(json.dumps(report, indent=2) if args.json else table(report))
    return 0


class Pair(NamedTuple):
    """What was seen and told of two frames."""

    estimate: Estimate
    seconds: float  # of CPU, without the flow
    flow: np.ndarray
    image: np.ndarray  # the previous one
    depth: dict[str, np.ndarray]  # of both frames, by the name of `Odometry.update`'s argument


def estimate_pair(
    sequence: Sequence, estimator: FlowEstimator, odometry: Odometry, i: int, j: int
) -> Pair:
    """Estimate the motion from frame i to frame j."""
    images = [read_image(sequence.images[k]) for k in (i, j)]
    flow = estimator(*images)
    depth: dict[str, Any] = {}
    if sequence.depth:
        depth = {'depth': sequence.depth(i), 'current_depth': sequence.depth(j)}
    begin = time.process_time()
    estimate = odometry.update(
        flow, sequence.camera, sequence.times[i], sequence.times[j],
        stride=estimator.query_stride, previous_image=images[0], image=images[1], **depth,
    )  # fmt: skip
    return Pair(estimate, time.process_time() - begin, flow, images[0], depth)


def measure(
    sequence: Sequence, estimator: FlowEstimator, gap: int, args: argparse.Namespace
) -> dict:
    """Estimate the motion of every pair so many frames apart; give medians and sums."""
    from tqdm import tqdm

    odometry = odometry_of(sequence, args)
    scale = odometry.settings.scale
    ours, plain, deviations, lengths, seconds, turns = [], [], [], [], [], []
    kinds: Counter[str] = Counter()
    starts = range(0, len(sequence.images) - gap, args.every)
    for i in tqdm(starts, f'{gap} apart', unit='pair', disable=None, file=sys.stderr):
        if gap > 1 or args.every > 1 and not args.camera_height:
            odometry.reset()  # pairs that do not follow each other
        pair = estimate_pair(sequence, estimator, odometry, i, i + gap)
        estimate = pair.estimate
        seconds.append(pair.seconds)
        kinds[estimate.kind or estimate.reason.value] += 1
        true = inverse(sequence.poses[i]) @ sequence.poses[i + gap]
        if estimate.valid:
            ours.append(errors(estimate.motion, true))
            deviations.append(squared(estimate.motion, true, turning(estimate)))
            turns.append([rotation_vector(t[:3, :3]) for t in (estimate.motion, true)])
            if estimate.metric:
                lengths.append([np.linalg.norm(t[:3, 3]) for t in (estimate.motion, true)])
        motion = None
        if estimator.query_stride == 1:
            motion = opencv(pair.flow, pair.image, sequence.camera, pair.depth)
        if motion is not None:
            plain.append(errors(motion, true))
    out = {
        'gap': gap,
        'scale': scale,
        'pairs': len(starts),
        'valid': len(ours),
        'kinds': kinds,
        'seconds': float(np.median(seconds)),
        'ours': medians(ours, scale == 'depth'),
        'deviation': relative(deviations),
        'slopes': slopes(turns),
        'opencv': medians(plain, scale == 'depth'),
    }
    if lengths and scale == 'camera_height':
        mine, true = np.array(lengths).T
        out['distance_error'] = float(mine.sum() / true.sum() - 1)
        out['speed_error'] = float(np.median(np.abs(mine / true - 1)))
        out['metric'] = len(lengths)
    return out


def odometry_of(sequence: Sequence, args: argparse.Namespace) -> Odometry:
    """Make an odometry that takes its metres from what the sequence has."""
    scale = 'depth' if sequence.depth else 'camera_height' if args.camera_height else 'none'
    settings = Settings(scale=scale, camera_height=args.camera_height or 0.0)
    return Odometry(settings)


def closure(sequence: Sequence, estimator: FlowEstimator, args: argparse.Namespace) -> dict:
    """
    Compare rotations over two frames with two of one frame each: what needs no true poses.

    Noise of the flow shows in it; what is wrong everywhere alike (calibration) does not.
    """
    from tqdm import tqdm

    angles, deviations = [], []
    starts = range(0, len(sequence.images) - 2, max(args.every, CLOSURE_EVERY))
    for i in tqdm(starts, 'closure', unit='pair', disable=None, file=sys.stderr):
        first, second, both = (
            estimate_pair(sequence, estimator, odometry_of(sequence, args), *ends).estimate
            for ends in ((i, i + 1), (i + 1, i + 2), (i, i + 2))
        )
        if not (first.valid and second.valid and both.valid):
            continue
        parts = first.motion @ second.motion
        covariance = turning(first) + turning(second) + turning(both)
        angles.append(errors(both.motion, parts)[0])
        deviations.append(squared(both.motion, parts, covariance))
    rotation = float(np.median(angles)) if angles else None
    return {'pairs': len(angles), 'rotation_deg': rotation, 'deviation': relative(deviations)}


def turning(estimate: Estimate) -> np.ndarray:
    """Give the covariance (3, 3) of an estimate's rotation, rad^2."""
    return estimate.twist_covariance[3:, 3:] * estimate.dt**2


def squared(motion: np.ndarray, true: np.ndarray, covariance: np.ndarray) -> float:
    """Give the squared error of a rotation in its covariance: chi^2 with 3 degrees of freedom."""
    off = rotation_vector(true[:3, :3].T @ motion[:3, :3])
    return float(off @ np.linalg.solve(covariance, off))


def relative(deviations: list[float]) -> float | None:
    """Give the median of squared errors; 1 where the covariances are true."""
    return float(np.median(deviations) / CHI2_MEDIAN) if deviations else None


def slopes(turns: list) -> dict:
    """
    Regress the true rotations on the estimated ones, and the other way round.

    Noise lowers the slope of whatever is regressed on it (errors in variables): the first one
    falls below 1 with the noise of the estimates, the second one with that of the true poses.
    What is left of each one's square is its noise, root mean square. Nothing is told of a camera
    that does not turn.
    """
    mine, true = np.degrees(turns).reshape(-1, 2, 3).transpose(1, 0, 2)
    if not turns or np.sqrt(np.mean(true**2)) < STILL:
        return {}
    both, mine, true = (np.mean(np.sum(x, axis=1)) for x in (mine * true, mine**2, true**2))
    return {
        'true_on_estimated': float(both / mine),
        'estimated_on_true': float(both / true),
        'noise_estimated_deg': float(np.sqrt(max(mine - both, 0))),
        'noise_true_deg': float(np.sqrt(max(true - both, 0))),
    }


def opencv(flow: np.ndarray, image: np.ndarray, camera: Camera, more: dict) -> np.ndarray | None:
    """Give OpenCV's plain estimate from the same flow: five points, or PnP with depth."""
    h, w = flow.shape[:2]
    y, x = (a.ravel() for a in np.mgrid[GRID: h - GRID: GRID, GRID: w - GRID: GRID])
    before = np.stack([x, y], axis=1).astype(np.float64)
    after = before + flow[y, x]
    good = np.isfinite(after).all(axis=1)
    if 'depth' in more:
        z = more['depth'][y, x]
        good &= np.isfinite(z)
        points = camera.rays(before[good]) * z[good, None]
        if len(points) < MINIMAL:
            return None
        found, turn, shift, _ = cv2.solvePnPRansac(
            points, after[good], camera.matrix, np.zeros(4), reprojectionError=THRESHOLD
        )
        return inverse(transform(cv2.Rodrigues(turn)[0], shift[:, 0])) if found else None
    grey = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    texture = cv2.cornerMinEigenVal(grey, 7)[y, x]
    good &= texture > np.median(texture)
    before, after = before[good], after[good]
    if len(before) < MINIMAL:
        return None
    essential, mask = cv2.findEssentialMat(
        before, after, camera.matrix, cv2.RANSAC, prob=0.999, threshold=THRESHOLD
    )
    if essential is None:
        return None
    _, turn, shift, _ = cv2.recoverPose(essential[:3], before, after, camera.matrix, mask=mask)
    return inverse(transform(turn, shift[:, 0]))


def errors(motion: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """Rotation, deg; direction of translation, deg (NaN where there is none); translation, m."""
    off = inverse(true) @ motion
    a, b = motion[:3, 3], true[:3, 3]
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    angle = np.degrees(np.arccos(np.clip(a @ b / lengths, -1, 1))) if lengths > 0 else np.nan
    turn = np.degrees(np.linalg.norm(rotation_vector(off[:3, :3])))
    return float(turn), float(angle), float(np.linalg.norm(off[:3, 3]))


def medians(rows: list, metric: bool) -> dict:
    """Give the medians of `errors`; the translation only where it is in metres."""
    if not rows:
        return {}
    rotation, direction, translation = np.array(rows).T
    known = direction[np.isfinite(direction)]
    out = {'rotation_deg': float(np.median(rotation)),
           'direction_deg': float(np.median(known)) if len(known) else None}
    return {**out, 'translation_mm': 1e3 * float(np.median(translation))} if metric else out
