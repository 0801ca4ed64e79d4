# SPDX-License-Identifier: Apache-2.0
"""The processes of the demo: a camera, the flow node and a recorder, talking on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import ctypes
from dataclasses import dataclass
import json
import os
from pathlib import Path
import pickle
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

CAMERA = {'image': '/camera/image_raw', 'camera_info': '/camera/camera_info'}
OUTPUTS = ('flow', 'flow/previous', 'flow/color', 'twist', 'odometry')
NODE = {name: f'/perceiver_flow/{name}' for name in OUTPUTS}
TERMINATED = 'SIGTERM'  # beside the names of the children
SHORTEST_WAIT = 5.0  # seconds for the last flow, and for a process to end
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be


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


class Processes:
    """
    Child processes that end with this one, whatever happens to it.

    Parameters
    ----------
    folder : where their logs go.
    domain : ROS_DOMAIN_ID, so that nothing else on this machine is heard.

    """

    def __init__(self, folder: Path, domain: int) -> None:
        self._folder = folder
        self._children: dict[str, subprocess.Popen] = {}
        # Unlike a Queue it takes a line from a signal handler, too.
        self._lines: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        self.environment = {
            **os.environ,
            'ROS_DOMAIN_ID': str(domain),
            'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
            'ROS_LOG_DIR': str(folder / 'log'),
            'FASTDDS_DEFAULT_PROFILES_FILE': str(fast_dds_profile()),
        }
        self.environment.setdefault('AMENT_PREFIX_PATH', sys.prefix)
        package = Path(__file__).resolve().parents[2]
        if package.name not in ('site-packages', 'dist-packages'):  # a checkout
            path = os.environ.get('PYTHONPATH')
            self.environment['PYTHONPATH'] = (
                f'{package}{os.pathsep}{path}' if path else str(package)
            )

    def __enter__(self) -> Processes:
        """Let a SIGTERM to this process run the clean-up, too."""
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def _terminate(self, *_: object) -> None:
        # Python drops what is raised while it forks: then `next_line` finds this line.
        self._lines.put((TERMINATED, None))
        sys.exit(143)

    def __exit__(self, *_: object) -> None:
        """Stop all children."""
        for name in self._children:
            self.stop(name)
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def start(self, name: str, module: str, *arguments: str, topics: dict[str, str]) -> None:
        """Start `python -m MODULE ARGUMENTS`; `topics` are remappings."""
        remaps = [word for pair in topics.items() for word in ('-r', ':='.join(pair))]
        ros = [] if '--ros-args' in arguments else ['--ros-args']
        with self._log(name).open('w') as log:
            child = subprocess.Popen(
                [sys.executable, '-m', module, *arguments, *ros, *remaps],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._children[name] = child
        threading.Thread(target=self._read, args=(name, child), daemon=True).start()

    def next_line(self, timeout: float) -> tuple[str, str | None]:
        """
        Wait for a line of any child's stdout: (name, line); (name, None) when it ended.

        Raises
        ------
        TimeoutError
            When none comes in `timeout` seconds.

        """
        try:
            name, line = self._lines.get(timeout=max(timeout, 0))
        except queue.Empty:
            raise TimeoutError from None
        if name == TERMINATED:
            sys.exit(143)
        return name, line

    def stop(self, name: str) -> int:
        """Ask a child to end, insist if it does not; give its exit code."""
        child = self._children[name]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            try:
                if child.poll() is None:
                    os.killpg(child.pid, number)
                return child.wait(SHORTEST_WAIT)
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        return child.wait()

    def exit_code(self, name: str) -> int | None:
        """Give the exit code of a child, None while it runs."""
        return self._children[name].poll()

    def log_tail(self, lines: int = 12) -> str:
        """Give the last lines that each child wrote to stderr."""
        parts = []
        for name in self._children:
            text = self._log(name).read_text(errors='replace').splitlines()[-lines:]
            parts += [f'--- {name}', *(f'    {line}' for line in text)]
        return '\n'.join(parts)

    def _log(self, name: str) -> Path:
        return self._folder / f'{name}.log'

    def _read(self, name: str, child: subprocess.Popen) -> None:
        for line in child.stdout or ():
            self._lines.put((name, line.strip()))
        child.wait()
        self._lines.put((name, None))


class DemoError(Exception):
    """A run that gave nothing; the text says what was seen of its processes."""


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
    DemoError
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
            raise DemoError(f'the recorder failed\n{processes.log_tail()}')
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
            raise DemoError(f'{what} within {timeout:g} s\n{processes.log_tail()}') from None
        if line is None and (name != 'camera' or not sent):
            code = processes.exit_code(name)
            raise DemoError(f'the {name} ended with code {code}\n{processes.log_tail()}')
        if line is None:
            continue
        if name == 'recorder' and line.startswith('error: '):
            if not arrivals:
                raise DemoError(f'the node says: {line.removeprefix("error: ")}')
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


def fast_dds_profile() -> Path:
    """
    Find config/fastdds.xml of this package, installed or in a checkout.

    Raises
    ------
    FileNotFoundError
        When it is in neither place.

    """
    places = [Path(__file__).resolve().parents[2]]
    try:
        from ament_index_python.packages import get_package_share_directory

        places.append(Path(get_package_share_directory('perceiver_flow_ros')))
    except (ImportError, LookupError, OSError):  # no ROS index, or we are not in it
        pass
    places.append(Path(sys.prefix) / 'share' / 'perceiver_flow_ros')
    for place in places:
        if (place / 'config' / 'fastdds.xml').is_file():
            return place / 'config' / 'fastdds.xml'
    raise FileNotFoundError(2, 'The Fast DDS profile is not installed', 'config/fastdds.xml')


def own_domain() -> int:
    """Choose a ROS_DOMAIN_ID that another demo on this machine hardly has, of those ROS allows."""
    return 80 + os.getpid() % 20


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Make a folder for files that pass; it is gone at the end."""
    return tempfile.TemporaryDirectory(prefix='perceiver_flow_demo_')


def _die_with_parent() -> None:
    """Have the kernel end this process when its parent dies, even of SIGKILL (Linux)."""
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except AttributeError:
        pass
