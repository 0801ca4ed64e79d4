# SPDX-License-Identifier: Apache-2.0
"""
Robust least squares that knows what its answer is worth.

Iteratively reweighted Gauss-Newton with the weights of Geman and McClure (1987),
w(u) = 1 / (1 + u)^2, u = |r|^2 / (C^2 s^2): residuals far beyond the scale s count for nothing.
The scale is the median one, so up to half of the samples may be wrong.

Neighbouring flow vectors err together, so N samples are not N observations. The covariance is the
sandwich A^-1 B A^-1 with B from sums over windows of the image (Liang and Zeger 1986; Conley
1999): errors may be correlated within them in any way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
import math
from typing import Any

import numpy as np

C2 = 6.0  # the squared residual, in scales, at which a sample has a quarter of its weight
MEDIAN = {1: 0.4549, 2: 1.3863}  # of chi^2 with so many degrees of freedom
INLIER = {1: 9.0, 2: 11.83}  # its 99.7 % quantile
CELLS_A_ROW = 16  # cells along the longer side of the image
REACH = 5  # cells over which errors may go together
STEP = 1e-5  # radians (and relative): a smaller step ends the iteration


@dataclass
class Linear:
    """Residuals linearised: r + J d, whitened so that r has unit variance at a noise of 1."""

    residual: np.ndarray  # (k, N)
    jacobian: np.ndarray  # (p, k, N)
    extra: np.ndarray | None = None  # (N,) squared distance that speaks against a sample besides


@dataclass
class Block:
    """Residuals of one kind: their model, the scale they may have, their place in the image."""

    linearize: Callable[[Any], Linear]
    cells: np.ndarray | None = None  # (N,) the cell of each sample, from 0
    floor: float = 1e-3
    ceiling: float = math.inf
    share: float = 1.0  # of its samples that count as independent, beside other blocks

    def weigh(self, state: Any) -> Weighed:
        """Linearise at a state, and weigh the samples."""
        linear = self.linearize(state)
        k = len(linear.residual)
        squared = np.einsum('kn,kn->n', linear.residual, linear.residual)
        if linear.extra is not None:
            squared = squared + linear.extra
        half = len(squared) // 2
        scale2 = np.partition(squared, half)[half] / MEDIAN[k]
        scale2 = min(max(float(scale2), self.floor**2), self.ceiling**2)
        if not math.isfinite(scale2):
            raise np.linalg.LinAlgError('residuals are not finite')
        weights = 1 / (1 + squared * (1 / (C2 * scale2))) ** 2
        return Weighed(linear, squared, math.sqrt(scale2), weights)


@dataclass
class Weighed:
    """A block at a state."""

    linear: Linear
    squared: np.ndarray  # (N,) squared residuals
    scale: float
    weights: np.ndarray  # (N,)

    def normal(self) -> tuple[np.ndarray, np.ndarray]:
        """J^T W J (p, p) and J^T W r (p,), in units of the scale."""
        p = len(self.linear.jacobian)
        a, b = np.zeros((p, p)), np.zeros(p)
        # One row of residuals after the other: with samples on the default grid such a product
        # does not wake BLAS's threads, which would go on waiting and take a core from others.
        for j, r in zip(self.linear.jacobian.swapaxes(0, 1), self.linear.residual):
            heavy = j * (self.weights / self.scale**2)
            a += heavy @ j.T
            b += heavy @ r
        return a, b

    def scores(self) -> np.ndarray:
        """Gradient (p, N) of each sample, in units of the scale."""
        heavy = self.linear.residual * (self.weights / self.scale**2)
        return np.einsum('pkn,kn->pn', self.linear.jacobian, heavy)

    def bend(self) -> float:
        """Mean curvature of the robust cost, relative to that of the weighted squares."""
        k = len(self.linear.residual)
        u = self.squared / (C2 * self.scale**2)
        curvature = (1 - (4 / k - 1) * u) / (1 + u) ** 3  # mean of psi' over the k directions
        return max(float(curvature.sum() / self.weights.sum()), 0.2)


@dataclass
class Fit:
    """What a fit ended at; all but the state and its covariance are of the first block."""

    state: Any
    scale: float
    weights: np.ndarray  # (N,)
    squared: np.ndarray  # (N,)
    inliers: np.ndarray  # (N,) bool: within 99.7 % of the noise
    covariance: np.ndarray  # (p, p) of the step parameters; empty without cells


def refine(
    blocks: list[Block],
    retract: Callable[[Any, np.ndarray], Any],
    state: Any,
    iterations: int = 10,
    close: float = STEP,
) -> Fit:
    """
    Minimise the robust residual of all blocks from a first guess on.

    Parameters
    ----------
    retract : `retract(state, d)` is the state a step d (p,) away.
    close : rad (or relative), a step that ends the iteration.

    Raises
    ------
    numpy.linalg.LinAlgError
        When the samples do not determine the state.

    """
    for _ in range(iterations):
        parts = [[block.share * x for x in block.weigh(state).normal()] for block in blocks]
        a, b = (np.sum(part, axis=0) for part in zip(*parts))
        step = np.linalg.solve(a, -b)
        state = retract(state, step)
        if np.abs(step).max() < close:
            break
    return evaluate(blocks, state)


def evaluate(blocks: list[Block], state: Any) -> Fit:
    """Tell how well a state fits, and how well it is known."""
    weighed = [block.weigh(state) for block in blocks]
    first = weighed[0]
    covariance = np.empty((0, 0))
    if all(block.cells is not None for block in blocks):
        covariance = sandwich(blocks, weighed)
    inliers = first.squared <= INLIER[len(first.linear.residual)] * first.scale**2
    return Fit(state, first.scale, first.weights, first.squared, inliers, covariance)


def sandwich(blocks: list[Block], weighed: list[Weighed]) -> np.ndarray:
    """Covariance (p, p) of an M-estimate whose errors are correlated within cells."""
    both = list(zip(blocks, weighed))
    bread = np.linalg.inv(np.sum([b.share * w.bend() * w.normal()[0] for b, w in both], axis=0))
    filling = np.sum([b.share**2 * clustered(b, w) for b, w in both], axis=0)
    # Never below what independent samples would give: cells may agree by chance.
    return bread @ filling @ bread + 1e-3 * bread


def clustered(block: Block, weighed: Weighed) -> np.ndarray:
    """
    Covariance (p, p) of the sum of all scores, which are correlated up to `REACH` cells away.

    Outer products of the sums over all windows of REACH x REACH cells: Bartlett's kernel (Newey
    and West 1987) in two dimensions (Conley 1999).
    """
    if block.cells is None:
        raise ValueError('a covariance needs the cells of the samples')
    scores = weighed.scores()
    cells = CELLS_A_ROW
    rows = int(block.cells.max()) // cells + 1
    pad = REACH - 1
    sums: np.ndarray = np.zeros((len(scores), rows + 2 * pad, cells + 2 * pad))
    for total, score in zip(sums, scores):
        counted = np.bincount(block.cells, score, minlength=rows * cells)
        total[pad: pad + rows, pad: pad + cells] = counted.reshape(rows, cells)
    for axis in (1, 2):
        ends = np.cumsum(np.insert(sums, 0, 0, axis=axis), axis=axis)
        keep = np.arange(sums.shape[axis] - pad)
        sums = ends.take(keep + REACH, axis=axis) - ends.take(keep, axis=axis)
    sums = sums.reshape(len(scores), -1)
    clusters = np.count_nonzero(np.bincount(block.cells, weighed.weights)) / REACH**2
    return sums @ sums.T / REACH**2 * (clusters / max(clusters - len(scores), 1))


def independent(block: Block, weighed: Weighed) -> float:
    """Tell which share of the samples would say as much if they erred independently (Kish)."""
    alone = np.einsum('pn,pn->p', *[weighed.scores()] * 2)
    together = np.diag(clustered(block, weighed))
    return float(np.clip(np.mean(alone / np.maximum(together, 1e-30)), 1e-3, 1.0))
