# SPDX-License-Identifier: Apache-2.0
"""
Two cameras, a node each: an example of including perceiver_flow.launch.py into another file.

ros2 launch perceiver_flow_ros two_cameras.launch.py left:=/left/image_raw right:=/right/image_raw

The nodes are /left/perceiver_flow and /right/perceiver_flow. On one CPU they share its threads:
give each its part by `threads` in params_file.
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration

SHARE = get_package_share_directory('perceiver_flow_ros')
SIDES = ('left', 'right')
ARGUMENTS = {
    **{side: (f'/{side}/image_raw', f'Topic of the images of the {side} camera.')
       for side in SIDES},
    'model': ('', 'lite, official, dis, a path or a Hugging Face id. Default: as in params_file.'),
    'device': ('', 'auto, cpu, cuda or cuda:N. Default: as in params_file.'),
    'params_file': (
        os.path.join(SHARE, 'config', 'perceiver_flow.yaml'), 'Parameters of both nodes.'
    ),
}  # fmt: skip


def generate_launch_description():
    """Include the launch file once a camera, in a namespace of its own."""
    source = PythonLaunchDescriptionSource(
        os.path.join(SHARE, 'launch', 'perceiver_flow.launch.py')
    )
    given = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    shared = [(name, given[name]) for name in ('model', 'device', 'params_file')]
    return LaunchDescription([
        *(
            DeclareLaunchArgument(name, default_value=default, description=description)
            for name, (default, description) in ARGUMENTS.items()
        ),
        *(  # a group each, or the arguments of one would be the defaults of the next
            GroupAction([
                IncludeLaunchDescription(
                    source,
                    launch_arguments=[('namespace', side), ('image', given[side]), *shared],
                )
            ])
            for side in SIDES
        ),
    ])  # fmt: skip
