# SPDX-License-Identifier: Apache-2.0
"""Shapes to build a scene of, and a builder that collects them with the shadows they throw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from perceiver_flow_ros.training.scene import Scene
from perceiver_flow_ros.training.surfaces import Face, Material, Sphere


def polygon(vertices, u, v, origin, material: str, body: int = 0) -> Face:
    """Return a face whose texture tile starts at `origin` and spans `u`, `v` (metres)."""
    u, v, origin = (np.asarray(a, float) for a in (u, v, origin))
    axes = np.stack([u / (u @ u), v / (v @ v)])
    uv = np.column_stack([axes, -axes @ origin])
    return Face(np.asarray(vertices, float), uv, material, body)


def wall(x0, y0, x1, y1, bottom, top, material: str, tile=None, body: int = 0) -> Face:
    """
    Return an upright rectangle from (x0, y0), left of its viewer, to (x1, y1), on the right.

    One texture covers it, or, with `tile`, as many as there is room for of so many metres.
    """
    along = np.array([x1 - x0, y1 - y0, 0.0])
    corners = [(x0, y0, top), (x0, y0, bottom), (x1, y1, bottom), (x1, y1, top)]
    u = along / np.linalg.norm(along) * tile if tile else along
    down = tile if tile else top - bottom
    return polygon(corners, u, (0, 0, -down), corners[0], material, body)


def flat(x0, y0, x1, y1, z, material: str, tile: float | None = None, body: int = 0) -> Face:
    """Return a level rectangle seen from above; with `tile` (metres) its texture repeats."""
    corners = [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]
    if tile is None:
        return polygon(corners, (x1 - x0, 0, 0), (0, y1 - y0, 0), corners[0], material, body)
    return polygon(corners, (tile, 0, 0), (0, tile, 0), (0, 0, z), material, body)


def box(x0, y0, z0, x1, y1, z1, side: str, top: str, tile: float | None = None) -> list[Face]:
    """Return the four sides and the top of an upright box."""
    ring = [(x0, y1), (x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    sides = [wall(*a, *b, z0, z1, side, tile) for a, b in zip(ring, ring[1:])]
    return [*sides, flat(x0, y0, x1, y1, z1, top, tile)]


def moved(face: Face, transform: np.ndarray) -> Face:
    """Return a face where T (4, 4) takes it."""
    vertices = face.vertices @ transform[:3, :3].T + transform[:3, 3]
    return face._replace(vertices=vertices, uv=face.uv @ np.linalg.inv(transform))


class Builder:
    """
    Collects what a scene consists of.

    `materials` is open to all: whoever needs one that is not there yet adds it.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.faces: list[Face] = []
        self.materials: dict[str, Material] = {}
        self.sun = np.array(Scene.sun) / np.linalg.norm(Scene.sun)
        self._spheres: list[Sphere] = []
        self._motions: list[Callable[[float], np.ndarray]] = []
        self._shadows: list[tuple[np.ndarray, float]] = []

    def material(self, name: str, texture: np.ndarray, **kind: bool) -> str:
        """Add a material under a name; give the name."""
        self.materials[name] = Material(texture, **kind)
        return name

    def sphere(self, centre: np.ndarray, radius: float, material: str) -> None:
        """Add a sphere."""
        self._spheres.append(Sphere(centre, radius, material))

    def body(self, motion: Callable[[float], np.ndarray]) -> int:
        """Add a body that moves, seconds -> T_world_body; give its number."""
        self._motions.append(motion)
        return len(self._motions)

    def shadow(self, points, strength: float = 1.0) -> None:
        """Have the convex hull of some points (n, 3) throw a shadow on the ground."""
        self._shadows.append((np.asarray(points, float), strength))

    def block_shadow(self, xs: Sequence, ys: Sequence, zs: Sequence) -> None:
        """Have an upright block throw a shadow."""
        self.shadow([(x, y, z) for x in xs for y in ys for z in zs])

    def scene(self, x0, y0, x1, y1, sky: np.ndarray) -> Scene:
        """Make the scene, with shadows within two corners (metres), under a sky (h, w, 3)."""
        sky = np.dstack([sky, np.zeros(sky.shape[:2], np.uint8)])  # final: not to be lit
        shadows = self._shadow_map(x0, y0, x1, y1)
        parts = self.faces, self.materials, self._spheres, self._motions
        return Scene(*parts, sky=sky, shadows=shadows, shadow_origin=(x0, y0))

    def _shadow_map(self, x0, y0, x1, y1) -> np.ndarray:
        """Project what throws a shadow along the sun: 1 in the sun, 0 in the shade."""
        step = Scene.shadow_step
        size = round((y1 - y0) / step), round((x1 - x0) / step)
        light = np.ones(size, np.float32)
        for points, strength in self._shadows:
            ground = points[:, :2] - points[:, 2:] / self.sun[2] * self.sun[:2]
            hull = cv2.convexHull(((ground - (x0, y0)) / step * 16).round().astype(np.int32))
            x, y, w, h = cv2.boundingRect(hull // 16)
            part = slice(max(y - 2, 0), max(y + h + 3, 0)), slice(max(x - 2, 0), max(x + w + 3, 0))
            shade = np.zeros(size, np.float32)
            cv2.fillConvexPoly(shade, hull, strength, cv2.LINE_4, 4)
            light[part] = np.minimum(light[part], 1 - shade[part])
        return cv2.GaussianBlur(light, (0, 0), 1.0)
