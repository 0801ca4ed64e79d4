# SPDX-License-Identifier: Apache-2.0
"""The demo's pictures: one pair in four panels, and the run over time."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from perceiver_flow_ros.flow.color import flow_to_color

BACKGROUND, INK, FAINT = (18, 21, 27), (236, 239, 244), (150, 159, 172)
MARGIN, GAP, CAPTION = 28, 18, 34  # pixels
ERRORS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], cv2.COLORMAP_INFERNO)[0, :, ::-1]
HIDDEN = np.array((58, 66, 80), np.uint8)


@dataclass
class Pair:
    """A flow that came, and what it should have been where that is known."""

    frame: np.ndarray  # (H, W, 3) uint8 RGB, the previous image
    flow: np.ndarray  # (H, W, 2)
    truth: np.ndarray | None = None  # (H, W, 2)
    visible: np.ndarray | None = None  # (H, W) bool
    seconds: float = 0.0  # into the run
    steps: int = 1  # camera frames from the one to the other

    @property
    def error(self) -> np.ndarray:
        """End-point error, (H, W) pixels."""
        return np.linalg.norm(self.flow - self.truth, axis=-1)


@dataclass
class Scales:
    """What full colour stands for, in all pictures of a run."""

    speed: float  # pixels
    error: float  # pixels


def scales(pairs: list[Pair]) -> Scales:
    """Choose scales under which most is told apart and little is saturated."""
    speeds = []
    for pair in pairs:
        field = pair.flow if pair.truth is None else pair.truth[pair.visible]
        speeds.append(np.nanpercentile(np.linalg.norm(field, axis=-1), 98))
    speed = float(np.median(speeds))
    return Scales(speed=_round_up(speed), error=3.0)


def panel(pair: Pair, scale: Scales, title: str, subtitle: str, name: str) -> np.ndarray:
    """
    Lay out one pair: frame, flow and, where the truth is known, true flow and error.

    Parameters
    ----------
    title, subtitle : above the panels.
    name : of the estimator.

    Returns
    -------
    (h, w, 3) uint8 RGB.

    """
    flow = _with_wheel(_fit(flow_to_color(pair.flow, scale.speed)), scale.speed)
    over = '' if pair.steps == 1 else f', over {pair.steps} frames'
    tiles = [(f'camera image, with the flow as arrows{over}', _arrows(pair))]
    tiles.append((f'flow: {name}', flow))
    if pair.truth is not None:
        truth = _with_wheel(_fit(flow_to_color(pair.truth, scale.speed)), scale.speed)
        error = _with_bar(_fit(_error_map(pair, scale)), scale.error)
        mean = np.nanmean(pair.error[pair.visible])
        tiles += [
            ('exact flow, from the renderer', truth),
            (f'end-point error: {mean:.2f} px on average where visible', error),
        ]
    height, width = tiles[0][1].shape[:2]
    rows = len(tiles) // 2
    top = MARGIN + 78
    shape = top + rows * (CAPTION + height) + (rows - 1) * GAP + MARGIN, 2 * (width + MARGIN) + GAP
    canvas = np.full((*shape, 3), BACKGROUND, np.uint8)
    write(canvas, title, (MARGIN, MARGIN + 26), 30, INK, weight=2)
    write(canvas, subtitle, (MARGIN, MARGIN + 60), 19, FAINT)
    for i, (caption, tile) in enumerate(tiles):
        x = MARGIN + (i % 2) * (width + GAP)
        y = top + (i // 2) * (CAPTION + height + GAP)
        write(canvas, caption, (x, y + CAPTION - 12), 18, INK)
        canvas[y + CAPTION: y + CAPTION + height, x: x + width] = tile
    return canvas


def timeline(pairs: list[Pair], scale: Scales, title: str, name: str) -> np.ndarray:
    """Lay out several pairs of a run side by side, (h, w, 3) uint8 RGB."""
    rows = [
        ('camera image', lambda p: p.frame),
        (name, lambda p: flow_to_color(p.flow, scale.speed)),
    ]
    if pairs[0].truth is not None:
        rows.append(('exact flow', lambda p: flow_to_color(p.truth, scale.speed)))
        rows.append(('error', lambda p: _error_map(p, scale)))
    tiles = [[_fit(draw(pair), 300) for pair in pairs] for _, draw in rows]
    height, width = tiles[0][0].shape[:2]
    gap, left, top = 6, MARGIN + 142, MARGIN + 74
    size = (
        top + len(rows) * (height + gap) + MARGIN + 14,
        left + len(pairs) * (width + gap) + MARGIN - gap,
    )
    canvas = np.full((*size, 3), BACKGROUND, np.uint8)
    write(canvas, title, (MARGIN, MARGIN + 24), 27, INK, weight=2)
    legend = f'flow: full colour is {scale.speed:g} px (dark: more)'
    if pairs[0].truth is not None:
        legend += f'   error: black 0, yellow {scale.error:g} px, grey: not in the next image'
    write(canvas, legend, (left, canvas.shape[0] - MARGIN + 4), 16, FAINT)
    for column, pair in enumerate(pairs):
        x = left + column * (width + gap)
        write(canvas, f'{pair.seconds:.1f} s', (x, top - 10), 17, FAINT)
        for row in range(len(rows)):
            y = top + row * (height + gap)
            canvas[y: y + height, x: x + width] = tiles[row][column]
    for row, (caption, _) in enumerate(rows):
        y = top + row * (height + gap) + height // 2
        write(canvas, caption, (MARGIN, y + 6), 17, INK)
    return canvas


def write(canvas, text: str, at: tuple[int, int], size: int, colour, weight: int = 1) -> None:
    """Write smooth text of `size` pixels with its base line starting at (x, y)."""
    fine = 4  # OpenCV's strokes look well only when drawn large and shrunk
    scale, thickness = size * fine / 30, round(size * fine * (0.055 + 0.03 * weight))
    font = cv2.FONT_HERSHEY_SIMPLEX
    (width, height), below = cv2.getTextSize(text, font, scale, thickness)
    pad = thickness + fine
    mask: np.ndarray = np.zeros((height + below + 2 * pad, width + 2 * pad), np.uint8)
    cv2.putText(mask, text, (pad, pad + height), font, scale, 255, thickness, cv2.LINE_AA)
    mask = cv2.resize(mask, None, fx=1 / fine, fy=1 / fine, interpolation=cv2.INTER_AREA)
    x, y = at[0] - pad // fine, at[1] - (pad + height) // fine
    mask = mask[max(-y, 0): canvas.shape[0] - y, max(-x, 0): canvas.shape[1] - x]
    part = canvas[max(y, 0):, max(x, 0):][: mask.shape[0], : mask.shape[1]]
    share = mask[..., None] / np.float32(255)
    part[:] = np.uint8(part * (1 - share) + np.float32(colour) * share + 0.5)


def _fit(image: np.ndarray, width: int = 640) -> np.ndarray:
    """Scale a picture to a width; grey becomes RGB."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    if image.shape[1] == width:
        return np.ascontiguousarray(image)
    size = width, max(1, round(image.shape[0] * width / image.shape[1]))
    shrinks = width < image.shape[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _arrows(pair: Pair, step: int = 44) -> np.ndarray:
    """Draw the flow on its frame."""
    image = (_fit(pair.frame) * 0.9).astype(np.uint8)
    scale = image.shape[1] / pair.frame.shape[1]
    fine = 4
    for y in range(step // 2, image.shape[0], step):
        for x in range(step // 2, image.shape[1], step):
            u, v = pair.flow[int(y / scale), int(x / scale)] * scale
            length = np.hypot(u, v)
            if not 1.0 < length < 4 * step:
                continue
            start, end = (
                (x * 2**fine, y * 2**fine),
                (int((x + u) * 2**fine), int((y + v) * 2**fine)),
            )
            tip = min(0.5, 5 / length)
            for colour, thickness in (((10, 12, 16), 3), ((255, 214, 64), 1)):
                cv2.arrowedLine(image, start, end, colour, thickness, cv2.LINE_AA, fine, tip)
    return image


def _error_map(pair: Pair, scale: Scales) -> np.ndarray:
    """Colour the error; what the next image does not show is grey."""
    assert pair.visible is not None, 'it comes with the truth'
    level = np.nan_to_num(np.clip(pair.error / scale.error, 0, 1), nan=1.0)
    image = ERRORS[np.uint8(level * 255)]
    image[~pair.visible] = HIDDEN
    return image


def _with_wheel(image: np.ndarray, speed: float, radius: int = 44) -> np.ndarray:
    """Put the colour wheel and what its rim stands for into the lower right corner."""
    y, x = np.mgrid[-radius: radius + 1, -radius: radius + 1] / np.float32(radius)
    wheel = flow_to_color(np.dstack([x, y]), 1.0)
    share = np.clip((1 - np.hypot(x, y)) * radius, 0, 1)[..., None]
    side = 2 * radius + 1
    bottom, right = image.shape[0] - 10, image.shape[1] - 10
    if image.shape[0] < side + 50:
        return image
    _shade(image, (right - side - 16, bottom - side - 38, right, bottom))
    part = image[bottom - side - 8: bottom - 8, right - side - 8: right - 8]
    part[:] = np.uint8(part * (1 - share) + wheel * share)
    write(image, f'{speed:g} px', (right - side + 8, bottom - side - 15), 16, INK)
    return image


def _with_bar(image: np.ndarray, most: float) -> np.ndarray:
    """Put the scale of the error into the lower right corner."""
    bottom, right, width = image.shape[0] - 10, image.shape[1] - 10, 180
    if image.shape[0] < 60:
        return image
    _shade(image, (right - width - 24, bottom - 66, right, bottom))
    x = right - width - 12
    image[bottom - 38: bottom - 24, x: x + width] = ERRORS[
        np.linspace(0, 255, width).astype(int)
    ]
    write(image, '0', (x, bottom - 46), 15, INK)
    write(image, f'{most:g} px', (right - 54, bottom - 46), 15, INK)
    image[bottom - 17: bottom - 7, x: x + 10] = HIDDEN
    write(image, 'not in the next image', (x + 16, bottom - 7), 13, FAINT)
    return image


def _shade(image: np.ndarray, corners: tuple[int, int, int, int]) -> None:
    """Darken a box, so that a legend can be read on it."""
    x0, y0, x1, y1 = corners
    part = image[max(y0, 0): y1, max(x0, 0): x1]
    part[:] = np.uint8(part * 0.2 + np.array(BACKGROUND, np.float32) * 0.8)


def _round_up(value: float) -> float:
    """Round up to 1, 2 or 5 x 10^n."""
    if not value > 1:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(power * m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * m >= value))
