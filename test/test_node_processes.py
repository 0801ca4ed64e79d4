# SPDX-License-Identifier: Apache-2.0
"""The node as people run it: a process, fed and read by other processes over Fast DDS."""

import json
import os
from pathlib import Path
import pickle
import signal
import subprocess
import sys

import cv2
from node_rig import DOMAIN
import numpy as np
from perceiver_flow_ros.ros.parameters import SETTINGS
import pytest
from ros_images import picture
from test_node import BAD_IMAGES

ROOT = Path(__file__).parents[1]
PROCESS = Path(__file__).with_name('ros_process.py')
NODE = ['-m', 'perceiver_flow_ros.ros.node', '--ros-args']
REMAPPED = ['-r', 'image:=/camera/image_raw', '-r', 'camera_info:=/camera/camera_info']
FAST_DIS = ['-p', 'model:=dis', '-p', 'quality:=fast', '-p', 'diagnostics_period:=0.05']
FRAMES = 30
TIMEOUT = 120  # s


@pytest.fixture
def start():
    """Start Python processes in a ROS domain of this test's own; none survives it."""
    processes = []

    def run(*arguments, **environment):
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        env = {**os.environ, 'PYTHONPATH': path, 'ROS_DOMAIN_ID': str(DOMAIN), **environment}
        env = {name: value for name, value in env.items() if value is not None}
        command = [sys.executable, *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def end(process, number=signal.SIGINT):
    """Tell a node to end; return what it logged."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert 'Traceback' not in errors
    return errors


def result(process):
    """Wait for a process that prints JSON."""
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.fixture
def sequence(tmp_path):
    """30 frames (bgr8, the first pixel telling which) as a file and an array, and their stamps."""
    folder = ROOT.parent / 'shared' / 'data' / 'seq' / '7scenes'
    files = sorted(folder.glob('*.color.jpg'))[:FRAMES]
    if len(files) == FRAMES:
        frames = np.stack([cv2.imread(str(file)) for file in files])
    else:
        frames = np.stack([picture(shift=i, height=480, width=640) for i in range(FRAMES)])
    for i, frame in enumerate(frames):
        frame[0, 0] = i
    np.save(tmp_path / 'frames.npy', frames)
    times = [1_700_000_000 * 10**9 + i * 33_333_333 for i in range(FRAMES)]
    return tmp_path / 'frames.npy', frames, [list(divmod(time, 10**9)) for time in times]


def test_thirty_frames_give_twenty_nine_flows(start, sequence):
    path, frames, stamps = sequence
    params = ['--params-file', ROOT / 'config' / 'perceiver_flow.yaml', *FAST_DIS]
    node = start(*NODE, *params, *REMAPPED)
    reader = start(PROCESS, 'reader', FRAMES - 1)
    camera = start(PROCESS, 'camera', path, json.dumps(stamps))
    got = result(reader)
    values = result(camera)
    end(node)

    height, width = frames.shape[1:3]
    assert got['complete']
    assert [m['stamp'] for m in got['flow']] == stamps[1:]
    assert [m['stamp'] for m in got['flow/previous']] == stamps[1:]
    assert [m['previous'] for m in got['flow/previous']] == stamps[:-1]
    colored = [m['stamp'] for m in got['flow/color']]
    assert colored == sorted(colored) and colored[-1] == stamps[-1]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    for color in got['flow/color']:
        assert color['frame_id'] == 'camera' and color['size'] == [width, height]
        assert (color['encoding'], color['step']) == ('rgb8', width * 3)
        assert color['bytes'] == width * height * 3
    for i, flow in enumerate(got['flow']):
        assert flow['frame_id'] == 'camera' and flow['size'] == [width, height]
        assert (flow['encoding'], flow['step']) == ('32FC2', width * 8)
        assert flow['bytes'] == width * height * 8
        if i % 7 == 0:  # it is the flow of these two frames
            grey = [cv2.cvtColor(frames[k], cv2.COLOR_BGR2GRAY) for k in (i, i + 1)]
            assert flow['mean'] == pytest.approx(dis.calc(*grey, None).mean((0, 1)), abs=0.05)
    flow = values['perceiver_flow: flow']
    assert (flow['flows'], flow['dropped'], flow['failed']) == ('29', '0', '0')
    assert values['perceiver_flow: input']['topic'] == '/camera/image_raw'
    assert values['perceiver_flow: camera_info']['size'] == f'{width}x{height}'


def test_a_slow_model_uses_the_newest_frame_and_counts_the_others(start, sequence):
    path, _, stamps = sequence
    node = start(PROCESS, 'slow-node', '--ros-args', *FAST_DIS, *REMAPPED)
    reader = start(PROCESS, 'reader', 8)
    camera = start(PROCESS, 'camera', path, json.dumps(stamps), '--burst')
    got = result(reader)
    values = result(camera)
    end(node)

    # Four frames arrive during each inference; the next one takes the fourth, never an older one,
    # so no flow is ever more than one inference late.
    used = [0, 1, 5, 9, 13, 17, 21, 25, 29]
    assert [m['stamp'] for m in got['flow']] == [stamps[i] for i in used[1:]]
    assert [m['previous'] for m in got['flow/previous']] == [stamps[i] for i in used[:-1]]
    flow = values['perceiver_flow: flow']
    assert (flow['flows'], flow['dropped'], flow['failed']) == ('8', '21', '0')
    assert int(flow['received']) == int(flow['processed']) + 21


@pytest.mark.slow
def test_bad_images_do_not_end_the_process(start, tmp_path):
    kinds = [(pixels, fields) for pixels, fields, _ in BAD_IMAGES.values()]
    with open(tmp_path / 'images.pickle', 'wb') as file:
        pickle.dump({'good': picture(), 'bad': kinds}, file)
    node = start(*NODE, *FAST_DIS, *REMAPPED)
    camera = start(PROCESS, 'malformed', tmp_path / 'images.pickle')
    said = result(camera)
    log = end(node, signal.SIGTERM)
    for (*_, text), message in zip(BAD_IMAGES.values(), said, strict=True):
        assert text in message
    assert f'image of /camera/image_raw refused: {said[0].split(": ", 1)[1]}' in log


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_during_an_inference(start, sequence, number):
    path, _, stamps = sequence
    node = start(PROCESS, 'slow-node', '--ros-args', *FAST_DIS, *REMAPPED)
    reader = start(PROCESS, 'reader', 1)
    camera = start(PROCESS, 'camera', path, json.dumps(stamps), '--until-begun')
    assert result(camera)
    end(node, number)  # whose estimator would wait for frames that never come
    reader.kill()


def test_a_run_leaves_no_shared_memory(start):
    """What is left, 70 MB a run with config/fastdds.xml, would stay until the machine restarts."""
    node = start(*NODE, *FAST_DIS, *REMAPPED)
    assert any('flow of /camera/image_raw' in line for line in node.stderr)
    maps = Path(f'/proc/{node.pid}/maps').read_text().split()
    files = {Path(name) for name in maps if name.startswith('/dev/shm/fastdds_')}
    segments = {file for file in files if not file.name.startswith('fastdds_port')}
    assert sum(file.stat().st_size for file in segments) > 2**26
    end(node)
    assert not [file for file in segments if file.exists()]


def test_help_names_every_parameter(start):
    node = start(*NODE, '--help')
    output, errors = node.communicate(timeout=TIMEOUT)
    assert node.returncode == 0 and errors == ''
    assert output.startswith('usage: perceiver_flow_node ')
    for setting in SETTINGS:
        assert f'    {setting.name}: ' in output


@pytest.mark.parametrize(('arguments', 'text'), [
    (['--ros-args', '-p', 'query_stride:=3'], 'query_stride is 3, expected one of 1, 2, 4, 8'),
    (['--model', 'dis'], "unknown argument '--model'; parameters are given as --ros-args -p "),
])
def test_what_is_wrong_at_start_is_one_line_and_code_2(start, arguments, text):
    node = start(*NODE[:2], *arguments)
    output, errors = node.communicate(timeout=TIMEOUT)
    assert node.returncode == 2 and output == ''
    assert len(errors.splitlines()) == 1 and errors.startswith('perceiver_flow_node: error: ')
    assert text in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ('parameters', 'text', 'remedy'),
    [
        ({'model': '/no/such/weights'}, '/no/such/weights', {'model': 'dis'}),
        ({'device': 'cuda'}, 'no CUDA device', {'model': 'dis', 'device': 'cpu'}),
    ],
)
def test_a_model_that_does_not_load_leaves_the_process_alive(start, parameters, text, remedy):
    if 'device' in parameters and Path('/proc/driver/nvidia/version').exists():
        pytest.skip('there is a CUDA device here')
    given = [f'{name}:={value}' for name, value in parameters.items()]
    node = start(*NODE, *(word for pair in given for word in ('-p', pair)), *REMAPPED)
    said = result(start(PROCESS, 'operator', json.dumps(remedy)))
    log = end(node)
    assert said['before'] == 'unconfigured' and said['after'] == 'active'
    assert 'cannot configure: ' in said['diagnostics'] and text in said['diagnostics']
    assert said['diagnostics'] in log and 'ros2 lifecycle set /perceiver_flow configure' in log


@pytest.mark.slow
def test_images_lost_by_the_stock_transport_are_noticed(start):
    """Fast DDS without this package's profile loses nearly every VGA image sent best effort."""
    stock = {'FASTDDS_DEFAULT_PROFILES_FILE': None}
    node = start(*NODE, *FAST_DIS, *REMAPPED, **stock)
    said = result(start(PROCESS, 'flood', **stock))
    log = end(node)
    assert 'were lost on the way (/camera/image_raw)' in said and 'config/fastdds.xml' in said
    assert 'were lost on the way' in log
