"""What the covariances of the ego-motion are worth: normalised errors on rendered pairs."""

import numpy as np
from odometry_rig import CAMERA, depth_of, DRIVES, noisy, street, true_motion, VIEW
from perceiver_flow_ros.odometry import Camera, Odometry, Settings
from perceiver_flow_ros.odometry import depth as depths
from perceiver_flow_ros.odometry.geometry import (
    inverse,
    motion_vector,
    rotation,
    rotation_vector,
    transform,
)
from perceiver_flow_ros.training.scene import exact_flow, look
import pytest

PLANES = (((0.5, 0.1, 1), 3), ((-0.6, 0.2, 1), 3.2), ((0, 0.9, 0.5), 1.5))  # n . X = metres
FISHEYE = Camera(640, 480, 220.0, 220.0, 319.5, 239.5, 'equidistant', (0.02, -0.005, 0.001, 0.0))


def room(camera, pose):
    """Depth (H, W) of three planes, seen from a pose, and the rays of the pixels."""
    y, x = np.mgrid[:camera.height, :camera.width]
    rays = camera.rays(np.stack([x, y], -1).reshape(-1, 2).astype(float))
    depth = np.full(len(rays), np.inf)
    for normal, distance in PLANES:
        slope = rays @ (pose[:3, :3].T @ normal)
        with np.errstate(divide='ignore', invalid='ignore'):
            z = (distance - normal @ pose[:3, 3]) / slope
        depth = np.minimum(depth, np.where(slope > 1e-6, z, np.inf))
    return depth.reshape(camera.height, camera.width), rays


def flow_in_room(camera, before, after, noise=0.1):
    """Give the flow between two poses, with white noise of so many pixels."""
    depth, rays = room(camera, before)
    moved = transform_points(inverse(after) @ before, rays * depth.reshape(-1, 1))
    y, x = np.mgrid[:camera.height, :camera.width]
    flow = camera.project(moved).reshape(*depth.shape, 2) - np.stack([x, y], -1)
    return (flow + np.random.default_rng(0).normal(0, noise, flow.shape)).astype(np.float32)


def transform_points(motion, points):
    with np.errstate(invalid='ignore'):
        return points @ motion[:3, :3].T + motion[:3, 3]


def surprise(estimate, true):
    """Squared error of a motion in its covariance, over its degrees of freedom."""
    off = motion_vector(inverse(true) @ estimate.motion)
    return off @ np.linalg.solve(estimate.twist_covariance * estimate.dt**2, off) / len(off)


@pytest.mark.parametrize('camera', [CAMERA, FISHEYE], ids=['pinhole', 'fisheye'])
def test_the_surface_of_a_depth_image_is_seen_through_the_lens(camera):
    before = np.eye(4)
    after = transform(rotation((0.01, 0.02, 0.005)), np.array([0.05, -0.03, 0.1]))
    seen = [np.float32(room(camera, pose)[0]) for pose in (before, after)]
    estimate = Odometry(Settings(scale='depth')).update(
        flow_in_room(camera, before, after), camera, 0.0, 0.1, depth=seen[0],
        current_depth=seen[1],
    )  # fmt: skip
    # As exact as the linear distortion of four pixels to either side; depth has no noise here.
    assert estimate.usable and surprise(estimate, after) < 15
    assert np.linalg.norm(estimate.motion[:3, 3] - after[:3, 3]) < 2e-5  # m


def test_what_comes_beside_the_camera_is_not_looked_for_in_a_depth_image():
    points = np.array([[0.1, 1, 1, -2], [0.1, 2, 0, 1], [2, 1e-12, 0, -1]], float)
    depth = np.full((480, 640), 2.0, np.float32)
    with np.errstate(all='ignore'):
        _, _, known = depths._surface_at(depth, FISHEYE, points)
    assert known.tolist() == [True, False, False, False]


@pytest.mark.parametrize('twist', [(0, 0, 1.0, 0, 0, 0), (0.1, 0, 1.0, 0, 0.1, 0)], ids=str)
def test_depth_of_another_time_costs_certainty(twist):
    """Images at 30 Hz, depth at 15: every other pair has only that of the image before."""
    steps = np.array(twist) / 30
    poses = [transform(rotation(k * steps[3:]), k * steps[:3]) for k in range(3)]
    flow = flow_in_room(CAMERA, poses[1], poses[2])
    old, true = np.float32(room(CAMERA, poses[0])[0]), inverse(poses[1]) @ poses[2]
    told, untold = (
        Odometry(Settings(scale='depth')).update(
            flow, CAMERA, 1 / 30, 2 / 30, depth=old, depth_stamp=stamp)
        for stamp in (0.0, None)
    )  # fmt: skip
    assert surprise(untold, true) > 5 * surprise(told, true)
    assert surprise(told, true) < 3
    np.testing.assert_allclose(told.twist, twist, atol=0.05)


def test_a_range_of_another_time_costs_certainty():
    drive = DRIVES['downward']
    scene = drive.scene()
    first, second = (scene.render(drive.path(t), VIEW, t) for t in (1.0, 1.1))
    flow, height = exact_flow(first, second)[0], float(first.depth[120, 160])
    speeds = [
        Odometry(Settings(scale='range')).update(
            noisy(flow, 0, 0.1), CAMERA, 1.0, 1.1, height=height, height_stamp=1.0 - off)
        for off in (0.0, 0.5)
    ]  # fmt: skip
    assert speeds[0].usable and (speeds[0].twist == speeds[1].twist).all()
    velocity = speeds[0].twist[:3]
    assert abs(velocity[2]) > 0.1  # m/s along the axis, so that the range is another
    share = 0.5 * abs(velocity[2]) / height
    spreads = [np.trace(e.twist_covariance[:3, :3]) for e in speeds]
    assert spreads[1] - spreads[0] == pytest.approx(
        np.sum((share * velocity)**2), rel=0.05)


def test_a_turn_that_is_taken_for_none_is_in_the_covariance():
    """Of 0.03 px a pair, before flow of 0.02 px of noise."""
    turn = transform(rotation((0, 0.03 / CAMERA.fx, 0)), np.zeros(3))
    flow = flow_in_room(CAMERA, np.eye(4), turn, noise=0.02)
    estimate = Odometry().update(flow, CAMERA, 0.0, 0.1)
    assert estimate.kind == 'stationary' and not estimate.twist[3:].any()
    off = rotation_vector(turn[:3, :3])
    covariance = estimate.twist_covariance[3:, 3:] * 0.1**2
    assert off @ np.linalg.solve(covariance, off) / 3 < 2


@pytest.mark.parametrize('scale', ['none', 'depth'])
def test_what_a_gyro_is_off_by_adds_up_in_the_pose(scale):
    """`gyro_noise` has the bias in it, which is the same in every pair."""
    bias, step = 0.01, transform(rotation((0, 0.02, 0)), np.array([0, 0, 0.05]))
    odometry = Odometry(Settings(scale=scale, gyro='replace', gyro_noise=bias))
    flow, depth = flow_in_room(CAMERA, np.eye(4), step), np.float32(room(CAMERA, np.eye(4))[0])
    pairs = 50
    for k in range(pairs):
        estimate = odometry.update(flow, CAMERA, 0.1 * k, 0.1 * (k + 1), gyro=(0, 0.2 + bias, 0),
                                   depth=depth if scale == 'depth' else None)  # fmt: skip
    true = np.linalg.matrix_power(step, pairs)
    off = rotation_vector(true[:3, :3].T @ estimate.pose[:3, :3])
    assert np.linalg.norm(off) == pytest.approx(bias * 0.1 * pairs, rel=0.1)
    # (symmetric: a deviation about the vertical of odom, about which all of it was)
    assert np.sqrt(estimate.pose_covariance[4, 4]) == pytest.approx(np.linalg.norm(off), rel=0.1)
    assert np.linalg.eigvalsh(estimate.pose_covariance).min() > 0


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
