# SPDX-License-Identifier: Apache-2.0
"""The node's parameters from a file, without ROS: what it would take, and what it would refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from perceiver_flow_ros.ros.parameters import BY_NAME, defaults, Setting, Settings


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
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path}: not a parameter file ({error!r}); expected "/**: ros__parameters: ..."'
        ) from None
    if not sections:
        raise ValueError(f'{path}: it has parameters for neither /** nor {node}')
    for name, value in given.items():
        if name.startswith('qos_overrides') or name == 'use_sim_time':
            continue  # they mean nothing without ROS
        if name not in BY_NAME:
            raise ValueError(f'{path}: the node has no parameter {name!r}')
        problem = mistake(BY_NAME[name], value)
        if problem:
            raise ValueError(f'{path}: {problem}')
    return defaults().but({name: given[name] for name in given.keys() & BY_NAME.keys()})


def mistake(setting: Setting, value: Any) -> str:
    """Why a value is refused, with the checks that rclpy makes; '' if it is not."""
    if type(value) is not type(setting.default):
        kind = type(setting.default).__name__
        return f'{setting.name} is {value!r}, expected a value of type {kind}'
    if setting.low is not None and not setting.low <= value <= setting.high:
        return f'{setting.name} is {value}, expected {setting.values}'
    return setting.problem(value)
