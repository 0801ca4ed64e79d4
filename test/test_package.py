# SPDX-License-Identifier: Apache-2.0
"""What is installed: entry points, dependencies, colcon, pip, the installed node, `run`."""

import ast
from distutils.core import run_setup  # setuptools brings it where Python no longer has it
import importlib
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree

import cv2
import numpy as np
from perceiver_flow_ros.flow.files import write_image
import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = 'perceiver_flow_ros'
DOMAIN = 61

# The rosdep key of every module that is no ROS package of the same name.
KEYS = {
    'cv2': 'python3-opencv',
    'huggingface_hub': 'python3-huggingface-hub-pip',
    'numpy': 'python3-numpy',
    'pytest': 'python3-pytest',
    'rosbags': 'python3-rosbags-pip',
    'safetensors': 'python3-transformers-pip',
    'skimage': 'python3-skimage',
    'sklearn': 'python3-sklearn',
    'torch': 'python3-torch',
    'tqdm': 'python3-tqdm',
    'transformers': 'python3-transformers-pip',
    'yaml': 'python3-yaml',
}
# Done without where it is missing, and no rosdep key: torch's CUDA build brings it.
OPTIONAL = {'triton'}
PACKAGE_XML = ElementTree.parse(ROOT / 'package.xml').getroot()


def declared(*kinds):
    return {element.text for kind in kinds for element in PACKAGE_XML.iter(kind)}


def imported(*folders):
    """Give {module: files} of what the Python files below some folders import from elsewhere."""
    found = {}
    for file in (f for folder in folders for f in (ROOT / folder).rglob('*.py')):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.partition('.')[0] for name in names}:
                if name != NAME and name not in sys.stdlib_module_names:
                    found.setdefault(name, set()).add(file.relative_to(ROOT).as_posix())
    return found


def setup():
    """Give what setup.py says."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return run_setup('setup.py', stop_after='init')
    finally:
        os.chdir(before)


def test_every_entry_point_is_there():
    scripts = setup().entry_points['console_scripts']
    assert len(scripts) == 3
    for script in scripts:
        module, function = script.partition('=')[2].strip().split(':')
        assert callable(getattr(importlib.import_module(module), function)), script


def test_every_import_is_declared_in_package_xml():
    keys = declared('depend', 'exec_depend') | OPTIONAL
    for module, files in imported(NAME, 'launch').items():
        assert KEYS.get(module, module) in keys, f'{module}, imported by {sorted(files)}'


def test_every_dependency_in_package_xml_is_used():
    modules = imported(NAME, 'launch', 'test')
    used = {KEYS.get(module, module) for module in modules} | {'python3-pytest-timeout'}
    used |= {
        'python3-skimage',
        'python3-sklearn',
    }  # for the pictures they ship: no import statement
    assert declared('depend', 'exec_depend', 'test_depend') <= used


def test_one_version_everywhere():
    version = PACKAGE_XML.findtext('version')
    assert setup().metadata.version == version
    assert re.search(
        rf'^{re.escape(version)} ', (ROOT / 'CHANGELOG.rst').read_text(), re.MULTILINE
    )


def test_what_the_two_commands_install_is_pinned():
    for file in ROOT.glob('requirements*.txt'):
        for line in file.read_text().splitlines():
            if line and not line.startswith('#'):
                assert re.match(r'[\w.-]+==\S+( ; python_version .*)?$', line), (
                    f'{file.name}: {line}'
                )


CORE = ('model', 'flow', 'odometry', 'training')


def test_the_core_knows_nothing_of_ros():
    ros = {'rclpy', 'cv_bridge', 'sensor_msgs', 'std_msgs', 'launch', 'rosbags'}
    assert not ros & imported(*(f'{NAME}/{name}' for name in CORE)).keys()


def test_ruff_finds_nothing():
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', '--no-cache', '.'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--cache-dir', tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# Installed by colcon and by pip, from a copy of the sources


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    copy = tmp_path_factory.mktemp('source') / NAME
    ignore = shutil.ignore_patterns(
        '.*', '__pycache__', '*.egg-info', 'build', 'install', 'log', 'out'
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@pytest.fixture(scope='module')
def workspace(source):
    """Give the install space of `colcon build`."""
    beside_python = Path(sys.executable).parent
    colcon = shutil.which('colcon', path=f'{beside_python}:{os.environ["PATH"]}')
    done = subprocess.run(
        [colcon, '--log-base', 'log', 'build', '--paths', source],
        cwd=source.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'Finished <<< {NAME}' in done.stdout
    return source.parent / 'install' / NAME


def site_packages(prefix):
    """Give the folder below a prefix where its Python packages lie."""
    return Path(sysconfig.get_path('purelib', vars={'base': str(prefix)}))


def installed_environment(prefix):
    """Give the environment in which only what is installed below the prefix is found."""
    path = [str(prefix), os.environ['AMENT_PREFIX_PATH']]
    environment = {**os.environ, 'AMENT_PREFIX_PATH': ':'.join(path), 'ROS_DOMAIN_ID': str(DOMAIN)}
    return {**environment, 'PYTHONPATH': str(site_packages(prefix))}


def check_share(prefix):
    share = prefix / 'share' / NAME
    assert (share / 'package.xml').is_file()
    for folder in ('launch', 'config'):
        installed = {f.name for f in (share / folder).iterdir() if f.is_file()}
        assert installed == {f.name for f in (ROOT / folder).iterdir() if f.is_file()}
    assert (prefix / 'share/ament_index/resource_index/packages' / NAME).is_file()
    weights = [f.relative_to(ROOT) for f in (ROOT / NAME).rglob('*.safetensors')]
    assert weights, 'the lite weights are not in the package'
    for file in weights:
        assert (site_packages(prefix) / file).read_bytes() == (ROOT / file).read_bytes()


def check_command(executable, prefix, folder):
    """Let an installed perceiver_flow estimate something."""
    for name in ('a.png', 'b.png'):
        write_image(folder / name, np.zeros((40, 50, 3), np.uint8))
    command = [
        executable,
        'estimate',
        'a.png',
        'b.png',
        '-o',
        'flow.flo',
        '--model',
        'dis',
        '--json',
    ]
    done = subprocess.run(
        command, cwd=folder, env=installed_environment(prefix), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['flow_size'] == [50, 40]


def test_colcon_installs_everything(workspace, tmp_path):
    check_share(workspace)
    executables = workspace / 'lib' / NAME
    assert sorted(f.name for f in executables.iterdir()) == [
        'fetch_weights',
        'perceiver_flow',
        'perceiver_flow_node',
    ]
    check_command(executables / 'perceiver_flow', workspace, tmp_path)


@pytest.mark.slow
def test_pip_installs_everything(source, tmp_path):
    prefix = tmp_path / 'prefix'
    command = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation']
    command += ['--ignore-installed', '--prefix', prefix, source]
    subprocess.run(command, check=True, capture_output=True)
    check_share(prefix)
    check_command(prefix / 'bin' / 'perceiver_flow', prefix, tmp_path)


def test_the_installed_node_turns_images_into_flow(workspace, tmp_path):
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image

    config = workspace / 'share' / NAME / 'config' / 'perceiver_flow.yaml'
    node_command = [
        workspace / 'lib' / NAME / 'perceiver_flow_node',
        '--ros-args',
        '--params-file',
        config,
    ]
    node_command += ['-p', 'model:=dis', '-r', 'image:=/camera/image_raw']
    picture = np.random.default_rng(0).integers(0, 256, (120, 1000), np.uint8)
    picture = cv2.normalize(cv2.GaussianBlur(picture, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)

    with open(tmp_path / 'node.log', 'w') as log:
        process = subprocess.Popen(
            node_command,
            cwd=tmp_path,
            env=installed_environment(workspace),
            stdout=log,
            stderr=log,
        )
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=DOMAIN)
    try:
        node = rclpy.create_node('camera', context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        flows = []
        node.create_subscription(
            Image, '/perceiver_flow/flow', flows.append, qos_profile_sensor_data
        )
        publisher = node.create_publisher(Image, '/camera/image_raw', qos_profile_sensor_data)
        deadline = time.monotonic() + 60
        frame = 0
        while not flows:  # the picture moves by 2 px to the right in every frame
            assert process.poll() is None, (tmp_path / 'node.log').read_text()
            assert time.monotonic() < deadline, (tmp_path / 'node.log').read_text()
            if publisher.get_subscription_count():
                frame += 1
                image = Image(height=120, width=160, encoding='mono8', step=160)
                image.header.frame_id = 'front'
                image.header.stamp.sec, image.header.stamp.nanosec = (
                    1 + frame // 10,
                    frame % 10 * 10**8,
                )
                left = 800 - 2 * frame
                image.data.frombytes(picture[:, left: left + 160].tobytes())
                publisher.publish(image)
            executor.spin_once(timeout_sec=0.2)
        process.send_signal(signal.SIGINT)
        code = process.wait(20)
    finally:
        process.kill()
        process.wait()
        rclpy.shutdown(context=context)

    assert code == 0, (tmp_path / 'node.log').read_text()
    flow = flows[0]
    assert (flow.width, flow.height, flow.encoding, flow.step) == (160, 120, '32FC2', 160 * 8)
    assert flow.header.frame_id == 'front'
    vectors = np.frombuffer(flow.data, np.float32).reshape(120, 160, 2)
    u, v = np.nanmedian(vectors, axis=(0, 1))
    frames_apart = max(round(u / 2), 1)  # more than one where the node was busy
    np.testing.assert_allclose((u, v), (2 * frames_apart, 0), atol=0.2)


# ./run, as far as it says what is missing


@pytest.fixture
def checkout(tmp_path):
    """Give a folder with `run` and what it installs from, and an environment for it."""
    folder = tmp_path / 'checkout'
    folder.mkdir()
    for name in ['run', 'setup.py', *(f.name for f in ROOT.glob('requirements*.txt'))]:
        shutil.copy(ROOT / name, folder)
    environment = {
        k: v for k, v in os.environ.items() if k not in ('ROS_DISTRO', 'AMENT_PREFIX_PATH')
    }
    environment.update(PYTHON=sys.executable)
    return folder, environment


def stand_in(folder, name, script):
    """Put a program of that name before all others; give the PATH for it."""
    bin_folder = folder / 'bin'
    bin_folder.mkdir(exist_ok=True)
    (bin_folder / name).write_text(f'#!/bin/sh\n{script}\n')
    (bin_folder / name).chmod(0o755)
    return f'{bin_folder}:{os.environ["PATH"]}'


def refusal(checkout, **changes):
    folder, environment = checkout
    done = subprocess.run(
        [folder / 'run', 'setup'], env={**environment, **changes}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert 'run: error: ' in done.stderr
    assert not (folder / '.venv' / 'ready-base').exists()
    return done.stderr


def test_run_tells_how_it_is_used(checkout):
    done = subprocess.run(
        [checkout[0] / 'run', '--help'], capture_output=True, text=True, check=True
    )
    for word in (
        './run demo',
        './run test [--quick]',
        './run setup',
        'PYTHON=',
        'TORCH_INDEX_URL',
    ):
        assert word in done.stdout


def test_run_says_what_is_missing(checkout, tmp_path):
    old = 'case $1 in --version) echo Python 3.9.1;; *) exit 1;; esac'
    path = stand_in(tmp_path, 'old-python', old)
    assert 'old-python is no Python 3.10 to 3.13' in refusal(
        checkout, PATH=path, PYTHON='old-python'
    )
    assert 'no Python 3.10' in refusal(checkout, PYTHON='no-such-python')

    no_venv = f'case "$2" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac'
    path = stand_in(tmp_path, 'no-venv-python', no_venv)
    message = refusal(checkout, PATH=path, PYTHON='no-venv-python')
    assert 'has no venv module' in message and 'apt install python3-venv' in message

    path = stand_in(tmp_path, 'uname', 'case $1 in -s) echo Linux;; *) echo aarch64;; esac')
    message = refusal(checkout, PATH=path)
    assert 'Linux aarch64' in message and 'install ROS 2, source it' in message

    no_rclpy = f'case "$2" in *rclpy*) exit 1;; *) exec {sys.executable} "$@";; esac'
    path = stand_in(tmp_path, 'no-rclpy-python', no_rclpy)
    ros = {'ROS_DISTRO': 'kilted', 'AMENT_PREFIX_PATH': '/opt/ros/kilted'}
    message = refusal(checkout, PATH=path, PYTHON='no-rclpy-python', **ros)
    assert 'ROS 2 kilted is sourced, but no-rclpy-python cannot import its rclpy' in message

    script = no_rclpy.replace('*rclpy*', '*event_handler*').replace(' *)', ' *rclpy*) ;; *)')
    path = stand_in(tmp_path, 'humble-python', script)
    ros = {'ROS_DISTRO': 'humble', 'AMENT_PREFIX_PATH': '/opt/ros/humble'}
    message = refusal(checkout, PATH=path, PYTHON='humble-python', **ros)
    assert 'ROS 2 humble is sourced: too old' in message and 'Iron or newer' in message


def test_run_remembers_where_torch_came_from(checkout, tmp_path):
    """Else the next command would throw the small build away and load several GB."""
    folder, environment = checkout
    venv, said = folder / '.venv', tmp_path / 'pip'
    script = f"""case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
    "-m pip") echo "$@" >>{said};;
    "-m perceiver_flow_ros") ;;
    *) exec {sys.executable} "$@";;
    esac"""
    environment.update(PATH=stand_in(tmp_path, 'recording-python', script))
    environment.update(PYTHON='recording-python')

    def run(**changes):
        before = said.read_text() if said.exists() else ''
        subprocess.run([folder / 'run', 'info'], env={**environment, **changes}, check=True)
        return said.read_text().removeprefix(before)

    small, other = '--extra-index-url https://small', '--extra-index-url https://other'
    assert small in run(TORCH_INDEX_URL='https://small')
    (venv / 'mark').touch()
    assert run() == '' and (venv / 'mark').exists()
    with open(folder / 'requirements.txt', 'a') as file:
        file.write('# changed\n')
    assert small in run() and not (venv / 'mark').exists()
    assert other in run(TORCH_INDEX_URL='https://other')
    assert '--extra-index-url' not in run(TORCH_INDEX_URL='')


@pytest.mark.slow
def test_run_says_that_there_is_no_network_and_begins_anew_after_it(checkout):
    nowhere = {'PIP_INDEX_URL': 'http://127.0.0.1:9/simple', 'PIP_CONFIG_FILE': os.devnull}
    message = refusal(checkout, **nowhere, PIP_FIND_LINKS='', PIP_NO_CACHE_DIR='1')
    assert 'the package registry cannot be reached' in message
    assert (checkout[0] / '.venv' / 'unfinished').exists()
    (checkout[0] / '.venv' / 'left-over').touch()
    refusal(checkout, **nowhere, PIP_FIND_LINKS='', PIP_NO_CACHE_DIR='1')
    assert not (checkout[0] / '.venv' / 'left-over').exists()
