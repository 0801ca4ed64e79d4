# SPDX-License-Identifier: Apache-2.0
"""The mean rate of a gyro between two frames."""

from __future__ import annotations

import numpy as np


class GyroGap(ValueError):
    """The samples do not cover the time between the frames; the text says where."""


def mean_rate(
    times: np.ndarray, rates: np.ndarray, start: float, end: float, max_gap: float = 0.1
) -> np.ndarray:
    """
    Average gyro samples over the time between two stamps, by the trapezoidal rule.

    Parameters
    ----------
    times : (N,) seconds, ascending; they must reach from `start` to `end`, or miss either by less
        than `max_gap`.
    rates : (N, 3) rad/s, in the IMU's frame (turn the result into the camera's).

    Returns
    -------
    (3,) rad/s.

    Raises
    ------
    GyroGap
        When there is a hole of more than `max_gap` seconds in them.

    """
    times, rates = np.asarray(times, float), np.asarray(rates, float).reshape(-1, 3)
    if not end > start:
        raise GyroGap(f'the frames are {end - start:.3f} s apart, expected more than 0')
    good = np.isfinite(times) & np.isfinite(rates).all(axis=1)
    times, rates = times[good], rates[good]
    if not len(times):
        raise GyroGap('no gyro samples: is the imu topic alive?')
    if (np.diff(times) < 0).any():
        raise GyroGap('gyro samples are not in order of time')
    # From the last sample before the start to the first one after the end, where there are such.
    low = max(int(np.searchsorted(times, start, 'right')) - 1, 0)
    high = min(int(np.searchsorted(times, end, 'left')), len(times) - 1)
    used = times[min(low, high): high + 1]
    hole = max(*np.diff(used), used[0] - start, end - used[-1], 0.0)
    if hole > max_gap:
        raise GyroGap(
            f'the gyro is silent for {hole:.3f} s between the frames, more than {max_gap} s: '
            'samples were lost, or its clock is another'
        )
    inner = times[(times > start) & (times < end)]
    at = np.concatenate([[start], inner, [end]])
    values = np.stack([np.interp(at, times, axis) for axis in rates.T], axis=1)
    steps = np.diff(at)[:, None]
    return (0.5 * (values[1:] + values[:-1]) * steps).sum(axis=0) / (end - start)
