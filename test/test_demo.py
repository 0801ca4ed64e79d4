# SPDX-License-Identifier: Apache-2.0
"""The demo: real processes over Fast DDS, and what it says, draws and stores of them."""

import argparse
import importlib.util
import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import cv2
import numpy as np
from perceiver_flow_ros.commands import _demo_pictures as demo_pictures
from perceiver_flow_ros.commands import bagfile, main
from perceiver_flow_ros.commands._processes import Processes
import pytest
from rosbags.highlevel import AnyReader

ROOT = Path(__file__).resolve().parents[1]
IMAGE = '/camera/image_raw'
FLOW = '/perceiver_flow/flow'
needs_ros = pytest.mark.skipif(
    importlib.util.find_spec('rclpy') is None, reason='no rclpy in this Python'
)


def demo(*arguments, domain, **options):
    command = [sys.executable, '-m', 'perceiver_flow_ros', 'demo', '--model', 'dis']
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return subprocess.run(
        [*command, '--domain-id', str(domain), *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def read(bag):
    """Read a bag into {topic: [message]}."""
    content = {}
    with AnyReader([bag]) as reader:
        for connection, _, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            content.setdefault(connection.topic, []).append(message)
    return content


def nanoseconds(stamp):
    return stamp.sec * 10**9 + stamp.nanosec


def still_frames(folder, count=6, size=(64, 96)):
    """Write frames of noise that moves by (3, 1) pixels a frame."""
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.uniform(0, 255, (200, 200)).astype(np.float32), (0, 0), 1.5)
    noise = np.clip((noise - 127) * 3 + 127, 0, 255).astype(np.uint8)
    folder.mkdir()
    for i in range(count):
        x, y = 60 - 3 * i, 60 - i
        cv2.imwrite(f'{folder}/frame{i}.png', noise[y: y + size[0], x: x + size[1]])
    return folder


@needs_ros
@pytest.mark.slow
def test_rendered_drive_end_to_end(tmp_path):
    result = demo('--frames', 8, '-o', tmp_path / 'out', '--json', domain=90)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report['frames_sent'] == 8
    assert 1 <= report['flows_received'] <= 7
    assert report['dropped'] == 7 - report['flows_received']
    assert (report['model'], report['device'], report['size']) == ('dis', 'cpu', [640, 480])
    late = report['latency_ms']
    assert 0 < late['p50'] <= late['p95'] <= late['max']
    # DIS on a scene that moves by about 7 px a frame: far better than nothing.
    assert report['epe_zero_visible'] > 4
    assert report['epe_visible'] < 0.4 * report['epe_zero_visible']
    assert report['epe_visible'] < report['epe'] < report['epe_zero']

    content = read(tmp_path / 'out' / 'drive.mcap')
    assert len(content[IMAGE]) == len(content['/camera/camera_info']) == 8
    stamps = [nanoseconds(m.header.stamp) for m in content[IMAGE]]
    assert np.allclose(np.diff(stamps) / 1e9, 0.1, atol=0.5)
    info = content['/camera/camera_info'][0]
    assert (info.width, info.height, info.k[0], info.distortion_model) == (
        640,
        480,
        500,
        'plumb_bob',
    )
    flows = content[FLOW]
    assert len(flows) == report['flows_received']
    colored = [c.header.stamp for c in content['/perceiver_flow/flow/color']]
    assert colored and all(c in [f.header.stamp for f in flows] for c in colored)
    for flow, reference in zip(flows, content['/perceiver_flow/flow/previous']):
        assert (flow.encoding, flow.width, flow.height) == ('32FC2', 640, 480)
        assert flow.header.stamp == reference.header.stamp
        assert (
            nanoseconds(reference.time_ref)
            in stamps[: stamps.index(nanoseconds(flow.header.stamp))]
        )
    assert nanoseconds(flows[-1].header.stamp) == stamps[-1]  # the newest frame was used

    with AnyReader([tmp_path / 'out' / 'drive.mcap']) as reader:  # what Foxglove can open
        assert {c.msgdef.format.name for c in reader.connections} == {'MSG'}
        assert {c.ext.serialization_format for c in reader.connections} == {'cdr'}
    with (tmp_path / 'out' / 'drive.mcap').open('rb') as file:
        assert b'\x04\0\0\0ros2' in file.read(40)  # its profile

    for name, rows in (('panel', 2), ('timeline', 4)):
        picture = cv2.imread(report['files'][name])
        assert picture.shape[0] > 150 * rows and picture.shape[1] > 600
        assert picture.std() > 30
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'drive.mcap', 'panel.png', 'timeline.png', 'trajectory.png',
    ]  # fmt: skip


@needs_ros
@pytest.mark.slow
def test_own_images_then_the_bag_of_that(tmp_path):
    frames = still_frames(tmp_path / 'frames')
    first = demo('--images', frames, '-o', tmp_path / 'a', '--rate', 5, domain=91)
    assert first.returncode == 0, first.stderr
    table = {
        line.split('  ')[1].strip(): line for line in first.stdout.splitlines() if '  ' in line
    }
    assert table['frames sent'].split()[2] == '6'
    assert {'flows received', 'dropped', 'latency p50', 'latency p95'} < table.keys()
    assert 'EPE' not in table  # nothing to compare with
    bag = tmp_path / 'a' / 'drive.mcap'
    again = demo('--bag', bag, '-o', tmp_path / 'b', '--frames', 4, '--json', domain=91)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)['frames_sent'] == 4
    for folder, count in (('a', 6), ('b', 4)):
        content = read(tmp_path / folder / 'drive.mcap')
        assert [m.encoding for m in content[IMAGE]] == ['mono8'] * count
        assert content['/camera/camera_info'][0].k[0] == 0  # uncalibrated, and it says so
        flow = content[FLOW][-1]
        field = np.frombuffer(flow.data, '<f4').reshape(flow.height, flow.width, 2)
        stamps = [nanoseconds(m.header.stamp) for m in content[IMAGE]]
        reference = content['/perceiver_flow/flow/previous'][-1]
        frames = stamps.index(nanoseconds(flow.header.stamp)) - stamps.index(
            nanoseconds(reference.time_ref)
        )
        np.testing.assert_allclose(
            np.median(field.reshape(-1, 2), axis=0), (3 * frames, frames), atol=0.3
        )


@needs_ros
@pytest.mark.slow
def test_a_model_that_is_not_there_and_a_sigterm(tmp_path):
    frames = still_frames(tmp_path / 'frames')
    result = demo('--images', frames, '-o', tmp_path, '--model', '/no/such', domain=92)
    assert result.returncode == 2
    assert 'the node says: cannot configure: /no/such' in result.stderr
    assert not (tmp_path / 'drive.mcap').exists()

    # Ended from outside while its children run: they end, too.
    command = [
        sys.executable,
        '-m',
        'perceiver_flow_ros',
        'demo',
        '--model',
        'dis',
        '--images',
        frames,
    ]
    command += ['-o', tmp_path, '--rate', '0.1', '--domain-id', '93']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(tmp_path)}
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        children = wait_for_children(process)
        process.send_signal(number)
        assert process.wait(30) in (143, -signal.SIGKILL)
        for child in children:
            wait_until_gone(child)
    assert not (tmp_path / 'drive.mcap').exists()


class Dropped:
    """What is raised while this goes is dropped, as what is raised while Python forks."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_sigterm_that_python_drops_is_found(tmp_path):
    with pytest.raises(SystemExit) as ended, Processes(tmp_path, 94) as processes:
        Dropped()
        processes.next_line(5)
    assert ended.value.code == 143


def wait_for_children(process):
    """Wait until node, recorder and camera run; give their process ids."""
    tasks = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    while True:
        assert process.poll() is None
        found = [int(pid) for pid in tasks.read_text().split()]
        if len(found) == 3 and all('_ros.ros.' in command_line(pid) for pid in found):
            return found


def command_line(pid):
    try:
        return Path(f'/proc/{pid}/cmdline').read_text()
    except OSError:
        return ''


def wait_until_gone(pid):
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    import select

    assert select.select([descriptor], [], [], 30)[0], f'{pid} still runs'
    os.close(descriptor)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--frames', '1'], '--frames is 1, expected 2'),
        (['--rate', '0'], '--rate is 0'),
        (['--image-topic', '/a'], '--image-topic goes with --bag'),
        (['--images', '/no/such/folder'], '/no/such/folder: No such'),
        (['--bag', 'a', '--video', 'b'], 'not allowed with'),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: True)
    monkeypatch.chdir(tmp_path)
    try:
        code = main.main(['demo', *arguments])
    except SystemExit as error:
        code = error.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.count('\n') == 1 and message in output.err
    assert list(tmp_path.iterdir()) == []


def test_without_ros_it_says_what_to_do(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert main.main(['demo', '-o', str(tmp_path / 'out')]) == 2
    assert 'rclpy' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def footage(**options):
    from perceiver_flow_ros.commands._demo_frames import Footage

    defaults = {'bag': None, 'video': None, 'images': None, 'rate': 10.0, 'seed': 0, 'frames': 60}
    return Footage(argparse.Namespace(**{**defaults, 'image_topic': None, **options}))


def test_frames_that_differ_are_refused(tmp_path):
    frames = still_frames(tmp_path / 'frames')
    cv2.imwrite(f'{frames}/frame9.png', np.zeros((20, 20), np.uint8))
    with pytest.raises(ValueError, match='frame 7 is 20x20 mono8, the first is 96x64 mono8'):
        footage(images=frames).store(tmp_path)
    with pytest.raises(ValueError, match='single frame'):
        footage(images=frames / '*9.png').store(tmp_path)
    chosen = footage(images=frames / '*[0-5].png')
    images, info, count = chosen.store(tmp_path)
    assert count == 6 and np.load(images).shape[0] == 6 and info.stat().st_size > 100
    expected = cv2.imread(f'{frames}/frame2.png', cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(chosen.image(2).data.reshape(64, 96), expected)


def test_frames_of_a_video(tmp_path):
    video = cv2.VideoWriter(f'{tmp_path}/a.avi', cv2.VideoWriter_fourcc(*'MJPG'), 10, (96, 64))
    for value in (40, 80, 120, 160):
        video.write(np.full((64, 96, 3), (value, 0, 200), np.uint8))
    video.release()
    film = footage(video=tmp_path / 'a.avi', frames=3)
    assert film.store(tmp_path)[2] == 3
    third = film.image(2)
    assert (third.encoding, third.width, third.height) == ('bgr8', 96, 64)
    np.testing.assert_allclose(third.data.reshape(-1, 3).mean(axis=0), (120, 0, 200), atol=4)
    (tmp_path / 'b.avi').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='neither a folder nor a video'):
        footage(video=tmp_path / 'b.avi').store(tmp_path)


def test_frames_of_a_bag(tmp_path):
    image = np.zeros((64, 96, 3), np.uint8)
    jpeg = cv2.imencode('.jpg', image + np.uint8([10, 20, 250]))[1]
    compressed = bagfile.TYPES.types['sensor_msgs/msg/CompressedImage']
    header = bagfile.header_message(0, 'cam')
    k = [90.0, 0, 48, 0, 90, 32, 0, 0, 1]
    info = bagfile.camera_info_message(96, 64, 'plumb_bob', [0.0] * 5, k, k, [*k, 0, 0, 0])
    with bagfile.BagWriter(tmp_path / 'bag.mcap') as bag:
        for i in range(3):
            packed = compressed(header, 'jpeg', jpeg.ravel())
            topic = '/front/image_raw/compressed'
            bag.write(topic, 'sensor_msgs/msg/CompressedImage', packed, i)
            for topic in ('/left/image_raw', '/left/depth'):
                message = bagfile.image_message(image[..., 0] + np.uint8(i), 'mono8', header)
                bag.write(topic, 'sensor_msgs/msg/Image', message, i)
            bag.write('/left/camera_info', 'sensor_msgs/msg/CameraInfo', info, i)
    left = footage(bag=tmp_path / 'bag.mcap')  # of the two raw ones the name decides
    _, file, count = left.store(tmp_path)
    assert count == 3 and left.image(2).data.max() == 2
    read_info = bagfile.TYPES.deserialize_cdr(file.read_bytes(), 'sensor_msgs/msg/CameraInfo')
    assert list(read_info.k) == k
    front = footage(bag=tmp_path / 'bag.mcap', image_topic='/front/image_raw/compressed')
    _, file, _ = front.store(tmp_path)
    assert front.image(0).encoding == 'bgr8' and abs(int(front.image(0).data[2]) - 250) < 5
    read_info = bagfile.TYPES.deserialize_cdr(file.read_bytes(), 'sensor_msgs/msg/CameraInfo')
    assert read_info.k[0] == 0  # another camera's is not its own
    with pytest.raises(ValueError, match='/x is no image topic of it; these are: /front'):
        footage(bag=tmp_path / 'bag.mcap', image_topic='/x').store(tmp_path)
    with pytest.raises(ValueError, match='not a bag'):
        footage(bag=tmp_path).store(tmp_path)


def test_pictures_show_what_they_say():
    rng = np.random.default_rng(1)
    frame = rng.integers(0, 255, (48, 64, 3), np.uint8)
    truth = np.full((48, 64, 2), (6.0, 0.0), np.float32)
    flow = truth.copy()
    flow[:, 32:] += (0, 2.9)
    visible = np.ones((48, 64), bool)
    visible[:8] = False
    pair = demo_pictures.Pair(frame, flow, truth, visible)
    scale = demo_pictures.scales([pair])
    assert scale.speed == 6 and scale.error == 3
    picture = demo_pictures.panel(pair, scale, 'title', 'subtitle', 'dis')
    tile = picture[
        -demo_pictures.MARGIN - 480: -demo_pictures.MARGIN,
        -demo_pictures.MARGIN - 640: -demo_pictures.MARGIN,
    ]
    assert tile[200, 100].max() < 30  # no error: dark
    assert tile[200, 500].mean() > 150  # nearly 3 px: bright
    assert tuple(tile[40, 300]) == tuple(demo_pictures.HIDDEN)
    row = demo_pictures.timeline([pair] * 3, scale, 'title', 'dis')
    assert row.shape[1] > 900
    plain = demo_pictures.panel(demo_pictures.Pair(frame, flow), scale, 'title', '', 'dis')
    assert plain.shape[0] < picture.shape[0] and plain.shape[1] == picture.shape[1]
