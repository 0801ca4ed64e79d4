# SPDX-License-Identifier: Apache-2.0
"""What befalls a robot: after each fault the process lives, and the next good flow is right."""

import array
import shutil
import signal

from fault_rig import EVERY, FAST, Faults, ROOT
import numpy as np
from perceiver_flow_ros.ros.conversion import ENCODINGS
import pytest
from ros_images import image_message, picture
from sensor_msgs.msg import Image

pytestmark = pytest.mark.slow
GROWTH = 20  # MB that the bar of the soak allows, and hence these


@pytest.fixture
def faults(tmp_path):
    """Start a node and a peer; nothing of them survives the test."""
    rigs = []

    def make(**parameters):
        rigs.append(Faults(tmp_path, **parameters))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_a_camera_killed_in_mid_frame_and_restarted(faults):
    rig = faults()
    rig.good()
    for i in range(5):
        before = rig.count('flows')
        camera = rig.stream('camera', 60)
        rig.until(lambda: rig.count('flows') > before + i)  # noqa: B023
        rig.kill(camera)
        rig.good()
    rig.end()


def malformed(random):
    """Make an image message that is wrong in some of its parts, or in none that matters."""
    height, width = random.integers(2, 40, 2)
    encoding = str(random.choice(sorted(ENCODINGS)))
    dtype, channels, _ = ENCODINGS[encoding]
    step = int(width) * channels * dtype.itemsize
    message = Image(height=int(height), width=int(width), encoding=encoding, step=step)
    message.header.stamp.sec = int(random.integers(-(2**31), 2**31))
    message.header.stamp.nanosec = int(random.integers(0, 2**32))
    size = step * int(height)
    odd = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    for what in random.choice(7, random.integers(0, 4), replace=False):
        any_number = int(random.choice([*odd, random.integers(0, 2**32)]))
        if what < 3:
            setattr(message, ('height', 'width', 'step')[what], any_number)
        elif what == 3:
            names = ['', 'RGB8', 'rgb8 ', '8UC9999', '64FC4', 'bayer_x8', 'h264', '\0', 'é' * 5000]
            message.encoding = str(random.choice(names))
        elif what == 4:
            message.is_bigendian = any_number % 256
        elif what == 5:
            size = int(random.integers(0, 2 * size))
        else:
            message.header.frame_id = random.bytes(50).decode('latin-1')
    message.data = array.array('B', random.bytes(size))
    return message


def test_ten_thousand_malformed_images(faults):
    rig = faults(**EVERY)
    rig.good()
    random = np.random.default_rng(1)
    before, counts = rig.memory(), dict(rig.values['flow'])
    for i in range(10_000):
        rig.image.publish(malformed(random))
        if i % 100 == 99:  # none is lost on the way, and none fills the middleware
            wanted = int(counts['received']) + i + 1
            rig.until(lambda: rig.count('received') == wanted, 'for all')  # noqa: B023
    rig.settle()
    assert rig.count('dropped') == 0
    assert rig.count('processed') - int(counts['processed']) == 10_000
    assert 5_000 < rig.count('failed') < 10_000
    rig.good()
    assert rig.memory()[0] < before[0] + GROWTH
    log = rig.end()
    assert 'refused' in log and max(map(len, log.splitlines())) < 2_000


def test_another_resolution_every_ten_frames(faults):
    rig = faults(**EVERY)
    rig.good()
    before, stamps = set(rig.medians), []
    rig.send(0, rig.stamp + 10**13)
    for i in range(1, 80):
        height, width = ((96, 128), (100, 140))[i // 10 % 2]
        stamp = rig.send(i % 10 * 2, height=height, width=width)
        if i % 10:
            stamps.append(stamp)
    rig.until(lambda: set(stamps) <= set(rig.medians) & set(rig.previous), 'for the flows')
    assert set(rig.medians) - before == set(stamps)  # and none across a switch
    assert all(rig.previous[stamp] == stamp - 10**8 for stamp in stamps)
    rig.check(*stamps)
    rig.good()
    rig.end()


def test_stamps_that_go_backward(faults):
    rig = faults(**EVERY, max_frame_gap=1.0)
    rig.good()
    before = set(rig.previous)
    random = np.random.default_rng(2)
    steps = random.choice([1, 1, 1, 3, 0, -2, -50, 17], 300)  # tenths of a second
    stamps = [rig.stamp + 10**13 + int(t) * 10**8 for t in np.cumsum(steps)]
    for stamp in stamps:
        rig.send(int(stamp // 10**8 % 4) * 2, stamp)
    wanted, kept = [], stamps[0]
    for stamp in stamps[1:]:
        gap = stamp - kept
        if -(10**9) <= gap <= 0:  # out of order, or repeated: as if it had not come
            continue
        wanted += [(kept, stamp)] * (0 < gap <= 10**9)
        kept = stamp
    assert 100 < len(wanted) < 250
    flows = rig.count('flows') + len(wanted)
    rig.until(lambda: rig.count('flows') == flows, 'for the flows')
    last = {b: a for a, b in wanted}  # stamps come twice, too
    rig.until(lambda: all(rig.previous.get(b) == a for b, a in last.items()), 'for the last')
    assert set(rig.previous) - before == set(last)
    rig.settle()
    assert rig.count('flows') == flows
    rig.good()
    rig.end()


def test_a_reader_that_never_reads(faults):
    rig = faults()
    rig.good()
    camera = rig.stream('camera', 30)
    reader = rig.stream('reader')
    reader.send_signal(signal.SIGSTOP)  # matched, and takes nothing any more
    seen, before = len(rig.medians), rig.memory()
    rig.until(lambda: len(rig.medians) > seen + 100, 'for flows beside a stopped reader')
    rig.kill(camera)
    rig.good()
    assert rig.memory()[0] < before[0] + 100  # what the middleware keeps for it has an end
    rig.kill(reader)
    rig.good()
    rig.end()


CHANGES = [  # and whether they are accepted
    ({'quality': 'fast'}, True), ({'quality': 'balanced'}, True), ({'query_stride': 2}, True),
    ({'query_stride': 1}, True), ({'threads': 1}, True), ({'threads': 0}, True),
    ({'max_frame_gap': 0.5}, True), ({'image_timeout': 2.0}, True),
    ({'color_max_magnitude': 5.0}, True), ({'diagnostics_period': 0.06}, True),
    ({'model': '/no/such/file'}, False), ({'query_stride': 3}, False), ({'model': ' '}, False),
    ({'device': 'cuda:77'}, False), ({'quality': 'fast', 'max_frame_gap': -1.0}, False),
    ({'queue_size': 5}, False), ({'diagnostics_period': 0}, False), ({'tiling': 'x'}, False),
]  # fmt: skip


def test_two_hundred_parameter_changes_under_load(faults):
    rig = faults()
    rig.good()
    camera = rig.stream('camera', 30)
    random = np.random.default_rng(3)
    before = rig.memory()
    for i in range(200):
        changes, accepted = CHANGES[random.integers(len(CHANGES))]
        reason = rig.set(**changes)
        assert (reason == '') == accepted, (changes, reason)
        if i == 50:
            before = rig.memory()
    flows = rig.count('flows')
    rig.until(lambda: rig.count('flows') > flows + 5, 'for flows under load')
    rig.kill(camera)
    assert rig.set(query_stride=1, max_frame_gap=1.0, quality='auto', device='auto') == ''
    rig.good()
    memory = rig.memory()
    assert memory[0] < before[0] + GROWTH and memory[1] <= before[1] + 1
    rig.end()


def test_the_model_file_is_deleted_while_it_is_used(faults, tmp_path):
    weights = tmp_path / 'weights.safetensors'
    shutil.copy(ROOT / 'perceiver_flow_ros' / 'model' / 'lite.safetensors', weights)
    rig = faults(model=str(weights))
    rig.good()
    weights.unlink()
    rig.good()  # what is loaded goes on
    assert str(weights) in rig.set(query_stride=2)  # what must load again is refused
    rig.good()
    assert rig.change('deactivate') and rig.change('cleanup') and not rig.change('configure')
    assert rig.state() == 'unconfigured'
    rig.until(lambda: f'cannot configure: {weights}' in rig.messages['flow'][1])
    shutil.copy(ROOT / 'perceiver_flow_ros' / 'model' / 'lite.safetensors', weights)
    assert rig.change('configure') and rig.change('activate')
    rig.until(lambda: rig.image.get_subscription_count() == 1)
    rig.good()
    rig.end()


def test_fifty_deactivations_under_load(faults):
    rig = faults()
    rig.good()
    camera = rig.stream('camera', 30)
    rig.stream('reader')
    for i in range(50):
        assert rig.change('deactivate') and rig.state() == 'inactive'
        assert rig.change('activate') and rig.state() == 'active'
        flows = rig.count('flows')
        rig.until(lambda: rig.count('flows') > flows, 'for a flow')  # noqa: B023
        if i == 9:
            before = rig.memory()
    after = rig.memory()
    assert after[0] < before[0] + GROWTH and after[1] <= before[1] and after[2] <= before[2] + 2
    rig.kill(camera)
    rig.good()
    counts = rig.values['flow']
    assert int(counts['received']) == int(counts['processed']) + int(counts['dropped'])
    rig.end()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_flows_are_computed(faults, number):
    rig = faults()
    rig.stream('camera', 60)
    rig.stream('reader')
    rig.until(lambda: rig.count('flows') > 3)
    rig.end(number)


def test_two_nodes_of_one_name(faults):
    rig = faults()
    rig.good()
    second = rig.start_node({**FAST, 'image_reliability': 'reliable'})
    rig.until(lambda: rig.image.get_subscription_count() == 2, 'for the second node')
    rig.until(
        lambda: 'another node publishes /perceiver_flow/flow' in rig.messages['flow'][1],
        'to be told',
    )
    assert second.poll() is None
    rig.kill(second, signal.SIGINT)
    assert second.returncode == 0
    rig.until(lambda: rig.messages['flow'][0] == b'\x00', 'for the warning to go')
    rig.good()


def test_images_that_opencv_cannot_take(faults):
    """Odd widths in 4:2:2, one-pixel-wide mosaics: what passes the checks but not OpenCV."""
    rig = faults(**EVERY)
    rig.good()
    for encoding in ('yuyv', 'uyvy', 'bayer_rggb8', 'bayer_gbrg16'):
        dtype, channels, _ = ENCODINGS[encoding]
        pixels = np.zeros((3, 3, channels), dtype)
        rig.image.publish(image_message(pixels, 1.0, encoding))
    rig.image.publish(image_message(picture(), 1.0, is_bigendian=255))
    rig.good()
    rig.end()
