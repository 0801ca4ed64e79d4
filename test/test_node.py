# SPDX-License-Identifier: Apache-2.0
"""The node over real topics: outputs, pairs, the newest image first, bad input, lifecycle, QoS."""

import threading
import types

from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from node_rig import Estimator, OUTPUTS, Rig
import numpy as np
from perceiver_flow_ros.ros import pipeline
import pytest
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from ros_images import flow_of, image_message, picture, seconds
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, RegionOfInterest
from std_srvs.srv import Trigger

OK, WARN, ERROR = b'\x00', b'\x01', b'\x02'


@pytest.fixture
def rig():
    """Make rigs, and close them at the end."""
    rigs = []

    def make(*arguments, **parameters):
        rigs.append(Rig(*arguments, **parameters))
        return rigs[-1]

    yield make
    for r in rigs:
        r.close()


@pytest.fixture
def stand_in(rig):
    """Connect a rig around a stand-in estimator."""

    def make(**parameters):
        estimator = Estimator()
        made = rig(loader=lambda *_, **__: estimator, **parameters).connect()
        made.estimator = estimator
        return made

    return make


# Outputs


def test_flow_of_a_moving_picture(rig):
    r = rig(model='dis').connect(('flow', 'flow/previous', 'flow/color'))
    for i in range(4):
        r.send(picture(shift=3 * i), 10 + i / 10)
    assert r.flows(3) == [(10.0, 10.1), (10.1, 10.2), (10.2, 10.3)]
    for message in r.received['flow']:
        assert message.header.frame_id == 'camera'
        flow = flow_of(message)
        assert flow.shape == (96, 128, 2)
        assert np.abs(np.median(flow[8:-8, 8:-8], (0, 1)) - (3, 0)).max() < 0.2
    r.until(lambda: r.received['flow/color'])
    color = r.received['flow/color'][-1]
    assert (color.encoding, color.height, color.width, color.step) == ('rgb8', 96, 128, 384)
    assert color.header in [m.header for m in r.received['flow']]
    red, green, blue = np.frombuffer(color.data, np.uint8).reshape(96, 128, 3)[48, 64]
    assert red > 200 > max(green, blue)  # rightward motion is red on Middlebury's wheel


def test_query_stride_makes_the_flow_image_smaller(rig):
    r = rig(model='dis', query_stride=4).connect()
    for i in range(2):
        r.send(picture(shift=2 * i, height=97, width=129), i)
    r.flows(1)
    flow = flow_of(r.received['flow'][0])
    assert flow.shape == (25, 33, 2)
    assert np.abs(np.median(flow[2:-2, 2:-2], (0, 1)) - (2, 0)).max() < 0.2


def test_nothing_is_computed_for_nobody(rig, monkeypatch):
    colored = []
    estimator = Estimator()
    monkeypatch.setattr(
        pipeline,
        'flow_to_color',
        lambda flow, scale: colored.append(scale) or np.zeros((*flow.shape[:2], 3), np.uint8),
    )
    r = rig(loader=lambda *_, **__: estimator, color_max_magnitude=7.0).connect(())
    for i in range(3):
        r.send(picture(i), i)
    assert estimator.pairs == []
    processed = str(r.node.pipeline.worker.counts.processed)
    r.until(lambda: r.statuses['flow'].values['processed'] == processed)
    assert r.status('flow', 'idle').level == OK

    r.connect(('flow', 'flow/previous'))
    for i in range(3):
        r.send(picture(i), 10 + i)
    assert r.flows(2) == [(10, 11), (11, 12)]  # and no flow from the frames before the subscriber
    assert colored == []

    r.connect(('flow/color',))
    r.send(picture(), 13)
    r.until(lambda: r.received['flow/color'])
    assert colored == [7.0]


# Pairs


def test_repeated_backward_and_distant_stamps_and_another_size(stand_in):
    r = stand_in(max_frame_gap=0.5)
    small, large = picture(), picture(height=100, width=140)
    for stamp in (10.0, 10.1, 10.1, 10.2):  # the repeated one is skipped
        r.send(small, stamp)
    assert r.flows(2) == [(10.0, 10.1), (10.1, 10.2)]
    r.status('flow', 'repeats the stamp')
    for stamp in (3.0, 3.1):  # a bag begins again
        r.send(small, stamp)
    assert r.flows(3)[2:] == [(3.0, 3.1)]
    r.status('flow', 'went back by 7.200 s')
    for stamp in (4.0, 4.1):
        r.send(small, stamp)
    assert r.flows(4)[3:] == [(4.0, 4.1)]
    r.status('flow', '0.900 s between two images exceed max_frame_gap (0.5 s)')
    for stamp in (4.2, 4.3):
        r.send(large, stamp)
    assert r.flows(5)[4:] == [(4.2, 4.3)]
    r.status('flow', 'images changed from 128x96 colour to 140x100 colour')
    assert flow_of(r.received['flow'][-1]).shape == (100, 140, 2)
    r.send(large[:, :, 0], 4.4, encoding='mono8')
    r.send(large[:, :, 0], 4.5, encoding='mono8')
    assert r.flows(6)[5:] == [(4.4, 4.5)]
    assert r.estimator.pairs[-1][0].shape == (100, 140)


def test_an_image_out_of_order_is_skipped(stand_in):
    """What it showed is in the last pair already."""
    r = stand_in()
    for stamp in (10.0, 10.1, 10.05, 10.2):
        r.send(picture(), stamp)
    assert r.flows(2) == [(10.0, 10.1), (10.1, 10.2)]
    r.status('flow', 'went back by 0.050 s (an image out of order')


def test_unset_stamps_are_named(stand_in):
    r = stand_in()
    for _ in range(3):
        r.send(picture(), 0.0)
    r.status('flow', 'the driver must set header.stamp')
    assert r.estimator.pairs == []


def test_reset_forgets_the_previous_image(stand_in):
    r = stand_in()
    r.send(picture(), 1.0)
    r.send(picture(), 1.1)
    answer = r.call(Trigger, 'reset', Trigger.Request())
    assert answer.success and 'new pair' in answer.message
    r.send(picture(), 1.2)
    r.send(picture(), 1.3)
    assert r.flows(2) == [(1.0, 1.1), (1.2, 1.3)]


# Never behind


def test_the_newest_image_is_used_and_the_others_are_counted(stand_in):
    r = stand_in()
    begun, go_on = threading.Event(), threading.Semaphore(0)
    r.estimator.before = lambda: (begun.set(), go_on.acquire())
    dropped = r.node.pipeline.worker.counts.dropped
    r.send(picture(), 1.0)
    r.publish(image_message(picture(), 1.1))
    r.until(begun.is_set)
    for i in range(2, 8):  # while the estimator works
        r.publish(image_message(picture(), 1 + i / 10))
    go_on.release(2)
    assert r.flows(2) == [(1.0, 1.1), (1.1, 1.7)]
    assert r.node.pipeline.worker.counts.dropped - dropped == 5
    r.until(lambda: r.statuses['flow'].values['dropped'] == str(dropped + 5))
    assert r.statuses['flow'].level == OK  # dropping is how it keeps up


def test_every_frame_is_processed_until_the_queue_is_full(stand_in):
    r = stand_in(process_every_frame=True, queue_size=4)
    begun, go_on = threading.Event(), threading.Semaphore(0)
    r.estimator.before = lambda: (begun.set(), go_on.acquire())
    r.send(picture(), 1.0)
    r.publish(image_message(picture(), 1.1))
    r.until(begun.is_set)
    for i in range(2, 6):
        r.publish(image_message(picture(), 1 + i / 10))
    go_on.release(5)
    assert r.flows(5) == [(1 + i / 10, 1 + (i + 1) / 10) for i in range(5)]
    assert r.node.pipeline.worker.counts.dropped == 0

    begun.clear()
    r.publish(image_message(picture(), 1.6))
    r.until(begun.is_set)
    for i in range(7, 13):  # two more than fit: the oldest go
        r.publish(image_message(picture(), 1 + i / 10))
    go_on.release(5)
    assert r.flows(10)[5:] == [(1.5, 1.6), (1.6, 1.9), (1.9, 2.0), (2.0, 2.1), (2.1, 2.2)]
    assert r.node.pipeline.worker.counts.dropped == 2


def test_a_viewer_does_not_slow_the_flow_down(rig, monkeypatch):
    begun, go_on = threading.Event(), threading.Semaphore(0)

    def color(flow, scale):
        begun.set()
        go_on.acquire()
        return np.zeros((*flow.shape[:2], 3), np.uint8)

    monkeypatch.setattr(pipeline, 'flow_to_color', color)
    r = rig(loader=lambda *_, **__: Estimator()).connect(OUTPUTS)
    for i in range(2):
        r.send(picture(), 1 + i / 10)
    r.until(begun.is_set)
    for i in range(2, 6):
        r.send(picture(), 1 + i / 10)
    r.flows(5)  # while the first of them is coloured
    go_on.release(2)
    r.until(lambda: len(r.received['flow/color']) == 2)
    assert [seconds(m.header.stamp) for m in r.received['flow/color']] == [1.1, 1.5]


# Bad input

GOOD = picture()
FLOATS = (GOOD[:, :, 0] / 255).astype(np.float32)
BAD_IMAGES = {
    'step': (GOOD, {'step': 100}, 'its step is 100, but a row of 128 rgb8 pixels has 384 bytes'),
    'sheared': (
        GOOD,
        {'step': 400},
        'its data has 36864 bytes, but 96 rows of step 400 have 38400',
    ),
    'truncated': (GOOD[:50], {'height': 96}, 'its data has 19200 bytes, but 96 rows of step 384'),
    'unknown encoding': (GOOD, {'encoding': 'jpeg'}, "encoding 'jpeg' is not one of 16UC1, "),
    'empty': (GOOD, {'width': 0, 'step': 0}, 'it has 0x96 pixels, but flow needs at least 2x2'),
    'one column': (GOOD[:, :1], {}, 'it has 1x96 pixels, but flow needs at least 2x2'),
    'NaN': (np.where(FLOATS > 0.5, np.nan, FLOATS), {'encoding': '32FC1'}, 'NaN or infinite'),
}


def test_bad_images_are_refused_and_the_next_good_one_counts(rig):
    r = rig(model='dis').connect()
    r.send(picture(), 10.0)
    r.send(picture(3), 10.1)
    stamps = [(10.0, 10.1)]
    for i, (pixels, fields, text) in enumerate(BAD_IMAGES.values()):
        r.send(pixels, 10.5 + i, **fields)
        status = r.status('flow', text)
        assert status.level == ERROR and status.message.startswith('image of /image refused: ')
        assert status.values['last error'] == status.message
        r.send(picture(), 11.0 + i)  # makes a pair with the last good one
        r.send(picture(3), 11.1 + i)
        stamps += [(10.1 + i, 11.0 + i), (11.0 + i, 11.1 + i)]
        assert r.flows(len(stamps)) == pytest.approx(np.array(stamps))
        for message, u in zip(r.received['flow'][-2:], (-3, 3)):
            assert np.abs(np.median(flow_of(message)[8:-8, 8:-8], (0, 1)) - (u, 0)).max() < 0.2
        r.until(lambda: r.statuses['flow'].level == OK)
    assert r.statuses['flow'].values['failed'] == str(len(BAD_IMAGES))


def test_every_reason_is_logged_and_each_but_once(rig, monkeypatch):
    r, said = rig(model='dis').connect(), []
    monkeypatch.setattr(r.node.diagnostics.notices, '_logger',
                        types.SimpleNamespace(error=said.append, warning=said.append))
    for i, encoding in enumerate(('nonsense', 'more', 'nonsense')):
        r.send(picture(), 10.0 + i, encoding=encoding)
    r.send(picture()[:, :40], 14.0, step=5)
    r.send(picture()[:, :50], 15.0, step=7)  # the same with other numbers
    assert len(said) == 3, said


def test_an_estimator_that_fails_leaves_the_node_alive(stand_in):
    r = stand_in()

    def fail(error):
        raise error

    r.send(picture(), 1.0)
    r.estimator.before = lambda: fail(IndexError('seven'))
    r.send(picture(), 1.1)
    assert r.status('flow', 'no flow: IndexError: seven').level == ERROR
    r.estimator.before = lambda: fail(RuntimeError('CUDA out of memory.\nTried to allocate 2 GiB'))
    r.send(picture(), 1.2)
    text = r.status('flow', 'out of GPU memory').message
    assert 'query_stride' in text and 'precision' in text and 'Tried to allocate 2 GiB' in text
    r.estimator.before = lambda: None
    r.send(picture(), 1.3)
    assert r.flows(1) == [(1.2, 1.3)]
    status = r.status('flow', 'flows per second')
    assert (
        status.level == OK
        and status.values['failed'] == '2'
        and status.values['last error'] == text
    )


# Lifecycle


def state_of(r):
    return r.call(GetState, 'get_state', GetState.Request()).current_state.label


def change(r, transition):
    request = ChangeState.Request(transition=Transition(id=transition))
    return r.call(ChangeState, 'change_state', request).success


def test_lifecycle(rig):
    loaded = []
    r = rig(loader=lambda *_, **__: loaded.append(Estimator()) or loaded[-1], start=False)
    topic = r.node.image_topic
    assert state_of(r) == 'unconfigured' and loaded == []
    assert r.status('flow', 'unconfigured').level == OK
    assert change(r, Transition.TRANSITION_CONFIGURE)
    assert state_of(r) == 'inactive' and r.peer.count_subscribers(topic) == 0
    r.status('flow', 'inactive')
    for turn in range(2):
        assert change(r, Transition.TRANSITION_ACTIVATE)
        r.until(lambda: r.peer.count_subscribers(topic) == 1)
        if not turn:
            r.connect()
        before = len(r.received['flow'])
        r.send(picture(), 1.0 + turn)
        r.send(picture(), 1.1 + turn)
        assert r.flows(before + 1)[-1] == (1.0 + turn, 1.1 + turn)
        assert change(r, Transition.TRANSITION_DEACTIVATE)
        r.until(lambda: r.peer.count_subscribers(topic) == 0)
        assert state_of(r) == 'inactive'
    assert change(r, Transition.TRANSITION_CLEANUP)
    assert state_of(r) == 'unconfigured' and r.node.pipeline.estimator is None and len(loaded) == 1
    assert change(r, Transition.TRANSITION_CONFIGURE) and len(loaded) == 2
    assert change(r, Transition.TRANSITION_ACTIVATE)
    assert change(r, Transition.TRANSITION_ACTIVE_SHUTDOWN)
    assert state_of(r) == 'finalized' and r.node.pipeline.estimator is None
    r.until(lambda: r.peer.count_subscribers(topic) == 0)


def test_a_flow_under_way_is_not_published_after_deactivation(stand_in):
    r = stand_in()
    begun, go_on = threading.Event(), threading.Event()
    r.estimator.before = lambda: (begun.set(), go_on.wait())
    r.send(picture(), 1.0)
    r.publish(image_message(picture(), 1.1))
    r.until(begun.is_set)
    r.publish(image_message(picture(), 1.2))
    assert change(r, Transition.TRANSITION_DEACTIVATE)  # does not wait for the estimator
    go_on.set()
    r.settle()
    assert change(r, Transition.TRANSITION_CLEANUP)
    r.status('flow', 'unconfigured')
    assert r.received['flow'] == [] and len(r.estimator.pairs) == 1


def test_a_configuration_that_fails_can_be_tried_again(rig, capfd):
    def load(model, **_):
        if model != 'good':
            raise ValueError(f'no weights at {model}')
        return Estimator()

    r = rig(loader=load, model='/no/such', start=False)
    assert not change(r, Transition.TRANSITION_CONFIGURE)
    assert state_of(r) == 'unconfigured'
    assert r.status('flow', 'cannot configure: no weights at /no/such').level == ERROR
    assert 'ros2 lifecycle set /perceiver_flow configure' in capfd.readouterr().err
    assert r.set(model='good') == ''
    assert change(r, Transition.TRANSITION_CONFIGURE)
    r.status('flow', 'inactive')


# What the operator reads


def test_a_reliable_subscription_names_a_best_effort_camera(rig, capfd):
    r = rig(model='dis', image_reliability='reliable', image_timeout=0.1)
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    r.peer.create_publisher(Image, r.node.image_topic, best_effort)
    status = r.status('input', 'set image_reliability to best_effort')
    assert status.level == WARN and 'a publisher of /image ' in status.message
    assert 'set image_reliability to best_effort' in capfd.readouterr().err


def test_a_subscriber_that_asks_too_much_is_told(rig, capfd):
    r = rig(model='dis')
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    r.peer.create_subscription(Image, '/perceiver_flow/flow', lambda _: None, latched)
    text = 'qos_overrides./perceiver_flow/flow.publisher.durability'
    seen = []
    r.until(lambda: seen.append(capfd.readouterr().err) or text in ''.join(seen))


def test_qos_is_overridable_and_topics_are_remapped(rig):
    r = rig(
        start=True,
        arguments=['-r', 'image:=/cam/raw', '-r', '__node:=left', '-r', '__ns:=/robot'],
        **{
            'model': 'dis',
            'qos_overrides./cam/raw.subscription.reliability': 'reliable',
            'qos_overrides./robot/left/flow.publisher.reliability': 'best_effort',
        },
    )  # fmt: skip
    (flow,) = r.node.get_publishers_info_by_topic('/robot/left/flow')
    (image,) = r.node.get_subscriptions_info_by_topic('/cam/raw')
    (info,) = r.node.get_subscriptions_info_by_topic('/robot/camera_info')
    (color,) = r.node.get_publishers_info_by_topic('/robot/left/flow/color')
    assert flow.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
    assert color.qos_profile.reliability == ReliabilityPolicy.RELIABLE
    assert color.qos_profile.durability == DurabilityPolicy.VOLATILE
    assert image.qos_profile.reliability == ReliabilityPolicy.RELIABLE
    assert info.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT  # SensorDataQoS


def test_an_activation_that_fails_leaves_nothing_subscribed(rig, capfd):
    name = 'qos_overrides./camera_info.subscription.reliability'
    r = rig(**{'model': 'dis', name: 'rely'})
    assert not change(r, Transition.TRANSITION_ACTIVATE)  # nor once more
    assert r.node.get_subscriptions_info_by_topic('/image') == []
    assert r.status('flow', 'cannot activate').level == ERROR
    assert 'correct the override and start the node again' in capfd.readouterr().err


def test_silence_is_explained(rig):
    r = rig(model='dis', image_timeout=0.1)
    said = r.status('input', 'no image for').message
    assert 'nothing publishes /image; nor any other image topic' in said
    camera = r.peer.create_publisher(Image, '/front/image_raw', 1)
    status = r.status('input', 'there is /front/image_raw (remap: -r image:=TOPIC; ')
    assert status.level == WARN
    r.peer.destroy_publisher(camera)
    r.peer.create_publisher(Image, '/image', 1)
    assert (
        'FASTDDS_DEFAULT_PROFILES_FILE' in r.status('input', '/image has 1 publisher(s)').message
    )


def test_losses_are_named_with_the_remedy(stand_in):
    r = stand_in()
    r.node.diagnostics.lost(20)  # as the middleware's event does
    text = r.status('input', 'images were lost on the way').message
    assert text.startswith('20 of the last ') and 'config/fastdds.xml' in text
    r.status('input', 'images per second')  # and forgotten when it is over
    assert r.statuses['input'].values['lost in transport'] == '20'


def test_camera_info_is_compared_with_the_images(stand_in):
    r = stand_in()
    assert r.status('camera_info', 'missing').level == OK
    r.send(picture(), 1.0)
    cases = [
        (OK, 'calibrated', {'width': 128, 'height': 96}),
        (OK, 'uncalibrated (K[0] is 0)', {'width': 128, 'height': 96, 'focal': 0.0}),
        (WARN, 'it describes 640x480 pixels, images have 128x96', {'width': 640, 'height': 480}),
        (OK, 'calibrated', {'width': 256, 'height': 192, 'binning_x': 2, 'binning_y': 2}),
        (
            OK, 'calibrated',
            {'width': 640, 'height': 480, 'roi': RegionOfInterest(width=128, height=96)},
        ),
    ]  # fmt: skip
    for level, text, fields in cases:

        def is_reported(level=level, text=text, fields=fields):
            r.describe(**fields)
            status = r.statuses['camera_info']
            return (status.level, status.message) == (level, text)

        r.until(is_reported, text)


def test_latency_is_given_only_where_the_clocks_agree(stand_in):
    r = stand_in()
    now = r.node.get_clock().now().nanoseconds / 1e9
    for i in range(3):
        r.send(picture(), now - 0.5 + i / 100)
    r.flows(2)
    r.until(lambda: r.statuses['flow'].values['flows'] == '2')
    mean = float(r.statuses['flow'].values['latency'].split()[1])
    assert 480 <= mean < 60e3 and 'p95' in r.statuses['flow'].values['latency']
    for i in range(4):
        r.send(picture(), 100 + i / 100)
    r.until(lambda: 'off the clock of this node' in r.statuses['flow'].values['latency'])


def test_simulated_time(rig):
    estimator = Estimator()
    r = rig(loader=lambda *_, **__: estimator, use_sim_time=True, image_timeout=10.0).connect()
    text = 'use_sim_time is true, but nothing publishes /clock'
    assert r.status('input', text).level == WARN
    clock = r.peer.create_publisher(Clock, '/clock', 10)

    def tell(now):
        message = Clock()
        message.clock.sec, message.clock.nanosec = divmod(round(now * 1e9), 10**9)
        node_clock = r.node.get_clock()
        r.until(lambda: clock.publish(message) or node_clock.now().nanoseconds == round(now * 1e9))

    for start in (1000.0, 500.0):  # a bag that is played twice
        for i in range(5):
            tell(start + i / 10 + 0.02)
            r.send(picture(), start + i / 10)
        r.until(lambda: r.statuses['input'].message == '10.0 images per second')
        r.until(lambda: r.statuses['flow'].message == '10.0 flows per second')
        assert r.statuses['flow'].values['latency'] == 'mean 20.0 ms, p95 20.0 ms, max 20.0 ms'
        assert r.statuses['input'].level == OK
    tell(520.0)
    assert r.status('input', 'no image for 19.6 s').level == WARN


def test_the_clock_of_a_bag_begins_before_its_images(rig, capfd):
    r = rig(loader=lambda *_, **__: Estimator(), use_sim_time=True, image_timeout=10.0).connect()
    clock, message = r.peer.create_publisher(Clock, '/clock', 10), Clock()
    for sec in (1_700_000_000, 1_700_000_008):
        message.clock.sec = sec
        node_clock = r.node.get_clock()
        r.until(lambda: clock.publish(message) or node_clock.now().nanoseconds == sec * 10**9)  # noqa: B023
        r.unseen.clear()
        r.until(lambda: 'input' in r.unseen)
    assert r.statuses['input'].level == OK and 'no image for' not in capfd.readouterr().err
