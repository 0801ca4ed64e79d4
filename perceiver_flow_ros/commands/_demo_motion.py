# SPDX-License-Identifier: Apache-2.0
"""The demo's odometry: what the node said of the camera's motion beside how it truly moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from perceiver_flow_ros.commands._demo_frames import Footage
from perceiver_flow_ros.commands._demo_pictures import BACKGROUND, FAINT, GAP, INK, MARGIN, write
from perceiver_flow_ros.commands._demo_run import NODE, Recording
from perceiver_flow_ros.commands.bagfile import TYPES
from perceiver_flow_ros.odometry.geometry import inverse, rotation, rotation_vector

TRUE, FOUND = (120, 200, 130), (255, 170, 64)  # colours of the curves
WEIGHTS = 6, 2  # pixels: where they agree, both are seen
WIDTH, STRIP = 1240, 220  # pixels of a plot
SCALE_SOURCE = 'camera_height'


@dataclass
class Motion:
    """One pair's motion as published and as it was, in camera axes (right, down, forward)."""

    previous: int  # number of the frame it starts from
    current: int
    seconds: float  # between their stamps
    time: float  # of the current one, into the run
    twist: np.ndarray  # (6,) m/s, rad/s
    position: np.ndarray  # (3,) m, integrated
    true_motion: np.ndarray  # (4, 4) T_previous_current
    true_position: np.ndarray  # (3,) m, from where the integration began

    @property
    def rotation_error(self) -> float:
        """Degrees."""
        turned = rotation(self.twist[3:] * self.seconds)
        return float(np.degrees(np.linalg.norm(
            rotation_vector(turned.T @ self.true_motion[:3, :3])
        )))  # fmt: skip

    @property
    def direction_error(self) -> float:
        """Degrees, between the velocities in the current camera's axes; NaN where it stands."""
        v = self.twist[:3]
        true = self.true_motion[:3, :3].T @ self.true_motion[:3, 3]
        # The twist is constant over the pair: its v turns by half of the rotation until the end.
        v = rotation(-0.5 * self.twist[3:] * self.seconds) @ v
        lengths = np.linalg.norm(v) * np.linalg.norm(true)
        if not lengths > 0:
            return float('nan')
        return float(np.degrees(np.arccos(np.clip(v @ true / lengths, -1, 1))))


def read_motions(recording: Recording, footage: Footage) -> list[Motion]:
    """Read the odometry out of the recording of a rendered drive, in its order."""
    number = {stamp: i for i, stamp in enumerate(recording.sent)}
    pairs: dict[int, int] = {}  # current -> previous, nanoseconds
    found = []
    m: Any
    for message in recording.messages():
        if message.topic == NODE['flow/previous']:
            m = TYPES.deserialize_cdr(message.data, message.kind)
            pairs[_stamp(m.header.stamp)] = _stamp(m.time_ref)
        elif message.topic == NODE['odometry']:
            m = TYPES.deserialize_cdr(message.data, message.kind)
            found.append((_stamp(m.header.stamp), m))
    if not pairs:
        return []
    start = inverse(footage.views[number[pairs[min(pairs)]]].pose)
    motions = []
    for stamp, m in sorted(found, key=lambda item: item[0]):
        if stamp not in pairs:
            continue  # its flow/previous was lost on the way
        before, now = number[pairs[stamp]], number[stamp]
        poses = footage.views[before].pose, footage.views[now].pose
        linear, angular, at = m.twist.twist.linear, m.twist.twist.angular, m.pose.pose.position
        motions.append(Motion(
            before, now, (stamp - pairs[stamp]) / 1e9, (stamp - recording.sent[0]) / 1e9,
            np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z]),
            np.array([at.x, at.y, at.z]),
            inverse(poses[0]) @ poses[1], (start @ poses[1])[:3, 3],
        ))  # fmt: skip
    return motions


def figures(motions: list[Motion]) -> dict[str, Any]:
    """Sum up how well the motion was known; nothing where there was none."""
    if not motions:
        return {}
    found = sum(float(np.linalg.norm(m.twist[:3])) * m.seconds for m in motions)
    true = sum(float(np.linalg.norm(m.true_motion[:3, 3])) for m in motions)
    return {
        'motions': len(motions),
        'scale_source': SCALE_SOURCE,
        'rotation_error_deg': float(np.median([m.rotation_error for m in motions])),
        'direction_error_deg': float(np.nanmedian([m.direction_error for m in motions])),
        'distance_m': float(found),
        'true_distance_m': float(true),
        'distance_error_percent': float(100 * abs(found / true - 1)) if true > 0 else 0.0,
    }


def rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lay the figures out as rows of the demo's table."""
    if not report.get('motions'):
        return []
    distance = f'{report["distance_m"]:.2f} m of {report["true_distance_m"]:.2f} m'
    return [
        ('odometry', f'{report["motions"]}', f'motions, scale source {report["scale_source"]}'),
        ('rotation', f'{report["rotation_error_deg"]:.3f} deg', 'median error of a pair'),
        ('direction', f'{report["direction_error_deg"]:.2f} deg', 'median error of a pair'),
        ('distance', f'{report["distance_error_percent"]:.1f} %', f'error: {distance}'),
    ]


def trajectory(motions: list[Motion], title: str, subtitle: str) -> np.ndarray:
    """Draw the path from above and the speed over time, found and true: (h, w, 3) uint8 RGB."""
    paths = [
        np.array([[0.0, 0.0, 0.0], *(p for p in points)])[:, [2, 0]]
        for points in ([m.true_position for m in motions], [m.position for m in motions])
    ]  # forward to the right, right downwards
    points = np.concatenate(paths)
    low, size = points.min(0), np.maximum(np.ptp(points, axis=0), 0.1)
    scale = min((WIDTH - 2 * MARGIN) / size[0], 500 / size[1])  # one for both axes
    height = max(round(size[1] * scale) + 2 * MARGIN, 90)
    top = MARGIN + 78
    shape = top + height + 2 * GAP + 34 + STRIP + 24 + MARGIN, WIDTH + 2 * MARGIN, 3
    canvas = np.full(shape, BACKGROUND, np.uint8)
    write(canvas, title, (MARGIN, MARGIN + 26), 30, INK, weight=2)
    write(canvas, subtitle, (MARGIN, MARGIN + 60), 19, FAINT)

    offset = np.array([2 * MARGIN, top + (height - size[1] * scale) / 2]) - low * scale
    for path, colour, weight in zip(paths, (TRUE, FOUND), WEIGHTS):
        _curve(canvas, path * scale + offset, colour, weight)
    _ruler(canvas, (2 * MARGIN, top + height - 6), scale)
    _legend(canvas, (WIDTH - 330, top + 4))

    top += height + 2 * GAP
    write(canvas, 'speed over time', (MARGIN, top + 16), 18, INK)
    top += 34
    times = np.array([m.time for m in motions])
    speeds = [
        np.array([np.linalg.norm(m.true_motion[:3, 3]) / m.seconds for m in motions]),
        np.array([np.linalg.norm(m.twist[:3]) for m in motions]),
    ]
    most = 1.2 * max(float(np.max(speeds)), 0.1)
    for level in (0.0, most / 2, most):
        y = round(top + STRIP - level / most * STRIP)
        cv2.line(canvas, (2 * MARGIN + 40, y), (WIDTH, y), (44, 50, 62), 1)
        write(canvas, f'{level:.1f} m/s', (MARGIN, y + 5), 15, FAINT)
    span = max(float(np.ptp(times)), 1e-3)
    x = 2 * MARGIN + 50 + (times - times[0]) / span * (WIDTH - 3 * MARGIN - 50)
    for speed, colour, weight in zip(speeds, (TRUE, FOUND), WEIGHTS):
        points = np.stack([x, top + STRIP - speed / most * STRIP], axis=1)
        _curve(canvas, points, colour, weight)
    for time, at in ((times[0], x[0]), (times[-1], x[-1])):
        write(canvas, f'{time:.1f} s', (round(at) - 18, top + STRIP + 26), 15, FAINT)
    return canvas


def _curve(
    canvas: np.ndarray, points: np.ndarray, colour: tuple[int, int, int], weight: int
) -> None:
    """Draw a smooth line through points (N, 2), and a dot at each."""
    fine = 4
    fixed = np.round(points * 2**fine).astype(np.int32)
    cv2.polylines(canvas, [fixed[:, None]], False, colour, weight, cv2.LINE_AA, fine)
    for point in fixed:
        x, y = (int(n) for n in point)
        cv2.circle(canvas, (x, y), (1 + weight) << fine, colour, -1, cv2.LINE_AA, fine)


def _ruler(canvas: np.ndarray, at: tuple[int, int], scale: float) -> None:
    """Draw what some metres are."""
    metres = next((m for m in (50, 20, 10, 5, 2, 1, 0.5, 0.2) if m * scale < 260), 0.1)
    end = at[0] + round(metres * scale)
    cv2.line(canvas, at, (end, at[1]), FAINT, 1)
    write(canvas, f'{metres:g} m', (end + 8, at[1] + 5), 15, FAINT)


def _legend(canvas: np.ndarray, at: tuple[int, int]) -> None:
    for i, (colour, text) in enumerate(((TRUE, 'true, from the renderer'), (FOUND, '~/odometry'))):
        y = at[1] + 22 * i
        cv2.line(canvas, (at[0], y), (at[0] + 28, y), colour, 3, cv2.LINE_AA)
        write(canvas, text, (at[0] + 38, y + 5), 16, FAINT)


def _stamp(stamp: Any) -> int:
    return stamp.sec * 10**9 + stamp.nanosec
