# SPDX-License-Identifier: Apache-2.0
"""The command `bag`: the node's messages of every image, offline, and a trajectory."""

import json
from pathlib import Path
import signal
import subprocess
import sys
import time
import types

import cv2
import numpy as np
from perceiver_flow_ros.commands import bagfile
from perceiver_flow_ros.commands._bag_pairs import decoded
from perceiver_flow_ros.commands._demo_frames import choose_topic, COMPRESSED, IMAGE
from perceiver_flow_ros.commands.bag import in_order
from perceiver_flow_ros.commands.bagfile import (
    BagWriter,
    camera_info_message,
    header_message,
    image_message,
    TYPES,
)  # fmt: skip
from perceiver_flow_ros.commands.main import main
from perceiver_flow_ros.odometry.geometry import inverse, transform
from perceiver_flow_ros.ros.frames import nanoseconds
from perceiver_flow_ros.ros.motion import Motion
from perceiver_flow_ros.ros.parameters import defaults
from perceiver_flow_ros.ros.transforms import (
    NoTransform,
    pose_of_text,
    StaticTree,
    turn_of_quaternion,
)
from perceiver_flow_ros.training.scene import Camera, look, Scene
import pytest
from rosbags.highlevel import AnyReader
import torch

NODE = '/perceiver_flow/'
CAMERA = Camera(width=320, height=240, fx=250.0, fy=250.0, cx=159.5, cy=119.5)
MOUNT = '0.3 0 1.2 -1.5707963268 0 -1.5707963268'  # forward camera, 1.2 m above the ground
SPEED, RATE, FRAMES = 2.0, 10, 6


@pytest.fixture(scope='module')
def views():
    """Drive straight down the rendered street."""
    street = Scene.street(3)
    return [
        street.render(look((SPEED * i / RATE, -1.5, 1.2)), CAMERA, i / RATE, noise=1.0, seed=i)
        for i in range(FRAMES)
    ]


def calibration(width=CAMERA.width, focal=True):
    k = CAMERA.matrix.ravel().tolist() if focal else [0.0] * 9
    size, none = (width, CAMERA.height), [0.0] * 5
    return camera_info_message(*size, 'plumb_bob', none, k, [0.0] * 9, [0.0] * 12)


def write(path, views, *, info=True, depth=False, imu=False, tf=None, times=None,
          stored=None, late=0.15):
    """Write a bag as a robot's; depth images are stored so late: after the next colour ones."""
    with BagWriter(path, force=True) as bag:
        if tf is not None:
            bag.write('/tf_static', 'tf2_msgs/msg/TFMessage', tf, 10**9)
        for i, view in enumerate(views):
            stamp = 10**9 + (i * 10**9 // RATE if times is None else round(times[i] * 1e9))
            header = header_message(stamp, 'camera')
            image = image_message(view.image, 'rgb8', header)
            when = stamp if stored is None else 10**9 + round(stored[i] * 1e9)
            bag.write('/cam/image_raw', 'sensor_msgs/msg/Image', image, when)
            if info:
                message = calibration() if info is True else info
                message.header = header
                bag.write('/cam/camera_info', 'sensor_msgs/msg/CameraInfo', message, when)
            if depth:
                metres = np.where(np.isfinite(view.depth), view.depth, np.nan).astype(np.float32)
                message = image_message(metres, '32FC1', header)
                bag.write('/cam/depth', 'sensor_msgs/msg/Image', message,
                          when + round(late * 1e9))
    return path


def read(path):
    """Read a bag: {topic: messages}."""
    found = {}
    with AnyReader([path], default_typestore=TYPES) as reader:
        for connection, time, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            found.setdefault(connection.topic, []).append((time, message))
    return found


def parameters(path, **values):
    text = '\n'.join(f'    {name}: {json.dumps(value)}' for name, value in values.items())
    path.write_text(f'/**:\n  ros__parameters:\n{text}\n')
    return path


def bag(*arguments):
    return main(['bag', *map(str, arguments), '--model', 'dis'])


def linear(message):
    v = message.twist.twist.linear
    return np.array([v.x, v.y, v.z])


@pytest.mark.parametrize('storage', ['.mcap', '.db3', ''])
def test_all_topics_and_the_trajectory(capsys, tmp_path, views, storage):
    source, out = write(tmp_path / f'in{storage}', views), tmp_path / f'out{storage}'
    file = parameters(
        tmp_path / 'p.yaml', scale_source='camera_height', camera_height=1.2,
        base_frame='base_link', base_from_camera=MOUNT, publish_tf=True, forward_backward=True,
    )  # fmt: skip
    tum = tmp_path / 'a.tum'
    assert bag(source, out, '--params-file', file, '--tum', tum, '--json') == 0
    report = json.loads(capsys.readouterr().out)
    assert (report['frames'], report['flows'], report['model']) == (FRAMES, FRAMES - 1, 'dis')
    assert report['motions'] == FRAMES - 1 and report['without_motion'] == {}
    assert report['distance_m'] == pytest.approx(SPEED * (FRAMES - 1) / RATE, rel=0.1)

    content = read(out)
    names = (
        'flow', 'flow/previous', 'flow/color', 'twist', 'odometry', 'focus_of_expansion',
        'time_to_contact', 'confidence',
    )  # fmt: skip
    assert content.keys() == {*(NODE + name for name in names), '/tf'}
    stamps = [10**9 + i * 10**8 for i in range(1, FRAMES)]
    for messages in content.values():
        assert [time for time, _ in messages] == stamps
    flow = content[NODE + 'flow'][0][1]
    assert (flow.encoding, flow.width, flow.height, flow.header.frame_id) == (
        '32FC2', 320, 240, 'camera',
    )  # fmt: skip
    assert content[NODE + 'flow/previous'][0][1].time_ref.sec == 1
    for _, twist in content[NODE + 'twist']:
        assert twist.header.frame_id == 'base_link'
        assert np.abs(linear(twist) - (SPEED, 0, 0)).max() < 0.25
        matrix = twist.twist.covariance.reshape(6, 6)
        assert np.isfinite(matrix).all() and np.linalg.eigvalsh(matrix).min() > 0
    last = content[NODE + 'odometry'][-1][1]
    assert (last.header.frame_id, last.child_frame_id) == ('odom', 'base_link')
    step = content['/tf'][-1][1].transforms[0]
    assert step.child_frame_id == 'base_link' and step.header.frame_id == 'odom'
    assert step.transform.translation.x == last.pose.pose.position.x
    assert content[NODE + 'time_to_contact'][0][1].encoding == '32FC1'

    lines = np.loadtxt(tum)
    assert lines.shape == (FRAMES, 8)
    assert np.allclose(lines[:, 0], [1.0, *(s / 1e9 for s in stamps)])
    assert lines[0, 1:].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert np.allclose(np.linalg.norm(lines[:, 4:], axis=1), 1)
    p = last.pose.pose.position
    assert np.allclose(lines[-1, 1:4], [p.x, p.y, p.z], atol=1e-8)


def test_twice_is_the_same(tmp_path, views):
    source = write(tmp_path / 'in.mcap', views[:4])
    file = parameters(tmp_path / 'p.yaml', scale_source='camera_height', camera_height=1.2)
    for name in ('a', 'b'):
        out, tum = tmp_path / f'{name}.mcap', tmp_path / f'{name}.tum'
        assert bag(source, out, '--params-file', file, '--tum', tum) == 0
    assert (tmp_path / 'a.tum').read_text() == (tmp_path / 'b.tum').read_text()
    first, second = read(tmp_path / 'a.mcap'), read(tmp_path / 'b.mcap')
    assert first.keys() == second.keys()
    for topic, messages in first.items():
        for (_, a), (_, b) in zip(messages, second[topic]):
            kind = a.__msgtype__
            assert bytes(TYPES.serialize_cdr(a, kind)) == bytes(TYPES.serialize_cdr(b, kind))


def test_depth_that_is_stored_late_and_transforms_of_the_bag(capsys, tmp_path, views):
    make = TYPES.types
    transform_type = make['geometry_msgs/msg/Transform']

    def link(parent, child, text):
        pose = pose_of_text(text, '')
        turn = {'0 0 1 0 0 0': (0.0, 0, 0, 1), MOUNT: (-0.5, 0.5, -0.5, 0.5)}[text]
        assert np.allclose(turn_of_quaternion(turn), pose[:3, :3], atol=1e-9)
        return make['geometry_msgs/msg/TransformStamped'](
            header_message(0, parent), child,
            transform_type(
                make['geometry_msgs/msg/Vector3'](*map(float, pose[:3, 3])),
                make['geometry_msgs/msg/Quaternion'](*map(float, turn)),
            ),
        )  # fmt: skip

    tf = make['tf2_msgs/msg/TFMessage'](
        [link('base_footprint', 'base_link', '0 0 1 0 0 0'), link('base_link', 'camera', MOUNT)]
    )
    source = write(tmp_path / 'in.mcap', views[:4], depth=True, tf=tf)
    file = parameters(
        tmp_path / 'p.yaml', scale_source='depth', base_frame='base_footprint', depth_max=40.0
    )
    out, topic = tmp_path / 'out.mcap', ('--depth-topic', '/cam/depth')
    options = '--params-file', file, '--image-topic', '/cam/image_raw'
    assert bag(source, out, *options, *topic, '--topics', 'twist', '--json') == 0
    report = json.loads(capsys.readouterr().out)
    assert report['motions'] == 3, report
    content = read(out)
    assert content.keys() == {NODE + 'twist'}
    for _, twist in content[NODE + 'twist']:
        assert twist.header.frame_id == 'base_footprint'
        assert np.abs(linear(twist) - (SPEED, 0, 0)).max() < 0.1


def test_topics_on_which_there_is_nothing_are_told(capsys, tmp_path, views):
    source, out = write(tmp_path / 'in.mcap', views[:3]), tmp_path / 'out.mcap'
    assert bag(source, out, '--topics', 'twist', 'odometry') == 0
    assert 'nothing on odometry' in capsys.readouterr().out  # without a scale_source
    file = parameters(tmp_path / 'p.yaml', base_frame='base_link', scale_source='camera_height',
                      camera_height=1.2)
    nothing = tmp_path / 'nothing.mcap'
    assert bag(source, nothing, '--params-file', file, '--topics', 'odometry') == 2
    said = capsys.readouterr().err
    assert 'nothing to write on odometry: 2 x no_transform: no transform' in said
    assert not nothing.exists()


def test_an_image_out_of_order_is_skipped(capsys, tmp_path, views):
    """Its time is in the pose already: the next pair begins where the pose is."""
    source = write(tmp_path / 'in.mcap', views[:4], times=[0, 0.2, 0.1, 0.3],
                   stored=[0, 0.1, 0.2, 0.3])
    tum = tmp_path / 'out.tum'
    assert bag(source, tmp_path / 'out.mcap', '--tum', tum) == 0
    assert '1 x late' in capsys.readouterr().out
    stamps = np.loadtxt(tum)[:, 0]
    assert np.allclose(stamps, [1.0, 1.2, 1.3])
    written = read(tmp_path / 'out.mcap')['/perceiver_flow/flow/previous']
    pairs = [[m.time_ref.nanosec, m.header.stamp.nanosec] for _, m in written]
    assert pairs == [[0, 200_000_000], [200_000_000, 300_000_000]]


def test_stamps_that_begin_again_leave_the_images_before_what_was_theirs(tmp_path, views):
    """Messages are read ahead of the images; those of a new run make the old ones be forgotten."""
    times = [20, 20.1, 20.2, 5, 5.1, 5.2]
    source = write(tmp_path / 'in.mcap', views, depth=True, times=times, late=0.01,
                   stored=[i / RATE for i in range(FRAMES)])
    results, found = Motion(defaults(), None), []
    takes = {'depth': results.depth_came, 'camera_info': results.described}
    taker = types.SimpleNamespace(take=lambda name, message: takes[name](message))
    topics = {f: f'/cam/{t}' for f, t in (('image', 'image_raw'), ('depth', 'depth'),
                                          ('camera_info', 'camera_info'))}
    with AnyReader([source], default_typestore=TYPES) as reader:
        for event in in_order(reader, topics, taker):
            stamp = nanoseconds(event.message.header.stamp) / 1e9
            found.append(results._depths.nearest(stamp)[0] - stamp)
    assert len(found) == FRAMES and np.allclose(found, 0)


def test_a_transform_that_is_none_is_told(views):
    turns = {'zero': (0.0, 0, 0, 0), 'NaN': (np.nan, 0, 0, 1), 'long': (0.0, 0, 0, 7)}
    for name, turn in turns.items():
        x, y, z, w = turn
        transform = types.SimpleNamespace(
            translation=types.SimpleNamespace(x=0.0, y=0.0, z=1.0),
            rotation=types.SimpleNamespace(x=x, y=y, z=z, w=w))
        tree = StaticTree()
        header = types.SimpleNamespace(frame_id='base_link')
        tree.add(types.SimpleNamespace(transforms=[types.SimpleNamespace(
            header=header, child_frame_id='camera', transform=transform)]))
        with pytest.raises(NoTransform, match="from 'camera' to 'base_link'.*quaternion"):
            tree('base_link', 'camera')
        assert (tree('odom', 'odom') == np.eye(4)).all(), name


def test_depth_is_never_taken_for_the_camera():
    cases = [({'/c/image_raw': IMAGE, '/c/image_raw/compressed': COMPRESSED}, '/c/image_raw'),
             ({'/c/color/image_raw': IMAGE, '/c/depth/image_raw': IMAGE}, '/c/color/image_raw'),
             ({'/c/image_raw/compressed': COMPRESSED}, '/c/image_raw/compressed'),
             ({'/c/image_raw/compressed': COMPRESSED, '/c/depth/image_rect_raw': IMAGE}, None),
             ({'/rgb/image_rect_color': IMAGE, '/depth/image_raw': IMAGE}, None)]
    for topics, expected in cases:
        if expected:
            assert choose_topic(Path('x.mcap'), topics, None) == expected
        else:
            with pytest.raises(ValueError, match='choose one with --image-topic'):
                choose_topic(Path('x.mcap'), topics, None)


def test_what_is_missing_is_counted_and_flow_goes_on(capsys, tmp_path, views):
    times = [0.0, 0.1, 0.1, 0.2, 5.0, 5.1]
    still = [views[0], views[1], views[1], views[2], views[3], views[3]]
    source = write(tmp_path / 'in.mcap', still, info=calibration(focal=False), times=times)
    out, tum = tmp_path / 'out.mcap', tmp_path / 'a.tum'
    assert bag(source, out, '--tum', tum) == 0
    text = capsys.readouterr().out
    assert 'motion of 0 of 3 pairs, scale source none' in text
    assert '3 x no_camera' in text and '1 x repeated' in text and '1 x gap' in text
    assert 'K[0] is 0: the camera is not calibrated' in text and 'only the rotations count' in text
    content = read(out)
    assert len(content[NODE + 'flow']) == 3 and NODE + 'twist' not in content
    assert len(tum.read_text().splitlines()) == 5  # one per frame; the pose is held

    source = write(tmp_path / 'in.mcap', [views[0], views[0], views[0]])  # bit by bit the same
    assert bag(source, out, '--force') == 0
    assert '2 x repeated' in capsys.readouterr().out
    source = write(tmp_path / 'in.mcap', [views[0]] * 3, times=[0, 0, 0.1])  # stamps, then images
    assert bag(source, out, '--force') == 0
    text = capsys.readouterr().out
    assert text.count('1 x repeated') == 2 and 'repeats the stamp' not in text
    source = write(tmp_path / 'in.mcap', views[:3])
    assert bag(source, out, '--force') == 0
    assert 'motion of 2 of 2 pairs' in capsys.readouterr().out
    content = read(out)
    for _, twist in content[NODE + 'twist']:  # without metres
        assert (linear(twist) == 0).all() and twist.twist.covariance[0] >= 1e6
        assert twist.header.frame_id == 'camera'
    assert NODE + 'odometry' not in content


def test_it_says_what_the_node_says(tmp_path, views):
    pytest.importorskip('rclpy')
    from node_rig import Rig
    from sensor_msgs.msg import CameraInfo

    values = {'scale_source': 'camera_height', 'camera_height': 1.2}
    source, out = write(tmp_path / 'in.mcap', views), tmp_path / 'out.mcap'
    file = parameters(tmp_path / 'p.yaml', **values)
    assert bag(source, out, '--params-file', file, '--topics', 'twist', 'odometry') == 0
    content = read(out)
    rig = Rig(model='dis', **values)
    try:
        rig.connect(('twist', 'odometry'))
        info = CameraInfo(width=320, height=240, distortion_model='plumb_bob')
        info.k = CAMERA.matrix.ravel()
        rig.node.on_camera_info(info)
        for i, view in enumerate(views):
            rig.send(view.image, 1 + i / RATE)
        rig.until(lambda: len(rig.received['odometry']) == FRAMES - 1)
        for name in ('twist', 'odometry'):
            for (_, ours), theirs in zip(content[NODE + name], rig.received[name]):
                assert ours.header.stamp.nanosec == theirs.header.stamp.nanosec
                assert (linear(ours) == linear(theirs)).all()
                assert (ours.twist.covariance == theirs.twist.covariance).all()
        ours, theirs = content[NODE + 'odometry'][-1][1].pose, rig.received['odometry'][-1].pose
        assert (ours.covariance == theirs.covariance).all()
        assert ours.pose.position.z == theirs.pose.position.z
    finally:
        rig.close()


def test_compressed_images_and_a_bad_one(capsys, tmp_path, views):
    kind, topic = 'sensor_msgs/msg/CompressedImage', '/cam/image_raw/compressed'
    with BagWriter(tmp_path / 'in.mcap') as bag_file:
        for i, view in enumerate(views[:4]):
            stamp = 10**9 + i * 10**8
            data = cv2.imencode('.png', view.image[..., ::-1])[1].ravel()
            data = data[:100] if i == 1 else data
            header = header_message(stamp, 'camera')
            bag_file.write(topic, kind, TYPES.types[kind](header, 'png', data), stamp)
            info = calibration()
            info.header = header
            bag_file.write('/cam/camera_info', 'sensor_msgs/msg/CameraInfo', info, stamp)
    assert bag(tmp_path / 'in.mcap', tmp_path / 'out.mcap') == 0
    text = capsys.readouterr().out
    assert 'motion of 2 of 2 pairs' in text
    assert '1 x bad image: its PNG data are cut off after 100 bytes' in text
    flow = read(tmp_path / 'out.mcap')[NODE + 'flow/previous']
    assert [m.time_ref.nanosec for _, m in flow] == [0, 200_000_000]


def test_compressed_images_are_what_the_node_makes_of_them():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    data = cv2.imencode('.png', red)[1].ravel()  # red first, where PNG has blue for OpenCV
    kind, header = TYPES.types['sensor_msgs/msg/CompressedImage'], header_message(0, 'camera')
    assert decoded(kind(header, 'rgb8; png compressed rgb8', data))[0, 0].tolist() == [200, 0, 0]
    assert decoded(kind(header, 'rgb8; png compressed bgr8', data))[0, 0].tolist() == [0, 0, 200]
    mosaic = cv2.imencode('.png', np.full((8, 8), 90, np.uint8))[1].ravel()
    assert decoded(kind(header, 'bayer_rggb8; png compressed ', mosaic)).shape == (8, 8, 3)


def test_wrong_input_is_one_line_and_leaves_nothing(capsys, tmp_path, views):
    source, out = write(tmp_path / 'in.mcap', views[:2], depth=True), tmp_path / 'out.mcap'
    (tmp_path / 'no.mcap').write_bytes(b'nothing')
    (tmp_path / 'one.bag').write_bytes(b'#ROSBAG V2.0')
    single = write(tmp_path / 'one.mcap', views[:1])
    still = write(tmp_path / 'still.mcap', views[:2], times=[0, 0])
    folder = write(tmp_path / 'folder', views[:2])
    cases = [
        ((tmp_path / 'none.mcap', out), 'No such bag'),
        ((tmp_path / 'no.mcap', out), 'not a bag that can be read'),
        ((source, source), 'same bag'),
        ((source, out, '--force', '--tum', source), 'is, or is inside, the input or the output'),
        ((source, out, '--force', '--tum', out), 'is, or is inside, the input or the output'),
        ((folder, folder / 'in.mcap', '--force'), 'is inside the input'),
        ((tmp_path / 'one.bag', out), 'rosbags-convert'),
        ((still, out), '1 images on /cam/image_raw; flow needs two: 1 x repeated (an image'),
        ((single, out), 'flow needs two'),
        ((source, out, '--topics', 'twits'), 'expected some of flow'),
    ]
    topic = ('--image-topic', '/cam/image_raw')
    cases += [
        ((source, out, '--image-topic', '/x'), '/x is no image topic of it'),
        ((source, out, *topic, '--camera-info-topic', '/x'), '/x is no sensor_msgs/msg/Camera'),
        ((source, out, *topic, '--depth-topic', '/cam/depth'), 'scale_source is none'),
    ]
    broken = tmp_path / 'broken.yaml'
    broken.write_text('/**:\n  ros__parameters:\n    model: [')
    cases.append(((source, out, *topic, '--params-file', broken),
                  'broken.yaml: not YAML in line 3, column 13'))
    for values, text in (
        ({'scale_source': 'depth'}, 'give --depth-topic'),
        ({'scale_source': 'metres'}, 'expected one of none, camera_height'),
        ({'camera_height': 2}, 'expected a value of type float: write 2.0'),
        ({'camera_height': 200.0}, 'expected 0.0 to 100.0'),
        ({'speed': 1}, "no parameter 'speed'"),
        ({'publish_tf': True}, 'publish_tf needs base_frame'),
    ):
        file = parameters(tmp_path / f'{len(cases)}.yaml', **values)
        cases.append(((source, out, *topic, '--params-file', file), text))
    (tmp_path / 'odd.yaml').write_text('- 1\n')
    cases.append(((source, out, *topic, '--params-file', tmp_path / 'odd.yaml'), 'parameter'))
    for arguments, text in cases:
        assert bag(*arguments) == 2, text
        error = capsys.readouterr().err.splitlines()
        lines = [line for line in error if line.startswith('perceiver_flow: error: ')]
        assert len(lines) == 1 and text in lines[0], error
        assert not out.exists() and not list(tmp_path.glob('.*'))
    assert bag(source, out, *topic) == 0
    assert bag(source, out, *topic) == 2 and '--force' in capsys.readouterr().err


def test_a_trajectory_that_cannot_be_written_costs_nothing(capsys, tmp_path, views):
    source, out = write(tmp_path / 'in.mcap', views[:2]), tmp_path / 'out.mcap'
    assert bag(source, out, '--tum', tmp_path / 'no' / 'drive.tum') == 2
    error = capsys.readouterr().err
    assert f'{tmp_path / "no"}: No such folder to write the trajectory to' in error
    assert not out.exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path, views, number):
    source = write(tmp_path / 'in.mcap', views * 50)
    command = [sys.executable, '-m', 'perceiver_flow_ros', 'bag', source, tmp_path / 'out.mcap']
    with subprocess.Popen(      # (nohup, if it runs the tests, has SIGHUP ignored)
            [*command, '--model', 'dis'],
            preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as process:
        end = time.monotonic() + 60
        while not list(tmp_path.glob('.out.mcap.*/*/*')) and time.monotonic() < end:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ['in.mcap']


def test_a_signal_while_the_bag_is_opened_leaves_nothing(tmp_path, monkeypatch):
    class Interrupted(bagfile.Writer):
        def open(self):
            super().open()
            raise SystemExit(143)

    monkeypatch.setattr(bagfile, 'Writer', Interrupted)
    with pytest.raises(SystemExit), BagWriter(tmp_path / 'out.mcap'):
        pass
    assert not list(tmp_path.iterdir())


def test_threads_are_set(tmp_path, views, monkeypatch):
    counts = []
    monkeypatch.setattr(cv2, 'setNumThreads', counts.append)
    monkeypatch.setattr(torch, 'set_num_threads', counts.append)
    source, file = write(tmp_path / 'in.mcap', views[:2]), tmp_path / 'p.yaml'
    assert bag(source, tmp_path / 'out.mcap', '--params-file', parameters(file, threads=1)) == 0
    assert counts == [1, 1]


def test_no_ros_is_needed(tmp_path, views):
    source, out = write(tmp_path / 'in.mcap', views[:3]), tmp_path / 'out.mcap'
    program = (
        'import sys\n'
        'class NoRos:\n'
        '    def find_spec(self, name, *_):\n'
        '        root = name.partition(".")[0]\n'
        '        if root == "rclpy" or root.endswith(("_msgs", "_interfaces", "_srvs")):\n'
        '            raise ModuleNotFoundError(name)\n'
        'sys.meta_path.insert(0, NoRos())\n'
        'from perceiver_flow_ros.commands.main import main\n'
        'sys.exit(main(sys.argv[1:]))\n'
    )
    arguments = ['bag', str(source), str(out), '--model', 'dis']
    done = subprocess.run(
        [sys.executable, '-c', program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert NODE + 'twist' in read(out)


@pytest.mark.slow
def test_kitti_from_images_to_trajectory(capsys, tmp_path, sequence_data):
    folder = sequence_data / 'kitti_odometry_1'
    source, tum = tmp_path / 'kitti.mcap', tmp_path / 'kitti.tum'
    assert main(['record', str(folder / 'image_l'), '-o', str(source),
                 '--calibration', str(folder / 'calib.txt')]) == 0  # fmt: skip
    file = parameters(tmp_path / 'p.yaml', scale_source='camera_height', camera_height=1.65)
    capsys.readouterr()
    options = '--params-file', file, '--tum', tum, '--topics', 'twist', 'odometry', '--json'
    assert bag(source, tmp_path / 'out.mcap', *options) == 0
    assert json.loads(capsys.readouterr().out)['motions'] == 50
    lines = np.loadtxt(tum)
    found = [transform(turn_of_quaternion(line[4:]), line[1:4]) for line in lines]
    truth = [np.vstack([row.reshape(3, 4), [0, 0, 0, 1]])
             for row in np.loadtxt(folder / 'poses.txt')]  # fmt: skip
    assert len(found) == len(truth) == 51
    turns, angles, lengths = [], [], []
    for i in range(50):
        a, b = (inverse(p[i]) @ p[i + 1] for p in (truth, found))
        cosine = (np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2
        turns.append(np.degrees(np.arccos(min(cosine, 1))))
        lengths.append([np.linalg.norm(p[:3, 3]) for p in (a, b)])
        angles.append(np.degrees(np.arccos(a[:3, 3] @ b[:3, 3] / np.prod(lengths[-1]))))
    true, estimated = np.array(lengths).T
    assert np.median(turns) <= 0.05 and np.median(angles) <= 0.5
    assert abs(estimated.sum() / true.sum() - 1) <= 0.03
    assert np.median(np.abs(estimated / true - 1)) <= 0.08
