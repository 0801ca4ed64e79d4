# SPDX-License-Identifier: Apache-2.0
"""A run of the demo: the flow node between a camera and a recorder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import json
from pathlib import Path
import pickle
import statistics
import sys
import time
from typing import Any, NamedTuple

from perceiver_flow_ros.commands._processes import CAMERA, Processes, RunError

OUTPUTS = ('flow', 'flow/previous', 'flow/color', 'twist', 'odometry')
NODE = {name: f'/perceiver_flow/{name}' for name in OUTPUTS}
SHORTEST_WAIT = 5.0  # seconds for the last flow


class Message(NamedTuple):
    """A message as the recorder received it, serialised."""

    topic: str
    kind: str  # sensor_msgs/msg/Image
    received: int  # nanoseconds
    data: bytes


@dataclass
class Recording:
    """What came of a run."""

    file: Path
    sent: list[int]  # stamps of the images, nanoseconds
    complete: bool  # the flow that leads to the last image came

    def messages(self) -> Iterator[Message]:
        """Give the messages in the order of arrival."""
        with self.file.open('rb') as file:
            while True:
                try:
                    yield Message(*pickle.load(file))  # noqa: S301 (our own recorder wrote it)
                except EOFError:
                    return


def record_flow(
    footage: Callable[[Path], tuple[Path, Path, int]],
    folder: Path,
    *,
    rate: float,
    parameters: dict[str, Any],
    domain: int,
    timeout: float,
) -> Recording:
    """
    Run the flow node between a camera and a recorder.

    Parameters
    ----------
    footage : makes the camera's files in a folder while the node loads its model, and returns the
        images', the camera_info's, and how many images there are.
    folder : for files that pass.
    rate : of the camera, Hz.
    parameters : of the node.
    domain : ROS_DOMAIN_ID.
    timeout : seconds to wait for the first flow, or for another one while images are sent.

    Raises
    ------
    RunError
        When a process fails, or nothing comes.

    """
    with Processes(folder, domain) as processes:
        settings = [w for k, v in parameters.items() for w in ('-p', f'{k}:={json.dumps(v)}')]
        processes.start(
            'node', 'perceiver_flow_ros.ros.node', '--ros-args', *settings, topics=CAMERA
        )
        file = folder / 'messages.pickle'
        processes.start(
            'recorder', 'perceiver_flow_ros.ros.recorder', str(file), topics={**CAMERA, **NODE}
        )
        images, info, count = footage(folder)
        # Both the node and the recorder take the images; the camera waits for them.
        options = [str(images), str(info), '--rate', str(rate), '--subscribers', '2']
        processes.start('camera', 'perceiver_flow_ros.ros.camera', *options, topics=CAMERA)
        sent, complete = _follow(processes, count, timeout)
        if processes.stop('recorder') != 0:
            raise RunError(f'the recorder failed\n{processes.log_tail()}')
        return Recording(file, sent, complete)


def _follow(processes: Processes, count: int, timeout: float) -> tuple[list[int], bool]:
    """Wait until the flow that leads to the last image has come: (stamps sent, whether it has)."""
    from tqdm import tqdm

    with tqdm(None, 'flowing', count - 1, unit='flow', disable=None, file=sys.stderr) as progress:
        return _follow_lines(processes, timeout, progress)


def _follow_lines(processes: Processes, timeout: float, progress) -> tuple[list[int], bool]:
    sent: list[int] = []
    arrivals: list[float] = []
    last = 0
    start = time.monotonic()
    deadline = start + timeout
    while not sent or last < sent[-1]:
        try:
            name, line = processes.next_line(deadline - time.monotonic())
        except TimeoutError:
            if arrivals and sent:
                return sent, False  # an image that the transport lost leads to no flow
            what = 'no flow came' if not arrivals else 'no further flow came'
            raise RunError(f'{what} within {timeout:g} s\n{processes.log_tail()}') from None
        if line is None and (name != 'camera' or not sent):
            code = processes.exit_code(name)
            raise RunError(f'the {name} ended with code {code}\n{processes.log_tail()}')
        if line is None:
            continue
        if name == 'recorder' and line.startswith('error: '):
            if not arrivals:
                raise ValueError(f'the node says: {line.removeprefix("error: ")}')
        elif name == 'recorder':
            last = int(line)
            arrivals.append(time.monotonic())
            progress.update()
            deadline = arrivals[-1] + timeout
        elif name == 'camera':
            sent = json.loads(line)
        if sent and arrivals:
            deadline = min(deadline, arrivals[-1] + _patience([start, *arrivals]))
    return sent, True


def _patience(times: list[float]) -> float:
    """Seconds to wait for a flow that may not come: a few of the usual intervals."""
    return max(SHORTEST_WAIT, 5 * statistics.median(b - a for a, b in zip(times, times[1:])))
