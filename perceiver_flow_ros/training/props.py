# SPDX-License-Identifier: Apache-2.0
"""What stands and drives on a street: cars, trees, lamps."""

from __future__ import annotations

import cv2
import numpy as np
from perceiver_flow_ros.training import materials
from perceiver_flow_ros.training.builder import box, Builder, flat, moved, polygon, wall
from perceiver_flow_ros.training.surfaces import Face

CAR_COLOURS = {
    'red': (178, 34, 34),
    'blue': (38, 74, 138),
    'white': (226, 226, 222),
    'black': (52, 56, 62),
    'silver': (150, 154, 158),
    'yellow': (232, 184, 46),
    'green': (44, 96, 76),
}
LENGTH, HALF_WIDTH = 4.2, 0.88  # of a car, metres
SILL, WAIST, ROOF = 0.25, 0.92, 1.45  # heights
WHEEL = 0.33  # its radius


def parked_car(builder: Builder, x: float, y: float, heading: int, colour: str) -> None:
    """Put a car at (x, y), its nose towards heading * x."""
    place = pose(x, y, heading)
    builder.faces += [moved(face, place) for face in car(builder, colour)]
    end = LENGTH / 2
    builder.block_shadow((x - end, x + end), (y - HALF_WIDTH, y + HALF_WIDTH), (0.2, WAIST))
    builder.block_shadow((x - 1.3, x + 0.6), (y - 0.7, y + 0.7), (WAIST, ROOF))


def moving_car(
    builder: Builder, x: float, y: float, heading: int, colour: str, speed: float
) -> None:
    """Put a car at (x, y) at time 0 that drives on at `speed` m/s."""
    faces = car(builder, colour)
    if 'shade' not in builder.materials:
        builder.material('shade', np.full((8, 8, 3), 46, np.uint8), lit=False)
    end = LENGTH / 2 - 0.1
    faces.append(flat(-end, -0.84, end, 0.84, 0.008, 'shade'))  # its shadow travels with it
    body = builder.body(lambda time: pose(x + heading * speed * time, y, heading))
    builder.faces += [face._replace(body=body) for face in faces]


def pose(x: float, y: float, heading: int) -> np.ndarray:
    """T_world_car of a car whose nose points along x (1) or against it (-1)."""
    return np.array([[heading, 0, 0, x], [0, heading, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def car(builder: Builder, colour: str) -> list[Face]:
    """Make a car whose nose points along x."""
    name = f'car {colour}'
    if f'{name} side' not in builder.materials:
        for part, texture in materials.car(builder.rng, CAR_COLOURS[colour]).items():
            builder.material(f'{name} {part}', texture, repeat=False)
    end, half = LENGTH / 2, HALF_WIDTH
    near = wall(-end, -half, end, -half, SILL, WAIST, f'{name} side')
    far = wall(end, half, -end, half, SILL, WAIST, f'{name} side')
    faces = [
        near,
        far._replace(uv=near.uv),  # mirrored: on both sides the tail lights are at the tail
        wall(-end, half, -end, -half, SILL, WAIST, f'{name} tail'),
        wall(end, -half, end, half, SILL, WAIST, f'{name} nose'),
        flat(-end, -half, end, half, WAIST, f'{name} roof'),
        flat(-1.25, -0.68, 0.25, 0.68, ROOF, f'{name} roof'),
    ]
    # The cabin narrows towards the roof.
    foot = [(-1.75, -0.84, WAIST), (1.0, -0.84, WAIST), (1.0, 0.84, WAIST), (-1.75, 0.84, WAIST)]
    head = [(-1.25, -0.68, ROOF), (0.25, -0.68, ROOF), (0.25, 0.68, ROOF), (-1.25, 0.68, ROOF)]
    for k in range(4):
        a, b, c, d = np.array([foot[k], foot[k - 3], head[k - 3], head[k]])
        down = (a + b - c - d) / 2
        faces.append(polygon([a, b, c, d], b - a, down, a - down, f'{name} glass'))
    angle = np.arange(12) * np.pi / 6
    for x in (-1.32, 1.30):
        for side in (-1, 1):
            rim = x - side * WHEEL * np.cos(angle), WHEEL * (1 + np.sin(angle))
            ring = np.stack([rim[0], np.full(12, side * (half + 0.012)), rim[1]], axis=-1)
            corner, size = (x - WHEEL, 0, 2 * WHEEL), 2 * WHEEL
            faces.append(polygon(ring, (size, 0, 0), (0, 0, -size), corner, f'{name} wheel'))
    return faces


def tree(builder: Builder, x: float, y: float, ground: float) -> None:
    """Put a tree, its crown a bunch of spheres."""
    rng = builder.rng
    if 'bark' not in builder.materials:
        grain = cv2.resize(materials.fractal((32, 256), rng, 0.6), (256, 256))
        bark = np.clip(92 + 26 * grain, 30, 180)[..., None] * materials.rgb((1, 0.86, 0.7))
        builder.material('bark', bark.astype(np.uint8))
        for k, colour in enumerate([(98, 132, 58), (118, 140, 62), (84, 120, 64)]):
            leaves = materials.foliage(rng, colour, builder.sun)
            builder.material(f'leaves {k}', leaves, lit=False)
    height, half = rng.uniform(2.5, 3.0), 0.13
    sides = (x - half, x + half), (y - half, y + half)
    trunk = x - half, y - half, ground, x + half, y + half, height + 1
    builder.faces += box(*trunk, 'bark', 'bark', 1)
    builder.block_shadow(*sides, (0, height))
    crown = f'leaves {rng.integers(3)}'
    for _ in range(11):
        way = rng.normal(0, 1, 3)
        way *= rng.uniform(0.5, 1.05) / np.linalg.norm(way) * np.array([1.25, 1.2, 0.95])
        centre, radius = np.array([x, y, height + 1.35]) + way, rng.uniform(0.5, 0.86)
        builder.sphere(centre, radius, crown)
        around = rng.normal(0, 1, (24, 3))
        around *= radius / np.linalg.norm(around, axis=1, keepdims=True)
        builder.shadow(centre + around, 0.75)


def lamp(builder: Builder, x: float, y: float, side: int, ground: float) -> None:
    """Put a street lamp whose arm reaches over the road; `side` is the sign of its y."""
    arm = y - side * 1.5
    steel = 'steel', 'steel', 1
    for half, top in ((0.07, 5.4), (0.16, 0.9)):
        builder.faces += box(x - half, y - half, ground, x + half, y + half, top, *steel)
    low, high = sorted((y, arm))
    builder.faces += box(x - 0.05, low, 5.3, x + 0.05, high, 5.4, *steel)
    low, high = sorted((arm, arm + side * 0.6))
    builder.faces += box(x - 0.18, low, 5.2, x + 0.18, high, 5.32, *steel)
    builder.block_shadow((x - 0.07, x + 0.07), (y, y), (0, 5.4))
