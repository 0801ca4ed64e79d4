# SPDX-License-Identifier: Apache-2.0
"""The renderer: its flow, depth and occlusion are exact, and its pictures agree with them."""

import cv2
import numpy as np
from perceiver_flow_ros.training import builder
from perceiver_flow_ros.training.scene import (
    Camera,
    drive,
    exact_flow,
    look,
    Material,
    Scene,
    Sphere,
    swerve,
)
import pytest

CAMERA = Camera(160, 120, 125.0, 120.0, 79.5, 59.5)


def textures(seed=0):
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.uniform(0, 255, (256, 256, 3)).astype(np.float32), (0, 0), 1.5)
    noise = np.clip((noise - 127) * 3 + 127, 0, 255).astype(np.uint8)
    return {'noise': Material(noise), 'other': Material(noise[::-1, :, ::-1].copy())}


def wall_scene(distance=10.0, **more):
    """Put a wall across the world's x axis, seen from the origin."""
    big = builder.wall(distance, 60, distance, -60, -60, 60, 'noise', 4)
    return Scene([big, *more.pop('faces', [])], textures(), **more)


def warp(view, flow):
    """Give what `view` shows at the places that the pixels of the first view moved to."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(
        view.image.astype(np.float32), x + flow[..., 0], y + flow[..., 1], cv2.INTER_CUBIC
    )


@pytest.fixture(scope='module')
def views():
    """Return two frames in a row of the default drive, without noise, and one 0.9 s later."""
    scene = Scene.street(0)
    return [scene.render(swerve(t), time=t) for t in (2.0, 2.1, 3.0)]


def test_wall_depth_and_translation():
    scene = wall_scene(10.0)
    first = scene.render(look((0, 0, 0)), CAMERA)
    np.testing.assert_allclose(first.depth, 10.0, rtol=1e-6)
    # Camera 0.5 m to the left (+y): the wall moves right, by fx * 0.5 / 10; 0.2 m up: down.
    flow, visible = exact_flow(first, scene.render(look((0, 0.5, 0.2)), CAMERA))
    np.testing.assert_allclose(flow[..., 0], CAMERA.fx * 0.5 / 10, rtol=1e-5)
    np.testing.assert_allclose(flow[..., 1], CAMERA.fy * 0.2 / 10, rtol=1e-5)
    assert visible[4:-4, 8:-8].all() and not visible[:, -6:].any()
    # 2 m forward: expansion from the principal point by 10 / 8.
    flow, _ = exact_flow(first, scene.render(look((2, 0, 0)), CAMERA))
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    np.testing.assert_allclose(flow[..., 0], (x - CAMERA.cx) * 0.25, atol=1e-4)
    np.testing.assert_allclose(flow[..., 1], (y - CAMERA.cy) * 0.25, atol=1e-4)


@pytest.mark.parametrize('turn', [{'yaw': 0.03}, {'pitch': -0.02}, {'roll': 0.05}])
def test_rotation_is_a_homography_even_in_the_sky(turn):
    scene = wall_scene(10.0)
    empty = Scene([], textures())
    x, y = np.meshgrid(np.arange(160.0), np.arange(120.0))
    pixels = np.stack([x, y, np.ones_like(x)], -1)
    h = (
        CAMERA.matrix
        @ look((0, 0, 0), **turn)[:3, :3].T
        @ look((0, 0, 0))[:3, :3]
        @ np.linalg.inv(CAMERA.matrix)
    )
    expected = pixels @ h.T
    expected = expected[..., :2] / expected[..., 2:] - pixels[..., :2]
    for world in (scene, empty):
        first, second = (
            world.render(look((0, 0, 0)), CAMERA),
            world.render(look((0, 0, 0), **turn), CAMERA),
        )
        flow, _ = exact_flow(first, second)
        np.testing.assert_allclose(flow, expected, atol=1e-3)
    # REP-103: yaw turns left, the picture moves right; pitch down, it moves up; roll clockwise.
    sign = {
        'yaw': flow[60, 80, 0] > 3,
        'pitch': flow[60, 80, 1] > 2,
        'roll': flow[60, 150, 1] < -3,
    }
    assert sign[next(iter(turn))]


def test_sphere_depth_and_occlusion_of_what_lies_behind():
    scene = wall_scene(
        10.0,
        spheres=[Sphere(np.array([5.0, 0, 0]), 1.0, 'other')],
        faces=builder.box(3.0, 1.0, -0.5, 3.5, 1.5, 0.5, 'other', 'other', 1),
    )
    camera = Camera(161, 121, 125.0, 125.0, 80.0, 60.0)
    first, second = scene.render(look((0, 0, 0)), camera), scene.render(look((0, 0.4, 0)), camera)
    assert first.depth[60, 80] == pytest.approx(4.0, rel=1e-6)
    outline = np.count_nonzero(first.depth[60, 50:115] < 9)  # tan(asin(1 / 5)) * fx, twice
    assert abs(outline - 2 * 125 / np.sqrt(24)) <= 1
    flow, visible = exact_flow(first, second)
    np.testing.assert_allclose(flow[60, 80], (125 * 0.4 / 4, 0), atol=1e-4)
    # The wall moves 5 px, the far edge of the box (3.5 m) 14.3 px and covers what is between.
    row = 60
    box = np.flatnonzero(np.abs(first.depth[row] - 3.0) < 1e-3)
    hidden = np.flatnonzero(
        ~visible[row, box[-1] + 1: box[-1] + 25]
        & (first.depth[row, box[-1] + 1: box[-1] + 25] > 9)
    )
    assert abs(len(hidden) - (125 * 0.4 / 3.5 - 125 * 0.4 / 10)) <= 1.5
    assert visible[row, box[1:-1]].all()


def test_moving_body_has_its_own_flow():
    def motion(time):
        pose = np.eye(4)
        pose[1, 3] = 3.0 * time  # 3 m/s to the left
        return pose

    scene = wall_scene(
        20.0,
        faces=[builder.wall(8, 1, 8, -1, -1, 1, 'other', body=1)],
        motions=[motion],
    )
    first, second = (scene.render(look((0, 0, 0)), CAMERA, time=t) for t in (0.0, 0.1))
    flow, visible = exact_flow(first, second)
    on = first.body == 1
    assert 700 < on.sum() < 1100  # 31 x 30 pixels
    np.testing.assert_allclose(
        flow[on], np.broadcast_to((-CAMERA.fx * 0.3 / 8, 0), flow[on].shape), atol=1e-4
    )
    np.testing.assert_allclose(flow[~on], 0, atol=1e-5)
    assert visible[on].mean() > 0.9
    difference = np.abs(warp(second, flow) - first.image)[visible]
    assert difference.mean() < 1.0


def test_points_behind_the_second_camera_have_no_flow():
    scene = wall_scene(10.0)
    flow, visible = exact_flow(
        scene.render(look((0, 0, 0)), CAMERA), scene.render(look((12, 0, 0)), CAMERA)
    )
    assert np.isnan(flow).all() and not visible.any()


@pytest.mark.slow
def test_pictures_agree_with_flow_to_a_fraction_of_a_pixel(views):
    first, second, _ = views
    flow, visible = exact_flow(first, second)
    assert visible.mean() > 0.8 and np.isfinite(flow).all()
    assert 4 < np.hypot(*flow[visible].T).mean() < 20  # the scene does move
    visible &= cv2.erode(visible.astype(np.uint8), np.ones((3, 3))) > 0
    still = np.abs(second.image.astype(float) - first.image)[visible].mean()
    error = np.abs(warp(second, flow) - first.image)[visible]
    assert error.mean() < 3.0 and error.mean() < 0.25 * still
    # The squared difference is least where the flow says, not a tenth of a pixel beside it.
    for axis in (0, 1):
        cost = []
        for offset in (-0.5, 0.0, 0.5):
            moved = flow.copy()
            moved[..., axis] += offset
            cost.append(np.square(warp(second, moved) - first.image)[visible].mean())
        least = 0.5 * 0.5 * (cost[0] - cost[2]) / (cost[0] - 2 * cost[1] + cost[2])
        assert abs(least) < 0.05, (axis, least)


def test_flow_over_dropped_frames(views):
    first, _, third = views
    flow, visible = exact_flow(first, third)
    back, _ = exact_flow(third, first)
    # There and back again is where we started, wherever the point is seen in both.
    y, x = np.mgrid[:480, :640].astype(np.float32)
    returned = flow + cv2.remap(back, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR)
    assert 0.4 < visible.mean() < 0.9
    assert np.median(np.abs(returned[visible])) < 0.01


def test_the_street_is_worth_looking_at(views):
    image, depth = views[0].image, views[0].depth
    assert image.shape == (480, 640, 3) and image.dtype == np.uint8 and depth.dtype == np.float32
    assert 0.05 < np.isinf(depth).mean() < 0.4  # some sky
    assert np.percentile(depth[np.isfinite(depth)], 5) < 5 and np.percentile(depth, 70) > 15
    assert len(np.unique(views[0].body)) >= 3  # traffic
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    assert 60 < grey.mean() < 190 and grey.std() > 35
    textured = cv2.blur(np.square(cv2.Laplacian(grey, cv2.CV_32F)), (15, 15)) > 20
    assert textured[np.isfinite(depth)].mean() > 0.8


def test_exposure_and_noise():
    scene = wall_scene(10.0)
    plain = scene.render(look((0, 0, 0)), CAMERA)
    dark = scene.render(look((0, 0, 0)), CAMERA, exposure=0.5)
    assert dark.image.mean() == pytest.approx(0.5 * plain.image.mean(), rel=0.02)
    noisy, same, other = (
        scene.render(look((0, 0, 0)), CAMERA, exposure=0.5, noise=3.0, seed=s) for s in (1, 1, 2)
    )
    assert (noisy.image.astype(float) - dark.image).std() == pytest.approx(3.0, rel=0.1)
    np.testing.assert_array_equal(noisy.image, same.image)
    assert (noisy.image != other.image).any()


def test_drive_follows_its_path():
    scene = wall_scene(10.0)
    path = [look((0.1 * i, 0, 0)) for i in range(4)]
    frames = list(
        drive(4, 20.0, scene=scene, camera=CAMERA, path=lambda t: path[round(t * 20)], noise=0)
    )
    assert [f.time for f in frames] == [0, 0.05, 0.1, 0.15]
    np.testing.assert_allclose([f.depth[60, 80] for f in frames], [10, 9.9, 9.8, 9.7], rtol=1e-5)


@pytest.mark.slow
def test_same_seed_same_street(views):
    scene, other = Scene.street(0), Scene.street(1)
    again = scene.render(swerve(2.0), time=2.0)
    np.testing.assert_array_equal(again.image, views[0].image)
    np.testing.assert_array_equal(again.depth, views[0].depth)
    assert (other.render(swerve(2.0), time=2.0).image != views[0].image).mean() > 0.5
