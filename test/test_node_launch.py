# SPDX-License-Identifier: Apache-2.0
"""The launch file: what it passes on, and for real where the launch libraries are installed."""

import importlib.util
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import types

from node_rig import DOMAIN
from perceiver_flow_ros.ros.parameters import BY_NAME
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH_FILE = ROOT / 'launch' / 'perceiver_flow.launch.py'


@pytest.fixture
def prefix(tmp_path):
    """Make an install prefix as colcon makes it, of symbolic links."""
    share = tmp_path / 'share' / 'perceiver_flow_ros'
    index = tmp_path / 'share' / 'ament_index' / 'resource_index' / 'packages'
    executables = tmp_path / 'lib' / 'perceiver_flow_ros'
    for folder in (share, index, executables):
        folder.mkdir(parents=True)
    (index / 'perceiver_flow_ros').touch()
    for name in ('launch', 'config'):
        (share / name).symlink_to(ROOT / name)
    script = executables / 'perceiver_flow_node'
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m perceiver_flow_ros.ros.node "$@"\n')
    script.chmod(0o755)
    return tmp_path


class Recorded:
    """Stands for a launch action: keeps what it was made with."""

    def __init__(self, *arguments, **fields):
        self.arguments, self.fields = arguments, fields


@pytest.fixture
def launched(prefix, monkeypatch):
    """Evaluate the launch file with stand-ins for the launch libraries: the node's fields."""
    actions = {
        name: type(name, (Recorded,), {}) for name in ('DeclareLaunchArgument', 'OpaqueFunction')
    }
    modules = {
        'launch': {'LaunchDescription': list},
        'launch.actions': actions,
        'launch_ros': {},
        'launch_ros.actions': {'Node': Recorded},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix))
    monkeypatch.delenv('FASTDDS_DEFAULT_PROFILES_FILE')

    def evaluate(**given):
        spec = importlib.util.spec_from_file_location('launch_file', LAUNCH_FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        *declared, start = module.generate_launch_description()
        values = {a.arguments[0]: a.fields['default_value'] for a in declared}
        assert all(a.fields['description'] for a in declared) and set(given) <= set(values)
        context = types.SimpleNamespace(launch_configurations={**values, **given})
        (node,) = start.fields['function'](context)
        return node.fields

    return evaluate


def test_defaults(launched, prefix):
    node = launched()
    share = prefix / 'share' / 'perceiver_flow_ros'
    assert (node['package'], node['executable']) == ('perceiver_flow_ros', 'perceiver_flow_node')
    assert node['parameters'] == [str(share / 'config' / 'perceiver_flow.yaml'), {}]
    assert yaml.safe_load(Path(node['parameters'][0]).read_text())
    names = ('image', 'camera_info', 'depth', 'range', 'imu')
    assert node['remappings'] == [(name, name) for name in names]
    profile = node['additional_env']['FASTDDS_DEFAULT_PROFILES_FILE']
    assert Path(profile) == share / 'config' / 'fastdds.xml' and Path(profile).exists()


def test_arguments(launched, monkeypatch):
    node = launched(
        image='/front/image_raw', model='dis', device='cpu', namespace='robot', imu='/imu/data',
    )  # fmt: skip
    assert node['namespace'] == 'robot'
    assert node['parameters'][1] == {'model': 'dis', 'device': 'cpu'}
    assert set(node['parameters'][1]) <= set(BY_NAME)
    assert dict(node['remappings']) == {
        'image': '/front/image_raw', 'camera_info': '/front/camera_info',
        'depth': 'depth', 'range': 'range', 'imu': '/imu/data',
    }  # fmt: skip
    assert launched(image_transport='compressed')['parameters'][1] == {
        'image_transport': 'compressed'
    }
    node = launched(camera_info='/calibration', params_file='mine.yaml', fastdds_profile='')
    assert dict(node['remappings'])['camera_info'] == '/calibration'
    assert node['parameters'][0] == 'mine.yaml' and node['additional_env'] == {}
    monkeypatch.setenv('FASTDDS_DEFAULT_PROFILES_FILE', '/of/the/robot.xml')
    environment = launched()['additional_env']
    assert environment == {'FASTDDS_DEFAULT_PROFILES_FILE': '/of/the/robot.xml'}


@pytest.mark.skipif(
    not importlib.util.find_spec('launch_ros'),
    reason='launch_ros comes with ROS, not from a package registry',
)
def test_for_real(prefix):
    run = (
        'import sys\n'
        'from launch import LaunchDescription, LaunchService\n'
        'from launch.actions import IncludeLaunchDescription\n'
        'from launch.launch_description_sources import PythonLaunchDescriptionSource\n'
        'service = LaunchService()\n'
        'source = PythonLaunchDescriptionSource(sys.argv[1])\n'
        'arguments = [word.split(":=") for word in sys.argv[2:]]\n'
        'included = IncludeLaunchDescription(source, launch_arguments=arguments)\n'
        'service.include_launch_description(LaunchDescription([included]))\n'
        'sys.exit(service.run())\n'
    )
    arguments = ['image:=/front/image_raw', 'model:=dis', 'namespace:=robot']
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    prefixes = os.pathsep.join([str(prefix), os.environ['AMENT_PREFIX_PATH']])
    environment = {
        **os.environ, 'PYTHONPATH': path, 'AMENT_PREFIX_PATH': prefixes,
        'ROS_DOMAIN_ID': str(DOMAIN),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, '-c', run, str(LAUNCH_FILE), *arguments],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if 'flow of /front/image_raw on /robot/perceiver_flow/flow' in line:
                break
        process.send_signal(signal.SIGINT)
        lines += process.communicate(timeout=60)[0].splitlines()
    finally:
        process.kill()
    assert any('process has finished cleanly' in line for line in lines), json.dumps(
        lines, indent=1
    )
