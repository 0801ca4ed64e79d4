# SPDX-License-Identifier: Apache-2.0
"""Which flow vectors are used, and how far each can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, fields
import math

import cv2
import numpy as np
from perceiver_flow_ros.odometry.camera import Camera
from perceiver_flow_ros.odometry.cues import confidence_at
from perceiver_flow_ros.odometry.robust import CELLS_A_ROW
from perceiver_flow_ros.odometry.settings import Reason, Refused, Settings

WINDOW = 5  # half-resolution pixels over which texture is gathered
SENSOR = 4.0  # (grey levels / px)^2: gradients of this strength are as good as noise
PLAIN = 1.0  # (grey levels / px)^2: below it flow is a guess, not a measurement
MODEL = 0.15  # variance of the best textured flow, relative to that of untextured flow
PATCH = 3  # px around a flow vector that are compared
DARK = 16.0  # grey level below which an image without texture is called dark
CONTENT = 12.0  # grey levels of large-scale contrast that a sharp image would have texture with


@dataclass
class Samples:
    """Flow vectors and the noise of each; rays are columns (x, y, 1)."""

    points: np.ndarray  # (2, N) px, previous image
    moved: np.ndarray  # (2, N) px, current image
    rays: np.ndarray  # (3, N) of the points
    seen: np.ndarray  # (3, N) of where they moved
    noise: np.ndarray  # (3, N) xx, xy, yy: covariance of `seen` for flow noise of 1 px
    cells: np.ndarray  # (N,) the cell of the image each belongs to

    def __len__(self) -> int:
        return self.points.shape[1]

    def __getitem__(self, chosen) -> Samples:
        """Take some of the samples."""
        return Samples(*(getattr(self, entry.name)[..., chosen] for entry in fields(self)))


def choose(
    flow: np.ndarray,
    camera: Camera,
    settings: Settings,
    stride: int = 1,
    image: np.ndarray | None = None,
    backward: np.ndarray | None = None,
) -> Samples:
    """
    Pick flow vectors on a grid, with the noise to expect of each.

    Flow is worth what the texture under it is worth: the structure tensor A of the previous image
    is the information a patch holds on its own motion (Lucas and Kanade 1981; Foerstner 1987), so
    the covariance is taken as proportional to MODEL + (1 + A / SENSOR)^-1, per direction: along
    an edge flow is worse than across. Forward-backward confidence divides it.

    Parameters
    ----------
    flow : (h, w, 2) px at the pixels [::stride, ::stride]; NaN where unknown.
    image : (H, W) uint8 grey, the previous image; None trusts all vectors alike.
    backward : (h, w, 2) px, current -> previous.

    Raises
    ------
    Refused
        When too few are left, with the reason the images suggest.

    """
    h, w = flow.shape[:2]
    step = max(
        1, round(settings.grid / stride), math.ceil(math.sqrt(h * w / settings.max_samples))
    )
    rows, columns = (np.arange(min(step // 2, n - 1), n, step) for n in (h, w))
    row, column = (a.ravel() for a in np.meshgrid(rows, columns, indexing='ij'))
    vectors = flow[row, column].astype(np.float64).T
    points = np.stack([column, row]).astype(np.float64) * stride
    moved = points + vectors

    known = np.isfinite(vectors).all(axis=0)
    edge = np.array([[camera.width - 1], [camera.height - 1]])
    with np.errstate(invalid='ignore'):
        use = known & ((moved >= 0) & (moved <= edge)).all(axis=0)
    trust = np.ones(len(use))
    if backward is not None:
        trust = confidence_at(flow, backward, row, column, stride)
        use &= trust > 0.1
    tensor = None
    if image is not None:
        tensor = structure(image, points)
        strong = _largest(tensor) > PLAIN
        plain = np.count_nonzero(use & strong) < settings.min_samples
        if plain and np.count_nonzero(use) >= settings.min_samples:
            raise Refused(*why_plain(image, settings.min_samples))
        use &= strong
    if np.count_nonzero(use) >= settings.min_samples:
        rays, seen = (camera.rays(p[:, use].T).T for p in (points, moved))
        inside = np.isfinite(rays[0]) & np.isfinite(seen[0])
        use[use] = inside
        rays, seen = rays[:, inside], seen[:, inside]
    count = np.count_nonzero(use)
    if count < settings.min_samples:
        raise Refused(
            Reason.FEW_PIXELS,
            f'{count} usable flow vectors of {len(use)} looked at ({np.count_nonzero(known)} known'
            f'), {settings.min_samples} needed: the flow is unknown or leaves the image nearly '
            'everywhere',
        )
    noise = _in_plane(_noise(tensor, trust, use), camera.pixel_jacobian(seen.T))
    return Samples(points[:, use], moved[:, use], rays, seen, noise, cells(points[:, use], camera))


def cells(points: np.ndarray, camera: Camera) -> np.ndarray:
    """Give the number (N,) of the cell of the image that each point (2, N) lies in, row by row."""
    size = max(camera.width, camera.height) / CELLS_A_ROW
    x, y = (points / size).astype(int)
    return y * CELLS_A_ROW + np.minimum(x, CELLS_A_ROW - 1)


def structure(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Structure tensor (xx, xy, yy) (3, N) at points (2, N) of an image (H, W), half-sized."""
    small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    gx, gy = (cv2.Scharr(small, cv2.CV_32F, *d, scale=1 / 32) for d in ((1, 0), (0, 1)))
    x, y = (points / 2).astype(int)
    x, y = np.minimum(x, small.shape[1] - 1), np.minimum(y, small.shape[0] - 1)
    window = (WINDOW, WINDOW)
    products = [cv2.multiply(a, b) for a, b in ((gx, gx), (gx, gy), (gy, gy))]
    return np.stack([cv2.boxFilter(product, -1, window)[y, x] for product in products])


def likeness(samples: Samples, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Tell (N,) -1..1 how alike (zero-mean normalised cross-correlation) flow's two ends look."""
    offset = np.arange(-PATCH, PATCH + 1)
    dx, dy = (a.ravel() for a in np.meshgrid(offset, offset))
    patches = []
    for picture, (x, y) in ((previous, samples.points), (current, samples.moved)):
        x, y = ((a[:, None] + d).astype(np.float32) for a, d in ((x, dx), (y, dy)))
        seen = cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        patch = seen.astype(np.float32)
        patches.append(patch - patch.mean(axis=1, keepdims=True))
    a, b = patches
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1) + 1e-6)


def why_plain(image: np.ndarray, needed: int) -> tuple[Reason, str]:
    """Tell why an image has no texture."""
    mean = float(image.mean())
    if mean < DARK:
        return Reason.DARK, f'the image is dark (mean grey level {mean:.0f}): light, or exposure'
    coarse = cv2.resize(image, (16, 12), interpolation=cv2.INTER_AREA)
    if float(coarse.std()) > CONTENT:
        return Reason.BLURRED, 'the image is blurred: it has contrast, but no detail to follow'
    return (
        Reason.TEXTURELESS,
        f'fewer than {needed} flow vectors lie on texture: the camera sees a plain surface',
    )


def _largest(tensor: np.ndarray) -> np.ndarray:
    xx, xy, yy = tensor
    return 0.5 * (xx + yy) + np.hypot(0.5 * (xx - yy), xy)


def _noise(tensor: np.ndarray | None, trust: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Covariance (xx, xy, yy) (3, n) in the image, in px^2 for noise of 1 px."""
    n = np.count_nonzero(use)
    if tensor is None:
        noise = np.stack([np.ones(n), np.zeros(n), np.ones(n)])
    else:
        xx, xy, yy = tensor[:, use].astype(np.float64) / SENSOR
        xx, yy = 1 + xx, 1 + yy
        det = xx * yy - xy * xy
        noise = np.stack([yy / det + MODEL, -xy / det, xx / det + MODEL])
    return noise / trust[use]


def _in_plane(noise: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
    """J S J^T of covariances (3, N) with d(x, y) / d(pixel) (N, 2, 2): (3, N)."""
    (a, b), (c, d) = jacobian.transpose(1, 2, 0)
    xx, xy, yy = noise
    return np.stack(
        [
            a * a * xx + 2 * a * b * xy + b * b * yy,
            a * c * xx + (a * d + b * c) * xy + b * d * yy,
            c * c * xx + 2 * c * d * xy + d * d * yy,
        ]
    )
