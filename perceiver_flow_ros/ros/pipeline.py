# SPDX-License-Identifier: Apache-2.0
"""
From an image message to published flow.

Two threads. The worker's owns the estimator: whenever it is free it takes the newest image and
publishes the flow from the one it took before. The painter's colours the newest flow, so that
somebody who watches does not slow the flow down.
"""

from __future__ import annotations

import array
from collections.abc import Callable
import gc
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
from perceiver_flow_ros.flow.color import flow_to_color
from perceiver_flow_ros.flow.estimator import FlowEstimator, set_threads
from perceiver_flow_ros.ros.compressed import decode, encode
from perceiver_flow_ros.ros.conversion import BadImage, to_frame, to_message
from perceiver_flow_ros.ros.cues import Cues
from perceiver_flow_ros.ros.frames import Frame, nanoseconds, SKIPPED, why_no_pair, Worker
from perceiver_flow_ros.ros.notices import explain
from perceiver_flow_ros.ros.parameters import Settings
from perceiver_flow_ros.ros.topics import create_output
from sensor_msgs.msg import CompressedImage, Image, TimeReference
from std_msgs.msg import Header

if TYPE_CHECKING:
    from perceiver_flow_ros.ros.node import FlowNode

WARM_UP_SIZE = (368, 496)  # one tile of the official model
COLORS = {'flow/color', 'flow/color/compressed'}
DENSE = {'flow', 'flow/previous', *COLORS, 'time_to_contact', 'confidence'}
UNPAINTED = 4  # flows at most that wait for their colours: each of 1920x1080 takes 16 MB


class Pipeline:
    """
    What becomes of the images.

    Parameters
    ----------
    node : whose settings hold, at each image anew, and whose diagnostics are told what happens.
    loader : called like `load_estimator`.

    """

    def __init__(self, node: FlowNode, loader: Callable[..., FlowEstimator]) -> None:
        self.estimator: FlowEstimator | None = None
        self._node = node
        self._loader = loader
        self._previous: Frame | None = None
        self._restarts = 0  # what was begun before the last one counts no more
        self._since = 0  # which of them the previous frame came after
        self._memory: array.array | None = None  # of the last flow message
        self._outputs = {
            name: create_output(node, kind, f'~/{name}', node.diagnostics.output_incompatible)
            for name, kind in (
                ('flow', Image), ('flow/previous', TimeReference), ('flow/color', Image),
                ('flow/color/compressed', CompressedImage),
            )
        }  # fmt: skip
        self.cues = Cues(node)
        self.worker = Worker(self._process, node.settings.capacity)
        self.painter = Worker(self._paint, min(node.settings.capacity, UNPAINTED))
        self.worker.start()
        self.painter.start()

    def subscribers(self) -> dict[str, int]:
        """Count the subscribers of each output."""
        outputs = [*self._outputs.values(), *self.cues.outputs.values()]
        return {output.topic_name: output.get_subscription_count() for output in outputs}

    def wanted(self) -> set[str]:
        """Name what has to be published."""
        flow = {name for name, out in self._outputs.items() if out.get_subscription_count()}
        return flow | self.cues.wanted()

    def restart(self) -> None:
        """Have the next image start a new pair, and the next pair a new pose."""
        self._restarts += 1
        self.worker.clear()
        self.cues.motion.reset()

    def clear(self) -> None:
        """Drop what waits."""
        self.worker.clear()
        self.painter.clear()

    def stop(self, timeout: float) -> bool:
        """End the threads; tell whether each did within `timeout` seconds."""
        end = time.monotonic() + timeout  # of both together: a process has 2 s to end
        ended = [t.stop(max(end - time.monotonic(), 0.0)) for t in (self.worker, self.painter)]
        return all(ended)

    # In the worker's thread

    def load(self, settings: Settings) -> FlowEstimator:
        """Load an estimator and run it once, so that the first image need not wait."""
        s = settings
        estimator = self._loader(
            s.model, device=s.device, precision=s.precision, tiling=s.tiling, quality=s.quality,
            query_stride=s.query_stride, allow_download=s.allow_download,
        )  # fmt: skip
        set_threads(s.threads)
        blank = np.zeros((*WARM_UP_SIZE, 3), np.uint8)
        estimator(blank, blank)
        return estimator

    def gpu_memory(self) -> str:
        """Tell the GPU memory that this process has taken from its device."""
        torch, estimator = sys.modules.get('torch'), self.estimator
        if torch is None or estimator is None or not estimator.device.startswith('cuda'):
            return 'none'
        return f'{torch.cuda.memory_reserved(estimator.device) / 2**20:.0f} MiB'

    def free(self) -> None:
        """Give the estimator's memory back."""
        self._previous = None
        self.replace(None)

    def replace(self, estimator: FlowEstimator | None) -> None:
        """Take another estimator and give the memory of the old one back."""
        self.estimator = estimator
        gc.collect()  # (it may be in cycles)
        torch = sys.modules.get('torch')
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _process(self, message: Image | CompressedImage) -> None:
        """Work on one image. Whatever is wrong with it, the node lives and says so."""
        diagnostics = self._node.diagnostics
        try:
            self._follow(message)
        except BadImage as error:
            diagnostics.failed('image', f'image of {self._node.image_topic} refused: {error}')
        except Exception as error:
            if self._node.context.ok():  # else it came of the shutdown
                diagnostics.failed('inference', f'no flow: {explain(error)}')

    def _follow(self, message: Image | CompressedImage) -> None:
        restarts, estimator = self._restarts, self.estimator
        wanted = self.wanted()  # once: somebody may come while this pair is worked on
        cues = wanted - self._outputs.keys()
        if not cues:
            self.cues.motion.passed(nanoseconds(message.header.stamp) / 1e9)
        if estimator is None or not wanted:
            self._previous = None
            return
        frame = Frame(message.header, self._pixels(message))
        if restarts != self._restarts:
            return
        previous = self._previous if self._since == restarts else None
        self._since = restarts
        if previous is None:
            self._previous = frame
            return
        obstacle = why_no_pair(previous, frame, self._node.settings.max_frame_gap)
        if obstacle:
            self._node.diagnostics.restarted(*obstacle)
            if obstacle[0] in SKIPPED:
                return
        self._previous = frame
        if obstacle:
            self._odometry_without(obstacle[0], previous, frame)
            return
        start = time.perf_counter()
        pair = previous.image, frame.image
        settings = self._node.settings
        grid = settings.odometry_grid
        backward = None
        if wanted & DENSE or not decodes_points(estimator, grid):
            stride, flow = estimator.query_stride, estimator(*pair)
            if 'confidence' in wanted or (settings.forward_backward and cues):
                backward = estimator(*pair[::-1])
        else:  # motion alone needs but a sparse grid
            stride, flow = grid, on_grid(estimator, *pair, grid)
            if settings.forward_backward:
                backward = on_grid(estimator, *pair[::-1], grid)
        took = time.perf_counter() - start
        if restarts != self._restarts:  # this pair is of before it
            return
        self._publish(previous, frame, flow)
        self.cues.follow(previous, frame, flow, stride, backward, cues)
        self._node.diagnostics.flowed(frame.stamp / 1e9, took)

    def _pixels(self, message: Image | CompressedImage) -> np.ndarray:
        if isinstance(message, Image):
            return to_frame(message)
        image = decode(message)
        height, width = image.shape[:2]
        kind = 'grey' if image.ndim == 2 else 'colour'
        self._node.diagnostics.decoded(height, width, f'{kind}, compressed')
        return image

    def _odometry_without(self, obstacle: str, previous: Frame, frame: Frame) -> None:
        """Tell the odometry of two images that make no pair."""
        if obstacle == 'backward':  # a bag that starts again starts a new pose
            self.cues.motion.reset()
        elif self.cues.wanted():
            self.cues.missed(previous, frame)

    def _publish(self, previous: Frame, frame: Frame, flow: np.ndarray) -> None:
        """Publish what is subscribed to, under the header of the image that the flow leads to."""
        if self._outputs['flow/previous'].get_subscription_count():
            reference = TimeReference(header=frame.header, time_ref=previous.header.stamp)
            reference.source = 'previous image'
            self._outputs['flow/previous'].publish(reference)
        if self._outputs['flow'].get_subscription_count():
            message = to_message(flow, '32FC2', frame.header, self._memory)
            self._outputs['flow'].publish(message)
            self._memory = message.data
        if any(self._outputs[name].get_subscription_count() for name in COLORS):
            self.painter.put((flow, frame.header))

    # In the painter's thread

    def _paint(self, item: tuple[np.ndarray, Header]) -> None:
        flow, header = item
        try:
            color = flow_to_color(flow, self._node.settings.color_max_magnitude or None)
            plain, compressed = (self._outputs[name] for name in sorted(COLORS))
            if plain.get_subscription_count():
                plain.publish(to_message(color, 'rgb8', header))
            if compressed.get_subscription_count():
                compressed.publish(encode(color, header))
        except Exception as error:
            if self._node.context.ok():
                self._node.diagnostics.notices.error('color', f'no colour: {explain(error)}')


def decodes_points(estimator: FlowEstimator, grid: int) -> bool:
    """Tell whether a grid costs less than the whole image: for the official model it does."""
    return estimator.name == 'official' and grid > estimator.query_stride


def on_grid(
    estimator: FlowEstimator, previous: np.ndarray, current: np.ndarray, grid: int
) -> np.ndarray:
    """Estimate the flow (h, w, 2) at every `grid`-th row and column."""
    height, width = previous.shape[:2]
    points = np.stack(np.meshgrid(np.arange(0, width, grid), np.arange(0, height, grid)), -1)
    return estimator.at(previous, current, points.reshape(-1, 2)).reshape(points.shape)
