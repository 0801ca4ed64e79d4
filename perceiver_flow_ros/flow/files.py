# SPDX-License-Identifier: Apache-2.0
"""Flow files (Middlebury .flo, KITTI .png, .npy) and images, written whole or not at all."""

from __future__ import annotations

import io
import os
from pathlib import Path
import tokenize

import cv2
import numpy as np
from perceiver_flow_ros.flow.color import UNKNOWN

FLOW_SUFFIXES = ('.flo', '.png', '.npy')
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
FLO_TAG = b'PIEH'  # the float 202021.25 in little endian
FLO_UNKNOWN = 1e10
KITTI_LIMIT = 512  # px; components from -512 to 511.98 in steps of 1/64


def read_flow(path: str | Path) -> np.ndarray:
    """
    Read a flow field.

    Parameters
    ----------
    path : a Middlebury ``.flo``, a KITTI 16-bit ``.png`` or an ``.npy`` file.

    Returns
    -------
    (H, W, 2) float32 pixels, (u right, v down), NaN where the file says that the flow is unknown.

    Raises
    ------
    ValueError
        When the file is not what its name says, naming it and what was expected.
    OSError
        When it cannot be read.

    """
    path = Path(path)
    check_suffix(path, FLOW_SUFFIXES)
    parse = {'.flo': _parse_flo, '.png': _parse_kitti, '.npy': _parse_npy}[path.suffix.lower()]
    flow = parse(path.read_bytes(), path)
    unknown = ~(np.abs(flow) <= UNKNOWN).all(axis=2)
    flow[unknown] = np.nan
    return flow


def write_flow(path: str | Path, flow: np.ndarray) -> None:
    """
    Write a flow field (H, W, 2) in pixels, NaN where unknown, as its name's suffix says.

    ``.flo`` and ``.npy`` keep float32 exactly; KITTI's ``.png`` rounds to 1/64 px and holds less
    than 512 px.
    """
    path = Path(path)
    flow = np.asarray(flow, np.float32)
    if flow.ndim != 3 or flow.shape[2] != 2 or not flow.size:
        raise ValueError(f'{path}: flow has shape {flow.shape}, expected (H, W, 2)')
    check_suffix(path, FLOW_SUFFIXES)
    suffix = path.suffix.lower()
    unknown = ~np.isfinite(flow).all(axis=2)
    if suffix == '.npy':
        buffer = io.BytesIO()
        np.save(buffer, flow, allow_pickle=False)
        data = buffer.getvalue()
    elif suffix == '.flo':
        height, width = flow.shape[:2]
        known = np.where(unknown[:, :, None], np.float32(FLO_UNKNOWN), flow)
        data = FLO_TAG + np.array([width, height], '<i4').tobytes() + known.astype('<f4').tobytes()
    else:
        steps = np.rint(np.where(unknown[:, :, None], 0, flow).astype(np.float64) * 64) + 2**15
        if steps.min() < 0 or steps.max() > 2**16 - 1:
            largest = float(np.abs(flow[~unknown]).max())
            raise ValueError(
                f'{path}: a KITTI .png holds less than {KITTI_LIMIT} px a component, this flow '
                f'has {largest:.1f} px; write .flo or .npy'
            )
        steps[unknown] = 0
        bgr = np.dstack([~unknown, steps[:, :, 1], steps[:, :, 0]]).astype(np.uint16)
        data = _encode(bgr, path)
    write_whole(path, data)


def read_image(path: str | Path) -> np.ndarray:
    """
    Read an image as (H, W, 3) uint8 RGB.

    Grey becomes three equal channels, 16 bits lose the lower 8, an alpha channel is dropped.
    ValueError when it is no (whole) image, OSError when it cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    image = _decode(data, cv2.IMREAD_COLOR)
    if image is None:
        other = _decode(data, cv2.IMREAD_UNCHANGED)
        if other is not None:
            raise ValueError(f'{path}: its pixels are {other.dtype}, expected 8 or 16 bits each')
        raise ValueError(
            f'{path}: not a whole image of a kind that OpenCV reads (PNG, JPEG, PPM, TIFF, ...)'
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an image, (H, W, 3) RGB or (H, W) grey, uint8, in the format of its suffix."""
    path = Path(path)
    if (
        image.dtype != np.uint8
        or not image.size
        or not (image.ndim == 2 or image.shape[2:] == (3,))
    ):
        raise ValueError(
            f'{path}: image is {image.shape} {image.dtype}, expected (H, W, 3) or (H, W) uint8'
        )
    check_suffix(path, IMAGE_SUFFIXES)
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    if image.ndim == 2 and path.suffix.lower() == '.ppm':       # which holds colour only
        bgr = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    write_whole(path, _encode(bgr, path))


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError unless the path's suffix is one of these."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(
            f'{path}: the suffix is {path.suffix!r}, expected one of {", ".join(suffixes)}'
        )


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that at no time a part of it stands under its name."""
    path = Path(path)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def _parse_flo(data: bytes, path: Path) -> np.ndarray:
    if data[:4] != FLO_TAG:
        raise ValueError(
            f'{path}: not a Middlebury .flo file: it starts with {data[:4]!r}, not {FLO_TAG!r}'
        )
    width, height = (int(n) for n in np.frombuffer(data[4:12].ljust(8, b'\0'), '<i4'))
    if not (0 < width < 100_000 and 0 < height < 100_000):
        raise ValueError(f'{path}: corrupt .flo file: its header says {width}x{height} pixels')
    if len(data) != 12 + width * height * 8:
        raise ValueError(
            f'{path}: corrupt .flo file: {len(data)} bytes, expected {12 + width * height * 8} '
            f'for the {width}x{height} pixels of its header'
        )
    return np.frombuffer(data, '<f4', offset=12).reshape(height, width, 2).astype(np.float32)


def _parse_kitti(data: bytes, path: Path) -> np.ndarray:
    image = _decode(data, cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        found = 'no whole PNG' if image is None else f'{image.shape} {image.dtype}'
        raise ValueError(f'{path}: not a KITTI flow file: {found}, expected 3 channels of 16 bits')
    valid, v, u = np.moveaxis(image.astype(np.float32), 2, 0)
    flow = (np.stack([u, v], axis=2) - 2**15) / 64
    flow[valid == 0] = np.nan
    return flow


def _parse_npy(data: bytes, path: Path) -> np.ndarray:
    try:
        flow = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # of its header
        raise ValueError(f'{path}: corrupt .npy file: {error}') from None
    if flow.ndim != 3 or flow.shape[2] != 2 or flow.dtype.kind != 'f':
        raise ValueError(
            f'{path}: holds {flow.shape} {flow.dtype}, expected a flow (H, W, 2) of floats'
        )
    return flow.astype(np.float32)


def _encode(image: np.ndarray, path: Path) -> bytes:
    suffix, (height, width) = path.suffix.lower(), image.shape[:2]
    try:
        whole, data = cv2.imencode(suffix, image)
    except cv2.error:  # of old OpenCV; what later ones cannot write they give back as not whole
        whole = False
    if not whole:
        kind = 'grey' if image.ndim == 2 else 'colour'
        raise ValueError(
            f'{path}: a {suffix} cannot hold {width}x{height} {kind} pixels; choose another format'
        )
    return data.tobytes()


def _decode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        return None
