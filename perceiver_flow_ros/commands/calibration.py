# SPDX-License-Identifier: Apache-2.0
"""Camera calibrations as people have them: a camera_info YAML or a KITTI calib.txt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perceiver_flow_ros.commands.bagfile import camera_info_message


@dataclass
class Calibration:
    """What camera_info says of a camera; `size` (width, height) is None where it is not told."""

    k: list[float]
    p: list[float]
    size: tuple[int, int] | None = None
    model: str = 'plumb_bob'
    d: list[float] = field(default_factory=lambda: [0.0] * 5)
    r: list[float] = field(default_factory=lambda: [1.0, 0, 0, 0, 1, 0, 0, 0, 1])


def read_calibration(path: Path, kitti_camera: int = 0) -> Calibration:
    """Read a camera_info YAML (camera_calibration_parsers) or row PN of a KITTI calib.txt."""
    import yaml

    text = path.read_text(errors='replace')
    try:
        if path.suffix.lower() == '.txt':
            return kitti_calibration(text, kitti_camera)
        content = yaml.safe_load(text)
        k = matrix(content, 'camera_matrix', 9)
        return Calibration(
            size=(int(content['image_width']), int(content['image_height'])),
            model=str(content['distortion_model']),
            d=matrix(content, 'distortion_coefficients', None),
            k=k,
            r=matrix(content, 'rectification_matrix', 9, [1.0, 0, 0, 0, 1, 0, 0, 0, 1]),
            p=matrix(content, 'projection_matrix', 12, [*k[:3], 0, *k[3:6], 0, *k[6:], 0]),
        )
    except KeyError as error:
        raise ValueError(f'{path}: no {error} in this camera_info YAML') from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f'{path}: not a calibration: {error}; expected a camera_info YAML or a KITTI calib.txt'
        ) from None


def kitti_calibration(text: str, camera: int) -> Calibration:
    """Take row N of 12 numbers, labelled "PN:" or not; such images are rectified already."""
    rows = [line.rpartition(':') for line in text.splitlines() if line.strip()]
    numbers = {label.strip() or f'P{i}': row for i, (label, _, row) in enumerate(rows)}
    if f'P{camera}' not in numbers:
        raise ValueError(f'it has no P{camera}')
    p = [float(word) for word in numbers[f'P{camera}'].split()]
    if len(p) != 12:
        raise ValueError(f'P{camera} has {len(p)} numbers, expected 12')
    return Calibration(k=[*p[0:3], *p[4:7], *p[8:11]], p=p)


def matrix(
    content: dict, name: str, size: int | None, default: list[float] | None = None
) -> list[float]:
    """Read the numbers of a matrix of a camera_info YAML; with a default it may be missing."""
    if name not in content and default is not None:
        return default
    data = [float(number) for number in content[name]['data']]
    if size is not None and len(data) != size:
        raise ValueError(f'{name} has {len(data)} numbers, expected {size}')
    return data


def camera_info(calibration: Calibration | None, width: int, height: int):
    """Make the sensor_msgs/CameraInfo; without a calibration K is zero, which says so."""
    if calibration and calibration.size not in (None, (width, height)):
        raise ValueError(
            f'the calibration is for {calibration.size[0]}x{calibration.size[1]} images, '
            f'these are {width}x{height}'
        )
    known = calibration or Calibration(k=[0.0] * 9, p=[0.0] * 12, model='', d=[], r=[0.0] * 9)
    return camera_info_message(width, height, known.model, known.d, known.k, known.r, known.p)
