# SPDX-License-Identifier: Apache-2.0
"""A bag played twice to a process_every_frame node: the same flow, bit for bit, each time."""

import hashlib

import cv2
from fault_rig import EVERY, Faults
import numpy as np
from perceiver_flow_ros.commands.main import main
from perceiver_flow_ros.flow.files import write_image
import pytest
from ros_images import flow_of, picture
from rosbags.highlevel import AnyReader

pytestmark = pytest.mark.slow
FRAMES = 12


class Player(Faults):
    """Plays a bag to a node, at the bag's order and as fast as it takes it."""

    def __init__(self, folder, **parameters):
        self.flows = {}
        super().__init__(folder, **parameters)

    def _flow(self, message):
        stamp = message.header.stamp.sec, message.header.stamp.nanosec
        self.flows[stamp] = hashlib.sha256(message.data).hexdigest(), flow_of(message)

    def play(self, bag):
        """Give {stamp: (hash, flow)} of what the node makes of a bag."""
        self.flows = {}
        done = self.count('flows')
        with AnyReader([bag]) as reader:
            connections = [c for c in reader.connections if c.topic == '/camera/image_raw']
            for _, _, data in reader.messages(connections):
                self.image.publish(bytes(data))
        self.until(lambda: len(self.flows) == FRAMES - 1, 'for the flows of the bag')
        self.until(lambda: self.count('flows') == done + FRAMES - 1)
        self.settle()
        return self.flows


@pytest.fixture
def bag(tmp_path, capsys):
    """Make a bag by the package's own command."""
    (tmp_path / 'frames').mkdir()
    for i in range(FRAMES):
        tall = cv2.resize(picture(2 * i), (160, 120))
        write_image(tmp_path / 'frames' / f'{i:02}.png', tall)
    target = tmp_path / 'drive.mcap'
    assert main(['record', str(tmp_path / 'frames'), '-o', str(target), '--fps', '10']) == 0
    capsys.readouterr()
    return target


@pytest.mark.parametrize('model', ['dis', 'lite'])
def test_two_replays_are_equal(bag, tmp_path, model):
    hashes = []
    for name in ('first', 'second'):  # two nodes, each of which hears the bag twice
        (tmp_path / name).mkdir()
        player = Player(tmp_path / name, model=model, **EVERY)
        try:
            for _ in range(2):
                flows = player.play(bag)
                hashes.append({stamp: digest for stamp, (digest, _) in flows.items()})
                medians = [np.median(flow[9:-9, 9:-9], (0, 1)) for _, flow in flows.values()]
                assert np.abs(np.array(medians) - (2.5, 0)).max() < 0.5
            assert player.count('dropped') == player.count('failed') == 0
            player.end()
        finally:
            player.close()
    assert all(found == hashes[0] for found in hashes[1:])
    assert len(set(hashes[0].values())) == FRAMES - 1
