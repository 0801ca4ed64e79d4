# SPDX-License-Identifier: Apache-2.0
"""Procedural walls and house fronts: windows, shops, doors, cornices, dirt."""

from __future__ import annotations

import cv2
import numpy as np
from perceiver_flow_ros.training.materials import Colour, finish, fractal, plain, rgb


def bricks(
    size: tuple[int, int],
    rng: np.random.Generator,
    colour: Colour,
    course: int = 12,
    length: int = 34,
) -> np.ndarray:
    """Lay a running bond, float32; one shade a brick."""
    h, w = size
    y, x = np.mgrid[:h, :w]
    row = y // course
    shifted = x + (row % 2) * (length // 2)
    shade = rng.normal(0, 1, (h // course + 1, w // length + 2))[row, shifted // length]
    image = plain(size, colour) * (1 + 0.13 * shade[..., None].astype(np.float32))
    image += 7 * fractal(size, rng, 0.5)[..., None]
    mortar = (y % course < 2) | (shifted % length < 2)
    image[mortar] = rgb((176, 168, 156)) + 6 * fractal(size, rng, 0.5)[mortar][:, None]
    return image


def plaster(size: tuple[int, int], rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """Painted plaster, float32: blotches, grain, and streaks that the rain left."""
    streak = cv2.resize(
        fractal((64, size[1]), rng, 0.9), (size[1], size[0]), interpolation=cv2.INTER_CUBIC
    )
    image = plain(size, colour)
    return (
        image
        * (
            1
            + 0.055 * fractal(size, rng, 1.4)
            + 0.03 * fractal(size, rng, 0.4)
            - 0.05 * np.maximum(streak, 0)
        )[..., None]
    )


def stone(size: tuple[int, int], rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """Large dressed blocks, float32."""
    image = bricks(size, rng, colour, course=52, length=118)
    return image + 9 * fractal(size, rng, 1.0)[..., None]


WALLS = {'brick': bricks, 'plaster': plaster, 'stone': stone}
PAINTS = [
    (205, 178, 138),
    (214, 201, 176),
    (178, 92, 68),
    (151, 78, 60),
    (196, 152, 112),
    (186, 190, 186),
    (160, 172, 178),
    (222, 188, 120),
    (196, 128, 98),
    (170, 176, 150),
    (140, 98, 84),
    (226, 214, 200),
]
AWNINGS = [(176, 44, 44), (38, 92, 74), (36, 62, 116), (206, 138, 40), (112, 40, 84)]


def _glass(
    image: np.ndarray,
    rng: np.random.Generator,
    x0: int,
    y0: int,
    x1: int,
    y1: int,
    reflection: np.ndarray,
):
    """Fill a pane: dark rooms, curtains, now and then a lamp, and the sky reflected in streaks."""
    h, w = y1 - y0, x1 - x0
    pane = np.linspace(92, 42, h)[:, None, None] * rgb((0.72, 0.9, 1.08)) * rng.uniform(0.6, 1.25)
    pane = np.broadcast_to(pane, (h, w, 3)).astype(np.float32).copy()
    kind = rng.random()
    if kind < 0.35:  # curtains left and right
        c = max(2, int(w * rng.uniform(0.15, 0.32)))
        folds = 150 + 40 * np.sin(np.arange(c) * 0.9)[None, :, None] * rgb((1, 1, 1))
        pane[:, :c] = folds * rgb((1, 0.95, 0.86))
        pane[:, -c:] = folds * rgb((1, 0.95, 0.86))
    elif kind < 0.55:  # a blind
        b = int(h * rng.uniform(0.25, 0.85))
        pane[:b] = (172 + 22 * (np.arange(b) % 6 < 3))[:, None, None] * rgb((1, 0.98, 0.92))
    elif kind < 0.63:  # a lamp inside
        pane += rgb((120, 92, 44)) * rng.uniform(0.5, 1.0)
    oy, ox = rng.integers(0, reflection.shape[0] - h), rng.integers(0, reflection.shape[1] - w)
    pane += 17 * reflection[oy: oy + h, ox: ox + w, None]
    image[y0:y1, x0:x1] = pane


def _window(
    image: np.ndarray,
    rng: np.random.Generator,
    x: int,
    y: int,
    w: int,
    h: int,
    frame: Colour,
    reflection: np.ndarray,
    panes: int,
) -> None:
    """Draw a window in its reveal: surround, frame, panes, sill and the shadows they throw."""
    image[y - 6: y + h + 6, x - 6: x + w + 6] *= 1.13
    image[y: y + h, x: x + w] = frame
    image[y: y + 4, x: x + w] *= 0.45
    image[y: y + h, x: x + 3] *= 0.55
    edge = 5
    step = (w - edge) / panes
    top = int(h * 0.3)
    for k in range(panes):
        x0, x1 = int(x + edge + k * step), int(x + (k + 1) * step)
        _glass(image, rng, x0, y + edge + 2, x1, y + top, reflection)
        _glass(image, rng, x0, y + top + 4, x1, y + h - edge, reflection)
    image[y + h: y + h + 7, x - 9: x + w + 9] = rgb(frame) * 0.95
    image[y + h + 7: y + h + 18, x - 7: x + w + 9] *= np.linspace(0.55, 1, 11, dtype=np.float32)[
        :, None, None
    ]


def _shop(
    image: np.ndarray,
    rng: np.random.Generator,
    x: int,
    y: int,
    w: int,
    h: int,
    reflection: np.ndarray,
) -> None:
    """Draw a shop front: sign with lettering, striped awning, display window, door."""
    colour = rgb(AWNINGS[rng.integers(len(AWNINGS))])
    image[y: y + h, x: x + w] = colour * 0.5
    sign = int(h * 0.17)
    image[y + 4: y + sign, x + 4: x + w - 4] = colour * 0.9
    at = x + 24
    while at < x + w - 40:  # glyph-like strokes
        width = int(rng.integers(6, 18))
        if rng.random() < 0.85:
            top = y + 12 + int(rng.integers(0, 10))
            image[top: y + sign - 10, at: at + width] = 238
            if width > 9:
                image[
                    top + 7: top + 13, at + 4: at + width - (4 if rng.random() < 0.5 else 0)
                ] = colour * 0.9
        at += width + 5
    awning = int(h * 0.13)
    stripe = (np.arange(w) // 18 % 2)[None, :, None]
    image[y + sign: y + sign + awning, x: x + w] = np.where(stripe, rgb((236, 232, 224)), colour)
    image[y + sign: y + sign + awning, x: x + w] *= np.linspace(
        1.05, 0.8, awning, dtype=np.float32
    )[:, None, None]
    top = y + sign + awning
    door = int(rng.integers(0, 2)) * (w - 92)
    for x0, x1 in (
        (x + 10, x + w - 100) if door else (x + 100, x + w - 10),
        (x + door + 12, x + door + 80),
    ):
        _glass(image, rng, x0, top + 14, x1, y + h - (34 if x1 - x0 > 70 else 6), reflection)
        image[top: top + 14, x0:x1] *= 0.4
    x0, x1 = (x + 10, x + w - 100) if door else (x + 100, x + w - 10)
    for _ in range(14):  # goods on display
        gx, gw, gh = (
            int(rng.integers(x0 + 4, x1 - 40)),
            int(rng.integers(10, 36)),
            int(rng.integers(14, 64)),
        )
        image[y + h - 36 - gh: y + h - 36, gx: gx + gw] = rng.uniform(50, 235, 3)


def facade(
    rng: np.random.Generator, width: float, height: float, shops: bool = True
) -> np.ndarray:
    """
    Return the front of a house of `width` x `height` metres, stretched to 1024 x 1024.

    Row 0 is the roof line.
    """
    scale = 64  # texels per metre while drawing
    size = int(height * scale), int(width * scale)
    kind = list(WALLS)[rng.integers(len(WALLS))]
    paint = (
        PAINTS[rng.integers(len(PAINTS))]
        if kind == 'plaster'
        else [(158, 82, 62), (172, 104, 74), (134, 72, 60), (186, 148, 112)][rng.integers(4)]
        if kind == 'brick'
        else [(196, 186, 166), (176, 168, 158), (206, 192, 160)][rng.integers(3)]
    )
    image = WALLS[kind](size, rng, paint)
    reflection = fractal((512, 1024), rng, 1.3)
    frame = [(236, 234, 228), (92, 66, 48), (70, 78, 84), (214, 208, 196)][rng.integers(4)]
    ground, storey = int(3.9 * scale), int(3.15 * scale)
    floors = max(1, (size[0] - ground - scale // 2) // storey)
    columns = max(2, int(round(width / rng.uniform(2.3, 3.2))))
    step = size[1] / columns
    w, h = int(step * rng.uniform(0.42, 0.56)), int(storey * rng.uniform(0.55, 0.66))
    panes = int(rng.integers(1, 4))
    for floor in range(floors):
        y = size[0] - ground - (floor + 1) * storey + (storey - h) // 2
        for column in range(columns):
            _window(
                image, rng, int((column + 0.5) * step - w / 2), y, w, h, frame, reflection, panes
            )
        if rng.random() < 0.6:  # a string course
            line = size[0] - ground - floor * storey
            image[line - 9: line] = rgb(paint) * 0.35 + 150
            image[line: line + 7] *= 0.6
    if not shops:  # a door, and windows beside it
        door = int(rng.integers(columns))
        for column in range(columns):
            x, y = int((column + 0.5) * step - w / 2), size[0] - ground + int(0.9 * scale)
            if column != door:
                _window(image, rng, x, y, w, int(1.7 * scale), frame, reflection, panes)
                continue
            image[y - 12:, x - 12: x + w + 12] = rgb(paint) * 0.3 + 140
            image[y:, x: x + w] = rgb(AWNINGS[rng.integers(len(AWNINGS))]) * 0.8
            image[y: y + 6, x: x + w] *= 0.4
            for k in range(4):
                top = y + 24 + k * 56
                cv2.rectangle(image, (x + 12, top), (x + w - 12, top + 38), (24.0, 24.0, 26.0), 3)
    if shops:
        edges = np.linspace(0.02, 0.98, max(1, int(width / 6)) + 1) * size[1]
        for x0, x1 in zip(edges[:-1], edges[1:]):
            _shop(
                image,
                rng,
                int(x0) + 14,
                size[0] - ground + 20,
                int(x1 - x0) - 28,
                ground - 24,
                reflection,
            )
    cornice = int(0.45 * scale)
    image[:cornice] = rgb(paint) * 0.4 + 132
    image[cornice // 2: cornice // 2 + 4] *= 0.7
    image[cornice: cornice + 14] *= np.linspace(0.5, 1, 14, dtype=np.float32)[:, None, None]
    soot = np.linspace(1.02, 0.9, size[0], dtype=np.float32)[:, None] * (
        1 + 0.05 * fractal(size, rng, 1.5)
    )
    return finish(cv2.resize(image * soot[..., None], (1024, 1024), interpolation=cv2.INTER_AREA))
