# SPDX-License-Identifier: Apache-2.0
"""A street canyon to render: houses, shops, pavements, trees, parked and moving cars."""

from __future__ import annotations

import numpy as np
from perceiver_flow_ros.training import materials
from perceiver_flow_ros.training.builder import box, Builder, flat, polygon, wall
from perceiver_flow_ros.training.facades import facade, PAINTS, WALLS
from perceiver_flow_ros.training.props import CAR_COLOURS, lamp, moving_car, parked_car, tree
from perceiver_flow_ros.training.scene import Scene

# Metres: half the width of the road, height of the kerb, where the houses stand and how deep.
ROAD, KERB, FRONT, DEPTH = 5.0, 0.13, 8.2, 12.0
START, END = -16.0, 100.0  # along x
LANE = 2.95  # from the centre line to the line along the parking bays
BAY = 5.6
CROSSINGS = (17.0, 62.0)
PAINT_HEIGHT = 0.004  # what lies on the road needs some, to be in front of it


def street(seed: int = 0) -> Scene:
    """Return a street along x, its right lane around y = -1.5 m, as `swerve` drives it."""
    builder = Builder(seed)
    add_road(builder)
    add_houses(builder)
    add_furniture(builder)
    add_traffic(builder)
    sky = materials.sky(builder.rng)
    return builder.scene(START - 2, -FRONT - 3, END + 2, FRONT + 3, sky)


def add_road(builder: Builder) -> None:
    """Add asphalt, pavements, kerbs and what is painted on the road."""
    rng, add = builder.rng, builder.faces.append
    builder.material('asphalt', materials.asphalt(rng), ground=True)
    builder.material('paving', materials.paving(rng), ground=True)
    builder.material('kerb', materials.paving(rng, 256, 2, (188, 184, 176)), ground=True)
    builder.material('paint', materials.road_paint(rng), ground=True)
    builder.material('iron', materials.iron(rng), ground=True)
    add(flat(START - 60, -ROAD, END + 60, ROAD, 0, 'asphalt', 8))
    for side in (-1, 1):
        kerb, inner, house = (side * d for d in (ROAD, ROAD + 0.25, FRONT + 14))
        left, right = (START, END) if side > 0 else (END, START)
        add(wall(left, kerb, right, kerb, 0, KERB, 'kerb', 1))
        add(flat(START, min(kerb, inner), END, max(kerb, inner), KERB, 'kerb', 1))
        add(flat(START, min(inner, house), END, max(inner, house), KERB, 'paving', 3.2))
        line = side * LANE
        add(flat(START, line - 0.06, END, line + 0.06, PAINT_HEIGHT, 'paint', 1))
        low, high = sorted((line, kerb))
        for x in np.arange(START, END, BAY):
            add(flat(x, low, x + 0.1, high, PAINT_HEIGHT, 'paint', 1))
        for x in np.arange(START + 9, END, 17.0):  # drains
            y = side * 4.55
            add(flat(x, y - 0.2, x + 0.5, y + 0.2, PAINT_HEIGHT, 'iron', 0.5))
    for x in np.arange(START, END, 6.0):
        add(flat(x, -0.07, x + 3, 0.07, PAINT_HEIGHT, 'paint', 1))
    for crossing in CROSSINGS:
        for y in np.arange(-2.7, 2.7, 0.9).tolist():
            add(flat(crossing, y, crossing + 3, y + 0.45, PAINT_HEIGHT + 0.001, 'paint', 1))
    for x, y in rng.uniform((2, -2.4), (END, 2), (9, 2)):  # manholes
        add(flat(x, y, x + 0.7, y + 0.7, PAINT_HEIGHT + 0.002, 'iron', 0.7))


def add_houses(builder: Builder) -> None:
    """Line both sides with houses, and close the street with one."""
    rng = builder.rng
    for number in range(4):
        kind = WALLS['brick' if number % 2 else 'plaster']
        texture = kind((512, 512), rng, PAINTS[rng.integers(len(PAINTS))])
        builder.material(f'gable {number}', np.clip(texture, 0, 255).astype(np.uint8))
    builder.material('roof', materials.paving(rng, 256, 8, (150, 84, 62)))
    builder.material('balcony', materials.railing())
    fronts: list[tuple[str, float, float]] = []  # (material, width, height), used again far away
    for side in (-1, 1):
        x = START
        while x < END - 6:
            if len(fronts) < 10:
                width, height = rng.uniform(11, 17), rng.choice([8.0, 11.2, 11.2, 14.4])
                texture = facade(rng, width, height, shops=rng.random() < 0.75)
                name = builder.material(f'front {len(fronts)}', texture, repeat=False)
                fronts.append((name, width, height))
                front = fronts[-1]
            else:
                front = fronts[rng.integers(len(fronts))]
            add_house(builder, x, side, *front)
            x += front[1] + (rng.uniform(4, 6) if rng.random() < 0.3 else 0.0)
    texture = facade(rng, 44, 18, shops=False)
    builder.material('end', texture, repeat=False)
    builder.faces.append(wall(END, 22, END, -22, KERB, 18, 'end'))


def add_house(builder: Builder, x, side: int, front: str, width, height) -> None:
    """Add a house from x to x + width: front, gables, the roof as seen from below, balconies."""
    rng, add = builder.rng, builder.faces.append
    gable = f'gable {rng.integers(4)}'
    y, back = side * (FRONT + rng.choice([0.0, 0.0, 0.6])), side * (FRONT + DEPTH)
    left, right = (x, x + width) if side > 0 else (x + width, x)
    low, high = sorted((y, back))
    add(wall(left, y, right, y, KERB, height, front))
    add(wall(x, high, x, low, KERB, height, gable, 8))
    add(wall(x + width, low, x + width, high, KERB, height, gable, 8))
    slope, along = np.array([0, side * 5.0, 3.4]), np.array([right - left, 0, 0])
    eave = np.array([left, y, height])
    roof = [eave, eave + along, eave + along + slope, eave + slope]
    add(polygon(roof, (2, 0, 0), -slope / 3, eave, 'roof'))
    builder.block_shadow((x, x + width), (y, back), (0, height))
    if rng.random() < 0.6:
        x0, x1 = x + width / 2 - 1.8, x + width / 2 + 1.8
        y0, y1 = sorted((y, y - side * 1.1))
        for z in np.arange(7.1, height - 2, 3.15):
            builder.faces += box(x0, y0, z - 0.1, x1, y1, z + 0.95, 'balcony', 'kerb')
            floor = [(x0, y1, z - 0.1), (x1, y1, z - 0.1), (x1, y0, z - 0.1), (x0, y0, z - 0.1)]
            add(polygon(floor, (1, 0, 0), (0, 1, 0), floor[0], 'kerb'))


def add_furniture(builder: Builder) -> None:
    """Add trees, lamps, bins and cabinets to the pavements."""
    rng = builder.rng
    builder.material('steel', materials.steel(rng))
    for side in (-1, 1):
        for x in np.arange(START + 6, END - 10, 14.0).tolist():
            tree(builder, x + rng.uniform(-1, 1), side * (ROAD + 1.0), KERB)
            lamp(builder, x + 7, side * (ROAD + 0.7), side, KERB)
    colours = [(42, 110, 78), (190, 150, 40), (60, 84, 150)]
    for k, colour in enumerate(colours):
        builder.material(f'bin {k}', materials.worn_paint(rng, colour))
    for x in rng.uniform(START, END, 26):
        width, height = rng.uniform(0.35, 0.8), KERB + rng.uniform(0.7, 1.3)
        y = rng.choice([-1, 1]) * (FRONT - 0.2 - width / 2) - width / 2
        kind = f'bin {rng.integers(3)}'
        builder.faces += box(x, y, KERB, x + width, y + width, height, kind, 'steel', 1)
        builder.block_shadow((x, x + width), (y, y + width), (0, height))


def add_traffic(builder: Builder) -> None:
    """Add parked cars, one ahead that draws away, and two that come towards us."""
    rng = builder.rng
    for side in (-1, 1):
        for x in np.arange(START + BAY / 2, END, BAY).tolist():
            free = all(abs(x - crossing - 1.5) > 4 for crossing in CROSSINGS)
            if free and rng.random() < 0.62:
                colour = list(CAR_COLOURS)[rng.integers(len(CAR_COLOURS))]
                parked_car(builder, x + rng.uniform(-0.3, 0.3), side * 3.95, -side, colour)
    moving_car(builder, 11.5, -1.45, 1, 'red', speed=4.2)
    moving_car(builder, 52.0, 1.6, -1, 'yellow', speed=5.0)
    moving_car(builder, 86.0, 1.6, -1, 'blue', speed=5.0)
