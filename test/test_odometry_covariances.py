"""What the covariances of the ego-motion are worth: normalised errors on rendered pairs."""

import numpy as np
from odometry_rig import CAMERA, depth_of, noisy, street, true_motion, VIEW
from perceiver_flow_ros.odometry import Odometry, Settings
from perceiver_flow_ros.odometry.geometry import inverse, motion_vector
from perceiver_flow_ros.training.scene import exact_flow, look
import pytest


@pytest.mark.slow
@pytest.mark.parametrize('pairs', [200, 30])
def test_covariances_tell_the_errors(pairs):
    """NEES over its degrees of freedom: rotation and direction, and all six axes with depth."""
    scene = street()
    rng = np.random.default_rng(1)
    sums = {'none': [], 'depth': [], 'camera_height': []}
    seed = 0
    while seed < pairs:
        x, y = rng.uniform(0, 60), rng.uniform(-2.5, -0.5)
        yaw = rng.uniform(-0.25, 0.25)
        dx, dy, dz = rng.uniform((0.1, -0.1, -0.02), (0.5, 0.1, 0.02))
        turns = rng.uniform(-0.03, 0.03, 3) * (1, 0.3, 0.3)
        time = rng.uniform(0, 6)
        first = scene.render(look((x, y, 1.5), yaw), VIEW, time)
        moved = look((x + dx, y + dy, 1.5 + dz), yaw + turns[0], *turns[1:])
        second = scene.render(moved, VIEW, time + 0.1)
        if first.depth.min() < 1 or np.mean(first.body[first.depth < 20] > 0) > 0.25:
            continue  # close behind another car, which is most of what has a depth
        flow, true = noisy(exact_flow(first, second)[0], seed), true_motion(first, second)
        seed += 1
        for scale, rows in sums.items():
            odometry = Odometry(Settings(scale=scale, camera_height=1.5))
            estimate = odometry.update(flow, CAMERA, 0.0, 0.1, depth=depth_of(first))
            if not estimate.usable or estimate.kind != 'general':
                continue
            off = motion_vector(inverse(true) @ estimate.motion)
            covariance = estimate.twist_covariance * estimate.dt**2
            if scale == 'none':
                off, covariance = off[3:], covariance[3:, 3:]
            rows.append(off @ np.linalg.solve(covariance, off) / len(off))
    low, high = (0.5, 2.0) if pairs >= 200 else (0.35, 3.0)  # 30 pairs scatter by themselves
    for scale, rows in sums.items():
        assert len(rows) > 0.7 * pairs, (scale, len(rows))
        print(f'{scale}: NEES / dof {np.mean(rows):.2f} over {len(rows)} pairs')
        assert low < np.mean(rows) < high, (scale, np.mean(rows))
        middle = np.median(rows) / 0.85  # chi^2 has its median lower
        assert low < middle < high, (scale, middle)
