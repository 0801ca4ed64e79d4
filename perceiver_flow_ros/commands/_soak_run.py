# SPDX-License-Identifier: Apache-2.0
"""One run of camera, node and meter as processes, and what was seen of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import cv2
import numpy as np
from perceiver_flow_ros.commands._processes import (
    CAMERA,
    own_domain,
    Processes,
    RunError,
    temporary_folder,
)

FRAMES = 24  # that the camera sends over and over
STEP = 3  # px of motion from one to the next
START = 90.0  # s for the node to be there
MODULE = 'perceiver_flow_ros.ros.'
QUIET = 15.0  # s after which the node must have finished what it took


@dataclass
class Sample:
    """What the meter saw between two diagnostics, `time` seconds after the first flow."""

    time: float
    latency: list[float]  # ms, of each flow
    published: float  # ms from stamp to publication, as the node measures it; mean of the last 100
    inference: float  # ms, of the same
    memory: float  # MB, resident
    counts: dict[str, int]  # received, processed, dropped, flows, failed


@dataclass
class Run:
    """Everything that was seen of a run."""

    sent: int = 0
    samples: list[Sample] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """The node's counts at the end."""
        return self.samples[-1].counts

    def latency(self, first: float = 0.0, last: float = 1.0) -> np.ndarray:
        """Give the latencies (n,) in ms of a part of the run, from 0 (start) to 1 (end)."""
        end = self.samples[-1].time
        part = [s for s in self.samples if first * end <= s.time <= last * end]
        return np.array([late for s in part for late in s.latency])


def run(
    *, seconds: float, rate: float, width: int, height: int, parameters: dict[str, Any],
    title: str,
) -> Run:  # fmt: skip
    """
    Send images at a rate (Hz) for some seconds through the node; wait until it is done with them.

    Raises
    ------
    RunError
        When a process fails or nothing comes.

    """
    with temporary_folder() as name, Processes(Path(name), own_domain()) as processes:
        _start_node(processes, parameters)
        _start_meter(processes)
        _wait(processes, 'the node subscribed to by the meter', _is_ready)
        footage = write_footage(Path(name), width, height)
        _start_camera(processes, footage, rate, max(round(seconds * rate), 2))
        return _follow(processes, seconds, title)


def start_up(
    *, rate: float, width: int, height: int, parameters: dict[str, Any]
) -> dict[str, float]:  # fmt: skip
    """
    Start the node while images and a listener are there already; times in seconds.

    Returns
    -------
    `first flow`: from the start of the process to the first flow at the listener; `imports`: what
    a process of its own needs to import the same, just before.

    Raises
    ------
    RunError
        When a process fails or nothing comes.

    """
    with temporary_folder() as name, Processes(Path(name), own_domain()) as processes:
        footage = write_footage(Path(name), width, height)
        _start_meter(processes)
        _start_camera(processes, footage, rate, round(START * rate), subscribers=0)
        modules = ['perceiver_flow_ros.ros.node']
        if parameters['model'] != 'dis':
            modules += ['torch', 'perceiver_flow_ros.flow.lite']
        for _ in range(2):  # the first time fills caches
            begun = time.time()
            subprocess.run(
                [sys.executable, '-c', f'import {", ".join(modules)}'],
                env=processes.environment, check=True,
            )  # fmt: skip
        imported = time.time()
        _start_node(processes, parameters)
        report = _wait(processes, 'the first flow', lambda line: line['first'] is not None)
        return {'first flow': report['first'] - imported, 'imports': imported - begun}


def _start_node(processes: Processes, parameters: dict[str, Any]) -> None:
    settings = [w for k, v in parameters.items() for w in ('-p', f'{k}:={json.dumps(v)}')]
    processes.start('node', f'{MODULE}node', '--ros-args', *settings, topics=CAMERA)


def _start_meter(processes: Processes) -> None:
    processes.start('meter', f'{MODULE}meter', topics={'flow': '/perceiver_flow/flow'})


def _start_camera(
    processes: Processes, footage: tuple[Path, Path], rate: float, count: int, subscribers: int = 1
) -> None:
    processes.start(
        'camera', f'{MODULE}camera', *(str(file) for file in footage), '--rate', str(rate),
        '--count', str(count), '--subscribers', str(subscribers), topics=CAMERA,
    )  # fmt: skip


def write_footage(folder: Path, width: int, height: int) -> tuple[Path, Path]:
    """Write images that move to and fro, serialised, and their camera_info, for the camera."""
    from perceiver_flow_ros.commands import bagfile

    noise = np.random.default_rng(0).integers(0, 256, (height, width + FRAMES * STEP, 3), np.uint8)
    texture = cv2.GaussianBlur(noise, (0, 0), 3)
    texture = cv2.normalize(texture, texture, 0, 255, cv2.NORM_MINMAX)
    header = bagfile.header_message(0, 'camera_optical_frame')
    shifts = [STEP * min(i, FRAMES - i) for i in range(FRAMES)]
    messages = [
        bagfile.image_message(texture[:, s: s + width], 'rgb8', header) for s in shifts
    ]  # fmt: skip
    rows = [bagfile.TYPES.serialize_cdr(m, 'sensor_msgs/msg/Image') for m in messages]
    np.save(folder / 'images.npy', np.stack([np.frombuffer(row, np.uint8) for row in rows]))
    k = [width, 0, width / 2, 0, width, height / 2, 0, 0, 1]
    p = [*k[:3], 0, *k[3:6], 0, *k[6:], 0]
    info = bagfile.camera_info_message(
        width, height, 'plumb_bob', [0] * 5, k, [1, 0, 0, 0, 1, 0, 0, 0, 1], p
    )
    data = bagfile.TYPES.serialize_cdr(info, 'sensor_msgs/msg/CameraInfo')
    (folder / 'info.bin').write_bytes(bytes(data))
    return folder / 'images.npy', folder / 'info.bin'


def _is_ready(line: dict[str, Any]) -> bool:
    values = line['values'].get('flow', {})
    return values.get('subscribers of /perceiver_flow/flow') == '1'


def _wait(
    processes: Processes, what: str, condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    end = time.monotonic() + START
    while True:
        try:
            name, line = processes.next_line(end - time.monotonic())
        except TimeoutError:
            raise RunError(f'in vain for {what}\n{processes.log_tail()}') from None
        if line is None:
            raise RunError(f'the {name} ended\n{processes.log_tail()}')
        if name == 'meter' and condition(report := json.loads(line)):
            return report


def _follow(processes: Processes, seconds: float, title: str) -> Run:
    from tqdm import tqdm

    found, begun, quiet = Run(), None, float('inf')
    with tqdm(None, title, round(seconds), unit='s', disable=None, file=sys.stderr) as progress:
        while True:
            now = time.monotonic()
            patience = min(START if begun is None else QUIET, quiet - now)
            try:
                name, line = processes.next_line(patience)
            except TimeoutError:
                raise RunError(f'nothing is heard any more\n{processes.log_tail()}') from None
            if name == 'camera':
                found.sent = found.sent or len(json.loads(line or '[]'))
                quiet = min(quiet, time.monotonic() + QUIET)
            elif line is None:
                raise RunError(f'the {name} ended\n{processes.log_tail()}')
            elif name == 'meter':
                report = json.loads(line)
                if begun is None and not report['latency']:
                    continue
                begun = begun or now
                sample = _sample(now - begun, report)
                done = sample.counts['processed'] + sample.counts['dropped']
                if found.sent and not sample.latency and done == sample.counts['received']:
                    return found
                found.samples.append(sample)
                progress.update(max(0, round(now - begun) - progress.n))


def _sample(now: float, report: dict[str, Any]) -> Sample:
    flow = report['values']['flow']
    names = ('received', 'processed', 'dropped', 'flows', 'failed')
    return Sample(
        now,
        report['latency'],
        _mean(flow['latency']),
        _mean(flow['inference']),
        float(flow['memory'].split()[0]),
        {name: int(flow[name]) for name in names},
    )


def _mean(text: str) -> float:
    """Read 12.3 from `mean 12.3 ms, p95 ...`; NaN where the node says something else."""
    words = text.split()
    return float(words[1]) if words[0] == 'mean' else float('nan')
