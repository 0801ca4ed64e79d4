"""Cameras, gyro samples, depth images, settings; and that nothing bad that comes in gets out."""

from itertools import pairwise

import cv2
import numpy as np
from odometry_rig import CAMERA, DRIVES, views
from perceiver_flow_ros.odometry import (
    Camera,
    CameraError,
    cues,
    GyroGap,
    mean_rate,
    Odometry,
    register_depth,
    Settings,
    Uncalibrated,
)
from perceiver_flow_ros.odometry.geometry import (
    adjoint,
    inverse,
    left_jacobian,
    motion_vector,
    rotation,
    rotation_vector,
    tangent,
    transform,
)
from perceiver_flow_ros.training.scene import exact_flow
import pytest

K = [500.0, 0, 320.0, 0, 510.0, 240.0, 0, 0, 1]
P = [480.0, 0, 321.0, 0, 0, 490.0, 241.0, 0, 0, 0, 1, 0]
MODELS = {
    'plumb_bob': [-0.3, 0.1, 0.001, -0.002, 0.01],
    'rational_polynomial': [0.4, -0.2, 0.001, -0.001, 0.03, 0.5, -0.1, 0.02],
    'equidistant': [0.05, -0.01, 0.003, -0.001],
}


# The camera


@pytest.mark.parametrize('model', MODELS)
def test_rays_and_pixels_are_inverse_and_those_of_opencv(model):
    camera = Camera.from_info(640, 480, K, MODELS[model], distortion_model=model)
    points = np.stack(np.meshgrid(np.arange(60, 600, 60.0), np.arange(40, 460, 60.0)), -1)
    points = points.reshape(-1, 2)
    rays = camera.rays(points)
    np.testing.assert_allclose(camera.project(rays), points, atol=1e-3)
    zero = np.zeros(3)
    if model == 'equidistant':
        expected, _ = cv2.fisheye.projectPoints(
            rays[:, None], zero, zero, camera.matrix, np.array(camera.d)
        )
    else:
        expected, _ = cv2.projectPoints(rays, zero, zero, camera.matrix, np.array(camera.d))
    np.testing.assert_allclose(camera.project(rays), expected[:, 0], atol=1e-6)
    # The derivative of rays by pixels.
    moved = camera.rays(points + (0.5, 0)) - camera.rays(points - (0.5, 0))
    np.testing.assert_allclose(camera.pixel_jacobian(rays)[:, :, 0], moved[:, :2], atol=1e-5)


def test_distortion_is_not_used_beyond_where_it_turns_back():
    """A polynomial is a fit to what was seen of the calibration target, nothing beyond."""
    kitti = [984.2439, 0, 690.0, 0, 980.8141, 233.1966, 0, 0, 1]
    raw = Camera.from_info(1392, 512, kitti, [-0.3729, 0.2037, 0.0022, 0.0014, -0.0723],
                           distortion_model='plumb_bob')  # fmt: skip
    for angle in (-80, -60, 10, 30, 60, 80):
        motion = np.eye(4)
        motion[:3, 3] = np.sin(np.radians(angle)), 0, np.cos(np.radians(angle))
        x = cues.focus_of_expansion(motion, raw)[0]
        assert np.isnan(x) if abs(angle) > 50 else (x > 690) == (angle > 0)
    corner = np.array([[-0.5, -0.5], [1391.5, 511.5]])
    assert np.isfinite(raw.rays(corner)).all()  # real images are not cut
    strong = Camera.from_info(640, 480, [400.0, 0, 320, 0, 400, 240, 0, 0, 1], [-0.3, 0, 0, 0, 0],
                              distortion_model='plumb_bob')  # fmt: skip
    points = np.stack(np.meshgrid(np.arange(640.0), np.arange(480.0)), -1).reshape(-1, 2)
    missed = np.abs(strong.project(strong.rays(points)) - points)
    assert np.nanmax(missed) < 0.5 and 0.6 < np.isfinite(missed).all(1).mean() < 0.9


def test_rectified_images_have_p_and_raw_ones_k():
    info = {'d': MODELS['plumb_bob'], 'p': P, 'distortion_model': 'plumb_bob'}
    raw, rectified = (Camera.from_info(640, 480, K, **info, rectified=r) for r in (False, True))
    assert (raw.fx, raw.cx, raw.d) == (500, 320, tuple(MODELS['plumb_bob']))
    assert (rectified.fx, rectified.fy, rectified.cx, rectified.d) == (480, 490, 321, ())


def test_binning_and_region():
    whole = Camera.from_info(640, 480, K)
    part = Camera.from_info(640, 480, K, binning_x=2, binning_y=2, roi=(100, 40, 400, 320))
    assert (part.width, part.height) == (200, 160)
    # The middle of four pixels of the whole image is the centre of one binned pixel.
    at = np.array([[100 + 2 * 50 + 0.5, 40 + 2 * 30 + 0.5]])
    np.testing.assert_allclose(part.rays(np.array([[50.0, 30.0]])), whole.rays(at))


def test_another_size_is_scaled_where_the_aspect_fits():
    whole = Camera.from_info(640, 480, K)
    half = Camera.from_info(640, 480, K, image_size=(320, 240))
    assert half.scaled and not whole.scaled
    np.testing.assert_allclose(
        half.rays(np.array([[50.0, 30.0]])), whole.rays(np.array([[100.5, 60.5]]))
    )
    with pytest.raises(CameraError, match='640x480 .* 640x360'):
        Camera.from_info(640, 480, K, image_size=(640, 360))


@pytest.mark.parametrize(
    'change, error, words',
    [
        ({'k': [0.0] * 9}, Uncalibrated, 'not calibrated'),
        ({'rectified': True, 'p': [0.0] * 12}, Uncalibrated, 'P'),
        ({'rectified': True}, CameraError, 'P has 0 numbers'),
        ({'k': [1.0]}, CameraError, 'K has 1 numbers'),
        ({'k': [float('nan')] * 9}, CameraError, 'finite'),
        ({'distortion_model': 'magic', 'd': [1.0]}, CameraError, 'magic'),
        ({'distortion_model': 'plumb_bob', 'd': [1.0] * 3}, CameraError, '3 coefficients'),
        ({'binning_x': 1000}, CameraError, 'no image'),
    ],
)
def test_what_makes_no_camera_is_refused_with_the_reason(change, error, words):
    with pytest.raises(error, match=words):
        Camera.from_info(640, 480, **{'k': K, **change})


def test_a_wide_camera_gives_the_motion_too():
    """Flow of a fisheye image, made of exact motion, gives that motion."""
    camera = Camera.from_info(320, 240, [150.0, 0, 160, 0, 150, 120, 0, 0, 1],
                              MODELS['equidistant'], distortion_model='equidistant')  # fmt: skip
    y, x = np.mgrid[:240, :320].astype(float)
    points = np.stack([x, y], -1).reshape(-1, 2)
    depth = np.random.default_rng(0).uniform(3, 9, (12, 16))
    depth = cv2.resize(depth, (320, 240), interpolation=cv2.INTER_CUBIC).reshape(-1, 1)
    change = transform(rotation(np.array([0.01, -0.02, 0.015])), np.array([0.1, 0.02, -0.2]))
    moved = camera.rays(points) * depth @ change[:3, :3].T + change[:3, 3]
    flow = (camera.project(moved) - points).reshape(240, 320, 2).astype(np.float32)
    estimate = Odometry().update(flow, camera, 0.0, 0.1)
    assert estimate.kind == 'general'
    true = inverse(change)
    off = rotation_vector(true[:3, :3].T @ estimate.motion[:3, :3])
    assert np.degrees(np.linalg.norm(off)) < 0.02
    t = true[:3, 3] / np.linalg.norm(true[:3, 3])
    assert np.degrees(np.arccos(min(t @ estimate.motion[:3, 3], 1))) < 0.3


# Geometry


def test_exponentials_and_logarithms():
    rng = np.random.default_rng(0)
    for size in (0, 1e-9, 1e-3, 1.0, 3.0, np.pi - 1e-6, np.pi):
        vector = rng.standard_normal(3)
        vector *= size / np.linalg.norm(vector)
        expected = cv2.Rodrigues(vector)[0]
        np.testing.assert_allclose(rotation(vector), expected, atol=1e-9)
        back = rotation_vector(rotation(vector))
        np.testing.assert_allclose(rotation(back), expected, atol=1e-5)
    twist = rng.standard_normal(6)
    step = transform(rotation(twist[3:]), left_jacobian(twist[3:]) @ twist[:3])
    np.testing.assert_allclose(motion_vector(step), twist, atol=1e-9)
    # The adjoint moves a twist to another frame.
    other = transform(rotation(rng.standard_normal(3)), rng.standard_normal(3))
    moved = other @ step @ inverse(other)
    np.testing.assert_allclose(motion_vector(moved), adjoint(other) @ twist, atol=1e-8)
    for direction in ((0, 0, 1.0), (0, 0, -1.0), (0.6, 0, -0.8)):
        frame = np.column_stack([direction, tangent(np.array(direction))])
        np.testing.assert_allclose(frame.T @ frame, np.eye(3), atol=1e-12)


# The gyro


def test_mean_rate_of_a_gyro():
    times = np.arange(0, 1, 0.005)
    rates = np.stack([times, 2 * times, np.ones_like(times)], axis=1)
    np.testing.assert_allclose(mean_rate(times, rates, 0.4, 0.5), [0.45, 0.9, 1.0])
    np.testing.assert_allclose(mean_rate(times, rates, 0.4033, 0.4066), [0.40495, 0.8099, 1.0])
    hole = (times < 0.42) | (times > 0.47)
    with pytest.raises(GyroGap, match='silent for 0.0'):
        mean_rate(times[hole], rates[hole], 0.4, 0.5, max_gap=0.02)
    for late in (5.0, -5.0):
        with pytest.raises(GyroGap):
            mean_rate(times + late, rates, 0.4, 0.5)
    with pytest.raises(GyroGap, match='no gyro samples'):
        mean_rate(np.empty(0), np.empty((0, 3)), 0.4, 0.5)
    with pytest.raises(GyroGap, match='order'):
        mean_rate(times[::-1], rates[::-1], 0.4, 0.5)


# Depth of another camera


def test_depth_is_registered_onto_another_camera():
    other = Camera.pinhole(160, 120, 150.0, 150.0, 79.5, 59.5)
    camera = Camera.pinhole(320, 240, 250.0, 250.0, 159.5, 119.5)
    depth = np.full((120, 160), 2000, np.uint16)
    depth[40:80, 60:100] = 1000
    depth[:10] = 0
    shift = transform(np.eye(3), np.array([0.1, 0, 0]))
    seen = register_depth(depth, other, camera, shift)
    assert seen.shape == (240, 320) and seen.dtype == np.float32
    known = np.isfinite(seen)
    assert known[40:220, 60:260].mean() > 0.97  # no holes between the pixels
    assert set(np.unique(seen[known])) == {1.0, 2.0}
    left = np.flatnonzero(seen[120] == 1.0)[0]  # of (60 - 79.5) / 150 m, 0.1 m to the right
    assert abs(left - (159.5 + 250 * (0.1 - 19.5 / 150))) <= 2


# Settings


@pytest.mark.parametrize(
    'change, words',
    [
        ({'scale': 'metric'}, 'scale'),
        ({'scale': 'camera_height'}, 'camera_height'),
        ({'grid': 0}, 'grid is 0, expected 1 to 64 px'),
        ({'max_gap': float('nan')}, 'max_gap'),
        ({'min_samples': True}, 'min_samples'),
        ({'gyro': 'maybe'}, 'gyro'),
        ({'depth_min': 5.0, 'depth_max': 2.0}, 'depth_min'),
    ],
)
def test_bad_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Settings(**change)


# Bad input: nothing escapes, nothing false comes out, the reason names the cause


@pytest.fixture(scope='module')
def pair():
    first, second = views(DRIVES['forward'], 2)
    return exact_flow(first, second)[0], np.nan_to_num(first.depth, posinf=0).astype(np.float32)


def images(kind):
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 255, (240, 320)).astype(np.uint8)
    ramp = np.tile(np.linspace(60, 150, 320, dtype=np.float32), (240, 1))
    grain = rng.normal(0, 1, (2, 240, 320))
    plain = {
        'black': (np.zeros((240, 320)) + 2, np.zeros((240, 320)) + 2),
        'plain': (np.full((240, 320), 120), np.full((240, 320), 120)),
        'blurred': (ramp, ramp),
    }
    if kind in plain:
        return [np.clip(i + g, 0, 255).astype(np.uint8) for i, g in zip(plain[kind], grain)]
    return [noise, noise.copy()] if kind == 'same' else [noise, np.roll(noise, 1, 0)]


BAD = {
    'no camera_info': ({'camera': None}, 'no_camera'),
    'camera_info of another size': ({'camera': Camera.pinhole(640, 480, 9, 9, 9, 9)}, 'size'),
    'flow of nothing': ({'flow': None}, 'bad_flow'),
    'flow of integers': ({'flow': np.zeros((240, 320, 2), int)}, 'bad_flow'),
    'flow of another shape': ({'flow': np.zeros((240, 320, 3), np.float32)}, 'bad_flow'),
    'flow all NaN': ({'flow': np.full((240, 320, 2), np.nan, np.float32)}, 'few_pixels'),
    'flow out of the image': ({'flow': np.full((240, 320, 2), 1e9, np.float32)}, 'few_pixels'),
    'flow of chaos': (
        {'flow': np.random.default_rng(0).normal(0, 20, (240, 320, 2)).astype(np.float32)},
        'no_consensus',
    ),
    'backward flow of another shape': ({'backward': np.zeros((2, 2, 2))}, 'bad_flow'),
    'repeated stamp': ({'stamp': 0.0}, 'bad_stamps'),
    'backward stamp': ({'stamp': -1.0}, 'bad_stamps'),
    'stamp that is no number': ({'stamp': float('nan')}, 'bad_stamps'),
    'gap': ({'stamp': 5.0}, 'gap'),
    'black image': ({'images': 'black'}, 'dark'),
    'textureless image': ({'images': 'plain'}, 'textureless'),
    'blurred image': ({'images': 'blurred'}, 'blurred'),
    'repeated image': ({'images': 'same'}, 'repeated'),
    'image of another size': (
        {'previous_image': np.zeros((100, 100), np.uint8)}, 'size',
    ),
    'no depth': ({'scale': 'depth'}, 'no_depth'),
    'depth of another size': ({'scale': 'depth', 'depth': np.ones((120, 160))}, 'depth_size'),
    'depth of another type': (
        {'scale': 'depth', 'depth': np.ones((240, 320), np.int32)}, 'depth_size',
    ),
    'depth of another time': (
        {'scale': 'depth', 'depth': np.ones((240, 320)), 'depth_stamp': 0.2}, 'depth_stamp',
    ),
    'depth all NaN': ({'scale': 'depth', 'depth': np.full((240, 320), np.nan)}, 'depth_unknown'),
    'depth all zero': (
        {'scale': 'depth', 'depth': np.zeros((240, 320), np.uint16)}, 'depth_unknown',
    ),
    'depth all infinite': (
        {'scale': 'depth', 'depth': np.full((240, 320), np.inf)}, 'depth_unknown',
    ),
    'gyro that is no number': ({'gyro': np.full(3, np.nan)}, 'gyro'),
    'gyro of another shape': ({'gyro': np.zeros(2)}, 'error'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_survived_and_named(pair, case):
    change, reason = BAD[case]
    flow, depth = pair
    change = {'flow': flow, 'camera': CAMERA, 'stamp': 0.1, **change}
    if 'images' in change:
        change['previous_image'], change['image'] = images(change.pop('images'))
    settings = Settings(scale=change.pop('scale', 'none'))
    odometry = Odometry(settings)
    flow_given, camera, stamp = (change.pop(name) for name in ('flow', 'camera', 'stamp'))
    estimate = odometry.update(flow_given, camera, 0.0, stamp, **change)
    assert not estimate.valid and not estimate.usable
    assert estimate.reason == reason, estimate.message
    assert estimate.message and '\n' not in estimate.message
    assert np.isnan(estimate.twist).all() and (estimate.pose == np.eye(4)).all()
    assert np.isfinite(estimate.pose_covariance).all()
    # And it goes on.
    depth = depth if settings.scale == 'depth' else None
    assert odometry.update(flow, CAMERA, 1.0, 1.1, depth=depth).usable


def test_a_gap_as_long_as_may_be_is_none():
    """At times since 1970 a tenth of a second has a rounding error, of up to 0.2 microseconds."""
    stamps = [(1_764_000_000 * 10**9 + k * 10**8) / 1e9 for k in range(20)]
    assert max(np.diff(stamps)) > 0.1
    for before, now in pairwise(stamps):
        estimate = Odometry(Settings(max_gap=0.1)).update(None, CAMERA, before, now)
        assert estimate.reason == 'bad_flow'
    assert Odometry(Settings(max_gap=0.1)).update(None, CAMERA, 0.0, 0.11).reason == 'gap'


@pytest.mark.parametrize('height', [None, 0.0, -1.0, float('inf'), float('nan')])
def test_a_bad_range_gives_no_metres_but_the_turn(pair, height):
    estimate = Odometry(Settings(scale='range')).update(pair[0], CAMERA, 0.0, 0.1, height=height)
    assert estimate.valid and not estimate.metric and estimate.reason == 'no_height'
    assert not estimate.usable and np.isfinite(estimate.twist[3:]).all()


def test_thin_flow_and_grey_and_colour_images(pair):
    flow, _ = pair
    noise = images('different')
    dense = Odometry().update(flow, CAMERA, 0.0, 0.1, previous_image=noise[0], image=noise[1])
    colour = [cv2.cvtColor(i, cv2.COLOR_GRAY2RGB) for i in noise]
    for stride in (1, 2, 4, 8):
        estimate = Odometry().update(
            flow[::stride, ::stride], CAMERA, 0.0, 0.1, stride=stride,
            previous_image=colour[0], image=colour[1],
        )  # fmt: skip
        assert estimate.usable
        np.testing.assert_allclose(estimate.motion, dense.motion, atol=1e-3)


def test_the_same_input_gives_the_same_motion(pair):
    flow = pair[0] + np.random.default_rng(1).normal(0, 0.3, pair[0].shape).astype(np.float32)
    first, second = (Odometry().update(flow, CAMERA, 0.0, 0.1) for _ in range(2))
    np.testing.assert_array_equal(first.motion, second.motion)
    np.testing.assert_array_equal(first.twist_covariance, second.twist_covariance)
