# SPDX-License-Identifier: Apache-2.0
"""Image pairs with exact flow to evaluate on, made here: drives, or objects that move far."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import shutil
import sys
from typing import NamedTuple

import numpy as np

HELP = 'write image pairs with exact flow, in the layout of KITTI, for `evaluate` to read'
EXAMPLE = 'perceiver_flow pairs /tmp/drive && perceiver_flow evaluate /tmp/drive'

FOLDERS = 'flow_noc', 'flow_occ', 'image_2'  # layers have no flow_noc/
RATE = 10.0  # Hz, as KITTI's
SPEEDS = 9.0, 12.0, 15.0  # m/s
FARTHEST = 400.0  # px: what goes farther is not counted (KITTI's file holds 512)
SIZE = 480, 640  # of layers and objects
MOTION = 30.0, 100.0  # px, mean over a pair
OBJECTS = 2, 8
LAYERS_SCALE = 160.0  # px, of the largest single motion
LAYERS_SHARES = 0.34, 0.30, 0.21, 0.15  # of training's `KINDS`


class MadePair(NamedTuple):
    """Two frames (H, W, 3) uint8, the flow between them, and what of it the second one shows."""

    previous: np.ndarray
    current: np.ndarray
    flow: np.ndarray  # (H, W, 2) px
    visible: np.ndarray | None  # (H, W) bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('folder', type=Path, help='where image_2/, flow_occ/ (and _noc/) are put')
    parser.add_argument(
        '--kind', choices=('drive', 'objects', 'layers'), default='drive',
        help='drive (default): rendered streets, 1242x376, at 9 to 15 m/s and 10 Hz; objects: 2 '
        'to 8 before a photograph, all planes in perspective, 640x480, that move by 30 to 100 px '
        'in the mean; layers: the same with the shapes and motions of training',
    )  # fmt: skip
    parser.add_argument('--count', type=int, default=12, metavar='N', help='pairs (12)')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument(
        '--textures', type=Path, action='append', metavar='DIR',
        help='photographs for objects and layers, as in train: the eighth that training leaves '
        'out is used',
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Make the pairs and write them."""
    from perceiver_flow_ros.flow.files import write_flow, write_image
    from tqdm import tqdm

    if args.count < 1:
        raise ValueError(f'--count is {args.count}, expected at least 1')
    if args.textures and args.kind == 'drive':
        raise ValueError('--textures are for objects and layers: drives bring their own')
    if any((args.folder / name).exists() for name in FOLDERS):
        raise ValueError(f'{args.folder} holds pairs already: choose another folder or remove it')
    if args.kind == 'drive':
        made = drives(args.seed)
    else:
        made = (objects if args.kind == 'objects' else layers)(args.seed, args.textures)
    bar = tqdm(range(args.count), unit='pair', disable=None, file=sys.stderr)
    with whole_or_nothing(args.folder) as folder:
        for name in FOLDERS[1:] if args.kind == 'layers' else FOLDERS:
            (folder / name).mkdir()
        for i, pair in zip(bar, made):
            for k, image in ((10, pair.previous), (11, pair.current)):
                write_image(folder / f'image_2/{i:06d}_{k}.png', image)
            far = ~(np.abs(pair.flow).max(2) < FARTHEST)
            write_flow(folder / f'flow_occ/{i:06d}_10.png', masked(pair.flow, far))
            if pair.visible is not None:
                hidden = masked(pair.flow, far | ~pair.visible)
                write_flow(folder / f'flow_noc/{i:06d}_10.png', hidden)
    print(f'{args.count} pairs in {args.folder}')
    return 0


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Give a folder to make `FOLDERS` in, which are moved to their place at the end."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    partial = there / f'.{folder.name}.{os.getpid()}.partial'
    try:
        partial.mkdir()
        yield partial
        folder.mkdir(parents=True, exist_ok=True)
        for made in sorted(partial.iterdir()):  # image_2/, without which they are no pairs, last
            made.rename(folder / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def masked(flow: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Give the flow with NaN in some pixels."""
    return np.where(where[..., None], np.nan, flow).astype(np.float32)


def drives(seed: int) -> Iterator[MadePair]:
    """Render street after street, at each of the speeds, as a camera like KITTI's sees it."""
    from perceiver_flow_ros.training import scene

    camera = scene.Camera(1242, 376, 720.0, 720.0, 620.5, 187.5)
    while True:
        street = scene.Scene.street(seed)
        for k, speed in enumerate(SPEEDS):
            times = 0.5 + k, 0.5 + k + 1 / RATE
            first, second = (
                street.render(scene.swerve(t, speed), camera, t, noise=1.0, seed=2 * k + i)
                for i, t in enumerate(times)
            )
            yield MadePair(first.image, second.image, *scene.exact_flow(first, second))
        seed += 1


def layers(seed: int, textures: list[Path] | None) -> Iterator[MadePair]:
    """Make pairs as in training, of photographs it leaves out, that move far."""
    from perceiver_flow_ros.training.synthesis import KINDS, make_pairs, Motion
    from perceiver_flow_ros.training.textures import HELD_OUT, Textures
    import torch

    held_out = Textures(textures).split(HELD_OUT)[1]
    # What is measured with must not change where training shows more of something.
    kinds = tuple(kind._replace(share=share) for kind, share in zip(KINDS, LAYERS_SHARES))
    motion = Motion(smallest=MOTION[0], largest=LAYERS_SCALE, kinds=kinds)
    torch.manual_seed(seed)
    while True:
        *frames, flow = make_pairs(1, *SIZE, held_out, motion)
        if MOTION[0] <= flow.norm(dim=1).mean() <= MOTION[1]:
            first, second = (
                (frame[0].permute(1, 2, 0) * 255).round().byte().numpy() for frame in frames
            )
            yield MadePair(first, second, flow[0].permute(1, 2, 0).numpy(), None)


def objects(seed: int, textures: list[Path] | None) -> Iterator[MadePair]:
    """Make pairs of planes in perspective: a photograph, and ellipses cut from others before it.

    Training has no homographies; its shapes are like these, but wilder.
    """
    import cv2
    from perceiver_flow_ros.training.textures import HELD_OUT, Textures
    import torch

    held_out = Textures(textures).split(HELD_OUT)[1]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    height, width = SIZE
    margin = 150
    here = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)

    def at(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        return cv2.perspectiveTransform(points.reshape(-1, 1, 2), matrix).reshape(points.shape)

    def motion() -> np.ndarray:
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
        far, angle = rng.uniform(*MOTION), rng.uniform(0, 2 * np.pi)
        shift = far * rng.uniform(0.5, 1) * np.array([np.cos(angle), np.sin(angle)])
        moved = corners + shift + rng.normal(0, far / 4, (4, 2))
        return cv2.getPerspectiveTransform(corners, moved.astype(np.float32))

    while True:
        camera = motion()
        frames = np.zeros((2, height, width, 3), np.uint8)
        flow = np.zeros((height, width, 2), np.float32)
        labels = np.zeros((2, height, width), int)
        for k in range(1 + rng.integers(*OBJECTS, endpoint=True)):
            matrix = motion() @ (camera if rng.random() < 0.5 else np.eye(3)) if k else camera
            size = height + 2 * margin, width + 2 * margin
            photograph = (held_out.patches(1, *size, noise=0)[0] * 255).byte().permute(1, 2, 0)
            centre = rng.uniform(80, (width - 80, height - 80))
            stretch = rng.uniform(0.5, 2)
            axes = rng.uniform(40, 120) * np.array([stretch, 1 / stretch])
            for i, was in enumerate((here, at(here, np.linalg.inv(matrix)))):
                x, y = np.moveaxis(was + np.float32(margin), 2, 0)
                seen = cv2.remap(
                    photograph.numpy(), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
                )
                inside = (((was - centre) / axes) ** 2).sum(2) < 1 if k else np.full(SIZE, True)
                frames[i][inside], labels[i][inside] = seen[inside], k
                if i == 0:
                    flow[inside] = (at(here, matrix) - here)[inside]
        if MOTION[0] <= np.linalg.norm(flow, axis=2).mean() <= MOTION[1]:
            x, y = np.rint(here + flow).astype(int).transpose(2, 0, 1)
            visible = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            x, y = x.clip(0, width - 1), y.clip(0, height - 1)
            visible &= labels[1, y, x] == labels[0]
            yield MadePair(frames[0], frames[1], flow, visible)
