# SPDX-License-Identifier: Apache-2.0
"""Procedural textures of a street: (h, w, 3) uint8 RGB, tiling, with detail at all scales."""

from __future__ import annotations

import cv2
import numpy as np

Colour = tuple[float, float, float]


_TILE = 1024
_tiles: dict[float, np.ndarray] = {}


def _tile(slope: float) -> np.ndarray:
    """Return one tile of 1/f^slope noise, always the same; made once."""
    if slope not in _tiles:
        rng = np.random.default_rng(int(slope * 1000))
        fy, fx = np.meshgrid(
            np.fft.fftfreq(_TILE) * _TILE, np.fft.rfftfreq(_TILE) * _TILE, indexing='ij'
        )
        radius = np.maximum(np.hypot(fx, fy), 1e-9)
        spectrum = np.exp(2j * np.pi * rng.random(radius.shape)) / radius**slope
        spectrum[0, 0] = 0
        noise = np.fft.irfft2(spectrum)
        _tiles[slope] = np.float32(noise / noise.std())
    return _tiles[slope]


def fractal(size: tuple[int, int], rng: np.random.Generator, slope: float = 1.2) -> np.ndarray:
    """
    Return 1/f^slope noise, `size` (h, w), float32 of zero mean and unit deviation.

    A crop, at a random place and turned at random, of one tile; sizes that divide 1024 tile too.
    """
    tile = _tile(slope)
    tile = np.rot90(tile, rng.integers(4))[:: rng.choice([-1, 1])]
    while tile.shape[0] >= 2 * max(size) and _TILE % size[0] == _TILE % size[1] == 0:
        tile = tile[0::2, 0::2]  # decimated, not averaged: fine detail keeps its strength
    y, x = rng.integers(0, tile.shape[0], 2)
    tile = np.roll(tile, (y, x), (0, 1))
    repeat = -(-size[0] // tile.shape[0]), -(-size[1] // tile.shape[1])
    return (
        np.tile(tile, repeat)[: size[0], : size[1]]
        if max(repeat) > 1
        else tile[: size[0], : size[1]].copy()
    )


def _finish(colour: np.ndarray) -> np.ndarray:
    return np.clip(colour, 0, 255).astype(np.uint8)


def _plain(size: tuple[int, int], colour: Colour) -> np.ndarray:
    return np.broadcast_to(np.float32(colour), (*size, 3)).copy()


def asphalt(rng: np.random.Generator, size: int = 1024) -> np.ndarray:
    """8 m x 8 m of worn asphalt: grain, aggregate, stains, cracks and repaired patches."""
    grey = 118 + 9 * fractal((size, size), rng, 1.6)[..., None] * np.float32([1, 1, 0.96])
    grey += 15 * fractal((size, size), rng, 0.35)[..., None]
    speck = rng.random((size, size))
    grey[speck > 0.992] += 48
    grey[speck < 0.008] -= 38
    for _ in range(3):  # patches, with a dark seam
        x, y = rng.integers(0, size - 300, 2)
        w, h = rng.integers(90, 280, 2)
        grey[y : y + h, x : x + w] -= rng.uniform(8, 24)
        cv2.rectangle(grey, (int(x), int(y)), (int(x + w), int(y + h)), (62, 62, 62), 3)
    crack = np.abs(fractal((size, size), rng, 1.5)) < 0.013
    crack &= fractal((size, size), rng, 1.6) > 0.6
    crack = cv2.dilate(crack.astype(np.uint8), np.ones((2, 2), np.uint8)) > 0
    grey[crack] *= 0.5
    return _finish(grey)


def paving(
    rng: np.random.Generator, size: int = 512, slabs: int = 8, colour: Colour = (168, 163, 154)
) -> np.ndarray:
    """Concrete slabs, each a little different, with dark joints."""
    cell = size // slabs
    tint = rng.normal(0, 9, (slabs, slabs))
    image = _plain((size, size), colour) + np.kron(tint, np.ones((cell, cell)))[..., None].astype(
        np.float32
    )
    image += (
        8 * fractal((size, size), rng, 1.3)[..., None]
        + 7 * fractal((size, size), rng, 0.3)[..., None]
    )
    at = np.arange(size) % cell
    joint = (at[:, None] < 2) | (at[None, :] < 2)
    light = (at[:, None] == 2) | (at[None, :] == 2)
    image[light] += 14
    image[joint] *= 0.55
    gum = rng.random((size, size)) > 0.9994
    image[
        cv2.dilate(gum.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (4, 4))) > 0
    ] *= 0.72
    return _finish(image)


def bricks(
    size: tuple[int, int],
    rng: np.random.Generator,
    colour: Colour,
    course: int = 12,
    length: int = 34,
) -> np.ndarray:
    """Running bond, float32; one shade a brick."""
    h, w = size
    y, x = np.mgrid[:h, :w]
    row = y // course
    shifted = x + (row % 2) * (length // 2)
    shade = rng.normal(0, 1, (h // course + 1, w // length + 2))[row, shifted // length]
    image = _plain(size, colour) * (1 + 0.13 * shade[..., None].astype(np.float32))
    image += 7 * fractal(size, rng, 0.5)[..., None]
    mortar = (y % course < 2) | (shifted % length < 2)
    image[mortar] = np.float32([176, 168, 156]) + 6 * fractal(size, rng, 0.5)[mortar][:, None]
    return image


def plaster(size: tuple[int, int], rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """Painted plaster, float32: blotches, grain, and streaks that the rain left."""
    streak = cv2.resize(
        fractal((64, size[1]), rng, 0.9), (size[1], size[0]), interpolation=cv2.INTER_CUBIC
    )
    image = _plain(size, colour)
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
    pane = (
        np.linspace(92, 42, h)[:, None, None]
        * np.float32([0.72, 0.9, 1.08])
        * rng.uniform(0.6, 1.25)
    )
    pane = np.broadcast_to(pane, (h, w, 3)).astype(np.float32).copy()
    kind = rng.random()
    if kind < 0.35:  # curtains left and right
        c = max(2, int(w * rng.uniform(0.15, 0.32)))
        folds = 150 + 40 * np.sin(np.arange(c) * 0.9)[None, :, None] * np.float32([1, 1, 1])
        pane[:, :c] = folds * np.float32([1, 0.95, 0.86])
        pane[:, -c:] = folds * np.float32([1, 0.95, 0.86])
    elif kind < 0.55:  # a blind
        b = int(h * rng.uniform(0.25, 0.85))
        pane[:b] = (172 + 22 * (np.arange(b) % 6 < 3))[:, None, None] * np.float32([1, 0.98, 0.92])
    elif kind < 0.63:  # a lamp inside
        pane += np.float32([120, 92, 44]) * rng.uniform(0.5, 1.0)
    oy, ox = rng.integers(0, reflection.shape[0] - h), rng.integers(0, reflection.shape[1] - w)
    pane += 17 * reflection[oy : oy + h, ox : ox + w, None]
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
    image[y - 6 : y + h + 6, x - 6 : x + w + 6] *= 1.13
    image[y : y + h, x : x + w] = frame
    image[y : y + 4, x : x + w] *= 0.45
    image[y : y + h, x : x + 3] *= 0.55
    edge = 5
    step = (w - edge) / panes
    top = int(h * 0.3)
    for k in range(panes):
        x0, x1 = int(x + edge + k * step), int(x + (k + 1) * step)
        _glass(image, rng, x0, y + edge + 2, x1, y + top, reflection)
        _glass(image, rng, x0, y + top + 4, x1, y + h - edge, reflection)
    image[y + h : y + h + 7, x - 9 : x + w + 9] = np.float32(frame) * 0.95
    image[y + h + 7 : y + h + 18, x - 7 : x + w + 9] *= np.linspace(0.55, 1, 11, dtype=np.float32)[
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
    colour = np.float32(AWNINGS[rng.integers(len(AWNINGS))])
    image[y : y + h, x : x + w] = colour * 0.5
    sign = int(h * 0.17)
    image[y + 4 : y + sign, x + 4 : x + w - 4] = colour * 0.9
    at = x + 24
    while at < x + w - 40:  # glyph-like strokes
        width = int(rng.integers(6, 18))
        if rng.random() < 0.85:
            top = y + 12 + int(rng.integers(0, 10))
            image[top : y + sign - 10, at : at + width] = 238
            if width > 9:
                image[
                    top + 7 : top + 13, at + 4 : at + width - (4 if rng.random() < 0.5 else 0)
                ] = colour * 0.9
        at += width + 5
    awning = int(h * 0.13)
    stripe = (np.arange(w) // 18 % 2)[None, :, None]
    image[y + sign : y + sign + awning, x : x + w] = np.where(
        stripe, np.float32([236, 232, 224]), colour
    )
    image[y + sign : y + sign + awning, x : x + w] *= np.linspace(
        1.05, 0.8, awning, dtype=np.float32
    )[:, None, None]
    top = y + sign + awning
    door = int(rng.integers(0, 2)) * (w - 92)
    for x0, x1 in (
        (x + 10, x + w - 100) if door else (x + 100, x + w - 10),
        (x + door + 12, x + door + 80),
    ):
        _glass(image, rng, x0, top + 14, x1, y + h - (34 if x1 - x0 > 70 else 6), reflection)
        image[top : top + 14, x0:x1] *= 0.4
    x0, x1 = (x + 10, x + w - 100) if door else (x + 100, x + w - 10)
    for _ in range(14):  # goods on display
        gx, gw, gh = (
            int(rng.integers(x0 + 4, x1 - 40)),
            int(rng.integers(10, 36)),
            int(rng.integers(14, 64)),
        )
        image[y + h - 36 - gh : y + h - 36, gx : gx + gw] = rng.uniform(50, 235, 3)


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
            image[line - 9 : line] = np.float32(paint) * 0.35 + 150
            image[line : line + 7] *= 0.6
    if not shops:  # a door, and windows beside it
        door = int(rng.integers(columns))
        for column in range(columns):
            x, y = int((column + 0.5) * step - w / 2), size[0] - ground + int(0.9 * scale)
            if column != door:
                _window(image, rng, x, y, w, int(1.7 * scale), frame, reflection, panes)
                continue
            image[y - 12 :, x - 12 : x + w + 12] = np.float32(paint) * 0.3 + 140
            image[y:, x : x + w] = np.float32(AWNINGS[rng.integers(len(AWNINGS))]) * 0.8
            image[y : y + 6, x : x + w] *= 0.4
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
    image[:cornice] = np.float32(paint) * 0.4 + 132
    image[cornice // 2 : cornice // 2 + 4] *= 0.7
    image[cornice : cornice + 14] *= np.linspace(0.5, 1, 14, dtype=np.float32)[:, None, None]
    soot = np.linspace(1.02, 0.9, size[0], dtype=np.float32)[:, None] * (
        1 + 0.05 * fractal(size, rng, 1.5)
    )
    return _finish(cv2.resize(image * soot[..., None], (1024, 1024), interpolation=cv2.INTER_AREA))


def foliage(
    rng: np.random.Generator, colour: Colour, sun: np.ndarray, size: int = 512
) -> np.ndarray:
    """Leaves around a sphere (v from top to bottom), brighter towards the sun and dark below."""
    leaves = fractal((size, size), rng, 0.45) + 0.8 * fractal((size, size), rng, 1.1)
    v, u = np.mgrid[:size, :size].astype(np.float32) / size
    theta, phi = v * np.pi, u * 2 * np.pi
    facing = np.sin(theta) * (np.cos(phi) * sun[0] + np.sin(phi) * sun[1]) + np.cos(theta) * sun[2]
    light = 0.62 + 0.38 * facing
    image = np.float32(colour) * (light * (1 + 0.34 * leaves))[..., None]
    image[leaves > 1.9] += np.float32([34, 34, 6])
    return _finish(image)


def car(rng: np.random.Generator, colour: Colour) -> dict[str, np.ndarray]:
    """Return a car's textures: 'side', 'tail', 'nose', 'glass' (its cabin), 'roof', 'wheel'."""
    shine = np.linspace(1.12, 0.62, 256, dtype=np.float32)[:, None, None]
    side = _plain((256, 1024), colour) * shine + 5 * fractal((256, 1024), rng, 1.3)[..., None]
    side[96:104] *= 1.25
    side[218:] = (44, 44, 46)
    for x in (330, 560, 760):  # door seams and handles
        side[6:214, x : x + 4] *= 0.45
    for x in (500, 700):
        side[60:70, x : x + 40] = (200, 200, 204)
    for x in (190, 826):  # wheel arches
        cv2.circle(side, (x, 236), 96, (22, 22, 24), -1)
    side[50:84, :34] = (190, 40, 36)
    side[50:84, -40:] = (236, 234, 214)
    ends = []
    for lamp, inner in (((186, 30, 30), (244, 176, 110)), ((226, 228, 224), (255, 255, 250))):
        end = _plain((256, 512), colour) * shine + 4 * fractal((256, 512), rng, 1.3)[..., None]
        end[176:] = (48, 48, 50)
        end[124:162, 186:326] = (232, 230, 214)  # number plate
        for k in range(6):
            end[132:154, 200 + 19 * k : 212 + 19 * k] = (34, 34, 44)
        for x in (14, 408):
            end[40:112, x : x + 90] = lamp
            end[62:84, x + 10 : x + 80] = inner
        ends.append(end)
    tail, nose = ends
    for y in range(48, 108, 12):  # radiator grille
        nose[y : y + 7, 124:388] = (34, 34, 36)
    glass = (
        _plain((256, 512), (52, 66, 78))
        * np.linspace(1.7, 0.8, 256, dtype=np.float32)[:, None, None]
    )
    glass += 12 * fractal((256, 512), rng, 1.4)[..., None]
    glass[:, 250:262] = np.float32(colour) * 0.7
    glass[:10] = glass[-8:] = np.float32(colour) * 0.8
    roof = _plain((256, 256), colour) * 1.05 + 6 * fractal((256, 256), rng, 1.4)[..., None]
    wheel = _plain((128, 128), (34, 34, 36))
    cv2.circle(wheel, (64, 64), 42, (168, 170, 176), -1)
    for angle in np.arange(5) * 2 * np.pi / 5:
        at = 64 + 28 * np.cos(angle), 64 + 28 * np.sin(angle)
        cv2.circle(wheel, (int(at[0]), int(at[1])), 9, (52, 52, 56), -1)
    cv2.circle(wheel, (64, 64), 9, (60, 60, 64), -1)
    parts = {
        'side': side,
        'tail': tail,
        'nose': nose,
        'glass': glass,
        'roof': roof,
        'wheel': wheel,
    }
    return {name: _finish(texture) for name, texture in parts.items()}


def sky(rng: np.random.Generator, size: tuple[int, int] = (512, 2048)) -> np.ndarray:
    """Return the dome, rows from zenith to horizon, columns around: blue, with clouds."""
    h, w = size
    elevation = np.linspace(np.pi / 2, 0, h, dtype=np.float32)[:, None]
    azimuth = np.linspace(0, 2 * np.pi, w, endpoint=False, dtype=np.float32)
    t = np.sin(elevation) ** 0.55
    image = (
        np.float32([206, 218, 230]) * (1 - t[..., None])
        + np.float32([72, 124, 190]) * t[..., None]
    )
    image = np.broadcast_to(image, (h, w, 3))
    reach = 300 / (np.tan(elevation) + 0.16)
    x, y = reach * np.cos(azimuth) + 512, reach * np.sin(azimuth) + 512

    def over(
        noise: np.ndarray, dx: float = 0.0, dy: float = 0.0, stretch: float = 1.0
    ) -> np.ndarray:
        at = np.float32(x * stretch + dx), np.float32(y + dy)
        return cv2.remap(noise, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)

    noise = fractal((1024, 1024), rng, 1.5)
    cloud, towards_sun = over(noise), over(noise, -9, 9)
    veil = np.clip(0.5 + 0.5 * over(fractal((1024, 1024), rng, 1.25), stretch=0.35), 0, 1) * 0.55
    cover = np.maximum(np.clip(cloud * 0.8 + 0.1, 0, 1), veil) * np.clip(elevation * 9, 0, 1)
    white = 246 + np.clip((towards_sun - cloud) * 60, -46, 6)[..., None] * np.float32(
        [1, 0.95, 0.86]
    )
    return _finish(image + cover[..., None] * (white - image))
