# SPDX-License-Identifier: Apache-2.0
"""The node's odometry over real topics: values, frames, laziness, and whatever may be missing."""

import importlib.util
from pathlib import Path
import sys
import types

from geometry_msgs.msg import Transform, TransformStamped, Vector3
import moving_camera as scene
from moving_camera import (
    boxes,
    depth_message,
    ExactFlow,
    FORWARD,
    FORWARD_TEXT,
    frame_of,
    ground,
    imu_message,
    info_message,
    PERIOD,
    range_message,
    step_of,
)  # fmt: skip
from node_rig import Rig
import numpy as np
from perceiver_flow_ros.odometry.geometry import inverse
from perceiver_flow_ros.ros import messages
from perceiver_flow_ros.ros.motion import Motion
from perceiver_flow_ros.ros.parameters import BY_NAME, defaults
from perceiver_flow_ros.ros.transforms import pose_of_text
import pytest
from rclpy.qos import QoSProfile
from ros_images import image_message, seconds
from sensor_msgs.msg import CameraInfo, Image, Imu, Range
from std_srvs.srv import Trigger
import yaml

OK, WARN, ERROR = b'\x00', b'\x01', b'\x02'
ON_BASE = {'base_frame': 'base_link', 'base_from_camera': FORWARD_TEXT}
CURVE = (1.0, 0, 0, 0, 0, 0.4)  # of the base: m/s forward, rad/s to the left
MOTION = ('twist', 'odometry')
INPUTS = {'camera_info': CameraInfo, 'depth': Image, 'range': Range, 'imu': Imu}


@pytest.mark.parametrize(('axes', 'right', 'down', 'forward'), [
    ('-1.5708 0 -1.5708', (0, -1, 0), (0, 0, -1), (1, 0, 0)),      # of a camera that looks forward
    ('3.1416 0 -1.5708', (0, -1, 0), (-1, 0, 0), (0, 0, -1)),      # down, the image's top forward
])  # fmt: skip
def test_the_mounts_of_the_readme_have_the_axes_it_says(axes, right, down, forward):
    assert f' {axes}"' in (Path(__file__).parents[1] / 'README.md').read_text()
    pose = pose_of_text(f'0 0 0 {axes}', 'base_from_camera')
    np.testing.assert_allclose(pose[:3, :3].T, (right, down, forward), atol=1e-4)


class Robot(Rig):
    """A rig whose camera moves; every message is known to have arrived."""

    def __init__(self, outputs=MOTION, estimator=None, **parameters):
        self.estimator = estimator or ExactFlow()
        arguments = {} if estimator == 'dis' else {'loader': lambda *_, **__: self.estimator}
        if estimator == 'dis':
            parameters['model'] = 'dis'
        super().__init__(**arguments, **parameters)
        self.publishers, self.image = {}, frame_of(0)
        self.connect(outputs)

    def tell(self, name, message):
        """Publish to an input and wait until the node has it."""
        topic = self.node.resolve_topic_name(name)
        if name not in self.publishers:
            kind, qos = INPUTS[name], QoSProfile(depth=50)
            self.publishers[name] = self.peer.create_publisher(kind, topic, qos)
            matched = self.publishers[name].get_subscription_count
            self.until(lambda: matched() > 0, f'for {name} to be matched')
        motion = self.node.pipeline.cues.motion
        buffer = {
            'camera_info': motion._infos, 'depth': motion._depths, 'range': motion._ranges,
            'imu': motion._rates,
        }[name]  # fmt: skip
        stamp = seconds(message.header.stamp)
        self.publishers[name].publish(message)

        def has_it():
            found = buffer.nearest(stamp)
            return found is not None and abs(found[0] - stamp) < 1e-6

        self.until(has_it, f'for {name} to arrive')

    def move(self, stamp, twist=CURVE, mount=FORWARD, info=True, depth=True):
        """Have the base move with a twist up to a stamp, then send an image."""
        motion = inverse(mount) @ step_of(twist) @ mount
        self.estimator.motion = motion
        if info:
            self.tell('camera_info', info_message(stamp))
        if depth and self.node.settings.scale_source == 'depth':
            self.tell('depth', depth_message(self.estimator.depth, stamp))
        flow = scene.flow_of_motion(self.estimator.depth, motion)
        self.image = scene.following(self.image, flow)
        noise = np.random.default_rng(round(stamp * 1e3)).integers(-1, 2, self.image.shape)
        self.send(np.clip(self.image + noise, 0, 255).astype(np.uint8), stamp)

    def counted(self, estimates):
        """Wait until diagnostics count so many estimates; return the status."""
        is_so = lambda: (  # noqa: E731
            'odometry' in self.statuses
            and self.statuses['odometry'].values['estimates'] == str(estimates)
        )
        self.until(is_so, f'for {estimates} estimates')
        return self.statuses['odometry']


@pytest.fixture
def robot():
    """Make robots, and close them at the end."""
    robots = []

    def make(*arguments, **parameters):
        robots.append(Robot(*arguments, **parameters))
        return robots[-1]

    yield make
    for r in robots:
        r.close()


def values(message):
    t = message.twist.twist
    return np.array([t.linear.x, t.linear.y, t.linear.z, t.angular.x, t.angular.y, t.angular.z])


def covariance(field):
    matrix = np.array(field.covariance).reshape(6, 6)
    assert np.isfinite(matrix).all() and np.allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0
    return matrix


# What comes out


def test_motion_of_the_base_with_depth(robot):
    r = robot(('twist', 'odometry', 'focus_of_expansion', 'time_to_contact', 'confidence'),
              scale_source='depth', odometry_grid=4, **ON_BASE)  # fmt: skip
    for i in range(4):
        r.move(10 + i * PERIOD)
    r.until(lambda: len(r.received['odometry']) == len(r.received['twist']) == 3)
    for i, twist in enumerate(r.received['twist'], 1):
        assert seconds(twist.header.stamp) == pytest.approx(10 + i * PERIOD)
        assert twist.header.frame_id == 'base_link'
        # The camera moves sideways, too: 0.3 m before the axis. The base does not.
        assert np.abs(values(twist) - CURVE).max() < 0.02
        assert covariance(twist.twist)[0, 0] < 0.01
    last, pose = r.received['odometry'][-1], np.eye(4)
    for _ in range(3):
        pose = pose @ step_of(CURVE)
    assert (last.header.frame_id, last.child_frame_id) == ('odom', 'base_link')
    assert last.header.stamp == r.received['twist'][-1].header.stamp
    p, q = last.pose.pose.position, last.pose.pose.orientation
    assert np.abs([p.x, p.y, p.z] - pose[:3, 3]).max() < 0.005
    assert 2 * np.arctan2(q.z, q.w) == pytest.approx(3 * 0.4 * PERIOD, abs=0.002)
    assert np.hypot(np.hypot(q.x, q.y), np.hypot(q.z, q.w)) == pytest.approx(1)
    assert covariance(last.pose)[0, 0] > covariance(r.received['odometry'][0].pose)[0, 0]
    assert np.allclose(values(last), values(r.received['twist'][-1]))

    motion = inverse(FORWARD) @ step_of(CURVE) @ FORWARD
    heading = motion[:3, :3].T @ motion[:3, 3]
    point = r.received['focus_of_expansion'][-1]
    at = heading[:2] / heading[2] * scene.FOCAL + scene.CENTRE
    assert point.header.frame_id == 'camera' and point.point.z == 1
    assert np.abs([point.point.x, point.point.y] - at).max() < 3
    contact = r.received['time_to_contact'][-1]
    assert (contact.encoding, contact.width, contact.height) == ('32FC1', 160, 120)
    contact = np.frombuffer(contact.data, '<f4').reshape(120, 160)
    expected = boxes() / 1.0 - PERIOD
    known = np.isfinite(contact)
    assert 0.3 < known.mean() and np.median(np.abs(contact / expected - 1)[known]) < 0.1
    confidence = np.frombuffer(r.received['confidence'][-1].data, '<f4')
    assert 0 <= confidence.min() and confidence.max() <= 1 and np.median(confidence) > 0.5

    status = r.counted(3)
    assert status.level == OK and status.message == 'general motion'
    assert status.values['scale source'] == 'depth' and status.values['motion'] == 'general'
    assert float(status.values['moving share']) < 0.2 and 'ms' in status.values['time']


@pytest.mark.parametrize('source', ['camera_height', 'range'])
def test_other_sources_of_metres(robot, source):
    parameters = {'scale_source': source, 'odometry_grid': 2}
    mount, twist = np.eye(4), (0, 0, 1.0, 0, 0, 0)
    if source == 'camera_height':
        parameters['camera_height'] = 0.5
    r = robot(**parameters)
    if source == 'camera_height':
        r.estimator.depth = ground()
    else:
        r.estimator.noise = 0.01
        r.estimator.depth, twist = np.full((120, 160), 2.0), (2.0, 0.8, 0, 0, 0, 0)
    for i in range(3):
        if source == 'range':
            r.tell('range', range_message(2.0, 10 + i * PERIOD))
        r.move(10 + i * PERIOD, twist, mount)
    r.until(lambda: len(r.received['odometry']) == 2)
    for message in r.received['twist']:
        assert message.header.frame_id == 'camera'  # in its own axes: no base_frame is set
        assert np.abs(values(message) - twist).max() < 0.05
    assert r.received['odometry'][-1].child_frame_id == 'camera'


def test_without_metres_there_is_rotation_only(robot):
    r = robot(('twist', 'odometry', 'focus_of_expansion'), odometry_grid=4)
    for i in range(3):
        r.move(10 + i * PERIOD, (0, 0, 1.0, 0, 0.3, 0), np.eye(4))
    r.until(lambda: len(r.received['twist']) == len(r.received['focus_of_expansion']) == 2)
    for message in r.received['twist']:
        matrix = covariance(message.twist)
        assert (values(message)[:3] == 0).all() and (np.diag(matrix)[:3] >= 1e6).all()
        assert np.abs(values(message)[3:] - (0, 0.3, 0)).max() < 0.02
        assert (np.diag(matrix)[3:] < 0.01).all()
    assert r.received['odometry'] == []
    assert 'no metres' in r.counted(2).message


def test_stationary_is_a_measurement(robot):
    r = robot(scale_source='depth', odometry_grid=4)
    for i in range(3):
        r.move(10 + i * PERIOD, np.zeros(6))
    r.until(lambda: len(r.received['odometry']) == 2)
    assert np.abs(values(r.received['twist'][-1])).max() < 0.01
    assert r.counted(2).values['motion'] == 'stationary'
    p = r.received['odometry'][-1].pose.pose.position
    assert (p.x, p.y, p.z) == (0, 0, 0)


# Nothing for nobody


def test_odometry_is_not_computed_for_those_who_want_flow(robot):
    r = robot(('flow', 'flow/previous'), scale_source='depth')
    for i in range(3):
        r.move(10 + i * PERIOD)
    r.flows(2)
    assert len(r.estimator.calls) == 2  # no backward pass either
    status = r.status('odometry', 'idle')
    assert status.level == OK and status.values['estimates'] == '0'


def test_the_official_model_decodes_a_grid_for_motion_alone(robot):
    estimator = ExactFlow()
    estimator.name = 'official'
    r = robot(estimator=estimator, scale_source='depth', odometry_grid=4)
    for i in range(2):
        r.move(10 + i * PERIOD, mount=np.eye(4), twist=(0, 0, 1, 0, 0, 0))
    r.until(lambda: len(r.received['twist']) == 1)
    assert np.abs(values(r.received['twist'][0]) - (0, 0, 1, 0, 0, 0)).max() < 0.05
    (points,) = estimator.points
    assert points.shape == (30 * 40, 2) and points.max(0).tolist() == [156, 116]
    r.connect(('time_to_contact',))
    r.move(10.2, mount=np.eye(4), twist=(0, 0, 1, 0, 0, 0))
    r.until(lambda: r.received['time_to_contact'])
    assert len(estimator.points) == 1 and r.received['time_to_contact'][0].width == 160


def test_the_second_inference_is_for_those_who_ask(robot):
    r = robot(scale_source='depth')
    for i in range(2):
        r.move(10 + i * PERIOD)
    assert len(r.estimator.calls) == 1
    assert r.set(forward_backward=True) == ''
    r.move(10.2)
    assert len(r.estimator.calls) == 3
    (first, second), (third, fourth) = r.estimator.calls[1:]
    assert first is fourth and second is third


# Missing, wrong, late


def test_camera_info_missing_uncalibrated_other_and_changing(robot):
    r = robot(('flow', 'flow/previous', *MOTION), scale_source='depth', odometry_grid=4)
    cases = [
        (None, ERROR, 'no camera_info has come'),
        ({'focal': 0.0}, ERROR, 'not calibrated'),
        ({'width': 320, 'height': 120}, ERROR, 'of another aspect'),
        ({'distortion_model': 'mirror', 'd': [1.0]}, ERROR, "'mirror' is unknown"),
    ]
    for case, (fields, level, text) in enumerate(cases):
        for i in range(2):
            stamp = 10 + case + i * PERIOD
            if fields is not None:
                r.tell('camera_info', info_message(stamp, **fields))
            r.move(stamp, info=False)
        assert r.status('odometry', text).level == level
    assert r.received['twist'] == r.received['odometry'] == []
    assert len(r.received['flow']) >= 4  # it needs none

    for i in range(2):  # of another size, the aspect fits
        r.tell('camera_info', info_message(20 + i * PERIOD, width=320, height=240))
        r.move(20 + i * PERIOD, info=False)
    r.until(lambda: len(r.received['twist']) == 1)
    assert np.abs(values(r.received['twist'][0])[2] - 1) < 1
    assert 'scaled' in r.status('odometry', 'general motion').values['camera']
    r.tell('camera_info', info_message(20.2, focal=200.0))
    r.move(20.2, info=False)
    r.status('odometry', 'camera_info changed between the two images')
    r.tell('camera_info', info_message(20.3, focal=200.0))
    r.move(20.3, info=False)
    r.until(lambda: len(r.received['twist']) == 2)  # a pair of the new camera


def test_depth_missing_of_another_size_or_stamp_or_unknown(robot):
    r = robot(scale_source='depth', odometry_grid=4)
    good = boxes()
    cases = [
        (None, 0, '32FC1', 'no depth image has come'),
        (good[:60, :80], 0, '32FC1', 'depth'),
        (good, 0.5, '32FC1', 'more than sync_tolerance'),
        (np.full_like(good, np.nan), 0, '32FC1', 'have a depth'),
        (np.zeros_like(good), 0, '16UC1', 'have a depth'),
        (good, 0, 'mono8', "its encoding is 'mono8'"),
    ]
    for case, (depth, late, encoding, text) in enumerate(cases):
        r.unseen['odometry'] = []
        for i in range(2):
            stamp = 10 + 2 * case + i * PERIOD
            if depth is not None:
                r.tell('depth', depth_message(depth, stamp + late, encoding))
            r.move(stamp, depth=False)
        assert r.status('odometry', text).level == WARN
    assert r.received['twist'] == r.received['odometry'] == []
    for i in range(2):
        r.tell('depth', depth_message(good * 1000, 30 + i * PERIOD, '16UC1'))
        r.move(30 + i * PERIOD, (0, 0, 1, 0, 0, 0), np.eye(4), depth=False)
    r.until(lambda: len(r.received['odometry']) == 1)
    assert values(r.received['odometry'][0])[2] == pytest.approx(1, abs=0.03)


def test_range_unknown_or_late(robot):
    r = robot(scale_source='range', odometry_grid=2)
    r.estimator.depth, r.estimator.noise = np.full((120, 160), 2.0), 0.01
    cases = [
        (None, 0, 'no range has come'),
        (float('nan'), 0, 'the range is nan m'),
        (float('inf'), 0, 'the range is inf m'),
        (50.0, 0, 'the range is 50 m, the sensor says 0.1 to 30'),
        (2.0, 0.3, 'more than sync_tolerance (0.05 s)'),
    ]
    for case, (distance, late, text) in enumerate(cases):
        for i in range(2):
            stamp = 10 + 2 * case + i * PERIOD
            if distance is not None:
                r.tell('range', range_message(distance, stamp + late))
            r.move(stamp, (2.0, 0.8, 0, 0, 0, 0), np.eye(4))
        assert r.status('odometry', text).level == WARN
    assert r.received['twist'] == []


def test_a_gyro_checks_the_rotation(robot):
    r = robot(scale_source='depth', odometry_grid=4, **ON_BASE)

    def pair(start, rates, frame='base_link', until=PERIOD):
        for k in range(int(round(until / 0.01)) + 1):
            r.tell('imu', imu_message(rates, start + k * 0.01, frame))
        for i in range(2):
            r.move(start + i * PERIOD)

    pair(10.0, (0, 0, 0.4))
    r.until(lambda: len(r.received['twist']) == 1)
    pair(12.0, (0, 0, -0.4))  # the other way
    r.status('odometry', 'no motion (gyro): ')
    r.move(14.0)
    r.move(14.1)  # the imu has gone: the flow still says the truth, diagnostics say what is amiss
    r.until(lambda: len(r.received['twist']) == 2)
    assert r.status('odometry', 'gyro not used: the gyro is silent').level == WARN
    pair(16.0, (0, 0, 0.4), 'imu_link')  # which way does it look?
    text = r.status('odometry', "no transform from 'imu_link' to 'camera'").message
    assert 'base_from_imu' in text
    assert r.set(base_from_imu='0 0 0 3.14159265 0 0') == ''  # upside down
    pair(18.0, (0, 0, -0.4), 'imu_link')
    r.until(lambda: len(r.received['twist']) == 4)
    assert r.status('odometry', 'general motion').level == OK
    assert len(r.received['twist']) == 4


def test_time_jumps(robot):
    r = robot(scale_source='depth', odometry_grid=4, max_frame_gap=0.5)
    forward = {'twist': (0, 0, 1.0, 0, 0, 0), 'mount': np.eye(4)}
    for stamp in (10.0, 10.1, 10.1, 10.2):  # one image comes twice
        r.move(stamp, **forward)
    r.until(lambda: len(r.received['odometry']) == 2)
    r.move(12.0, **forward)  # a gap
    r.status('odometry', 'no motion (gap)')
    r.move(12.1, **forward)
    r.until(lambda: len(r.received['odometry']) == 3)
    before, after = r.received['odometry'][1:]
    assert after.pose.pose.position.z == pytest.approx(0.3, abs=0.01)  # it goes on from there
    assert covariance(after.pose)[2, 2] > 10 * covariance(before.pose)[2, 2]  # knowing less
    for stamp in (3.0, 3.1):  # the bag starts again
        r.move(stamp, **forward)
    r.until(lambda: len(r.received['odometry']) == 4)
    last = r.received['odometry'][-1]
    assert seconds(last.header.stamp) == pytest.approx(3.1)
    assert last.pose.pose.position.z == pytest.approx(0.1, abs=0.01)  # and so does the pose
    assert len(r.received['twist']) == 4


def test_reset_forgets_the_pose(robot):
    r = robot(scale_source='depth', odometry_grid=4)
    forward = {'twist': (0, 0, 1.0, 0, 0, 0), 'mount': np.eye(4)}
    for i in range(3):
        r.move(10 + i * PERIOD, **forward)
    assert r.call(Trigger, 'reset', Trigger.Request()).success
    for i in range(3, 5):
        r.move(10 + i * PERIOD, **forward)
    r.until(lambda: len(r.received['odometry']) == 3)
    z = [m.pose.pose.position.z for m in r.received['odometry']]
    assert np.allclose(z, [0.1, 0.2, 0.1], atol=0.01)


def test_a_reset_during_an_inference_leaves_its_pair_out(robot):
    r = robot(scale_source='depth', odometry_grid=4)
    forward = {'twist': (0, 0, 1.0, 0, 0, 0), 'mount': np.eye(4)}
    for i in range(5):
        r.estimator.during = r.node.pipeline.restart if i == 2 else lambda: None
        r.move(10 + i * PERIOD, **forward)
    r.until(lambda: len(r.received['odometry']) == 2)
    assert [seconds(m.header.stamp) for m in r.received['odometry']] == [10.1, 10.4]
    z = [m.pose.pose.position.z for m in r.received['odometry']]
    assert np.allclose(z, [0.1, 0.1], atol=0.01)


def test_a_reset_while_an_image_is_decoded_leaves_it_out(robot, monkeypatch):
    r = robot(('flow', 'flow/previous'))
    decode, resets = r.node.pipeline._pixels, [1]

    def decode_and_reset(message):
        pixels = decode(message)
        if seconds(message.header.stamp) == 10.2 and resets.pop():
            r.node.pipeline.restart()
        return pixels

    monkeypatch.setattr(r.node.pipeline, '_pixels', decode_and_reset)
    for i in range(5):
        r.move(10 + i * PERIOD)
    assert r.flows(2) == [(10.0, 10.1), (10.3, 10.4)]


@pytest.mark.parametrize('why', ['a flow that fails', 'nobody asks'])
def test_the_pose_knows_of_a_time_without_motion(robot, monkeypatch, why):
    r = robot(('flow', *MOTION), scale_source='depth', odometry_grid=4)

    def fail():
        raise RuntimeError('made to fail')

    for i in range(8):
        with monkeypatch.context() as broken:
            if 3 <= i < 6:
                what = (r.estimator, 'during', fail), (r.node.pipeline.cues, 'wanted', set)
                broken.setattr(*what[why == 'nobody asks'])
            r.move(10 + i * PERIOD, (0, 0, 1.0, 0, 0, 0), np.eye(4))
    r.until(lambda: len(r.received['odometry']) == 4)
    stamps = [seconds(m.header.stamp) for m in r.received['odometry']]
    assert stamps == [10.1, 10.2, 10.6, 10.7]
    deviations = [np.sqrt(covariance(m.pose)[2, 2]) for m in r.received['odometry']]
    assert deviations[1] < 0.02 and deviations[2] > 0.3     # m: it may have gone on at 1 m/s
    assert deviations[3] < deviations[2] + 0.02


def test_an_imu_is_remembered_as_long_as_images_may_wait():
    """1000 images at 30 Hz are 33 s, in which an imu may send 400 samples a second."""
    motion = Motion(defaults().but({'process_every_frame': True, 'queue_size': 1000}), None)
    for k in range(33 * 400):
        motion.imu_came(imu_message((0, 0, 0), 1 + k / 400))
    assert motion._rates.nearest(1.0)[0] == 1.0
    many = defaults().but({'process_every_frame': True, 'queue_size': 10_000})
    assert Motion(many, None)._rates._size > 333 * 400


def test_two_cameras_on_one_topic_make_no_pair(robot):
    r = robot(('flow', 'flow/previous', *MOTION))
    for i, frame in enumerate(('left', 'left', 'right', 'right')):
        message = image_message(frame_of(0), 10 + i * PERIOD)
        message.header.frame_id = frame
        r.publish(message)
        r.settle()
    assert r.flows(2) == [(10.0, 10.1), (10.2, 10.3)]
    r.status('flow', "from 'left' to 'right'")


def test_images_without_a_frame_have_no_motion(robot):
    r = robot(('flow', *MOTION), odometry_grid=4)
    for i in range(2):
        r.tell('camera_info', info_message(10 + i * PERIOD))
        message = image_message(frame_of(0), 10 + i * PERIOD)
        message.header.frame_id = ''
        r.publish(message)
        r.settle()
    status = r.status('odometry', 'no motion (no_transform)')
    assert status.level == ERROR and 'no frame_id' in status.message
    r.until(lambda: len(r.received['flow']) == 1)
    assert r.received['twist'] == []


def test_a_quality_of_service_that_means_nothing_does_not_end_the_node(robot):
    r = robot(('flow',), **{'qos_overrides./depth.subscription.reliability': 'nonsense'})
    assert r.set(scale_source='depth') == ''
    for i in range(2):
        r.send(frame_of(i), 10 + i * PERIOD)
    r.until(lambda: len(r.received['flow']) == 1)


def test_an_image_that_comes_late_keeps_the_pose(robot):
    """One of 1 ms before the last (out of order, a clock that was set) is no new beginning."""
    r = robot(scale_source='depth', odometry_grid=4)
    forward = {'twist': (0, 0, 1.0, 0, 0, 0), 'mount': np.eye(4)}
    for stamp in (10.0, 10.1, 10.2, 10.199, 10.299):
        r.move(stamp, **forward)
    r.until(lambda: len(r.received['odometry']) == 3)
    z = [m.pose.pose.position.z for m in r.received['odometry']]
    assert np.allclose(z, [0.1, 0.2, 0.3], atol=0.01)
    r.status('flow', 'went back by 0.001 s (an image out of order')


@pytest.mark.parametrize('source', ['range', 'depth'])
def test_a_slow_model_finds_what_fast_sensors_said_long_ago(robot, source):
    r = robot(scale_source=source, odometry_grid=2)
    r.estimator.noise, r.estimator.depth = 0.01, np.full((120, 160), 2.0)
    slow = {'twist': (0.4, 0.16, 0, 0, 0, 0), 'mount': np.eye(4)}
    message = {'range': range_message, 'depth': lambda _, t: depth_message(r.estimator.depth, t)}
    for k in range(150):  # at 200 Hz, while an image waits for 0.75 s
        r.tell(source, message[source](2.0, 10 + k / 200))
        if k == 0:
            r.move(10.0, depth=False, **slow)
    r.move(10.5, depth=False, **slow)
    r.until(lambda: len(r.received['twist']) == 1)
    assert r.received['twist'][0].twist.covariance[0] < 0.01


def test_no_transform_is_sent_after_deactivation(robot, monkeypatch):
    """With a stand-in for tf2_msgs, which is on no package registry."""
    for name in ('tf2_msgs', 'tf2_msgs.msg'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules['tf2_msgs.msg'].TFMessage = TransformStamped
    monkeypatch.setattr(messages, 'tf', lambda maker, stamp, *_: stamp)
    r = robot(('flow',), scale_source='depth', odometry_grid=4, publish_tf=True, **ON_BASE)
    sent = []
    monkeypatch.setattr(r.node.pipeline.cues._broadcaster, 'publish', sent.append)
    for i in range(3):
        r.estimator.during = r.node.trigger_deactivate if i == 2 else lambda: None
        r.move(10 + i * PERIOD)
    assert [seconds(stamp) for stamp in sent] == [10.1]


@pytest.mark.parametrize(
    ('name', 'pixels'),
    [
        ('textureless', [np.full((120, 160, 3), 120 + i, np.uint8) for i in range(3)]),
        ('dark', [np.full((120, 160, 3), i, np.uint8) for i in range(3)]),
        ('repeated', [frame_of(0)] * 3),
    ],
)
def test_images_that_tell_nothing(robot, name, pixels):
    r = robot(('flow', *MOTION), 'dis', scale_source='camera_height', camera_height=1.0)
    r.estimator = ExactFlow()
    for i, image in enumerate(pixels):
        r.tell('camera_info', info_message(10 + i * PERIOD))
        r.send(image, 10 + i * PERIOD)
    r.until(lambda: len(r.received['flow']) == 2)
    status = r.counted(2)
    assert status.level == WARN and f'no motion ({name})' in status.message
    assert r.received['twist'] == r.received['odometry'] == []
    for i in range(3):  # and the node works on
        r.tell('camera_info', info_message(11 + i * PERIOD))
        r.send(np.roll(frame_of(7), 2 * i, 1), 11 + i * PERIOD)
    r.counted(5)


# Frames and parameters


@pytest.mark.skipif(importlib.util.find_spec('tf2_ros') is not None, reason='tf2_ros is here')
def test_a_missing_transform_is_named_with_the_fix(robot):
    r = robot(('flow', *MOTION), scale_source='depth', base_frame='base_link')
    for i in range(2):
        r.move(10 + i * PERIOD)
    status = r.status('odometry', "no transform from 'camera' to 'base_link'")
    assert status.level == ERROR and 'tf2_ros is not installed' in status.message
    assert 'set base_from_camera' in status.message
    assert r.received['twist'] == [] and len(r.received['flow']) == 1
    assert r.set(base_from_camera=FORWARD_TEXT) == ''
    r.move(10.2)
    r.until(lambda: len(r.received['twist']) == 1)
    assert r.set(base_frame='camera', base_from_camera='') == ''  # the base is the camera
    r.move(10.3, (0, 0, 1, 0, 0, 0), np.eye(4))
    r.until(lambda: len(r.received['twist']) == 2)
    assert r.received['twist'][-1].header.frame_id == 'camera'


@pytest.mark.parametrize('known', [True, False])
def test_extrinsics_from_tf(robot, monkeypatch, known):
    """With a stand-in for tf2_ros, which is on no package registry."""
    mount = Transform(translation=Vector3(x=0.3, y=0.0, z=0.5))
    q = mount.rotation
    q.x, q.y, q.z, q.w = -0.5, 0.5, -0.5, 0.5

    class Buffer:
        def lookup_transform(self, target, source, time):
            if not known:
                raise RuntimeError(f'"{source}" passed to lookupTransform does not exist')
            assert (target, source, time.nanoseconds) == ('base_link', 'camera', 0)
            return TransformStamped(transform=mount)

    listeners = []
    stand_in = types.SimpleNamespace(
        Buffer=Buffer, TransformListener=lambda *arguments: listeners.append(arguments)
    )
    monkeypatch.setitem(sys.modules, 'tf2_ros', stand_in)
    r = robot(('flow', *MOTION), scale_source='depth', base_frame='base_link', odometry_grid=4)
    assert len(listeners) == 1  # listens from the start
    for i in range(3):
        r.move(10 + i * PERIOD)
    if known:
        r.until(lambda: len(r.received['twist']) == 2)
        assert np.abs(values(r.received['twist'][-1]) - CURVE).max() < 0.02
    else:
        status = r.status('odometry', "no transform from 'camera' to 'base_link'")
        assert status.level == ERROR and 'does not exist' in status.message
        assert 'static_transform_publisher' in status.message
        r.until(lambda: len(r.received['flow']) == 2)
        assert r.received['twist'] == []


def test_parameters_that_do_not_go_together_are_refused(robot):
    with pytest.raises(ValueError, match="scale_source 'camera_height' needs"):
        robot(scale_source='camera_height')
    r = robot(odometry_grid=2)
    assert 'needs camera_height' in r.set(scale_source='camera_height')
    assert 'is not below depth_max' in r.set(depth_min=30.0)
    assert 'publish_tf needs base_frame' in r.set(publish_tf=True)
    assert 'base_from_camera needs base_frame' in r.set(base_from_camera='0 0 0 0 0 0')
    assert "both 'odom'" in r.set(base_frame='odom', publish_tf=True)
    text = r.set(base_frame='base_link', base_from_camera='1 2 3')
    assert 'expected "x y z roll pitch yaw"' in text
    assert 'has length 2.000' in r.set(base_frame='b', base_from_camera='0 0 0 0 0 0 2')
    if importlib.util.find_spec('tf2_msgs') is None:
        assert 'needs the ROS package tf2_msgs' in r.set(base_frame='base_link', publish_tf=True)
    assert r.set(scale_source='camera_height', camera_height=0.5) == ''
    r.estimator.depth = ground()
    for i in range(2):
        r.move(10 + i * PERIOD, (0, 0, 1, 0, 0, 0), np.eye(4))
    r.until(lambda: len(r.received['odometry']) == 1)


def test_sensors_are_subscribed_to_where_they_are_used(robot):
    r = robot()

    def subscribed():
        topics = {s.topic_name for s in r.node.subscriptions}
        return topics & {'/depth', '/range', '/imu'}

    assert subscribed() == {'/imu'}
    assert r.set(scale_source='depth', gyro='ignore') == ''
    assert subscribed() == {'/depth'}
    assert r.set(scale_source='range') == ''
    assert subscribed() == {'/range'}


def test_the_filter_is_fed_with_what_the_node_publishes():
    """config/ekf.yaml: names and shapes as robot_localization documents them."""
    file = Path(__file__).parents[1] / 'config' / 'ekf.yaml'
    filter_node = yaml.safe_load(file.read_text())['ekf_filter_node']['ros__parameters']
    assert filter_node['twist0'] == '/perceiver_flow/twist'
    fused = filter_node['twist0_config']
    names = 'x y z roll pitch yaw vx vy vz vroll vpitch vyaw ax ay az'.split()
    assert [name for name, used in zip(names, fused, strict=True) if used] == ['vx', 'vy', 'vyaw']
    assert filter_node['world_frame'] == filter_node['odom_frame'] == 'odom'
    assert filter_node['publish_tf'] and not BY_NAME['publish_tf'].default  # one parent a frame
