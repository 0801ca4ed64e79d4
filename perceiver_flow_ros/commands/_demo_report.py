# SPDX-License-Identifier: Apache-2.0
"""What the demo says of a run: figures, the table, pictures and the bag."""

from __future__ import annotations

import dataclasses
from pathlib import Path
import sys
from typing import Any

import numpy as np
from perceiver_flow_ros.commands import _demo_motion as motion
from perceiver_flow_ros.commands._demo_frames import Footage
from perceiver_flow_ros.commands._demo_pictures import Pair, panel, scales, timeline
from perceiver_flow_ros.commands._demo_run import NODE, Recording
from perceiver_flow_ros.commands.bagfile import BagWriter, TYPES
from perceiver_flow_ros.flow.metrics import metrics
from perceiver_flow_ros.training.scene import exact_flow

COLUMNS = 6  # of the timeline


@dataclasses.dataclass
class Flow:
    """A flow that the node published."""

    previous: int  # number of the frame it starts from
    current: int  # and of the one it leads to
    received: float  # seconds
    latency: float  # seconds between the image's stamp and the flow's arrival
    field: np.ndarray  # (H, W, 2) float32
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # where the truth is known


def read_flows(recording: Recording, footage: Footage) -> list[Flow]:
    """Read the flows out of a recording, in their order, and compare them with the truth."""
    from tqdm import tqdm

    number = {stamp: i for i, stamp in enumerate(recording.sent)}
    flows: dict[int, Flow] = {}
    previous: dict[int, int] = {}
    for message in recording.messages():
        if message.topic == NODE['flow']:
            image: Any = TYPES.deserialize_cdr(message.data, message.kind)
            field = np.frombuffer(image.data, '<f4').reshape(image.height, image.width, 2)
            stamp = nanoseconds(image.header.stamp)
            late = (message.received - stamp) / 1e9
            flows[stamp] = Flow(-1, number[stamp], message.received / 1e9, late, field)
        elif message.topic == NODE['flow/previous']:
            reference: Any = TYPES.deserialize_cdr(message.data, message.kind)
            before = nanoseconds(reference.time_ref)
            previous[nanoseconds(reference.header.stamp)] = number[before]
    for stamp, flow in flows.items():
        flow.previous = previous.get(stamp, flow.current - 1)
    result = sorted(flows.values(), key=lambda flow: flow.current)
    if footage.views:
        for flow in tqdm(result, 'comparing', unit='flow', disable=None, file=sys.stderr):
            flow.errors = errors(flow, footage)
    return result


def errors(flow: Flow, footage: Footage) -> dict[str, float]:
    """Compare a flow with the exact one: over all pixels, and over those that are not hidden."""
    truth, visible = exact_flow(footage.views[flow.previous], footage.views[flow.current])
    targets = {'': truth}
    if visible.any():
        targets['_visible'] = np.where(visible[..., None], truth, np.nan)
    result: dict[str, float] = {}
    for name, target in targets.items():
        result |= {f'{key}{name}': metrics(flow.field, target)[key] for key in ('epe', 'fl')}
        result[f'epe_zero{name}'] = metrics(np.zeros_like(truth), target)['epe']
    return result


def figures(
    recording: Recording, footage: Footage, flows: list[Flow], rate: float
) -> dict[str, Any]:
    """Sum a run up."""
    sent = len(recording.sent)
    late = np.array([flow.latency for flow in flows]) * 1e3
    seconds = flows[-1].received - flows[0].received
    height, width = flows[0].field.shape[:2]
    report = {
        **estimator(recording),
        'source': footage.name,
        'size': [width, height],
        'camera_hz': rate,
        'frames_sent': sent,
        'flows_received': len(flows),
        'dropped': sent - 1 - len(flows),
        'flow_hz': (len(flows) - 1) / seconds if seconds > 0 else 0.0,
        'latency_ms': {
            'p50': float(np.percentile(late, 50)),
            'p95': float(np.percentile(late, 95)),
            'max': float(late.max()),
        },
    }
    for key in sorted({key for flow in flows for key in flow.errors}):
        known = [flow.errors[key] for flow in flows if key in flow.errors]
        report[key] = float(np.mean(known))
    return report


def estimator(recording: Recording) -> dict[str, str]:
    """Ask the node's diagnostics what computed the flow."""
    known: dict[str, str] = {}
    for message in recording.messages():
        if message.topic == '/diagnostics':
            array: Any = TYPES.deserialize_cdr(message.data, message.kind)
            for status in array.status:
                known.update((pair.key, pair.value) for pair in status.values)
    return {key: known.get(key, 'unknown') for key in ('model', 'device', 'precision')}


def pictures(footage: Footage, flows: list[Flow], report: dict[str, Any]) -> dict[str, np.ndarray]:
    """Draw the panel of one pair and the timeline."""
    every = [flows[i] for i in np.unique(np.linspace(0, len(flows) - 1, COLUMNS).astype(int))]
    pairs = [pair(flow, footage, flows[0]) for flow in every]
    one = pair(typical(flows), footage, flows[0])
    scale = scales([*pairs, one])
    late = report['latency_ms']
    facts = [
        f'{report["frames_sent"]} frames at {report["camera_hz"]:g} Hz',
        f'{report["flows_received"]} flows',
        f'latency {late["p50"]:.0f} ms (median), {late["p95"]:.0f} ms (p95)',
    ]
    if 'epe' in report:
        facts.append(
            f'end-point error {report["epe"]:.2f} px (zero flow {report["epe_zero"]:.1f})'
        )
    title = f'perceiver_flow, {report["model"]} on {report["device"]}'
    name = report['model']
    return {
        'panel': panel(one, scale, title, ',  '.join(facts), name),
        'timeline': timeline(pairs, scale, f'{title}: the run over time', name),
    }


def headings(report: dict[str, Any]) -> tuple[str, str]:
    """Give title and subtitle of the trajectory's picture."""
    title = f'perceiver_flow, {report["model"]} on {report["device"]}: the way from above'
    facts = [
        f'{report["motions"]} motions',
        f'{report["distance_m"]:.2f} m of {report["true_distance_m"]:.2f} m',
        f'median errors of a pair: {report["rotation_error_deg"]:.3f} deg of rotation',
        f'{report["direction_error_deg"]:.2f} deg of direction',
    ]
    return title, ',  '.join(facts)


def typical(flows: list[Flow]) -> Flow:
    """Choose the flow to show: the one of median error, or the middle one."""
    compared = [flow for flow in flows if 'epe_visible' in flow.errors]
    compared.sort(key=lambda flow: flow.errors['epe_visible'])
    candidates = compared or flows
    return candidates[len(candidates) // 2]


def pair(flow: Flow, footage: Footage, first: Flow) -> Pair:
    """Put a flow beside its frame and its truth."""
    from perceiver_flow_ros.ros.conversion import to_frame

    seconds = flow.received - first.received
    frame = to_frame(footage.image(flow.previous))
    truth = visible = None
    if footage.views:
        truth, visible = exact_flow(footage.views[flow.previous], footage.views[flow.current])
    steps = flow.current - flow.previous
    return Pair(frame, flow.field, truth, visible, seconds=seconds, steps=steps)


def write_bag(recording: Recording, path: Path) -> None:
    """Write the messages to a bag as they came, from a second before the first image."""
    with BagWriter(path, force=True) as bag:
        for message in recording.messages():
            if message.received < recording.sent[0] - 10**9:
                continue  # while the drive was rendered there was but the node's diagnostics
            bag.write(message.topic, message.kind, message.data, message.received)


def table(report: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    late = report['latency_ms']
    rows = [
        ('frames sent', f'{report["frames_sent"]}', f'at {report["camera_hz"]:g} Hz'),
        ('flows received', f'{report["flows_received"]}', f'at {report["flow_hz"]:.1f} Hz'),
        ('dropped', f'{report["dropped"]}', 'frames that gave way to a newer one'),
        ('latency p50', f'{late["p50"]:.0f} ms', 'from the stamp of the image to the flow'),
        ('latency p95', f'{late["p95"]:.0f} ms', f'at most {late["max"]:.0f} ms'),
    ]
    for name, key, what in (
        ('EPE', '', 'all pixels'),
        ('EPE visible', '_visible', 'pixels that the next image shows, too'),
    ):
        if f'epe{key}' in report:
            zero, share = report[f'epe_zero{key}'], report[f'fl{key}']
            note = f'{what}; zero flow: {zero:.2f} px; Fl {share:.1f} %'
            rows.append((name, f'{report["epe" + key]:.2f} px', note))
    rows += motion.rows(report)
    width, height = report['size']
    head = f'{report["model"]} on {report["device"]} in {report["precision"]}: '
    lines = [f'{head}{report["source"]}, {width}x{height}', '']
    lines += [f'  {name:15} {value:>9}   {note}' for name, value, note in rows]
    lines += ['', *(f'  {name:15} {file}' for name, file in report['files'].items())]
    return '\n'.join(lines)


def nanoseconds(stamp: Any) -> int:
    """Give a builtin_interfaces/Time as one number."""
    return stamp.sec * 10**9 + stamp.nanosec
