# SPDX-License-Identifier: Apache-2.0
"""Sequences with true poses as they are published: KITTI odometry, 7-Scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from perceiver_flow_ros.commands.calibration import read_calibration
from perceiver_flow_ros.odometry import Camera, register_depth
from perceiver_flow_ros.odometry.geometry import inverse, transform

KINECT = 585.0, 525.0, 0.025  # px: focal lengths of depth and colour; m: colour right of depth
KINECT_RATE = 30.0  # Hz


@dataclass
class Sequence:
    """Images, poses and what else a sequence has."""

    layout: str  # 'kitti' | '7scenes'
    images: list[Path]
    poses: np.ndarray  # (N, 4, 4) T_world_camera
    times: np.ndarray  # (N,) seconds
    camera: Camera
    depth: Callable[[int], np.ndarray] | None = None  # (H, W) metres, registered


def find_sequence(root: Path) -> Sequence:
    """Read what there is, ValueError where it is neither layout."""
    if (root / 'poses.txt').is_file():
        return kitti(root)
    if (root / 'frame-000000.pose.txt').is_file():
        return seven_scenes(root)
    raise ValueError(
        f'{root}: neither KITTI odometry (calib.txt, poses.txt, times.txt, images) nor 7-Scenes '
        '(frame-000000.color.*, .depth.png, .pose.txt)'
    )


def kitti(root: Path) -> Sequence:
    """calib.txt, poses.txt, times.txt, and the images in image_0 or the only other folder."""
    folders = sorted(f for f in root.iterdir() if f.is_dir() and any(f.glob('*.png')))
    if not folders:
        raise ValueError(f'{root}: no folder of PNG images beside poses.txt')
    images = sorted(folders[0].glob('*.png'))
    poses = numbers(root / 'poses.txt', 12).reshape(-1, 3, 4)
    times = numbers(root / 'times.txt', 1).ravel()
    if not len(images) == len(poses) == len(times):
        raise ValueError(
            f'{root}: {len(images)} images, {len(poses)} poses, {len(times)} times: '
            'expected one of each a frame'
        )
    calibration = read_calibration(root / 'calib.txt')
    height, width = _size(images[0])
    camera = Camera.from_info(width, height, calibration.k, p=calibration.p, rectified=True)
    bottom = np.tile([[[0, 0, 0, 1.0]]], (len(poses), 1, 1))
    # No base frame: the road is taken to lie below the camera, along its y axis.
    return Sequence('kitti', images, np.concatenate([poses, bottom], axis=1), times, camera)


def seven_scenes(root: Path) -> Sequence:
    """frame-NNNNNN.color.png or .jpg, .depth.png (mm) and .pose.txt of the depth camera."""
    images = sorted([*root.glob('frame-*.color.png'), *root.glob('frame-*.color.jpg')])
    names = [image.name.partition('.')[0] for image in images]
    depth_focal, focal, baseline = KINECT
    camera_from_depth = transform(np.eye(3), np.array([-baseline, 0, 0]))
    poses = np.stack([numbers(root / f'{name}.pose.txt', 4, 4) for name in names])
    poses = poses @ inverse(camera_from_depth)
    height, width = _size(images[0])
    centre = width / 2, height / 2
    camera = Camera.pinhole(width, height, focal, focal, *centre)
    depth_camera = Camera.pinhole(width, height, depth_focal, depth_focal, *centre)
    kept: dict[int, np.ndarray] = {}

    def depth(i: int) -> np.ndarray:
        if i not in kept:
            image = cv2.imread(str(root / f'{names[i]}.depth.png'), cv2.IMREAD_UNCHANGED)
            if image is None:
                raise ValueError(f'{root / names[i]}.depth.png cannot be read')
            while len(kept) > 16:
                del kept[next(iter(kept))]
            kept[i] = register_depth(image, depth_camera, camera, camera_from_depth)
        return kept[i]

    times = np.arange(len(images)) / KINECT_RATE
    return Sequence('7scenes', images, poses, times, camera, depth)


def numbers(path: Path, columns: int, rows: int | None = None) -> np.ndarray:
    """Read a file of rows of so many numbers: (rows, columns)."""
    try:
        found = np.loadtxt(path, ndmin=2)
    except ValueError as error:
        raise ValueError(f'{path}: expected rows of numbers: {error}') from None
    if found.shape[1] != columns or rows is not None and len(found) != rows:
        raise ValueError(
            f'{path}: expected {columns} numbers a row{f", {rows} rows" if rows else ""}, '
            f'found {found.shape[1]} in {len(found)} rows'
        )
    return found


def _size(path: Path) -> tuple[int, int]:
    from perceiver_flow_ros.flow.files import read_image

    return read_image(path).shape[:2]
