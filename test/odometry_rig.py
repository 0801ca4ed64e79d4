"""Rendered drives with exact motion and flow, and noise such as flow has."""

import math
from typing import NamedTuple

import cv2
import numpy as np
from perceiver_flow_ros.odometry import Camera
from perceiver_flow_ros.odometry.geometry import inverse, motion_vector
from perceiver_flow_ros.training import builder
from perceiver_flow_ros.training.scene import Camera as Pinhole
from perceiver_flow_ros.training.scene import look, Material, Scene

VIEW = Pinhole(320, 240, 250.0, 250.0, 159.5, 119.5)
CAMERA = Camera.pinhole(320, 240, 250.0, 250.0, 159.5, 119.5)
RATE = 10.0
# The optical axes (x right, y down, z forward) in a base frame (x forward, y left, z up).
FORWARD = np.array([[0, 0, 1.0, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


class Shapes(Scene):
    """A scene without colours: depth and flow, in a tenth of the time."""

    def _shade(self, surfaces, pose):
        return np.zeros((surfaces.camera.height, surfaces.camera.width, 3), np.float32)


def noise_texture(seed=0):
    rng = np.random.default_rng(seed)
    fine, coarse = (
        cv2.GaussianBlur(rng.uniform(0, 255, (512, 512, 3)).astype(np.float32), (0, 0), s)
        for s in (1.5, 6)
    )
    grey = 5 * (fine + 2 * coarse - (fine + 2 * coarse).mean()) + 127
    return Material(np.clip(grey, 0, 255).astype(np.uint8))


def street(seed=0, colours=False):
    scene = Scene.street(seed)
    if not colours:
        scene.__class__ = Shapes
    return scene


def wall(colours=False):
    face = builder.wall(8, 60, 8, -60, -60, 60, 'noise', 4)
    return (Scene if colours else Shapes)([face], {'noise': noise_texture()})


def floor(colours=False):
    face = builder.flat(-60, -60, 60, 60, 0, 'noise', 4)
    return (Scene if colours else Shapes)([face], {'noise': noise_texture()})


class Drive(NamedTuple):
    scene: object  # () -> Scene
    path: object  # seconds -> T_world_camera
    kind: str


def circle(t, rate=0.5, speed=4.0):
    x, y = speed / rate * math.sin(rate * t), speed / rate * (1 - math.cos(rate * t))
    return look((x, y - 1.5, 1.5), yaw=rate * t)


DRIVES = {
    'forward': Drive(street, lambda t: look((3 * t, -1.5, 1.5)), 'general'),
    'curve': Drive(street, circle, 'general'),
    'rotation': Drive(
        street,
        lambda t: look((5, -1.5, 1.5), 0.3 * t, 0.1 * math.sin(t), 0.05 * math.sin(2 * t)),
        'rotation',
    ),
    'stationary': Drive(street, lambda t: look((5, -1.5, 1.5)), 'stationary'),
    'sideways': Drive(street, lambda t: look((5, 1.5 * t - 1.5, 1.5), yaw=0.6), 'general'),
    'wall': Drive(
        wall, lambda t: look((t, 0.8 * t, 0.1 * t), yaw=0.1 * t - 0.2, pitch=0.02 * t), 'planar'
    ),
    'slanted wall': Drive(wall, lambda t: look((t, 0, 0), yaw=0.3), 'planar'),
    'straight to a wall': Drive(wall, lambda t: look((t, 0, 0)), 'planar'),
    'downward': Drive(
        floor,
        lambda t: look((t, 0.4 * t, 2 + 0.2 * t), yaw=0.3 * t, pitch=math.pi / 2 - 0.05),
        'planar',
    ),
}


def views(drive, frames, start=1.0, scene=None):
    """Render so many frames, at RATE."""
    scene = scene or drive.scene()
    times = [start + i / RATE for i in range(frames)]
    return [scene.render(drive.path(t), VIEW, t) for t in times]


def true_motion(first, second):
    """T_previous_current of the camera."""
    return inverse(first.pose) @ second.pose


def depth_of(view):
    return np.where(np.isfinite(view.depth), view.depth, np.nan).astype(np.float32)


def with_mover(flow):
    """Let the left third of the image move by itself."""
    flow = flow.copy()
    flow[:, : flow.shape[1] // 3] += (3.0, 1.0)
    return flow


def noisy(flow, seed, deviation=0.25):
    """
    Add the errors of estimated flow.

    They are correlated over patches of two sizes and larger where the flow is large or changes at
    an edge; some patches are wrong altogether.
    """
    rng = np.random.default_rng(seed)
    h, w = flow.shape[:2]

    def field(size):
        noise = cv2.GaussianBlur(rng.standard_normal((h, w, 2)).astype(np.float32), (0, 0), size)
        return noise / noise.std()

    error = deviation * (0.8 * field(3) + 0.6 * field(8))
    error *= 1 + 0.05 * np.linalg.norm(np.nan_to_num(flow), axis=2)[..., None]
    smooth = cv2.GaussianBlur(np.nan_to_num(flow), (0, 0), 2)
    wrong = field(10)[..., :1] > 1.5  # 7 % of the image
    return (smooth + error + wrong * 5 * field(10)).astype(np.float32)


def errors(estimate, truth):
    """Degrees of rotation and of the direction of translation (NaN where there is none)."""
    off = motion_vector(inverse(truth) @ estimate.motion)
    a, b = truth[:3, 3], estimate.motion[:3, 3]
    angle = math.nan
    if np.linalg.norm(a) > 1e-9 and np.linalg.norm(b) > 0:
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        angle = math.degrees(math.acos(min(max(cosine, -1), 1)))
    return math.degrees(np.linalg.norm(off[3:])), angle
