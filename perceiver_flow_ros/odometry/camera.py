# SPDX-License-Identifier: Apache-2.0
"""
Pixels to rays and back, from the plain fields of a sensor_msgs/CameraInfo.

Conventions: sensor_msgs/CameraInfo, REP-104; distortion as in OpenCV's calib3d (plumb_bob,
rational_polynomial) and fisheye (equidistant: Kannala and Brandt 2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
import math

import cv2
import numpy as np

COEFFICIENTS = {
    'plumb_bob': (0, 4, 5),
    'rational_polynomial': (8, 12, 14),
    'equidistant': (4,),
}
SAME = {'': 'plumb_bob', 'fisheye': 'equidistant', 'pinhole': 'plumb_bob'}
WIDEST = math.radians(80.0)  # from the optical axis; rays are points of the plane z = 1
MISSED = 0.5  # px by which the pixel of a ray may miss the one it is the ray of
ASPECT = 0.01  # relative difference of aspects beyond which an image is not a scaled one


class CameraError(ValueError):
    """A calibration that cannot be used; the text says why, and what was expected."""


class Uncalibrated(CameraError):
    """K[0] (or P[0] of a rectified image) is zero: nobody has calibrated this camera."""


@dataclass(frozen=True)
class Camera:
    """
    A central camera for images of one size, in pixels; pixel (x, y) has its centre at (x, y).

    Rays are (x, y, 1) in the camera optical frame: x right, y down, z forward.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    model: str = 'plumb_bob'
    d: tuple[float, ...] = ()
    scaled: bool = False  # the calibration is for another size of the same aspect

    @classmethod
    def pinhole(
        cls, width: int, height: int, fx: float, fy: float, cx: float, cy: float
    ) -> Camera:
        """Make a camera without distortion, as rectified images have."""
        return cls(width, height, float(fx), float(fy), float(cx), float(cy))

    @classmethod
    def from_info(
        cls,
        width: int,
        height: int,
        k: Sequence[float],
        d: Sequence[float] = (),
        r: Sequence[float] = (),
        p: Sequence[float] = (),
        distortion_model: str = '',
        *,
        binning_x: int = 0,
        binning_y: int = 0,
        roi: Sequence[int] = (0, 0, 0, 0),
        rectified: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> Camera:
        """
        Make the camera of an image topic from the fields of its camera_info.

        Parameters
        ----------
        width, height : size of the full-resolution image the calibration is for, pixels.
        k, d, p, distortion_model : as in sensor_msgs/CameraInfo. `r` belongs to a rectified
            image's axes: those are the axes motion is then given in, so it is not needed.
        binning_x, binning_y : 0 and 1 are none.
        roi : (x_offset, y_offset, width, height) in full-resolution pixels; width or height 0
            is the full image.
        rectified : the images are rectified (P counts); else they are raw (K and D count).
        image_size : (width, height) of the images; None is what the info says.

        Raises
        ------
        Uncalibrated
            When the focal length is zero.
        CameraError
            For anything else that makes no camera: the text names it.

        """
        if rectified and len(p) < 11 or not rectified and len(k) < 9:
            name, numbers = ('P', p) if rectified else ('K', k)
            raise CameraError(
                f'camera_info: {name} has {len(numbers)} numbers, needs {12 if rectified else 9}'
            )
        fx, fy, cx, cy = (p[0], p[5], p[2], p[6]) if rectified else (k[0], k[4], k[2], k[5])
        if fx == 0:
            raise Uncalibrated(
                f'camera_info: {"P" if rectified else "K"}[0] is 0: the camera is not calibrated; '
                'calibrate it (camera_calibration) to get motion'
            )
        numbers = [float(n) for n in (fx, fy, cx, cy, *d)]
        if not np.isfinite(numbers).all() or fx < 0 or fy <= 0:
            raise CameraError(
                f'camera_info: fx {fx}, fy {fy}, cx {cx}, cy {cy}, D {list(d)}: expected finite '
                'numbers and positive focal lengths'
            )
        model, d = ('plumb_bob', ()) if rectified else _distortion(distortion_model, d)

        # REP-104: K and P are those of the full image; the image has the region, binned.
        x, y, w, h = (int(n) for n in roi)
        w, h = (w, h) if w and h else (int(width), int(height))
        bx, by = max(int(binning_x), 1), max(int(binning_y), 1)
        fx, cx, fy, cy = fx / bx, _shrunk(cx - x, bx), fy / by, _shrunk(cy - y, by)
        size = w // bx, h // by
        if min(size) < 1:
            raise CameraError(
                f'camera_info: {width}x{height} with region {tuple(roi)} and binning {bx}x{by} '
                'leaves no image'
            )
        scaled = False
        if image_size is not None and tuple(image_size) != size:
            scaled = True
            sx, sy = (wanted / told for wanted, told in zip(image_size, size))
            if abs(sx / sy - 1) > ASPECT:
                raise CameraError(
                    f'camera_info is for {size[0]}x{size[1]} images, these are {image_size[0]}x'
                    f'{image_size[1]}, of another aspect: it is the info of another camera, or '
                    'the image was cropped'
                )
            fx, cx, fy, cy = fx * sx, _shrunk(cx, 1 / sx), fy * sy, _shrunk(cy, 1 / sy)
            size = int(image_size[0]), int(image_size[1])
        fx, fy, cx, cy = (float(n) for n in (fx, fy, cx, cy))
        return cls(*size, fx, fy, cx, cy, model, d, scaled)

    @property
    def matrix(self) -> np.ndarray:
        """K, (3, 3) float64."""
        return np.array([[self.fx, 0, self.cx], [0, self.fy, self.cy], [0, 0, 1.0]])

    @property
    def focal(self) -> float:
        """Pixels a radian near the centre."""
        return math.sqrt(self.fx * self.fy)

    @cached_property
    def reach(self) -> float:
        """Distance from the axis, on the plane z = 1, up to which the distortion only grows."""
        if not any(self.d):
            return math.inf
        r = np.linspace(0, math.tan(WIDEST), 2000)
        reach = math.inf
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            back = np.flatnonzero(np.diff(np.hypot(*self._distort(r * x, r * y))) <= 0)
            reach = min(reach, r[back[0]] if len(back) else math.inf)
        return reach

    def rays(self, points: np.ndarray) -> np.ndarray:
        """
        Turn pixels (N, 2) to directions (N, 3), 1 along the axis.

        NaN beyond 80 deg off it, and where the distortion is not one to one.
        """
        points = np.asarray(points, np.float64).reshape(-1, 2)
        rays = np.ones((len(points), 3))
        if not any(self.d):
            rays[:, :2] = (points - (self.cx, self.cy)) / (self.fx, self.fy)
            if self.model == 'equidistant':
                theta = np.linalg.norm(rays[:, :2], axis=1)
                scale = np.tan(np.minimum(theta, WIDEST)) / np.maximum(theta, 1e-12)
                rays[:, :2] *= np.where(theta > 1e-12, scale, 1)[:, None]
                rays[theta > WIDEST] = np.nan
        elif len(points):
            at = np.ascontiguousarray(points[:, None])
            if self.model == 'equidistant':
                rays[:, :2] = cv2.fisheye.undistortPoints(at, self.matrix, np.array(self.d))[:, 0]
            else:
                stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 1e-7)
                rays[:, :2] = cv2.undistortPointsIter(
                    at, self.matrix, np.array(self.d), np.eye(3), np.eye(3), stop
                )[:, 0]
        rays[~(np.linalg.norm(rays[:, :2], axis=1) <= math.tan(WIDEST))] = np.nan
        if any(self.d):
            missed = np.linalg.norm(self.project(rays) - points, axis=1)
            rays[~(missed <= MISSED)] = np.nan
        return rays

    def project(self, points: np.ndarray) -> np.ndarray:
        """
        Give pixels (N, 2) of points or rays (N, 3) in the camera frame.

        NaN behind it, and beyond where the distortion, a polynomial, turns back.
        """
        points = np.asarray(points, np.float64).reshape(-1, 3)
        z = np.where(points[:, 2] > 0, points[:, 2], np.nan)
        x, y = points[:, 0] / z, points[:, 1] / z
        x = np.where(np.hypot(x, y) <= self.reach, x, np.nan)
        x, y = self._distort(x, y)
        return np.stack([self.fx * x + self.cx, self.fy * y + self.cy], axis=1)

    def _distort(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distort points of the plane z = 1 (OpenCV's calib3d and fisheye documentation)."""
        r2 = x * x + y * y
        if self.model == 'equidistant':
            r = np.sqrt(r2)
            theta = np.arctan(r)
            t2 = theta * theta
            k1, k2, k3, k4 = self.d or (0.0,) * 4
            bent = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
            scale = np.where(r > 1e-12, bent / np.maximum(r, 1e-12), 1.0)
            return x * scale, y * scale
        if not any(self.d):
            return x, y
        d = np.zeros(14)
        d[: len(self.d)] = self.d
        k1, k2, p1, p2, k3, k4, k5, k6, s1, s2, s3, s4, tx, ty = d
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x) + r2 * (s1 + s2 * r2)
        v = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y + r2 * (s3 + s4 * r2)
        if tx or ty:  # a tilted sensor
            tilt = np.array(
                [
                    [math.cos(ty), math.sin(ty) * math.sin(tx), -math.sin(ty) * math.cos(tx)],
                    [0, math.cos(tx), math.sin(tx)],
                    [math.sin(ty), -math.cos(ty) * math.sin(tx), math.cos(ty) * math.cos(tx)],
                ]
            )
            lift = np.array(
                [[tilt[2, 2], 0, -tilt[0, 2]], [0, tilt[2, 2], -tilt[1, 2]], [0, 0, 1]]
            )
            u, v, w = lift @ tilt @ np.stack([u, v, np.ones_like(u)])
            u, v = u / w, v / w
        return u, v

    def pixel_jacobian(self, rays: np.ndarray) -> np.ndarray:
        """Give d(x, y) / d(pixel) (N, 2, 2) at rays (N, 3) of the plane z = 1."""
        if not any(self.d) and self.model != 'equidistant':
            return np.broadcast_to(np.diag([1 / self.fx, 1 / self.fy]), (len(rays), 2, 2))
        return np.linalg.inv(self.projection_jacobian(rays))

    def projection_jacobian(self, rays: np.ndarray) -> np.ndarray:
        """Give d(pixel) / d(x, y) (N, 2, 2) at rays (N, 3) of the plane z = 1."""
        if not any(self.d) and self.model != 'equidistant':
            return np.broadcast_to(np.diag([self.fx, self.fy]), (len(rays), 2, 2))
        step = 1e-5
        x, y = rays[:, 0], rays[:, 1]
        forward = np.empty((len(rays), 2, 2))
        for k, (dx, dy) in enumerate(((step, 0), (0, step))):
            a, b = self._distort(x + dx, y + dy), self._distort(x - dx, y - dy)
            forward[:, 0, k] = (a[0] - b[0]) * self.fx / (2 * step)
            forward[:, 1, k] = (a[1] - b[1]) * self.fy / (2 * step)
        return np.where(np.isfinite(forward), forward, np.eye(2))


def _shrunk(c: float, factor: float) -> float:
    """Scale a coordinate about the corner of the image, which is at -0.5."""
    return (c + 0.5) / factor - 0.5


def _distortion(model: str, d: Sequence[float]) -> tuple[str, tuple[float, ...]]:
    """Check the model and its coefficients; none where all are zero."""
    name = SAME.get(model, model)
    d = tuple(float(n) for n in d)
    if name not in COEFFICIENTS:
        raise CameraError(
            f'camera_info: distortion model {model!r} is unknown; expected one of '
            f'{", ".join(COEFFICIENTS)}, or rectified images'
        )
    if not any(d) and name != 'equidistant':
        return name, ()
    if name == 'equidistant' and not d:
        return name, (0.0,) * 4
    if len(d) not in COEFFICIENTS[name]:
        raise CameraError(
            f'camera_info: {name} has {len(d)} coefficients, '
            f'expected {" or ".join(map(str, COEFFICIENTS[name]))}'
        )
    return name, d
