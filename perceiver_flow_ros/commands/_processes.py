# SPDX-License-Identifier: Apache-2.0
"""ROS processes that talk on this machine only, and end with the one that started them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
import queue
import signal
import subprocess
import sys
import tempfile
import threading

CAMERA = {'image': '/camera/image_raw', 'camera_info': '/camera/camera_info'}
TERMINATED = 'SIGTERM'  # beside the names of the children
TO_END = 5.0  # seconds for a process to end
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be


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
                return child.wait(TO_END)
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


class RunError(Exception):
    """A run that gave nothing; the text says what was seen of its processes."""


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
