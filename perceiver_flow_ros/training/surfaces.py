# SPDX-License-Identifier: Apache-2.0
"""
What a rendered scene is made of, and the casting of rays at it.

Everything that is needed of a plane is linear in the pixel (x, y): its inverse depth, its texture
coordinates times the inverse depth, and on which side of an edge the pixel lies. So a face costs a
few additions a pixel, and depth is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
import math
from typing import NamedTuple

import cv2
import numpy as np


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion, in pixels; pixel (x, y) has its centre at (x, y)."""

    width: int = 640
    height: int = 480
    fx: float = 500.0
    fy: float = 500.0
    cx: float = 319.5
    cy: float = 239.5

    @property
    def matrix(self) -> np.ndarray:
        """K, (3, 3) float64."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    def rays(self, x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
        """Directions (3, ...) of pixels in the camera frame, 1 along the optical axis."""
        x, y = np.broadcast_arrays((x - self.cx) / self.fx, (y - self.cy) / self.fy)
        return np.stack([x, y, np.ones_like(x)])


class Face(NamedTuple):
    """A convex polygon, seen from the side on which its vertices run counter-clockwise."""

    vertices: np.ndarray  # (n, 3) metres, in the frame of its body
    uv: np.ndarray  # (2, 4): texture coordinates [u, v] = uv @ [x, y, z, 1], in texture tiles
    material: str
    body: int = 0


class Sphere(NamedTuple):
    """A textured sphere: u runs around the vertical axis, v from its top to its bottom."""

    centre: np.ndarray  # (3,) metres, in the frame of its body
    radius: float
    material: str
    body: int = 0


class Material:
    """
    A texture, antialiased by a rip-map: level (i, j) is the texture 2^i narrower and 2^j lower.

    Rip-maps blur each axis as much as it is foreshortened: a street stays sharp across while it is
    smooth along. All levels lie in one atlas, with a border of one texel for bilinear sampling.

    Parameters
    ----------
    texture : (h, w, 3) uint8 RGB, h and w powers of two.
    lit : shaded by sun and sky; else its colours are final.
    ground : the shadows of the scene fall on it.
    repeat : it tiles; else its edge goes on for ever.

    """

    def __init__(
        self,
        texture: np.ndarray,
        *,
        lit: bool = True,
        ground: bool = False,
        repeat: bool = True,
    ):
        self.ground, self.repeat = ground, repeat
        height, width = texture.shape[:2]
        self.axes = tuple(_levels(size) for size in (width, height))
        (_, left), (_, top) = self.axes
        self.atlas = np.zeros((top[-1], left[-1], 4), np.uint8)
        row = np.full((height, width, 4), 255 if lit else 0, np.uint8)
        row[..., :3] = texture
        border = cv2.BORDER_WRAP if repeat else cv2.BORDER_REPLICATE
        for y in top[:-1]:
            level = row
            for x in left[:-1]:
                tile = cv2.copyMakeBorder(level, 1, 1, 1, 1, border)
                self.atlas[y: y + tile.shape[0], x: x + tile.shape[1]] = tile
                level = _halve(level, axis=1)
            row = _halve(row, axis=0)

    def sample(
        self, u: np.ndarray, v: np.ndarray, du: np.ndarray, dv: np.ndarray, dither: np.ndarray
    ) -> np.ndarray:
        """
        Return the colours (N, 4) uint8 at tiles (u, v) under footprints of (du, dv) tiles.

        `dither` 0..1 chooses between two levels. All are (N,) float32. The fourth channel is 255
        where the colour is to be lit, 0 where it is final.
        """
        at = []
        for t, dt, (size, start) in zip((u, v), (du, dv), self.axes):
            level = np.log2(np.maximum(dt * size, 1)) + dither
            level = np.minimum(level, len(start) - 2).astype(np.intp)
            t = t - np.floor(t) if self.repeat else np.clip(t, 0, 1)
            scale = np.float32(size) / np.exp2(np.arange(len(start), dtype=np.float32))
            # + 1 for the border, - 0.5 for the centre of a texel
            at.append(t * scale[level] + (start + 0.5).astype(np.float32)[level])
        return look_up(self.atlas, *at)


def look_up(
    picture: np.ndarray, x: np.ndarray, y: np.ndarray, border: int = cv2.BORDER_REPLICATE
) -> np.ndarray:
    """Sample a picture bilinearly at (N,) columns x and rows y: (N, C)."""
    shape = -(-len(x) // 1024), 1024  # cv2.remap takes no more than 32767 columns
    columns, rows = (np.resize(c.astype(np.float32, copy=False), shape) for c in (x, y))
    out = cv2.remap(picture, columns, rows, cv2.INTER_LINEAR, borderMode=border)
    return out.reshape(shape[0] * shape[1], -1)[: len(x)]


def _levels(size: int) -> tuple[int, np.ndarray]:
    """Size of level 0, and where each level starts; the last entry is where they end."""
    count = int(math.log2(size)) - 1
    return size, np.cumsum([0] + [(size >> i) + 2 for i in range(count)])


def _halve(image: np.ndarray, axis: int) -> np.ndarray:
    h, w = image.shape[:2]
    size = (w, h // 2) if axis == 0 else (w // 2, h)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if min(size) else image


class Packed:
    """Faces sorted by material, and their numbers as arrays."""

    def __init__(self, faces: list[Face]):
        self.faces = sorted(faces, key=lambda face: face.material)
        self.corners = np.array([len(f.vertices) for f in self.faces], int)
        longest = max(self.corners, default=3)
        # (F, V, 3); short polygons go on with their first vertex
        self.vertices = np.array(
            [np.resize(f.vertices, (longest, 3)) for f in self.faces], float
        ).reshape(-1, longest, 3)
        for vertices, corners in zip(self.vertices, self.corners):
            vertices[corners:] = vertices[0]
        a, b, c = self.vertices[:, :3].swapaxes(0, 1)
        normal = np.cross(b - a, c - a)
        self.normal = normal / np.linalg.norm(normal, axis=1, keepdims=True)
        self.uv = np.array([f.uv for f in self.faces], float).reshape(-1, 2, 4)
        self.body = np.array([f.body for f in self.faces], int)


class Surfaces:
    """
    The faces and spheres that one camera may see.

    Surface 0 is the sky; then come the faces and then the spheres, each sorted by material.

    Parameters
    ----------
    packed : the faces of the scene.
    spheres : its spheres, sorted by material.
    to_camera : (B, 4, 4) T_camera_body of every body, the static world first.
    sun : (3,) unit vector to the sun, in the world.

    """

    def __init__(
        self,
        packed: Packed,
        spheres: list[Sphere],
        to_camera: np.ndarray,
        camera: Camera,
        sun: np.ndarray,
    ):
        self.camera = camera
        # The sides of the view, as planes through the camera: inside is positive.
        left, top, _ = camera.rays(-0.5, -0.5)
        right, bottom, _ = camera.rays(camera.width - 0.5, camera.height - 0.5)
        sides = np.array([[0, 0, 1], [1, 0, -left], [-1, 0, right], [0, 1, -top], [0, -1, bottom]])

        moved = to_camera[packed.body]
        v = packed.vertices @ moved[:, :3, :3].swapaxes(1, 2) + moved[:, None, :3, 3]
        normal = np.einsum('fij,fj->fi', moved[:, :3, :3], packed.normal)
        distance = np.einsum('fi,fi->f', normal, v[:, 0])  # negative: it faces us
        keep = np.flatnonzero((distance < -1e-6) & (v @ sides.T > 0).any(axis=1).all(axis=1))
        v, normal, distance, moved = v[keep], normal[keep], distance[keep], moved[keep]
        self.light = np.maximum(normal @ to_camera[0][:3, :3] @ sun, 0)

        # Rows that act on (x, y, 1): inverse depth, and (u, v) x inverse depth but for an offset.
        kinv = np.linalg.inv(camera.matrix)
        self.plane = normal / distance[:, None] @ kinv  # (F, 3)
        uv = packed.uv[keep] @ np.linalg.inv(moved)
        self.uv = np.concatenate([uv[..., :3] @ kinv, uv[..., 3:]], axis=-1)  # (F, 2, 4)
        # Half-planes a x + b y + c <= 0, "in front" and the edges, as (a, -b, -c); no zero is -0.
        edges = np.cross(v, np.roll(v, -1, axis=1)) @ kinv
        edges = np.concatenate([-self.plane[:, None], edges], axis=1).swapaxes(1, 2)
        edges = edges * np.array([[1], [-1], [-1]]) + 0.0
        self.edges = [e[:, : 1 + n] for e, n in zip(edges, packed.corners[keep])]
        with np.errstate(divide='ignore', invalid='ignore'):
            rows = v[..., 1] / v[..., 2] * camera.fy + camera.cy
        behind = (v[..., 2] < 1e-3).any(axis=1)  # reaches behind the camera: no bounds known
        self.first_row = np.where(behind, -np.inf, rows.min(axis=1))
        self.last_row = np.where(behind, np.inf, rows.max(axis=1))

        self.spheres = []  # (centre, radius, rotation from the camera to its body)
        seen: list[Face | Sphere] = [packed.faces[i] for i in keep]
        for sphere in spheres:
            t = to_camera[sphere.body]
            centre = t[:3, :3] @ sphere.centre + t[:3, 3]
            if centre[2] > 1.5 * sphere.radius and (sides @ centre > -2 * sphere.radius).all():
                self.spheres.append((centre, sphere.radius, t[:3, :3].T))
                seen.append(sphere)
        self.material = ['', *(s.material for s in seen)]
        self.body = np.array([0, *(s.body for s in seen)], np.uint8)

    def cast(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Cast a ray through every pair of a column x (w,) and a row y (h,), both ascending.

        Returns the inverse depth (h, w) float32, 0 in the sky, and the surface (h, w) int16.
        """
        inverse = np.zeros((len(y), len(x)), np.float32)
        index = np.zeros((len(y), len(x)), np.int16)
        with np.errstate(divide='ignore', invalid='ignore'):  # an edge that runs along a row
            self._cast_faces(x, y, inverse, index)
        self._cast_spheres(x, y, inverse, index)
        return inverse, index

    def _cast_faces(self, x, y, inverse, index) -> None:
        columns, x32 = np.arange(len(x), dtype=np.int32), x.astype(np.float32)
        tops = y.searchsorted(self.first_row)
        bottoms = y.searchsorted(self.last_row, 'right')
        for i in np.flatnonzero(tops < bottoms):
            # A row meets a convex face in one interval: edges bound it from the left or the right.
            a, b, c = self.edges[i][:, :, None]
            bound = (b * y[tops[i]: bottoms[i]] + c) / a
            low = np.fmax.reduce(np.where(a < 0, bound, -np.inf), axis=0)
            high = np.fmin.reduce(np.where(a < 0, np.inf, bound), axis=0)
            low = x.searchsorted(low).astype(np.int32)
            high = x.searchsorted(high, 'right').astype(np.int32)
            filled = (low < high).nonzero()[0]
            if len(filled) == 0:
                continue
            first, last = filled[0], filled[-1] + 1
            low, high = low[first:last, None], high[first:last, None]
            c0, c1 = low.min(), high.max()
            part = slice(tops[i] + first, tops[i] + last), slice(c0, c1)
            wx, wy, w0 = self.plane[i]
            depth = np.float32(wx) * x32[part[1]]
            depth = depth + (wy * y[part[0]] + w0).astype(np.float32)[:, None]
            hit = depth > inverse[part]
            if (low > c0).any() or (high < c1).any():
                hit &= columns[part[1]] >= low
                hit &= columns[part[1]] < high
            np.copyto(inverse[part], depth, where=hit)
            np.copyto(index[part], i + 1, where=hit)

    def _cast_spheres(self, x, y, inverse, index) -> None:
        rx, ry = self.camera.rays(x, 0.0)[0], self.camera.rays(0.0, y)[1]
        for i, (centre, radius, _) in enumerate(self.spheres, start=len(self.plane) + 1):
            at = centre[:2] / centre[2]
            reach = 1.5 * radius / math.sqrt(centre[2] ** 2 - radius**2) * (1 + np.abs(at))
            c0, c1 = rx.searchsorted((at[0] - reach[0], at[0] + reach[0]))
            r0, r1 = ry.searchsorted((at[1] - reach[1], at[1] + reach[1]))
            part = slice(r0, r1), slice(c0, c1)
            column, row = rx[c0:c1], ry[r0:r1, None]
            # |ray / w - centre|^2 = radius^2, the nearer root.
            square = column * column + row * row + 1
            along = column * centre[0] + row * centre[1] + centre[2]
            root = along * along - square * (centre @ centre - radius**2)
            depth = np.float32(square / (along - np.sqrt(np.maximum(root, 0))))
            hit = (root > 0) & (depth > inverse[part])
            np.copyto(inverse[part], depth, where=hit)
            np.copyto(index[part], i, where=hit)

    def texture(
        self, i: int, x: np.ndarray, y: np.ndarray, inverse: np.ndarray, step: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.float32]:
        """
        Return u, v, their footprints du, dv over `step` pixels, and the sunlight 0..1.

        `x`, `y` and `inverse` depth are those of pixels (N,) float32 that show surface `i`.
        """
        i -= 1
        if i >= len(self.plane):
            return self._sphere_texture(i - len(self.plane), x, y, inverse, step)
        wx, wy, _ = self.plane[i].astype(np.float32)
        out = []
        for a, b, c, offset in self.uv[i].astype(np.float32):
            t = (a * x + b * y + c) / inverse  # so dt/dx = (a - t wx) / inverse
            dt = np.maximum(np.abs(a - t * wx), np.abs(b - t * wy))
            out.append((t + offset, dt * (np.float32(step) / inverse)))
        (u, du), (v, dv) = out
        return u, v, du, dv, np.float32(self.light[i])

    def _sphere_texture(self, i, x, y, inverse, step):
        centre, radius, rotation = self.spheres[i]
        point = self.camera.rays(x, y) / inverse - np.float32(centre)[:, None]
        nx, ny, nz = np.float32(rotation / radius) @ point
        u = np.arctan2(ny, nx) / np.float32(2 * np.pi)
        v = np.arccos(np.clip(nz, -1, 1)) / np.float32(np.pi)
        dv = np.float32(step / self.camera.fx / (np.pi * radius)) / inverse
        return u, v, dv / 2, dv, np.float32(1)
