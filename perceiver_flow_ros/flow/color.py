# SPDX-License-Identifier: Apache-2.0
"""The Middlebury colour code of flow (Baker et al. 2011): hue is direction, saturation speed."""

from __future__ import annotations

import numpy as np

UNKNOWN = 1e9  # px; Middlebury's convention: a larger component means that the flow is unknown


def flow_to_color(flow: np.ndarray, max_magnitude: float | None = None) -> np.ndarray:
    """
    Colour a flow field with Middlebury's wheel.

    Parameters
    ----------
    flow : (H, W, 2) pixels. NaN, infinite or > 1e9 is unknown.
    max_magnitude : pixels that reach full saturation; faster motion is darkened.
        None takes the largest magnitude of this field (1 where nothing moves).

    Returns
    -------
    (H, W, 3) uint8 RGB, black where the flow is unknown, white where nothing moves.

    """
    flow = np.asarray(flow, np.float32)
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f'flow has shape {flow.shape}, expected (H, W, 2)')
    if max_magnitude is not None and not 0 < max_magnitude < np.inf:
        raise ValueError(f'max_magnitude is {max_magnitude}, expected a positive number of pixels')
    u, v = flow[:, :, 0], flow[:, :, 1]
    known = (np.abs(u) <= UNKNOWN) & (np.abs(v) <= UNKNOWN)
    u, v = np.where(known, u, 0), np.where(known, v, 0)
    if max_magnitude is None:
        max_magnitude = float(np.sqrt(np.max(u * u + v * v, initial=0))) or 1.0
    u, v = u / np.float32(max_magnitude), v / np.float32(max_magnitude)

    # The direction picks a place between two neighbouring colours of the wheel.
    place = (np.arctan2(-v, -u) / np.float32(np.pi) + 1) / 2 * (len(WHEEL) - 1)
    first = np.minimum(place.astype(np.intp), len(WHEEL) - 1)
    second = (first + 1) % len(WHEEL)
    share = place - first.astype(np.float32)
    # The speed fades it towards white; out of range it is darkened instead.
    speed = np.sqrt(u * u + v * v)
    image = np.zeros((*flow.shape[:2], 3), np.uint8)
    for channel, wheel in enumerate(
        WHEEL.T
    ):  # a plane at a time: three times faster than all at once
        color = (1 - share) * wheel[first] + share * wheel[second]
        color = np.where(speed <= 1, 1 - speed * (1 - color), color * np.float32(0.75))
        image[:, :, channel] = np.where(known, np.float64(255) * color, 0)
    return image


def _make_wheel() -> np.ndarray:
    """Give the 55 colours of the wheel, (55, 3) float32 RGB in 0..1, at whole steps of 1/255."""
    red, yellow, green = (255, 0, 0), (255, 255, 0), (0, 255, 0)
    cyan, blue, magenta = (0, 255, 255), (0, 0, 255), (255, 0, 255)
    corners = [red, yellow, green, cyan, blue, magenta, red]
    steps = [15, 6, 4, 11, 13, 6]  # of equal perceived size
    colors = []
    for start, end, count in zip(corners, corners[1:], steps):
        for i in range(count):
            ramp = 255 * i // count
            colors.append(
                [
                    min(a, 255 - ramp) if b < a else max(a, ramp * b // 255)
                    for a, b in zip(start, end)
                ]
            )
    return np.array(colors, np.float32) / 255


WHEEL = _make_wheel()
