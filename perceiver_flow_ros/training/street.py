# SPDX-License-Identifier: Apache-2.0
"""A street canyon to render: houses, shops, pavements, parked and moving cars, trees, lamps."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from perceiver_flow_ros.training import materials
from perceiver_flow_ros.training.scene import Scene
from perceiver_flow_ros.training.surfaces import Face, Material, Sphere

ROAD, KERB, FRONT = (
    5.0,
    0.13,
    8.2,
)  # half width of the road, height of the kerb, distance of the houses: metres
START, END = -16.0, 100.0  # extent along x
CAR_COLOURS = [
    (178, 34, 34),
    (38, 74, 138),
    (226, 226, 222),
    (52, 56, 62),
    (150, 154, 158),
    (232, 184, 46),
    (44, 96, 76),
]


def polygon(vertices, u, v, origin, material: str, body: int = 0) -> Face:
    """Return a face whose texture tile starts at `origin` and spans `u`, `v` (metres)."""
    u, v, origin = (np.asarray(a, float) for a in (u, v, origin))
    axes = np.stack([u / (u @ u), v / (v @ v)])
    return Face(
        np.asarray(vertices, float), np.column_stack([axes, -axes @ origin]), material, body
    )


def quad(corner, u, v, material: str, body: int = 0) -> Face:
    """Return a rectangle that one tile covers, seen from where u x v points away."""
    corner, u, v = (np.asarray(a, float) for a in (corner, u, v))
    return polygon([corner, corner + v, corner + u + v, corner + u], u, v, corner, material, body)


def wall(x0, y0, x1, y1, bottom, top, material: str, tile=None, body: int = 0) -> Face:
    """Return an upright rectangle from (x0, y0), left of its viewer, to (x1, y1), on the right."""
    along = np.array([x1 - x0, y1 - y0, 0.0])
    face = quad((x0, y0, top), along, (0, 0, bottom - top), material, body)
    if tile is None:
        return face
    return polygon(
        face.vertices,
        along / np.linalg.norm(along) * tile,
        (0, 0, -tile),
        (x0, y0, top),
        material,
        body,
    )


def flat(x0, y0, x1, y1, z, material: str, tile: float | None = None, body: int = 0) -> Face:
    """Return a level rectangle seen from above; with `tile` (metres) its texture repeats."""
    corners = [(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)]
    if tile is None:
        return polygon(corners, (x1 - x0, 0, 0), (0, y1 - y0, 0), corners[0], material, body)
    return polygon(corners, (tile, 0, 0), (0, tile, 0), (0, 0, z), material, body)


def box(
    x0, y0, z0, x1, y1, z1, side: str, top: str, tile: float | None = None, body: int = 0
) -> list[Face]:
    """Return the four sides and the top of an upright box."""
    return [
        wall(x0, y1, x0, y0, z0, z1, side, tile, body),
        wall(x0, y0, x1, y0, z0, z1, side, tile, body),
        wall(x1, y0, x1, y1, z0, z1, side, tile, body),
        wall(x1, y1, x0, y1, z0, z1, side, tile, body),
        flat(x0, y0, x1, y1, z1, top, tile, body),
    ]


class _Street:
    """Collects the surfaces, and what throws a shadow."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.faces: list[Face] = []
        self.spheres: list[Sphere] = []
        self.textures: dict[str, Material] = {}
        self.motions: list[Callable[[float], np.ndarray]] = []
        self.shadows: list[
            tuple[np.ndarray, float]
        ] = []  # (points that throw it (n, 3), how dark 0..1)
        self.sun = np.array(Scene.sun) / np.linalg.norm(Scene.sun)

    def material(self, name: str, texture: np.ndarray, **kind) -> str:
        self.textures[name] = Material(texture, **kind)
        return name

    def ground(self) -> None:
        rng = self.rng
        self.material('asphalt', materials.asphalt(rng), ground=True)
        self.material('paving', materials.paving(rng), ground=True)
        self.material('kerb', materials.paving(rng, 256, 2, (188, 184, 176)), ground=True)
        paint = np.clip(214 + 14 * materials.fractal((128, 128), rng, 0.6), 120, 255)
        paint[materials.fractal((128, 128), rng, 1.0) > 1.7] = 128
        self.material('paint', np.repeat(paint[..., None], 3, -1).astype(np.uint8), ground=True)
        iron = np.clip(
            70
            + 24 * (np.indices((128, 128)).sum(0) // 8 % 2)
            + 8 * materials.fractal((128, 128), rng, 0.5),
            0,
            255,
        )
        self.material('iron', np.repeat(iron[..., None], 3, -1).astype(np.uint8), ground=True)
        add = self.faces.append
        add(flat(START - 60, -ROAD, END + 60, ROAD, 0, 'asphalt', 8))
        for side in (-1, 1):
            near, far = side * ROAD, side * (FRONT + 14)
            kerb = side * (ROAD + 0.25)
            add(flat(START, min(kerb, far), END, max(kerb, far), KERB, 'paving', 3.2))
            add(flat(START, min(near, kerb), END, max(near, kerb), KERB, 'kerb', 1))
            left, right = (START, END) if side > 0 else (END, START)
            add(wall(left, near, right, near, 0, KERB, 'kerb', 1))
            add(flat(START, side * 2.95 - 0.06, END, side * 2.95 + 0.06, 0.004, 'paint', 1))
            for x in np.arange(START, END, 5.6):  # parking bays
                add(
                    flat(
                        x,
                        min(side * 2.95, near),
                        x + 0.1,
                        max(side * 2.95, near),
                        0.004,
                        'paint',
                        1,
                    )
                )
            for x in np.arange(START + 9, END, 17.0):
                add(flat(x, side * 4.55 - 0.2, x + 0.5, side * 4.55 + 0.2, 0.004, 'iron', 0.5))
        for x in np.arange(START, END, 6.0):  # centre line
            add(flat(x, -0.07, x + 3, 0.07, 0.004, 'paint', 1))
        for x in (17.0, 62.0):  # zebra crossings
            for y in np.arange(-2.7, 2.7, 0.9):
                add(flat(x, y, x + 3, y + 0.45, 0.005, 'paint', 1))
        for x in rng.uniform(2, END, 9):  # manhole covers
            y = rng.uniform(-2.4, 2)
            add(flat(x, y, x + 0.7, y + 0.7, 0.006, 'iron', 0.7))

    def houses(self) -> None:
        rng = self.rng
        for number in range(4):
            self.material(
                f'gable{number}',
                np.clip(
                    materials.WALLS[['brick', 'plaster'][number % 2]](
                        (512, 512), rng, materials.PAINTS[rng.integers(len(materials.PAINTS))]
                    ),
                    0,
                    255,
                ).astype(np.uint8),
            )
        self.material('roof', materials.paving(rng, 256, 8, (150, 84, 62)))
        fronts = []  # (facade, width, height), reused far down the street
        for side in (-1, 1):
            x = START
            while x < END - 6:
                if len(fronts) < 10:
                    width, height = rng.uniform(11, 17), float(rng.choice([8.0, 11.2, 14.4, 11.2]))
                    texture = materials.facade(rng, width, height, rng.random() < 0.75)
                    fronts.append(
                        (
                            self.material(f'facade{len(fronts)}', texture, repeat=False),
                            width,
                            height,
                        )
                    )
                    front = fronts[-1]
                else:
                    front = fronts[rng.integers(len(fronts))]
                name, width, height = front
                gable = f'gable{rng.integers(4)}'
                y = side * (FRONT + rng.choice([0.0, 0.0, 0.6]))
                back = side * (FRONT + 12)
                left, right = (x, x + width) if side > 0 else (x + width, x)
                self.faces.append(wall(left, y, right, y, KERB, height, name))
                low, high = min(y, back), max(y, back)
                self.faces.append(wall(x, high, x, low, KERB, height, gable, 8))
                self.faces.append(wall(x + width, low, x + width, high, KERB, height, gable, 8))
                slope = np.array([0, side * 5.0, 3.4])  # a pitched roof seen from the street
                eave = np.array([left, y, height])
                along = np.array([right - left, 0, 0])
                self.faces.append(
                    polygon(
                        [eave, eave + along, eave + along + slope, eave + slope],
                        (2, 0, 0),
                        -slope / 3,
                        eave,
                        'roof',
                    )
                )
                self.shadow(
                    [(a, b, c) for a in (x, x + width) for b in (y, back) for c in (0, height)]
                )
                if rng.random() < 0.6:  # balconies
                    self.balconies(x, y, side, width, height)
                x += width + (rng.uniform(4, 6) if rng.random() < 0.3 else 0.0)
        name = self.material('end', materials.facade(rng, 44, 18, False), repeat=False)
        self.faces.append(wall(END, 22, END, -22, KERB, 18, name))

    def balconies(self, x, y, side, width, height) -> None:
        if 'balcony' not in self.textures:
            rail = np.full((128, 128, 3), 88, np.uint8)
            rail[:, ::16] = rail[:, 1::16] = rail[:, 2::16] = (38, 40, 44)
            rail[:10] = rail[-12:] = (46, 48, 52)
            self.material('balcony', rail)
        deep = 1.1
        for z in np.arange(7.1, height - 2, 3.15):
            x0 = x + width * 0.5 - 1.8
            y0, y1 = sorted((y, y - side * deep))
            self.faces += box(x0, y0, z - 0.1, x0 + 3.6, y1, z + 0.95, 'balcony', 'kerb')
            under = [
                (x0, y1, z - 0.1),
                (x0 + 3.6, y1, z - 0.1),
                (x0 + 3.6, y0, z - 0.1),
                (x0, y0, z - 0.1),
            ]
            self.faces.append(polygon(under, (1, 0, 0), (0, 1, 0), under[0], 'kerb'))

    def car(
        self, x, y, heading: int, colour: int, motion: Callable[[float], np.ndarray] | None = None
    ) -> None:
        """Put a car at (x, y), its nose towards heading * x; `motion` makes it a body."""
        name = f'car{colour}'
        if f'{name}.side' not in self.textures:
            for part, texture in materials.car(self.rng, CAR_COLOURS[colour]).items():
                self.material(f'{name}.{part}', texture, repeat=False)
        body = 0
        if motion:
            self.motions.append(motion)
            body = len(self.motions)
        length, half, waist, top = 4.2, 0.88, 0.92, 1.45
        to_world = np.array([[heading, 0, 0, x], [0, heading, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]])
        parts: list[Face] = []
        l2 = length / 2
        side, glass = f'{name}.side', f'{name}.glass'
        # The texture of a side shows the tail lights on its left.
        parts.append(wall(-l2, -half, l2, -half, 0.25, waist, side))
        mirrored = wall(l2, half, -l2, half, 0.25, waist, side)
        parts.append(
            polygon(
                mirrored.vertices, (length, 0, 0), (0, 0, 0.25 - waist), (-l2, half, waist), side
            )
        )
        parts.append(wall(-l2, half, -l2, -half, 0.25, waist, f'{name}.tail'))
        parts.append(wall(l2, -half, l2, half, 0.25, waist, f'{name}.nose'))
        parts.append(flat(-l2, -half, l2, half, waist, f'{name}.roof'))
        # Cabin: a frustum.
        foot = np.array([[-1.75, -0.84], [1.0, -0.84], [1.0, 0.84], [-1.75, 0.84]])
        head = np.array([[-1.25, -0.68], [0.25, -0.68], [0.25, 0.68], [-1.25, 0.68]])
        for k in range(4):
            a, b = np.append(foot[k], waist), np.append(foot[(k + 1) % 4], waist)
            c, d = np.append(head[(k + 1) % 4], top), np.append(head[k], top)
            across = b - a
            down = (a + b) / 2 - (c + d) / 2
            parts.append(polygon([a, b, c, d], across, down, a - down, glass))
        parts.append(flat(-1.25, -0.68, 0.25, 0.68, top, f'{name}.roof'))
        angle = np.arange(12) * 2 * np.pi / 12
        for wx in (-1.32, 1.30):
            for s in (-1, 1):
                ring = np.stack(
                    [
                        wx - s * 0.33 * np.cos(angle),
                        np.full(12, s * (half + 0.012)),
                        0.33 + 0.33 * np.sin(angle),
                    ],
                    -1,
                )
                parts.append(
                    polygon(
                        ring,
                        (0.66, 0, 0),
                        (0, 0, -0.66),
                        (wx - 0.33, s * half, 0.66),
                        f'{name}.wheel',
                    )
                )
        if motion:  # its shadow travels with it
            if 'shade' not in self.textures:
                self.material('shade', np.full((8, 8, 3), 46, np.uint8), lit=False)
            parts.append(flat(-l2 + 0.1, -half + 0.04, l2 - 0.1, half - 0.04, 0.008, 'shade'))
        else:
            self.shadow(
                [(x + a, y + b, c) for a in (-l2, l2) for b in (-half, half) for c in (0.2, waist)]
            )
            self.shadow(
                [(x + a, y + b, c) for a in (-1.3, 0.6) for b in (-0.7, 0.7) for c in (waist, top)]
            )
        if not motion:
            parts = [_moved(face, to_world) for face in parts]
        self.faces += [face._replace(body=body) for face in parts]

    def tree(self, x, y) -> None:
        rng = self.rng
        if 'bark' not in self.textures:
            bark = np.clip(
                92 + 26 * cv2.resize(materials.fractal((32, 256), rng, 0.6), (256, 256)), 30, 180
            )
            self.material('bark', np.uint8(bark[..., None] * np.float32([1, 0.86, 0.7])))
            for k, colour in enumerate([(98, 132, 58), (118, 140, 62), (84, 120, 64)]):
                self.material(f'leaves{k}', materials.foliage(rng, colour, self.sun), lit=False)
        height = rng.uniform(2.5, 3.0)
        self.faces += box(
            x - 0.13, y - 0.13, KERB, x + 0.13, y + 0.13, height + 1, 'bark', 'bark', 1
        )
        self.shadow([(x + a, y, z) for a in (-0.13, 0.13) for z in (0, height)])
        kind = f'leaves{rng.integers(3)}'
        for _ in range(11):
            offset = rng.normal(0, 1, 3)
            offset *= rng.uniform(0.5, 1.05) / np.linalg.norm(offset) * np.array([1.25, 1.2, 0.95])
            centre = np.array([x, y, height + 1.35]) + offset
            radius = rng.uniform(0.5, 0.86)
            self.spheres.append(Sphere(centre, radius, kind))
            ring = rng.normal(0, 1, (24, 3))
            self.shadow(centre + ring / np.linalg.norm(ring, axis=1, keepdims=True) * radius, 0.75)

    def lamp(self, x, y, side) -> None:
        if 'steel' not in self.textures:
            steel = np.clip(96 + 12 * materials.fractal((128, 128), self.rng, 0.9), 0, 255)
            self.material('steel', np.uint8(steel[..., None] * np.float32([0.86, 0.95, 1.0])))
            self.material('bulb', np.full((8, 8, 3), 245, np.uint8), lit=False)
        self.faces += box(x - 0.07, y - 0.07, KERB, x + 0.07, y + 0.07, 5.4, 'steel', 'steel', 1)
        self.faces += box(x - 0.16, y - 0.16, KERB, x + 0.16, y + 0.16, 0.9, 'steel', 'steel', 1)
        y0, y1 = sorted((y, y - side * 1.5))
        self.faces += box(x - 0.05, y0, 5.3, x + 0.05, y1, 5.4, 'steel', 'steel', 1)
        self.faces += box(
            x - 0.18,
            y0 if side > 0 else y1 - 0.6,
            5.2,
            x + 0.18,
            y0 + 0.6 if side > 0 else y1,
            5.32,
            'steel',
            'steel',
            1,
        )
        self.shadow([(x + a, y, z) for a in (-0.07, 0.07) for z in (0, 5.4)])

    def furniture(self) -> None:
        rng = self.rng
        for side in (-1, 1):
            for x in np.arange(START + 6, END - 10, 14.0):
                self.tree(x + rng.uniform(-1, 1), side * (ROAD + 1.0))
                self.lamp(x + 7, side * (ROAD + 0.7), side)
        colours = [(42, 110, 78), (190, 150, 40), (60, 84, 150)]
        for k, colour in enumerate(colours):
            noise = 1 + 0.12 * materials.fractal((128, 128), rng, 0.8)[..., None]
            self.material(f'bin{k}', np.uint8(np.clip(np.float32(colour) * noise, 0, 255)))
        for x in rng.uniform(START, END, 26):  # bins, boxes, electrical cabinets
            side = rng.choice([-1, 1])
            w, h = rng.uniform(0.35, 0.8), rng.uniform(0.7, 1.3)
            y = side * (FRONT - 0.2 - w / 2) - w / 2
            self.faces += box(
                x, y, KERB, x + w, y + w, KERB + h, f'bin{rng.integers(3)}', 'steel', 1
            )
            self.shadow([(x + a, y + b, c) for a in (0, w) for b in (0, w) for c in (0, h)])

    def traffic(self) -> None:
        rng = self.rng
        for side in (-1, 1):
            for x in np.arange(START + 2.8, END, 5.6):
                if rng.random() < 0.62 and abs(x - 18.5) > 4 and abs(x - 63.5) > 4:
                    self.car(
                        x + rng.uniform(-0.3, 0.3),
                        side * 3.95,
                        -side,
                        int(rng.integers(len(CAR_COLOURS))),
                    )

        def along(x: float, y: float, heading: int, speed: float):
            start = np.array(
                [[heading, 0, 0, x], [0, heading, 0, y], [0, 0, 1, 0], [0, 0, 0, 1.0]]
            )

            def pose(time: float) -> np.ndarray:
                moved = start.copy()
                moved[0, 3] += heading * speed * time
                return moved

            return pose

        self.car(0, 0, 1, 5, along(52.0, 1.6, -1, 5.0))  # oncoming
        self.car(0, 0, 1, 1, along(86.0, 1.6, -1, 5.0))
        self.car(0, 0, 1, 0, along(11.5, -1.45, 1, 4.2))  # ahead, drawing away

    def shadow(self, points, strength: float = 1.0) -> None:
        self.shadows.append((np.asarray(points, float), strength))

    def shadow_map(self, step: float = 0.1) -> tuple[np.ndarray, tuple[float, float]]:
        """Project what throws a shadow onto the ground: 1 in the sun, 0 in the shade."""
        origin = np.array([START - 2, -FRONT - 3])
        size = int((END - START + 4) / step), int((2 * FRONT + 6) / step)
        shade = np.ones((size[1], size[0]), np.float32)
        for points, strength in self.shadows:
            ground = (points[:, :2] - points[:, 2:] / self.sun[2] * self.sun[:2] - origin) / step
            mask = np.zeros(shade.shape, np.uint8)
            hull = cv2.convexHull(np.int32(np.round(ground * 16)))
            x, y, w, h = cv2.boundingRect(np.int32(hull / 16))
            x0, y0, x1, y1 = max(x - 2, 0), max(y - 2, 0), x + w + 3, y + h + 3
            if x1 <= x0 or y1 <= y0:
                continue
            cv2.fillConvexPoly(mask, hull, 1, cv2.LINE_AA, 4)
            shade[y0:y1, x0:x1] = np.minimum(
                shade[y0:y1, x0:x1], 1 - strength * mask[y0:y1, x0:x1]
            )
        return cv2.GaussianBlur(shade, (0, 0), 1.0), tuple(origin)


def _moved(face: Face, transform: np.ndarray) -> Face:
    vertices = face.vertices @ transform[:3, :3].T + transform[:3, 3]
    return face._replace(vertices=vertices, uv=face.uv @ np.linalg.inv(transform))


def street(seed: int = 0) -> Scene:
    """Return a street along x, its right lane around y = -1.5 m, as `swerve` drives it."""
    builder = _Street(seed)
    builder.ground()
    builder.houses()
    builder.furniture()
    builder.traffic()
    shadows, origin = builder.shadow_map()
    sky = materials.sky(builder.rng)
    return Scene(
        builder.faces,
        builder.textures,
        builder.spheres,
        builder.motions,
        sky=np.dstack([sky, np.zeros(sky.shape[:2], np.uint8)]),
        shadows=shadows,
        shadow_origin=origin,
    )
