# SPDX-License-Identifier: Apache-2.0
"""
A small software renderer whose optical flow is known exactly.

Scenes are textured polygons and spheres, some of them on moving bodies. Surfaces are found by ray
casting, so depth is exact at pixel centres, and flow follows from depth and poses alone.

The world is x forward, y left, z up (REP-103); cameras are optical, z forward, x right, y down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
import itertools
import math
from typing import NamedTuple

import cv2
import numpy as np
from perceiver_flow_ros.training.surfaces import (
    Camera,
    Face,
    look_up,
    Material,
    Packed,
    Sphere,
    Surfaces,
)

SUPERSAMPLE = 2  # samples of colour per pixel and axis
DITHER = np.array([[0.0, 0.5], [0.75, 0.25]], np.float32)  # texture levels mix over a pixel


class View(NamedTuple):
    """One rendered frame and all that exact flow needs."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    depth: np.ndarray  # (H, W) float32, metres along the optical axis, inf in the sky
    body: np.ndarray  # (H, W) uint8, 0 = the static world, k = moving body k
    camera: Camera
    pose: np.ndarray  # (4, 4) T_world_camera
    body_poses: np.ndarray  # (B, 4, 4) T_world_body, the first is the identity
    time: float  # seconds


@dataclass
class Scene:
    """Surfaces and their materials, the motion of bodies, and the light."""

    faces: list[Face]
    materials: dict[str, Material]
    spheres: list[Sphere] = field(default_factory=list)
    motions: list[Callable[[float], np.ndarray]] = field(default_factory=list)
    """Time in seconds -> T_world_body (4, 4), for bodies 1, 2, ..."""
    sky: np.ndarray | None = None
    """(h, w, 4) uint8: columns around, from +x over +y, rows from zenith to horizon."""
    sun: tuple[float, float, float] = (-0.45, 0.55, 0.75)  # direction to it
    sunlight: tuple[float, float, float] = (0.92, 0.83, 0.68)
    skylight: tuple[float, float, float] = (0.46, 0.50, 0.56)
    haze: float = 250.0  # metres over which contrast falls to 1/e
    haze_colour: tuple[float, float, float] = (205.0, 214.0, 224.0)
    shadows: np.ndarray | None = None
    """(h, w) float32, 0 in the shade, 1 in the sun: columns along world x, rows along y."""
    shadow_origin: tuple[float, float] = (0.0, 0.0)  # world (x, y) of its first sample
    shadow_step: float = 0.1  # metres between its samples

    def __post_init__(self):
        """Sort the surfaces by material."""
        self._packed = Packed(self.faces)
        self._spheres = sorted(self.spheres, key=lambda sphere: sphere.material)

    @classmethod
    def street(cls, seed: int = 0) -> Scene:
        """Return a street canyon with traffic; the same seed gives the same street."""
        from perceiver_flow_ros.training.street import street

        return street(seed)

    def render(
        self,
        pose: np.ndarray,
        camera: Camera = Camera(),  # noqa: B008 (it is frozen)
        time: float = 0.0,
        *,
        exposure: float = 1.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> View:
        """
        Render one view.

        Parameters
        ----------
        pose : (4, 4) T_world_camera.
        time : seconds; where the moving bodies are.
        exposure : scales the brightness.
        noise : standard deviation of sensor noise, grey levels; `seed` makes it reproducible.

        """
        bodies = np.stack([np.eye(4), *(motion(time) for motion in self.motions)])
        sun = np.array(self.sun) / np.linalg.norm(self.sun)
        to_camera = np.linalg.inv(pose) @ bodies
        surfaces = Surfaces(self._packed, self._spheres, to_camera, camera, sun)

        # Depth and body come from the pixel centres, colour from several samples a pixel.
        inverse, index = surfaces.cast(
            *(np.arange(n * 1.0) for n in (camera.width, camera.height))
        )
        with np.errstate(divide='ignore'):
            depth = 1 / inverse
        image = self._shade(surfaces, pose) * exposure
        if noise:
            rng = np.random.default_rng(seed)
            image += noise * rng.standard_normal(image.shape, np.float32)
        image = np.clip(image + 0.5, 0, 255).astype(np.uint8)
        return View(image, depth, surfaces.body[index], camera, pose, bodies, time)

    def _shade(self, surfaces: Surfaces, pose: np.ndarray) -> np.ndarray:
        """Colour the view, (H, W, 3) float32."""
        camera = surfaces.camera
        size = camera.width, camera.height
        x, y = ((np.arange(n * SUPERSAMPLE) + 0.5) / SUPERSAMPLE - 0.5 for n in size)
        inverse, index = surfaces.cast(x, y)

        # Sort the samples by surface: every surface, and every material, is one contiguous run.
        order = np.argsort(index, axis=None, kind='stable')
        runs = np.searchsorted(index.ravel()[order], np.arange(len(surfaces.body) + 1))
        dither = np.tile(DITHER, (camera.height, camera.width))
        px, py, iz, dither = (
            np.broadcast_to(a, index.shape).ravel()[order]
            for a in (x.astype(np.float32), y.astype(np.float32)[:, None], inverse, dither)
        )
        u, v, du, dv, light = np.zeros((5, len(order)), np.float32)
        # RGBA; one number moves faster than four
        colour: np.ndarray = np.zeros(len(order), np.uint32)
        numbers = range(1, len(surfaces.body))
        for name, group in itertools.groupby(numbers, surfaces.material.__getitem__):
            material = self.materials[name]
            start = None
            for i in group:
                run = slice(runs[i], runs[i + 1])
                start = run.start if start is None else start
                if run.start < run.stop:
                    u[run], v[run], du[run], dv[run], light[run] = surfaces.texture(
                        i, px[run], py[run], iz[run], 1 / SUPERSAMPLE
                    )
            run = slice(start, run.stop)
            if run.start == run.stop:
                continue
            if material.ground and self.shadows is not None:
                points = camera.rays(px[run], py[run]) / iz[run]
                light[run] *= self._sunlit(self.shadows, points, pose)
            sample = material.sample(u[run], v[run], du[run], dv[run], dither[run])
            colour[order[run]] = sample.view(np.uint32)[:, 0]
        sky = slice(runs[0], runs[1])
        if sky.start < sky.stop:
            rays = camera.rays(px[sky], py[sky])
            colour[order[sky]] = self._sky(rays, pose).view(np.uint32)[:, 0]

        # Average the samples, light them, and put the haze before them.
        lit: np.ndarray = np.empty_like(light)
        lit[order] = light
        clear = np.exp(np.maximum(-1 / (self.haze * np.maximum(inverse, 1e-9)), -50))
        clear[index == 0] = 1
        colour, lit, clear = (
            cv2.resize(a.reshape(*index.shape, -1), size, interpolation=cv2.INTER_AREA)
            for a in (colour.view(np.uint8).reshape(-1, 4), lit, clear)
        )
        skylight, sunlight, haze = (
            np.array(c, np.float32) for c in (self.skylight, self.sunlight, self.haze_colour)
        )
        gain = skylight + lit[..., None] * sunlight
        share = colour[..., 3:] * np.float32(1 / 255)  # of samples to be lit
        image = np.minimum(colour[..., :3] * (1 + share * (gain - 1)), 255)
        return haze + clear[..., None] * (image - haze)

    def _sunlit(self, shadows: np.ndarray, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Sunlight 0..1 on the ground at points (3, N) of the camera frame."""
        world = np.float32(pose[:2, :3]) @ points + np.float32(pose[:2, 3:])
        origin = np.array(self.shadow_origin, np.float32)
        at = (world - origin[:, None]) / np.float32(self.shadow_step)
        return look_up(shadows, *at)[:, 0]

    def _sky(self, rays: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Colours (N, 4) of the sky. It is at infinity: only the direction matters."""
        if self.sky is None:
            return np.tile(np.array([*self.haze_colour, 0], np.uint8), (rays.shape[1], 1))
        x, y, z = np.float32(pose[:3, :3]) @ rays
        height, width = self.sky.shape[:2]
        column = np.arctan2(y, x) * (width / (2 * np.pi)) % width
        row = (1 - np.arctan2(z, np.hypot(x, y)) * (2 / np.pi)) * (height - 1)
        return look_up(self.sky, column, np.clip(row, 0, height - 1), cv2.BORDER_WRAP)


def exact_flow(first: View, second: View) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the optical flow from one view to another, and where it can be seen.

    Returns
    -------
    flow : (H, W, 2) float32, pixels, (u right, v down), on the first view's grid; NaN where the
        point passes behind the second camera.
    visible : (H, W) bool, the point lies in the second image and nothing hides it there.

    """
    a, b = first.camera, second.camera
    x, y = np.arange(a.width, dtype=float), np.arange(a.height, dtype=float)[:, None]
    # Homogeneous points [ray, 1 / depth]: the sky, at infinity, needs no case of its own.
    point = np.concatenate([a.rays(x, y), 1.0 / first.depth[None]])
    moved = np.empty_like(point)
    for k, (before, after) in enumerate(zip(first.body_poses, second.body_poses)):
        on_body = first.body == k
        motion = np.linalg.inv(second.pose) @ after @ np.linalg.inv(before) @ first.pose
        moved[:, on_body] = motion @ point[:, on_body]
    z = np.where(moved[2] > 0, moved[2], np.nan)
    u, v = b.fx * moved[0] / z + b.cx, b.fy * moved[1] / z + b.cy
    flow = np.stack([u - x, v - y], axis=-1).astype(np.float32)

    # Inverse depth is linear on a plane in the image: interpolating it is exact away from edges.
    at = u.astype(np.float32), v.astype(np.float32)
    there = cv2.remap(1 / second.depth, *at, cv2.INTER_LINEAR)
    same = cv2.remap(second.body, *at, cv2.INTER_NEAREST) == first.body
    inside = (u >= 0) & (u <= b.width - 1) & (v >= 0) & (v <= b.height - 1)
    inverse = moved[3] / z
    return flow, inside & same & (np.abs(there - inverse) <= 0.01 * inverse + 1e-4)


def look(position, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> np.ndarray:
    """
    Return T_world_camera (4, 4) of a camera at (x, y, z) metres that looks along world x.

    Yaw turns it left, pitch down, roll clockwise about its view (radians; REP-103's signs).
    """
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(t), math.sin(t)) for t in (yaw, pitch, roll))
    turn = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    turn = turn @ np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    turn = turn @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    optical = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # its columns: right, down, forward
    pose = np.eye(4)
    pose[:3, :3] = turn @ optical
    pose[:3, 3] = position
    return pose


def swerve(time: float, speed: float = 3.0, height: float = 1.5) -> np.ndarray:
    """Return the pose of the default drive: down the right lane, gently swerving."""
    s = speed * time
    amplitude, k = 0.9, 2 * math.pi / 36  # metres, radians a metre
    heading = math.atan(amplitude * k * math.cos(k * s))
    return look((s, -1.5 + amplitude * math.sin(k * s), height), yaw=heading)


def drive(
    frames: int = 60,
    rate: float = 10.0,
    *,
    scene: Scene | None = None,
    camera: Camera = Camera(),  # noqa: B008 (it is frozen)
    path: Callable[[float], np.ndarray] = swerve,
    exposure: float = 1.0,
    noise: float = 1.0,
    seed: int = 0,
) -> Iterator[View]:
    """
    Yield views at `rate` Hz along `path` (seconds -> T_world_camera), by default down a street.

    The flow between any two of them, neighbours or not, is `exact_flow(first, second)`.
    """
    scene = scene or Scene.street(seed)
    for i in range(frames):
        time, noise_seed = i / rate, seed * 100_003 + i
        yield scene.render(
            path(time), camera, time, exposure=exposure, noise=noise, seed=noise_seed
        )
