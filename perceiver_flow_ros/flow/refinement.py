# SPDX-License-Identifier: Apache-2.0
"""The last tenths of a pixel: OpenCV's variational refinement (Brox et al. 2004)."""

from __future__ import annotations

import cv2
import numpy as np

SMOOTHNESS, GRADIENTS, BRIGHTNESS = 20.0, 15.0, 1.0  # weights; exposure changes the last one's
ITERATIONS = 2  # a round, of the weights that spare edges; another round gives more than more
SWEEPS, RELAXATION = 3, 1.99  # of the linear solver: five at 1.95 gain nothing for the time


def refined(
    flow: np.ndarray, previous: np.ndarray, current: np.ndarray, rounds: int
) -> np.ndarray:
    """
    Refine flow (H, W, 2) pixels, which may be written to, on frames (H, W[, 3]) uint8.

    Parameters
    ----------
    rounds : how often the current frame is warped by the flow so far, and the rest of the motion
        found, in which brightness and its gradients are taken as linear.

    """
    if not rounds or min(flow.shape[:2]) < 2:
        return flow
    grey = [f if f.ndim == 2 else cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (previous, current)]
    variational = cv2.VariationalRefinement.create()
    variational.setAlpha(SMOOTHNESS)
    variational.setGamma(GRADIENTS)
    variational.setDelta(BRIGHTNESS)
    variational.setOmega(RELAXATION)
    variational.setSorIterations(SWEEPS)
    variational.setFixedPointIterations(ITERATIONS)
    for _ in range(rounds):
        flow = variational.calc(grey[0], grey[1], flow)
    return flow
