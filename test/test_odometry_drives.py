"""Ego-motion on rendered drives: errors, kinds, signs, metres, cues."""

from collections import Counter
import math

import cv2
import numpy as np
from odometry_rig import (
    CAMERA,
    depth_of,
    DRIVES,
    errors,
    FORWARD,
    noise_texture,
    noisy,
    RATE,
    Shapes,
    street,
    true_motion,
    VIEW,
    views,
    wall,
    with_mover,
)
from perceiver_flow_ros.odometry import Camera, candidates, cues, depth, Odometry, Settings
from perceiver_flow_ros.odometry.geometry import inverse, motion_vector
from perceiver_flow_ros.training import builder
from perceiver_flow_ros.training.scene import exact_flow, look
import pytest

pytestmark = pytest.mark.slow
MOVES = [name for name, drive in DRIVES.items() if drive.kind == 'general']


def run(frames, settings=None, *, base=None, change=None, depth=False):
    """Give the estimates and the true motions of the pairs."""
    odometry = Odometry(settings or Settings(), base)
    out = []
    for i, (first, second) in enumerate(zip(frames, frames[1:])):
        flow = exact_flow(first, second)[0]
        flow = change(flow, i) if change else flow
        more = {'depth': depth_of(first)} if depth else {}
        estimate = odometry.update(flow, CAMERA, i / RATE, (i + 1) / RATE, **more)
        out.append((estimate, true_motion(first, second)))
    return out


@pytest.fixture(scope='module')
def drives():
    """Render every drive, twelve frames."""
    scenes = {}
    for drive in DRIVES.values():
        scenes.setdefault(drive.scene, drive.scene())
    return {name: views(d, 12, scene=scenes[d.scene]) for name, d in DRIVES.items()}


@pytest.mark.parametrize('name', DRIVES)
def test_exact_flow_gives_the_motion_and_its_kind(drives, name):
    rows = run(drives[name])
    kinds = Counter(estimate.kind for estimate, _ in rows)
    # The first pair of a turning camera before a wall is twofold, and must say so.
    decided = rows[1:] if name == 'wall' else rows
    assert kinds[DRIVES[name].kind] >= 0.95 * len(decided), kinds
    off = np.array([errors(e, true) for e, true in rows if e.valid])
    assert off[:, 0].max() <= 0.02
    if DRIVES[name].kind in ('general', 'planar'):
        assert off[:, 1].max() <= 0.3
    else:
        assert all(not e.motion[:3, 3].any() for e, _ in rows)
        assert all(np.isnan(e.direction).all() for e, _ in rows)


@pytest.mark.parametrize('name', MOVES)
def test_a_third_of_the_image_moves_by_itself(drives, name):
    rows = run(drives[name], change=lambda flow, i: with_mover(flow))
    assert all(e.kind == 'general' for e, _ in rows)
    off = np.array([errors(e, true) for e, true in rows])
    assert off[:, 0].max() <= 0.02 and off[:, 1].max() <= 0.3
    # Some of the mover's vectors agree with the motion by chance.
    assert all(0.15 <= e.moving <= 0.4 for e, _ in rows)


@pytest.mark.parametrize('name', ['rotation', 'stationary'])
@pytest.mark.parametrize('scale', ['none', 'depth', 'camera_height'])
def test_no_translation_out_of_noise(drives, name, scale):
    settings = Settings(scale=scale, camera_height=1.5)
    rows = run(drives[name], settings, change=noisy, depth=scale == 'depth')
    for estimate, _ in rows:
        assert estimate.valid and estimate.kind == name, estimate.message
        assert not estimate.motion[:3, 3].any()
        if scale != 'none':
            assert estimate.metric and (estimate.twist[:3] == 0).all()


# Signs: the base moves along, or turns about, each of its axes.


@pytest.mark.parametrize('axis', range(6), ids=['x', 'y', 'z', 'roll', 'pitch', 'yaw'])
def test_signs_in_the_base_frame(axis):
    base_from_camera = FORWARD.copy()
    base_from_camera[:3, 3] = (0.4, 0.2, 1.0)  # a lever arm
    twist = np.zeros(6)
    twist[axis] = 0.8 if axis < 3 else 0.2
    scene = street()
    base = np.eye(4)
    base[:3, 3] = (20, -1.5, 0.5)
    dt = 1 / RATE
    step = np.eye(4)
    step[:3, :3] = cv2.Rodrigues(twist[3:] * dt)[0]
    step[:3, 3] = twist[:3] * dt  # rotations here have no translation beside them
    poses = [base @ base_from_camera, base @ step @ base_from_camera]
    first, second = (scene.render(pose, VIEW) for pose in poses)
    ((estimate, _),) = run(
        [first, second], Settings(scale='depth'), base=base_from_camera, depth=True
    )
    np.testing.assert_allclose(estimate.base_twist, twist, atol=2e-3)
    np.testing.assert_allclose(estimate.pose, step, atol=2e-4)
    if axis < 3:
        np.testing.assert_allclose(estimate.base_direction, np.eye(3)[axis], atol=5e-3)
    eigenvalues = np.linalg.eigvalsh(estimate.base_twist_covariance)
    assert (eigenvalues > 0).all() and np.isfinite(eigenvalues).all()


def test_random_sets_of_points_are_tried_only_where_nothing_else_explains_the_flow(
    drives, monkeypatch
):
    tried = []
    points = depth.three_points
    monkeypatch.setattr(depth, 'three_points', lambda *a: tried.append(a) or points(*a))
    (estimate, _), *_ = run(drives['forward'], Settings(scale='depth'), change=noisy, depth=True)
    assert estimate.valid and not tried
    # No residual is small enough now.
    monkeypatch.setattr(depth, 'THRESHOLD', 0.0)
    run(drives['forward'][:2], Settings(scale='depth'), depth=True)
    assert tried


def test_minimal_sets_are_drawn_unless_two_other_guesses_agree(drives, monkeypatch):
    drawn = []
    draw = candidates.drawn
    monkeypatch.setattr(candidates, 'drawn', lambda *a: drawn.append(a) or draw(*a))
    rows = run(drives['forward'])
    assert all(estimate.kind == 'general' for estimate, _ in rows)
    assert 1 <= len(drawn) <= len(rows) / 2
    drawn.clear()
    # Now the last motion is of no use: the camera reverses.
    first, second = drives['forward'][:2]
    rows = run([first, second, first])
    assert len(drawn) == 2 and errors(*rows[1])[1] <= 0.3


def test_the_camera_alone_is_the_base_without_extrinsics(drives):
    (estimate, true), *_ = run(drives['forward'], Settings(scale='depth'), depth=True)
    np.testing.assert_allclose(estimate.motion, true, atol=1e-4)
    np.testing.assert_allclose(estimate.twist[:3], [0, 0, 3.0], atol=2e-3)
    np.testing.assert_array_equal(estimate.twist, estimate.base_twist)


# Metres


@pytest.mark.parametrize('name', ['curve', 'sideways'])
def test_the_current_depth_image_helps_unless_it_is_of_another_time(drives, name):
    off = {'none': [], 'right': [], 'stale': []}
    for i, (first, second) in enumerate(zip(drives[name], drives[name][1:])):
        flow, truth = noisy(exact_flow(first, second)[0], i), true_motion(first, second)
        for which, view in (('none', None), ('right', second), ('stale', first)):
            estimate = Odometry(Settings(scale='depth', grid=4)).update(
                flow, CAMERA, 0.0, 0.1, depth=depth_of(first),
                current_depth=None if view is None else depth_of(view),
            )  # fmt: skip
            off[which].append(np.linalg.norm(motion_vector(inverse(truth) @ estimate.motion)))
    none, right, stale = (np.median(off[which]) for which in off)
    assert right < 0.1 * none
    assert stale < 1.1 * none


def test_metres_from_the_camera_height(drives):
    rows = run(drives['forward'], Settings(scale='camera_height', camera_height=1.5))
    for estimate, true in rows:
        assert estimate.metric, estimate.message
        speed = np.linalg.norm(estimate.motion[:3, 3]) / np.linalg.norm(true[:3, 3])
        assert speed == pytest.approx(1, abs=0.03)


def test_metres_from_a_range(drives):
    frames = drives['downward']
    odometry = Odometry(Settings(scale='range'))
    for i, (first, second) in enumerate(zip(frames, frames[1:])):
        height = float(first.depth[120, 160])
        flow = exact_flow(first, second)[0]
        estimate = odometry.update(flow, CAMERA, i / RATE, (i + 1) / RATE, height=height)
        assert estimate.metric, estimate.message
        np.testing.assert_allclose(estimate.motion, true_motion(first, second), atol=2e-3)


def test_a_wrong_mount_gives_no_metres(drives):
    tilted = FORWARD.copy()
    tilted[:3, :3] = tilted[:3, :3] @ cv2.Rodrigues(np.array([math.radians(15), 0, 0]))[0]
    settings = Settings(scale='camera_height', camera_height=1.5)
    for estimate, _ in run(drives['forward'], settings, base=tilted):
        assert not estimate.metric and estimate.reason == 'no_ground'
        assert np.isnan(estimate.twist[:3]).all() and estimate.twist_covariance[0, 0] == 1e6
        assert not estimate.usable


def test_without_metres_there_are_none(drives):
    for estimate, _ in run(drives['forward']):
        assert estimate.usable and not estimate.metric
        assert np.isnan(estimate.twist[:3]).all() and np.isnan(estimate.base_twist[:3]).all()
        assert np.isfinite(estimate.twist[3:]).all()
        assert (np.diag(estimate.twist_covariance)[:3] == 1e6).all()
        assert not estimate.pose[:3, 3].any()
        assert np.linalg.norm(estimate.motion[:3, 3]) == pytest.approx(1)


# Odometry


def test_the_pose_is_the_sum_of_the_motions(drives):
    frames = drives['curve']
    rows = run(frames, Settings(scale='depth'), base=FORWARD, depth=True)
    true = FORWARD @ true_motion(frames[0], frames[-1]) @ inverse(FORWARD)
    last = rows[-1][0]
    np.testing.assert_allclose(last.pose, true, atol=2e-3)
    sizes = [np.trace(e.pose_covariance) for e, _ in rows]
    assert (np.diff(sizes) > 0).all()


def test_a_lost_pair_holds_the_pose_and_costs_certainty(drives):
    first, second = drives['curve'][:2]
    flow = exact_flow(first, second)[0]
    odometry = Odometry(Settings(scale='depth'))
    before = odometry.update(flow, CAMERA, 0.0, 0.1, depth=depth_of(first))
    lost = odometry.update(np.full_like(flow, np.nan), CAMERA, 0.1, 0.2, depth=depth_of(first))
    assert not lost.valid
    np.testing.assert_array_equal(lost.pose, before.pose)
    assert np.trace(lost.pose_covariance) > 100 * np.trace(before.pose_covariance)
    odometry.reset()
    again = odometry.update(flow, CAMERA, 5.0, 5.1, depth=depth_of(first))
    np.testing.assert_allclose(again.pose, before.pose, atol=1e-9)


def test_a_time_that_nobody_asked_about_costs_certainty(drives):
    first, second = drives['curve'][:2]
    flow, depth = exact_flow(first, second)[0], depth_of(first)
    odometry = Odometry(Settings(scale='depth'))
    before = odometry.update(flow, CAMERA, 0.0, 0.1, depth=depth)
    after = odometry.update(flow, CAMERA, 1.1, 1.2, depth=depth)
    gone = np.linalg.norm(before.twist[:3]) * 1.0  # m, if it went on
    assert gone < np.sqrt(np.trace(after.pose_covariance[:3, :3])) < 2 * gone
    without = odometry.update(flow, CAMERA, 1.2, 1.3, depth=depth)
    grown = np.trace(without.pose_covariance[:3, :3]) / np.trace(after.pose_covariance[:3, :3])
    assert grown < 1.2


# The gyro


def test_a_gyro_checks_or_replaces_the_rotation(drives):
    first, second = drives['curve'][:2]
    flow = exact_flow(first, second)[0]
    rate = motion_vector(true_motion(first, second))[3:] * RATE
    for use, gyro, valid in (
        ('check', rate, True),
        ('check', rate + (0, 0.1, 0), False),
        ('ignore', rate + (0, 0.1, 0), True),
        ('replace', rate, True),
    ):
        for scale in ('none', 'depth'):
            odometry = Odometry(Settings(scale=scale, gyro=use))
            more = {'depth': depth_of(first), 'gyro': gyro}
            estimate = odometry.update(flow, CAMERA, 0.0, 0.1, **more)
            assert estimate.valid == valid, (use, scale, estimate.message)
            assert valid or estimate.reason == 'gyro'
    odometry = Odometry(Settings(gyro='replace'))
    estimate = odometry.update(flow, CAMERA, 0.0, 0.1, gyro=rate + (0, 0.02, 0))
    np.testing.assert_allclose(estimate.twist[3:], rate + (0, 0.02, 0), atol=1e-6)
    assert estimate.twist_covariance[4, 4] == pytest.approx(Settings().gyro_noise ** 2, rel=0.1)


@pytest.mark.parametrize('scale', ['none', 'depth'])
def test_a_gyro_that_replaces_the_rotation_does_so_where_it_is_slow(scale):
    """0.03 rad/s are 3 deviations of the gyro, but far more of the flow."""
    odometry, rate = Odometry(Settings(scale=scale, gyro='replace')), 0.03
    scene = street()
    first, second = (scene.render(look((5, -1.5, 1.5), yaw=rate * i / RATE), VIEW, 0.0)
                     for i in range(2))  # fmt: skip
    flow, gyro = exact_flow(first, second)[0], np.array([0, -rate, 0])
    more = {'depth': depth_of(first)} if scale == 'depth' else {}
    for motion, rate, kind in ((flow, gyro, 'rotation'), (0 * flow, 0 * gyro, 'stationary')):
        estimate = odometry.update(noisy(motion, 0, 0.1), CAMERA, 0, 1 / RATE, gyro=rate, **more)
        assert estimate.kind == kind
        np.testing.assert_allclose(estimate.twist[3:], rate, atol=1e-6)


# Slow, and far from most that is seen


def test_a_robot_sets_off_on_open_ground():
    """Half of what it sees is far and does not move, as before a camera at rest."""
    far, plain = builder.wall(250, 400, 250, -400, -5, 200, 'noise', 30), (-10, -400, 250, 400)
    scene = Shapes([far, builder.flat(*plain, 0, 'noise', 4)], {'noise': noise_texture()})
    frames = [scene.render(look((x, 0, 1.5), pitch=-0.05), VIEW, 0.0)
              for x in (0, 0, 0.1, 0.2, 0.3, 0.4)]  # fmt: skip
    settings = Settings(scale='camera_height', camera_height=1.5)
    rows = run(frames, settings, base=FORWARD, change=lambda flow, i: noisy(flow, i, 0.1))
    assert [estimate.kind for estimate, _ in rows] == ['stationary'] + ['general'] * 4
    for estimate, _ in rows[1:]:
        assert estimate.base_twist[0] == pytest.approx(1, abs=0.15)
        assert abs(estimate.base_twist[0] - 1) < 3 * estimate.base_twist_covariance[0, 0] ** 0.5


def test_a_robot_that_creeps_is_not_at_rest(drives):
    """4 mm a pair, not to be told from noise in any of them."""
    scene = street()
    frames = [scene.render(look((5 + 0.004 * i, -1.5, 1.5)), VIEW, 0.0) for i in range(26)]
    creeps, rests = (
        run(views_, Settings(scale='depth'), base=FORWARD, depth=True,
            change=lambda flow, i: noisy(flow, i))
        for views_ in (frames, frames[:1] * 26)
    )  # fmt: skip
    last = creeps[-1][0]
    assert Counter(estimate.kind for estimate, _ in creeps[-10:])['general'] >= 4
    assert 0.04 < last.pose[0, 3] < 0.12  # of 0.1 m
    assert abs(last.pose[0, 3] - 0.1) < 4 * last.pose_covariance[0, 0] ** 0.5
    assert {estimate.kind for estimate, _ in rests} == {'stationary'}


def test_a_gyro_tells_the_two_motions_past_a_wall_apart(drives):
    first, second = drives['wall'][:2]
    flow = exact_flow(first, second)[0]
    true = true_motion(first, second)
    assert Odometry().update(flow, CAMERA, 0.0, 0.1).reason == 'ambiguous'
    rate = motion_vector(true)[3:] * RATE
    odometry = Odometry(Settings(gyro='replace', gyro_noise=1e-3))
    estimate = odometry.update(flow, CAMERA, 0.0, 0.1, gyro=rate)
    assert estimate.valid and errors(estimate, true)[1] <= 0.3


# Cues


def test_focus_of_expansion_and_time_to_contact():
    scene = wall()
    path = [look((0.5 * i, 0.1 * i, 0)) for i in range(2)]
    first, second = (scene.render(pose, VIEW) for pose in path)
    flow = exact_flow(first, second)[0]
    estimate = Odometry().update(flow, CAMERA, 0.0, 0.1)
    focus = VIEW.cx - VIEW.fx * 0.1 / 0.5, VIEW.cy  # 0.1 m to the left on 0.5 m forward
    np.testing.assert_allclose(estimate.focus_of_expansion, focus, atol=0.5)
    seconds = cues.time_to_contact(flow, CAMERA, estimate)
    assert seconds.shape == flow.shape[:2] and seconds.dtype == np.float32
    known = np.isfinite(seconds)
    assert known.mean() > 0.9  # all but around the focus
    np.testing.assert_allclose(seconds[known], 7.5 / 5.0, rtol=0.01)  # 7.5 m at 5 m/s
    thin = cues.time_to_contact(flow[::4, ::4], CAMERA, estimate, stride=4)
    np.testing.assert_allclose(thin, seconds[::4, ::4], rtol=1e-5)
    backward = Odometry().update(exact_flow(second, first)[0], CAMERA, 0.0, 0.1)
    assert np.isnan(cues.time_to_contact(exact_flow(second, first)[0], CAMERA, backward)).all()


def test_time_to_contact_through_a_wide_lens():
    """A room that rests, flow of 0.15 px of noise: nothing of it moves, up to 70 deg off axis."""
    camera = Camera(320, 240, 125.0, 125.0, 159.5, 119.5, 'equidistant', (0.0,) * 4)
    y, x = np.mgrid[:240, :320]
    pixels = np.stack([x, y], -1).reshape(-1, 2).astype(float)
    rays = camera.rays(pixels)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    points = rays * (4 + np.sin(pixels[:, :1] / 20) + np.cos(pixels[:, 1:] / 15))
    flow = (camera.project(points - (0, 0, 0.2)) - pixels).reshape(240, 320, 2)
    flow += np.random.default_rng(0).normal(0, 0.15, flow.shape)
    estimate = Odometry().update(flow, camera, 0.0, 0.1)
    off_axis = np.degrees(np.arccos(rays[:, 2])).reshape(240, 320)
    known = np.isfinite(cues.time_to_contact(flow, camera, estimate))
    moves = cues.against_motion(flow, camera, estimate)
    for angle in range(20, 70, 10):
        ring = (off_axis >= angle) & (off_axis < angle + 10)
        assert known[ring].mean() > 0.95 and moves[ring].mean() < 0.01, angle


def test_what_moves_against_the_motion_is_found(drives):
    first, second = drives['sideways'][:2]
    flow = with_mover(exact_flow(first, second)[0])
    estimate = Odometry().update(flow, CAMERA, 0.0, 0.1)
    moving = cues.against_motion(flow, CAMERA, estimate)
    third = flow.shape[1] // 3
    assert moving[:, :third].mean() > 0.7 and moving[:, third:].mean() < 0.05


def test_confidence_is_low_where_flow_there_and_back_differ(drives):
    first, second = drives['forward'][:2]
    forward, visible = exact_flow(first, second)
    backward = exact_flow(second, first)[0]
    confidence = cues.confidence(forward, backward)
    assert confidence.min() >= 0 and confidence.max() <= 1
    assert np.median(confidence[visible]) > 0.95
    hidden = ~visible
    assert np.mean(confidence[hidden]) < 0.6 * np.mean(confidence[visible])
    assert (cues.confidence(np.full_like(forward, np.nan), backward) == 0).all()
