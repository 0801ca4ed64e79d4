# SPDX-License-Identifier: Apache-2.0
"""What `benchmark --device cuda` times: a network, set up, with pairs that take turns."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from perceiver_flow_ros.commands.benchmark import frame_pair
from perceiver_flow_ros.flow.lite import LiteEstimator
from perceiver_flow_ros.flow.official_cuda import CudaFlow
from perceiver_flow_ros.flow.replay import Replay
from perceiver_flow_ros.model.official import patches
import torch

# What is timed on the device, the whole pair on the host, and what gives the flow of the first
Task = tuple[Callable[[int], object], Callable[[int], object], Callable[[], np.ndarray]]


def pairs_of(size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Make four pairs to take turns, as of a camera: each begins with the frame before."""
    first, second = frame_pair(*size)
    frames = [first, second, 255 - first, second[:, ::-1].copy()]
    return list(zip(frames, [*frames[1:], first]))


def moving_parts(height: int, width: int) -> np.ndarray:
    """Make a pair of which the middle goes another way, far and before the rest."""
    first, second = frame_pair(height, width)
    y, x = slice(height // 3, 2 * height // 3), slice(width // 3, 2 * width // 3)
    second[y, x] = np.roll(first[::-1, ::-1], (height // 20, -width // 10), (0, 1))[y, x]
    first[y, x] = first[::-1, ::-1][y, x]
    return np.stack([first, second])


def of_peer(peer: Any, precision: torch.dtype, size: tuple[int, int],
            device: torch.device) -> Task:
    """Set up transformers in a precision, its patches ready on the device."""
    peer = peer.to(precision)
    frames = [torch.from_numpy(np.stack(pair))[None].to(device) for pair in pairs_of(size)]
    inputs = [patches(f).unflatten(-1, (2, 27)).permute(0, 3, 4, 1, 2).to(peer.dtype)
              for f in frames]

    def task(i: int) -> None:
        peer(inputs=inputs[i % 4])
    return task, task, lambda: 20 * peer(inputs=inputs[0]).logits[0].float().cpu().numpy()


def of_pairs(flow_of: CudaFlow, replay: Replay, size: tuple[int, int],
             device: torch.device) -> Task:
    """Set up ours, from frames on the host to flow on the device, fetched for the result only."""
    pairs = pairs_of(size)

    def task(i: int) -> None:
        flow_of.launch(*pairs[i % 4])
        if replay.stream is not None:
            torch.cuda.current_stream(device).wait_stream(replay.stream)
    return task, lambda i: flow_of.launch(*pairs[i % 4]), lambda: flow_of(*pairs[0])


def of_lite(estimator: LiteEstimator, size: tuple[int, int], device: torch.device) -> Task:
    """Set up lite; refinement, where the setting has it, is on the CPU and part of the host's."""
    pairs, replay = pairs_of(size), estimator.replay

    def task(i: int) -> None:
        estimator.launch(*pairs[i % 4])
        if replay.stream is not None:
            torch.cuda.current_stream(device).wait_stream(replay.stream)

    def flow() -> np.ndarray:
        with replay.context():
            return replay.fetch(estimator.launch(*moving_parts(*size)))
    return task, lambda i: estimator(*pairs[i % 4]), flow
