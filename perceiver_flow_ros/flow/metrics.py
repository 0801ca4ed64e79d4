# SPDX-License-Identifier: Apache-2.0
"""How far a flow field is from the true one, and whether its confidence knows it."""

from __future__ import annotations

import numpy as np


def end_point_error(
    flow: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None
) -> np.ndarray:
    """
    Length of the difference to the true flow at every pixel.

    Parameters
    ----------
    flow, truth : (H, W, 2) pixels; NaN in `truth` where it is unknown.
    valid : (H, W) bool, pixels to count; None counts all whose truth is known.

    Returns
    -------
    (H, W) pixels, float64 where `truth` is, else float32: NaN where the truth is unknown or not to
    be counted, infinite where only the estimate is missing, so that a flow with holes never scores
    better than one without.

    """
    if flow.shape != truth.shape or flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(
            f'flow {flow.shape} and truth {truth.shape} differ in shape, expected (H, W, 2) both'
        )
    error = np.linalg.norm(flow.astype(np.float32) - truth, axis=2)
    error[~np.isfinite(flow).all(axis=2)] = np.inf
    known = np.isfinite(truth).all(axis=2)
    error[~(known if valid is None else known & valid)] = np.nan
    return error


def metrics(
    flow: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None
) -> dict[str, float]:
    """
    Sum up the errors of a flow field.

    Parameters
    ----------
    flow, truth, valid : as in `end_point_error`.

    Returns
    -------
    dict
        ``epe``: mean end-point error, pixels. ``fl``: KITTI's outliers, percent of the pixels
        whose error is over 3 px and over 5 % of the true motion. ``px1``, ``px3``, ``px5``:
        percent of the pixels with an error over 1, 3, 5 px. ``pixels``: how many were counted.

    Raises
    ------
    ValueError
        When the shapes differ or no pixel's truth is known.

    """
    error = end_point_error(flow, truth, valid)
    counted = ~np.isnan(error)
    if not counted.any():
        raise ValueError('the true flow is unknown at every pixel: nothing to compare with')
    error = error[counted]
    motion = np.linalg.norm(truth[counted], axis=1)
    return {
        'epe': float(error.mean(dtype=np.float64)),
        'fl': 100 * float(np.mean((error > 3) & (error > 0.05 * motion))),
        **{f'px{limit}': 100 * float(np.mean(error > limit)) for limit in (1, 3, 5)},
        'pixels': int(counted.sum()),
    }


def sparsification_error(error: np.ndarray, confidence: np.ndarray) -> float:
    """
    Tell how far a confidence is from the perfect one: area under the sparsification error (AUSE).

    Pixels are removed, the least confident ones first; the mean error of those that remain, over
    the mean error of all, is a curve from 1 down. The area between it and the curve of an oracle,
    which removes the largest errors first, is 0 for a perfect order (Ilg et al. 2018).

    Parameters
    ----------
    error : (H, W) as `end_point_error` gives it; NaN is not counted.
    confidence : (H, W), larger is better; pixels of equal confidence are removed together.

    """
    counted = np.isfinite(error)
    error, confidence = error[counted].astype(np.float64), confidence[counted]
    if not error.size or not error.any():
        return 0.0
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    shared = (np.bincount(group, error) / sizes)[np.sort(group)]
    kept = np.arange(1, error.size + 1)
    curve, oracle = (np.cumsum(e) / kept for e in (shared, np.sort(error)))
    return float((curve - oracle).mean() / error.mean())
