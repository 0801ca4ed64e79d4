# SPDX-License-Identifier: Apache-2.0
"""What `launch` and `config` hold beside the node's own: they name what is there."""

import configparser
import importlib.util
import json
from pathlib import Path
import re
import sys
import types
import xml.etree.ElementTree as ElementTree

from node_rig import Rig
from perceiver_flow_ros.ros.parameters import BY_NAME
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'config'
MADE_BY_OTHERS = {'/camera/image_raw', '/camera/camera_info', '/diagnostics'}


class Action:
    """Stands for anything of the launch libraries: keeps what it was made with."""

    made = []

    def __init__(self, *arguments, **fields):
        self.arguments, self.fields = arguments, fields
        Action.made.append(self)


def stand_in(name):
    module = types.ModuleType(name)
    module.__getattr__ = lambda kind: type(kind, (Action,), {})
    return module


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate a launch file with stand-ins: everything that it makes, by kind."""
    share = tmp_path / 'share' / 'perceiver_flow_ros'
    index = tmp_path / 'share' / 'ament_index' / 'resource_index' / 'packages'
    share.mkdir(parents=True)
    index.mkdir(parents=True)
    (index / 'perceiver_flow_ros').touch()
    for name in ('launch', 'config'):
        (share / name).symlink_to(ROOT / name)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    for name in (
        'launch', 'launch.actions', 'launch.conditions', 'launch.substitutions', 'launch_ros',
        'launch.launch_description_sources', 'launch_ros.actions',
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, stand_in(name))

    def load(name):
        path = ROOT / 'launch' / f'{name}.launch.py'
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        Action.made = []
        module.generate_launch_description()
        found = {}
        for action in Action.made:
            found.setdefault(type(action).__name__, []).append(action)
        return found, module

    return load


def includes(found, declared):
    """Give the arguments of each included perceiver_flow.launch.py, checked."""
    given = []
    for include in found['IncludeLaunchDescription']:
        (path,) = include.arguments[0].arguments
        assert Path(path).resolve() == ROOT / 'launch' / 'perceiver_flow.launch.py'
        given.append(dict(include.fields['launch_arguments']))
        assert set(given[-1]) <= set(declared)
    for declaration in found['DeclareLaunchArgument']:
        assert len(declaration.fields['description']) > 10
    return given


def test_replay(evaluate):
    _, node = evaluate('perceiver_flow')
    found, module = evaluate('replay')
    (given,) = includes(found, node.ARGUMENTS)
    assert {'image', 'params_file', 'model'} <= set(given)
    (bag,) = found['ExecuteProcess']
    assert bag.fields['cmd'][:3] == ['ros2', 'bag', 'play'] and '--clock' in bag.fields['cmd']
    (viewer,) = found['Node']
    assert viewer.fields['package'] == 'rviz2' and Path(viewer.fields['arguments'][1]).is_file()
    assert viewer.fields['condition'].arguments[0].arguments == ('rviz',)
    parameters = yaml.safe_load(Path(module.ARGUMENTS['params_file'][0]).read_text())
    values = parameters['/**']['ros__parameters']
    assert values.pop('use_sim_time') and values['process_every_frame']
    for name, value in values.items():
        assert BY_NAME[name].problem(value) == '' and type(value) is type(BY_NAME[name].default)


def test_two_cameras(evaluate):
    _, node = evaluate('perceiver_flow')
    found, _ = evaluate('two_cameras')
    left, right = includes(found, node.ARGUMENTS)
    assert (left['namespace'], right['namespace']) == ('left', 'right')
    assert left['image'].arguments == ('left',) and right['image'].arguments == ('right',)
    assert len(found['GroupAction']) == 2  # no argument leaks from one into the other


@pytest.fixture(scope='module')
def topics():
    """Give what a running node publishes, hears and serves."""
    published, heard, served = set(), set(), set()
    for transport in ('raw', 'compressed'):
        scale = {'raw': 'depth', 'compressed': 'range'}[transport]
        rig = Rig(
            model='dis', image_transport=transport, scale_source=scale, gyro='check',
            base_frame='base_link', base_from_camera='0 0 0 0 0 0', publish_tf=True,
        )  # fmt: skip
        try:
            published |= {p.topic_name for p in rig.node.publishers}
            heard |= {s.topic_name for s in rig.node.subscriptions}
            served |= {s.service_name for s in rig.node.services}
        finally:
            rig.close()
    return published, heard, served


def test_sros2_policy_allows_what_the_node_does(topics):
    profile = ElementTree.parse(CONFIG / 'sros2_policy.xml').getroot().find('.//profile')
    assert (profile.get('ns'), profile.get('node')) == ('/', 'perceiver_flow')

    def allowed(kind, what):
        names = [e.text for e in profile.findall(f"{kind}[@{what}='ALLOW']/*")]
        assert len(names) == len(set(names)) > 3
        return {
            name if name.startswith('/') else f'/{name.replace("~", "perceiver_flow")}'
            for name in names
        }

    published, heard, served = topics
    assert published <= allowed('topics', 'publish')
    assert heard <= allowed('topics', 'subscribe')
    assert served <= allowed('services', 'reply')
    extra = allowed('topics', 'publish') - published
    assert extra <= {'/tf', '/perceiver_flow/transition_event', '/rosout', '/parameter_events'}


def test_viewers_show_what_the_node_publishes(topics):
    known = topics[0] | MADE_BY_OTHERS
    rviz = yaml.safe_load((CONFIG / 'rviz.rviz').read_text())
    shown = [d['Topic']['Value'] for d in rviz['Visualization Manager']['Displays']
             if 'Topic' in d]  # fmt: skip
    assert len(shown) >= 3 and set(shown) <= known
    text = (CONFIG / 'foxglove.json').read_text()
    layout = json.loads(text)
    named = set(re.findall(r'"(/[\w/]+)', text))
    assert '/perceiver_flow/flow/color' in named and named <= known
    placed = set(re.findall(r'"(\w+!\w+)"', json.dumps(layout['layout'])))
    assert placed == set(layout['configById'])


def test_systemd_unit():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(CONFIG / 'perceiver_flow.service')
    command = unit['Service']['ExecStart']
    assert 'perceiver_flow_ros' in command and 'perceiver_flow.launch.py' in command
    assert (ROOT / 'launch' / 'perceiver_flow.launch.py').is_file()
    assert unit['Service']['Restart'] == 'always'  # launch ends well when a node of it does not
    assert unit['Service']['KillSignal'] == 'SIGINT' and unit['Install']['WantedBy']
