# SPDX-License-Identifier: Apache-2.0
"""The last tenths of a pixel: OpenCV's variational refinement (Brox et al. 2004)."""

from __future__ import annotations

import cv2
import numpy as np

SMOOTHNESS, GRADIENTS, BRIGHTNESS = 20.0, 15.0, 1.0  # weights; exposure changes the last one's
ITERATIONS = 2  # a round, of the weights that spare edges; after halved rounds one does
RELAXATION = 1.95  # of the linear solver (below 2), which makes five sweeps


def refined(
    flow: np.ndarray, previous: np.ndarray, current: np.ndarray, rounds: int, halved: int = 0
) -> np.ndarray:
    """
    Refine flow (H, W, 2) pixels, which may be written to, on frames (H, W[, 3]) uint8.

    Parameters
    ----------
    rounds : how often the current frame is warped by the flow so far, and the rest of the motion
        found, in which brightness and its gradients are taken as linear.
    halved : such rounds before these at half of the resolution, a quarter of the time each, where
        what is wrong by more than a pixel or two is still within reach.

    """
    if not (rounds or halved) or min(flow.shape[:2]) < 4:
        return flow
    grey = [f if f.ndim == 2 else cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (previous, current)]
    if halved:
        height, width = flow.shape[:2]
        size = (width + 1) // 2, (height + 1) // 2
        scale = np.array([size[0] / width, size[1] / height], np.float32)
        small = [cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in grey]
        begin = cv2.resize(flow, size, interpolation=cv2.INTER_AREA) * scale
        change = (solved(begin.copy(), small, halved, ITERATIONS) - begin) / scale
        flow += cv2.resize(change, (width, height))
    return solved(flow, grey, rounds, 1 if halved else ITERATIONS)


def solved(
    flow: np.ndarray, grey: list[np.ndarray], rounds: int, iterations: int
) -> np.ndarray:
    """Refine flow, which may be written to, on grey frames in so many rounds."""
    variational = cv2.VariationalRefinement.create()
    variational.setAlpha(SMOOTHNESS)
    variational.setGamma(GRADIENTS)
    variational.setDelta(BRIGHTNESS)
    variational.setOmega(RELAXATION)
    variational.setFixedPointIterations(iterations)
    for _ in range(rounds):
        flow = variational.calc(grey[0], grey[1], flow)
    return flow
