# SPDX-License-Identifier: Apache-2.0
"""Parameters: one table, the config file made of it, refusals at start and live."""

from pathlib import Path
import re
import threading

from node_rig import Estimator, Rig
from perceiver_flow_ros.ros import parameter_file, parameters
from perceiver_flow_ros.ros.parameters import SETTINGS
import pytest
from rcl_interfaces.srv import DescribeParameters
from rclpy.exceptions import ParameterException
from ros_images import image_message, picture
import yaml

CONFIG = Path(__file__).parents[1] / 'config' / 'perceiver_flow.yaml'


def test_config_file_is_the_table():
    text = CONFIG.read_text()
    values = yaml.safe_load(text)['/**']['ros__parameters']
    assert values == {s.name: s.default for s in SETTINGS}
    assert {k: type(v) for k, v in values.items()} == {s.name: type(s.default) for s in SETTINGS}
    assert text == parameter_file.to_yaml(), 'make it anew, as its head says'
    above = re.findall(r'((?:    # .*\n)+)    (\w+):', text)
    assert [name for _, name in above] == [s.name for s in SETTINGS]
    for (comment, _), s in zip(above, SETTINGS):
        assert s.description in ' '.join(comment.replace('#', ' ').split())


def test_every_choice_is_text_for_yaml():
    """As `ros2 param set` and parameter files read it: a bare off would be false."""
    for s in SETTINGS:
        assert [yaml.safe_load(str(choice)) for choice in s.choices or ()] == [*(s.choices or ())]


def test_what_ros2_param_dump_writes_is_read(tmp_path):
    path = tmp_path / 'dumped.yaml'
    path.write_text('/perceiver_flow:\n  ros__parameters:\n    gyro_noise: 1e-3\n'
                    '    start_type_description_service: true\n    use_sim_time: false\n')
    assert parameter_file.read_yaml(path).gyro_noise == 0.001


@pytest.mark.parametrize(
    ('name', 'value', 'text'),
    [
        ('precision', 'float8', "precision is 'float8', expected one of auto, float32, bfloat16"),
        ('query_stride', 3, 'query_stride is 3, expected one of 1, 2, 4, 8'),
        ('queue_size', 0, 'queue_size out of range'),
        ('max_frame_gap', -1.0, 'max_frame_gap out of range'),
        ('max_frame_gap', float('nan'), 'max_frame_gap out of range'),
        ('max_frame_gap', 1, "of type 'INTEGER', expecting type 'DOUBLE'"),
        ('model', ' ', 'model is empty'),
        ('image_reliability', 'rely', 'expected one of best_effort, reliable'),
    ],
)
def test_refused_at_start(name, value, text):
    with pytest.raises(ParameterException, match=re.escape(text)):
        Rig(start=False, **{name: value})


@pytest.fixture
def rig():
    """Load a stand-in that refuses some settings; `loads` lists the attempts."""
    loads = []

    def load(model, **settings):
        loads.append((model, settings))
        if settings['device'] == 'cuda':
            raise ValueError('no CUDA device')
        estimator = Estimator()
        estimator.name = model
        return estimator

    r = Rig(loader=load).connect()
    r.loads = loads
    yield r
    r.close()


def test_a_misspelled_parameter_is_named(capfd):
    rig = Rig(loader=lambda *_, **__: Estimator(), start=False, modle='dis')
    rig.close()
    assert "'modle' is no parameter of this node" in capfd.readouterr().err


def test_every_parameter_is_described(rig):
    request = DescribeParameters.Request(names=[s.name for s in SETTINGS])
    for s, d in zip(
        SETTINGS, rig.call(DescribeParameters, 'describe_parameters', request).descriptors
    ):
        assert d.description == s.description and len(s.description) > 20
        assert d.read_only == s.fixed
        numeric = isinstance(s.default, (int, float)) and not isinstance(s.default, bool)
        assert not numeric or d.integer_range or d.floating_point_range or d.additional_constraints
        if s.choices:
            assert s.default in s.choices and str(s.choices[-1]) in d.additional_constraints


def test_live_changes(rig):
    rig.send(picture(), 1.0)
    rig.send(picture(), 1.1)
    assert len(rig.loads) == 1
    assert rig.loads[0] == ('lite', {
        'device': 'auto', 'precision': 'auto', 'tiling': 'tile', 'quality': 'auto',
        'query_stride': 1, 'allow_download': False,
    })  # fmt: skip
    assert rig.set(model='other', query_stride=2) == ''
    assert len(rig.loads) == 2 and rig.node.pipeline.estimator.name == 'other'
    rig.send(picture(), 1.2)
    assert rig.flows(2) == [(1.0, 1.1), (1.1, 1.2)]  # the pair goes on
    rig.until(lambda: rig.statuses['flow'].values['model'] == 'other')

    assert rig.set(max_frame_gap=0.01, model='other') == ''
    assert len(rig.loads) == 2  # nothing to load
    rig.send(picture(), 1.3)
    rig.status('flow', 'exceed max_frame_gap (0.01 s)')


def test_a_refused_change_leaves_the_old_value_working(rig):
    rig.send(picture(), 1.0)
    assert rig.set(model='third', device='cuda') == 'no CUDA device'
    assert 'expected one of 1, 2, 4, 8' in rig.set(query_stride=5)
    assert 'out of range' in rig.set(threads=-1)
    assert 'read-only' in rig.set(image_reliability='reliable')
    assert 'out of range' in rig.set(image_timeout=float('nan'))
    for name in ('model', 'device', 'query_stride', 'threads'):
        assert rig.node.get_parameter(name).value == parameters.BY_NAME[name].default
        assert getattr(rig.node.settings, name) == parameters.BY_NAME[name].default
    rig.send(picture(), 1.1)
    assert rig.flows(1) == [(1.0, 1.1)]
    assert rig.node.pipeline.estimator.name == 'lite'


def test_the_model_is_exchanged_between_two_frames(rig):
    begun, go_on = threading.Event(), threading.Event()
    rig.node.pipeline.estimator.before = lambda: (begun.set(), go_on.wait())
    rig.send(picture(), 1.0)
    rig.publish(image_message(picture(), 1.1))
    rig.until(begun.is_set)
    threading.Timer(0.2, go_on.set).start()
    assert rig.set(model='other') == ''  # waits for the frame under way
    assert go_on.is_set()
    rig.send(picture(), 1.2)
    assert rig.flows(2) == [(1.0, 1.1), (1.1, 1.2)]


def test_threads(rig):
    cv2 = pytest.importorskip('cv2')
    torch = pytest.importorskip('torch')
    before = rig.node.pipeline.worker.submit(torch.get_num_threads).result()
    assert rig.set(threads=1) == ''
    assert rig.node.pipeline.worker.submit(torch.get_num_threads).result() == 1
    assert cv2.getNumThreads() == 1
    assert rig.set(threads=0) == ''
    assert rig.node.pipeline.worker.submit(torch.get_num_threads).result() == before


def test_diagnostics_period(rig):
    assert rig.set(diagnostics_period=1000.0) == ''
    rig.statuses.clear()
    for i in range(5):
        rig.send(picture(), 1 + i / 10)
    assert rig.statuses == {}
    assert rig.set(diagnostics_period=0.05) == ''
    rig.status('flow', 'flows per second')


def test_readme_has_every_parameter_and_its_default():
    readme = (CONFIG.parents[1] / 'README.md').read_text()
    for setting in SETTINGS:
        default = str(setting.default)
        default = default.lower() if isinstance(setting.default, bool) else default
        assert f'| `{setting.name}` | {default} | {setting.description}' in readme
