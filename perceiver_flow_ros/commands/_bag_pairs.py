# SPDX-License-Identifier: Apache-2.0
"""What `bag` makes of the images: the node's messages, a trajectory and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from perceiver_flow_ros.commands.bagfile import image_message, TYPES
from perceiver_flow_ros.flow.color import flow_to_color
from perceiver_flow_ros.flow.estimator import load_estimator, set_threads
from perceiver_flow_ros.flow.files import write_whole
from perceiver_flow_ros.odometry import cues
from perceiver_flow_ros.ros import messages
from perceiver_flow_ros.ros.compressed import decode
from perceiver_flow_ros.ros.conversion import BadImage, to_frame
from perceiver_flow_ros.ros.frames import Frame, SKIPPED, why_no_pair
from perceiver_flow_ros.ros.motion import Motion, Outcome, time_to_contact
from perceiver_flow_ros.ros.parameters import Settings
from perceiver_flow_ros.ros.transforms import quaternion_of_turn, StaticTree

KINDS = {**messages.FLOW, **messages.CUES}
MAKER = messages.Maker(lambda kind, **fields: TYPES.types[kind](**fields), image_message)
Written = tuple[str, str, Any]  # topic, type, message


class Results:
    """
    Follows the images of a bag, one after the other.

    Parameters
    ----------
    settings : the node's parameters.
    wanted : names of the outputs; None is all, confidence only with forward_backward.

    """

    def __init__(self, settings: Settings, wanted: list[str] | None) -> None:
        unknown = set(wanted or ()) - KINDS.keys()
        if unknown:
            raise ValueError(
                f'--topics: {", ".join(sorted(unknown))}: expected some of {", ".join(KINDS)}'
            )
        self.frames = self.flows = 0
        self._wanted = set(wanted or KINDS)
        if wanted is None and not settings.forward_backward:
            self._wanted.discard('confidence')
        self._settings = settings
        self._tree = StaticTree()
        self._motion = Motion(settings, self._tree)
        s = settings
        self._estimator = load_estimator(
            s.model, device=s.device, precision=s.precision, tiling=s.tiling, quality=s.quality,
            query_stride=s.query_stride, allow_download=s.allow_download,
        )  # fmt: skip
        set_threads(s.threads)
        self._previous: Frame | None = None
        self._pose = np.eye(4)
        self._trajectory: list[tuple[int, np.ndarray]] = []
        self._distance, self._motions = 0.0, 0
        self._kinds: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._remarks: Counter[str] = Counter()
        self._no_pair: Counter[str] = Counter()
        self._explained: dict[str, str] = {}  # reason -> what was wrong the first time
        self._unpaired: dict[str, str] = {}  # the same of images that make no pair

    def take(self, name: str, message: Any) -> None:
        """Take a message of another topic than the images'."""
        {
            'camera_info': self._motion.described, 'depth': self._motion.depth_came,
            'range': self._motion.range_came, 'imu': self._motion.imu_came, 'tf': self._tree.add,
        }[name](message)  # fmt: skip

    def of_image(self, message: Any) -> Iterator[Written]:
        """Give what is published on account of an image."""
        try:
            frame = Frame(message.header, decoded(message))
        except BadImage as error:  # as in the node, the next good one counts
            self._no_pair[f'bad image: {error}'] += 1
            return
        previous = self._previous
        obstacle = previous and why_no_pair(previous, frame, self._settings.max_frame_gap)
        if obstacle:
            self._no_pair[obstacle[0]] += 1
            self._unpaired.setdefault(*obstacle)
        if obstacle and obstacle[0] in SKIPPED:
            return
        self.frames += 1
        self._previous = frame
        if obstacle and obstacle[0] == 'backward':
            self._motion.reset()
            self._pose = np.eye(4)
        elif previous is not None and obstacle:
            self._motion.follow(previous, frame, None)
        elif previous is not None:
            yield from self._of_pair(previous, frame)
        self._trajectory.append((frame.stamp, self._pose))

    def _of_pair(self, previous: Frame, frame: Frame) -> Iterator[Written]:
        flow = self._estimator(previous.image, frame.image)
        stride, backward = self._estimator.query_stride, None
        if 'confidence' in self._wanted or self._settings.forward_backward:
            backward = self._estimator(frame.image, previous.image)
        self.flows += 1
        outcome = self._motion.follow(previous, frame, flow, stride=stride, backward=backward)
        self._note(outcome)
        made = self._made(previous, frame, flow, stride, backward, outcome)
        for name, message in made.items():
            if message is not None and name in self._wanted:
                yield name, KINDS[name], message
        estimate = outcome.estimate
        if self._settings.publish_tf and 'odometry' in self._wanted and estimate.metric \
                and estimate.usable:
            message = messages.tf(MAKER, frame.header.stamp, estimate, outcome.frames)
            yield '/tf', messages.TF, message

    def _made(self, previous, frame, flow, stride, backward, outcome) -> dict[str, Any]:
        """Make every message that can be made of a pair."""
        header, stamp, estimate = frame.header, frame.header.stamp, outcome.estimate
        made = {'flow': image_message(flow, '32FC2', header)}
        made['flow/previous'] = messages.time_reference(MAKER, header, previous.header.stamp)
        if 'flow/color' in self._wanted:
            color = flow_to_color(flow, self._settings.color_max_magnitude or None)
            made['flow/color'] = image_message(color, 'rgb8', header)
        if estimate.usable:
            made['twist'] = messages.twist(MAKER, stamp, estimate, outcome.frames)
            if estimate.metric:
                made['odometry'] = messages.odometry(MAKER, stamp, estimate, outcome.frames)
        if estimate.valid:
            made['focus_of_expansion'] = messages.focus_of_expansion(MAKER, header, estimate)
        if 'time_to_contact' in self._wanted:
            seconds = time_to_contact(outcome, flow, stride)
            if seconds is not None:
                made['time_to_contact'] = image_message(seconds, '32FC1', header)
        if backward is not None:
            share = cues.confidence(flow, backward, stride)[..., None]
            made['confidence'] = image_message(share, '32FC1', header)
        return made

    def _note(self, outcome: Outcome) -> None:
        estimate = outcome.estimate
        step = np.linalg.norm(estimate.pose[:3, 3] - self._pose[:3, 3])
        self._distance += float(step)
        self._pose = estimate.pose
        if estimate.usable:
            self._motions += 1
            self._kinds[estimate.kind] += 1
        else:
            self._reasons[outcome.reason] += 1
            self._explained.setdefault(outcome.reason, estimate.message)
        if outcome.remark:
            self._remarks[outcome.remark.partition(':')[0]] += 1

    def summary(self) -> dict[str, Any]:
        """Sum it up."""
        metric = self._settings.scale_source != 'none'
        stamps = [stamp for stamp, _ in self._trajectory]
        return {
            'model': self._estimator.name,
            'device': self._estimator.device,
            'frames': self.frames,
            'flows': self.flows,
            'seconds': sum(max(0, b - a) for a, b in pairwise(stamps)) / 1e9,
            'scale_source': self._settings.scale_source,
            'motions': self._motions,
            'motion_kinds': dict(self._kinds.most_common()),
            'distance_m': self._distance if metric else None,
            'without_motion': dict(self._reasons.most_common()),
            'explained': dict(self._explained),
            'no_pair': dict(self._no_pair.most_common()),
            'remarks': dict(self._remarks.most_common()),
        }

    def why_so_few(self) -> str:
        """Say what became of the images that are no frames or make no pair."""
        return '; '.join(f'{count} x {why}' + (f' ({self._unpaired[why]})'
                                               if why in self._unpaired else '')
                         for why, count in self._no_pair.most_common())

    def why_no_motion(self) -> str:
        """Say why pairs had none, or no metres."""
        return '; '.join(f'{count} x {why}: {self._explained[why]}'
                         for why, count in self._reasons.most_common())

    def write_tum(self, path: Path) -> None:
        """Write a line "t x y z qx qy qz qw" per frame (seconds, metres), whole or not at all."""
        lines = []
        for stamp, pose in self._trajectory:
            numbers = [*pose[:3, 3], *quaternion_of_turn(pose[:3, :3])]
            seconds = f'{stamp // 10**9}.{stamp % 10**9:09d}'
            lines.append(' '.join([seconds, *(f'{n:.9f}' for n in numbers)]) + '\n')
        write_whole(path, ''.join(lines).encode())


def decoded(message: Any) -> np.ndarray:
    """Decode a sensor_msgs/Image or CompressedImage."""
    return to_frame(message) if hasattr(message, 'encoding') else decode(message)
