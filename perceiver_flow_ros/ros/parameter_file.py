# SPDX-License-Identifier: Apache-2.0
"""
The node's parameters in a file: read without ROS, and the config file, made from the table.

    python3 -m perceiver_flow_ros.ros.parameter_file > config/perceiver_flow.yaml
"""

from __future__ import annotations

import contextlib
from pathlib import Path
import textwrap
from typing import Any

from perceiver_flow_ros.ros.parameters import BY_NAME, defaults, Setting, SETTINGS, Settings
import yaml

OF_ROS = {'use_sim_time', 'start_type_description_service'}  # of every node


def read_yaml(path: Path, node: str = 'perceiver_flow') -> Settings:
    """
    Read a parameter file of the node without ROS; what it does not name keeps its default.

    Raises
    ------
    ValueError
        For a file that is none, a parameter the node has not, or a value it would refuse.

    """
    try:
        content = yaml.safe_load(path.read_text(errors='replace'))
        sections = [
            content[name]['ros__parameters']
            for name in ('/**', node, f'/{node}', f'/**/{node}') if name in content
        ]  # fmt: skip
        given = {key: value for section in sections for key, value in section.items()}
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        where = f' in line {at.line + 1}, column {at.column + 1}' if at else ''
        raise ValueError(f'{path}: not YAML{where}: {error.problem}') from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path}: not a parameter file ({error!r}); expected "/**: ros__parameters: ..."'
        ) from None
    if not sections:
        raise ValueError(f'{path}: it has parameters for neither /** nor {node}')
    for name, value in given.items():
        if str(name).startswith('qos_overrides') or name in OF_ROS:
            continue  # they mean nothing without ROS
        if name not in BY_NAME:
            raise ValueError(f'{path}: the node has no parameter {name!r}')
        if isinstance(BY_NAME[name].default, float) and isinstance(value, str):
            with contextlib.suppress(ValueError):  # 1e-3 is a number for ROS, not for PyYAML
                given[name] = value = float(value)
        problem = mistake(BY_NAME[name], value)
        if problem:
            raise ValueError(f'{path}: {problem}')
    return defaults().but({name: given[name] for name in given.keys() & BY_NAME.keys()})


def mistake(setting: Setting, value: Any) -> str:
    """Why a value is refused, with the checks that rclpy makes; '' if it is not."""
    if type(value) is not type(setting.default):
        kind = type(setting.default).__name__
        hint = f': write {value}.0' if (type(value), kind) == (int, 'float') else ''
        return f'{setting.name} is {value!r}, expected a value of type {kind}{hint}'
    if setting.low is not None and not setting.low <= value <= setting.high:
        return f'{setting.name} is {value}, expected {setting.values}'
    return setting.problem(value)


def to_yaml() -> str:
    """Write the config file: every parameter at its default, its description above it."""
    lines = [
        '# Parameters of perceiver_flow_node, each at its default.',
        '#',
        '#   perceiver_flow_node --ros-args --params-file perceiver_flow.yaml \\',
        '#     -r image:=/camera/image_raw -r camera_info:=/camera/camera_info',
        '#',
        '# Made by: python3 -m perceiver_flow_ros.ros.parameter_file > config/perceiver_flow.yaml',
        '# Change a running node: ros2 param set /perceiver_flow max_frame_gap 0.5',
        '# QoS of a topic: qos_overrides./perceiver_flow/flow.publisher.reliability: best_effort',
        '',
        '/**:',
        '  ros__parameters:',
    ]
    for s in SETTINGS:
        values = f' Values: {s.values}.' if s.values else ''
        text = s.description + values + (' Set at start only.' if s.fixed else '')
        default = f"'{s.default}'" if s.default == '' else s.default
        default = str(default).lower() if isinstance(default, bool) else default
        lines += [f'    # {line}' for line in textwrap.wrap(text, 93)]
        lines += [f'    {s.name}: {default}', '']
    return '\n'.join(lines)


if __name__ == '__main__':
    print(to_yaml(), end='')
