# SPDX-License-Identifier: Apache-2.0
"""
Optical flow and odometry of a recorded bag: every image, on the bag's own time.

ros2 launch perceiver_flow_ros replay.launch.py bag:=drive.mcap image:=/camera/image_raw rviz:=true
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

SHARE = get_package_share_directory('perceiver_flow_ros')
CONFIG = os.path.join(SHARE, 'config')
ARGUMENTS = {
    'bag': (None, 'The bag: a folder or a file that `ros2 bag play` takes.'),
    'image': ('/camera/image_raw', 'Topic of the images in it.'),
    'model': ('', 'lite, official, dis, a path or a Hugging Face id. Default: as in params_file.'),
    'device': ('', 'auto, cpu, cuda or cuda:N. Default: as in params_file.'),
    'image_transport': ('', 'compressed where the bag has image/compressed. Default: raw.'),
    'params_file': (os.path.join(CONFIG, 'replay.yaml'), 'Parameters of the node.'),
    'rate': ('1.0', 'Speed of the bag. Slower where the diagnostics tell of dropped images.'),
    'delay': ('8.0', 'Seconds before the bag starts: the node loads its model.'),
    'rviz': ('false', 'Open RViz with config/rviz.rviz, too.'),
    'fastdds_profile': (
        os.environ.get('FASTDDS_DEFAULT_PROFILES_FILE', os.path.join(CONFIG, 'fastdds.xml')),
        'Fast DDS profile of all of them, so that no large image is lost.',
    ),
}


def generate_launch_description():
    """Start the node, the bag after a while, and RViz where it is asked for."""
    given = {name: LaunchConfiguration(name) for name in ARGUMENTS}
    passed = ('image', 'image_transport', 'model', 'device', 'params_file', 'fastdds_profile')
    bag = ['ros2', 'bag', 'play', given['bag'], '--clock', '100']
    return LaunchDescription([
        *(
            DeclareLaunchArgument(name, default_value=default, description=description)
            for name, (default, description) in ARGUMENTS.items()
        ),
        SetEnvironmentVariable('FASTDDS_DEFAULT_PROFILES_FILE', given['fastdds_profile']),
        IncludeLaunchDescription(
            PythonLaunchDescriptionSource(
                os.path.join(SHARE, 'launch', 'perceiver_flow.launch.py')
            ),
            launch_arguments=[(name, given[name]) for name in passed],
        ),
        ExecuteProcess(
            cmd=[*bag, '--rate', given['rate'], '--delay', given['delay']],
            name='bag', output='screen',
        ),
        Node(
            package='rviz2',
            executable='rviz2',
            arguments=['-d', os.path.join(CONFIG, 'rviz.rviz')],
            parameters=[{'use_sim_time': True}],
            condition=IfCondition(given['rviz']),
        ),
    ])  # fmt: skip
