# SPDX-License-Identifier: Apache-2.0
"""Procedural textures of a street: (h, w, 3) uint8 RGB, tiling, with detail at all scales."""

from __future__ import annotations

import cv2
import numpy as np

Colour = tuple[float, float, float]  # or a factor of each channel


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
        _tiles[slope] = (noise / noise.std()).astype(np.float32)
    return _tiles[slope]


def fractal(size: tuple[int, int], rng: np.random.Generator, slope: float = 1.2) -> np.ndarray:
    """
    Return 1/f^slope noise, `size` (h, w), float32 of zero mean and unit deviation.

    A crop, at a random place and turned at random, of one tile; sizes that divide 1024 tile too.
    """
    tile = _tile(slope)
    tile = np.rot90(tile, int(rng.integers(4)))[:: rng.choice([-1, 1])]
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


def finish(colour: np.ndarray) -> np.ndarray:
    """Clip to 0..255, as uint8."""
    return np.clip(colour, 0, 255).astype(np.uint8)


def rgb(colour: Colour) -> np.ndarray:
    """Return a colour as an array, (3,) float32."""
    return np.array(colour, np.float32)


def plain(size: tuple[int, int], colour: Colour) -> np.ndarray:
    """Return an area of one colour, (h, w, 3) float32."""
    return np.broadcast_to(rgb(colour), (*size, 3)).copy()


def asphalt(rng: np.random.Generator, size: int = 1024) -> np.ndarray:
    """8 m x 8 m of worn asphalt: grain, aggregate, stains, cracks and repaired patches."""
    grey = 118 + 9 * fractal((size, size), rng, 1.6)[..., None] * rgb((1, 1, 0.96))
    grey += 15 * fractal((size, size), rng, 0.35)[..., None]
    speck = rng.random((size, size))
    grey[speck > 0.992] += 48
    grey[speck < 0.008] -= 38
    for _ in range(3):  # patches, with a dark seam
        x, y = rng.integers(0, size - 300, 2)
        w, h = rng.integers(90, 280, 2)
        grey[y: y + h, x: x + w] -= rng.uniform(8, 24)
        cv2.rectangle(grey, (int(x), int(y)), (int(x + w), int(y + h)), (62, 62, 62), 3)
    crack = np.abs(fractal((size, size), rng, 1.5)) < 0.013
    crack &= fractal((size, size), rng, 1.6) > 0.6
    crack = cv2.dilate(crack.astype(np.uint8), np.ones((2, 2), np.uint8)) > 0
    grey[crack] *= 0.5
    return finish(grey)


def paving(
    rng: np.random.Generator, size: int = 512, slabs: int = 8, colour: Colour = (168, 163, 154)
) -> np.ndarray:
    """Concrete slabs, each a little different, with dark joints."""
    cell = size // slabs
    tint = rng.normal(0, 9, (slabs, slabs))
    image = plain((size, size), colour) + np.kron(tint, np.ones((cell, cell)))[..., None].astype(
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
    return finish(image)


def road_paint(rng: np.random.Generator) -> np.ndarray:
    """White paint, worn through here and there."""
    grey = np.clip(214 + 14 * fractal((128, 128), rng, 0.6), 120, 255)
    grey[fractal((128, 128), rng, 1.0) > 1.7] = 128
    return finish(np.repeat(grey[..., None], 3, axis=-1))


def iron(rng: np.random.Generator) -> np.ndarray:
    """Cast iron with ribs across."""
    ribs = 24 * (np.indices((128, 128)).sum(0) // 8 % 2)
    grey = 70 + ribs + 8 * fractal((128, 128), rng, 0.5)
    return finish(np.repeat(grey[..., None], 3, axis=-1))


def steel(rng: np.random.Generator) -> np.ndarray:
    """Galvanised steel."""
    grey = 96 + 12 * fractal((128, 128), rng, 0.9)
    return finish(grey[..., None] * rgb((0.86, 0.95, 1.0)))


def worn_paint(rng: np.random.Generator, colour: Colour) -> np.ndarray:
    """Paint of a colour, uneven with age."""
    return finish(rgb(colour) * (1 + 0.12 * fractal((128, 128), rng, 0.8)[..., None]))


def railing() -> np.ndarray:
    """Dark bars before a wall."""
    image = np.full((128, 128, 3), 88, np.uint8)
    image[:, ::16] = image[:, 1::16] = image[:, 2::16] = (38, 40, 44)
    image[:10] = image[-12:] = (46, 48, 52)
    return image


def foliage(
    rng: np.random.Generator, colour: Colour, sun: np.ndarray, size: int = 512
) -> np.ndarray:
    """Leaves around a sphere (v from top to bottom), brighter towards the sun and dark below."""
    leaves = fractal((size, size), rng, 0.45) + 0.8 * fractal((size, size), rng, 1.1)
    v, u = np.mgrid[:size, :size].astype(np.float32) / size
    theta, phi = v * np.pi, u * 2 * np.pi
    facing = np.sin(theta) * (np.cos(phi) * sun[0] + np.sin(phi) * sun[1]) + np.cos(theta) * sun[2]
    light = 0.62 + 0.38 * facing
    image = rgb(colour) * (light * (1 + 0.34 * leaves))[..., None]
    image[leaves > 1.9] += rgb((34, 34, 6))
    return finish(image)


def car(rng: np.random.Generator, colour: Colour) -> dict[str, np.ndarray]:
    """Return a car's textures: 'side', 'tail', 'nose', 'glass' (its cabin), 'roof', 'wheel'."""
    shine = np.linspace(1.12, 0.62, 256, dtype=np.float32)[:, None, None]
    side = plain((256, 1024), colour) * shine + 5 * fractal((256, 1024), rng, 1.3)[..., None]
    side[96:104] *= 1.25
    side[218:] = (44, 44, 46)
    for x in (330, 560, 760):  # door seams and handles
        side[6:214, x: x + 4] *= 0.45
    for x in (500, 700):
        side[60:70, x: x + 40] = (200, 200, 204)
    for x in (190, 826):  # wheel arches
        cv2.circle(side, (x, 236), 96, (22, 22, 24), -1)
    side[50:84, :34] = (190, 40, 36)
    side[50:84, -40:] = (236, 234, 214)
    ends = []
    for lamp, inner in (((186, 30, 30), (244, 176, 110)), ((226, 228, 224), (255, 255, 250))):
        end = plain((256, 512), colour) * shine + 4 * fractal((256, 512), rng, 1.3)[..., None]
        end[176:] = (48, 48, 50)
        end[124:162, 186:326] = (232, 230, 214)  # number plate
        for k in range(6):
            end[132:154, 200 + 19 * k: 212 + 19 * k] = (34, 34, 44)
        for x in (14, 408):
            end[40:112, x: x + 90] = lamp
            end[62:84, x + 10: x + 80] = inner
        ends.append(end)
    tail, nose = ends
    for y in range(48, 108, 12):  # radiator grille
        nose[y: y + 7, 124:388] = (34, 34, 36)
    glass = (
        plain((256, 512), (52, 66, 78))
        * np.linspace(1.7, 0.8, 256, dtype=np.float32)[:, None, None]
    )
    glass += 12 * fractal((256, 512), rng, 1.4)[..., None]
    glass[:, 250:262] = rgb(colour) * 0.7
    glass[:10] = glass[-8:] = rgb(colour) * 0.8
    roof = plain((256, 256), colour) * 1.05 + 6 * fractal((256, 256), rng, 1.4)[..., None]
    wheel = plain((128, 128), (34, 34, 36))
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
    return {name: finish(texture) for name, texture in parts.items()}


def sky(rng: np.random.Generator, size: tuple[int, int] = (512, 2048)) -> np.ndarray:
    """Return the dome, rows from zenith to horizon, columns around: blue, with clouds."""
    h, w = size
    elevation = np.linspace(np.pi / 2, 0, h, dtype=np.float32)[:, None]
    azimuth = np.linspace(0, 2 * np.pi, w, endpoint=False, dtype=np.float32)
    t = np.sin(elevation) ** 0.55
    image = rgb((206, 218, 230)) * (1 - t[..., None]) + rgb((72, 124, 190)) * t[..., None]
    image = np.broadcast_to(image, (h, w, 3))
    reach = 300 / (np.tan(elevation) + 0.16)
    x, y = reach * np.cos(azimuth) + 512, reach * np.sin(azimuth) + 512

    def over(
        noise: np.ndarray, dx: float = 0.0, dy: float = 0.0, stretch: float = 1.0
    ) -> np.ndarray:
        at = (x * stretch + dx).astype(np.float32), (y + dy).astype(np.float32)
        return cv2.remap(noise, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)

    noise = fractal((1024, 1024), rng, 1.5)
    cloud, towards_sun = over(noise), over(noise, -9, 9)
    veil = np.clip(0.5 + 0.5 * over(fractal((1024, 1024), rng, 1.25), stretch=0.35), 0, 1) * 0.55
    cover = np.maximum(np.clip(cloud * 0.8 + 0.1, 0, 1), veil) * np.clip(elevation * 9, 0, 1)
    white = 246 + np.clip((towards_sun - cloud) * 60, -46, 6)[..., None] * rgb((1, 0.95, 0.86))
    return finish(image + cover[..., None] * (white - image))
