# SPDX-License-Identifier: Apache-2.0
"""
Optical flow and odometry of a camera topic.

ros2 launch perceiver_flow_ros perceiver_flow.launch.py image:=/camera/image_raw
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch_ros.actions import Node

CONFIG = os.path.join(get_package_share_directory('perceiver_flow_ros'), 'config')
ARGUMENTS = {
    'image': ('image', 'Topic of the images.'),
    'camera_info': ('', 'Topic of their calibration. Default: camera_info beside the images.'),
    'depth': ('depth', 'Topic of registered depth images, for scale_source depth.'),
    'range': ('range', 'Topic of a range sensor that looks down, for scale_source range.'),
    'imu': ('imu', 'Topic of an imu with a gyro; not used with gyro: ignore.'),
    'model': ('', 'lite, official, dis, a path or a Hugging Face id. Default: as in params_file.'),
    'device': ('', 'auto, cpu, cuda or cuda:N. Default: as in params_file.'),
    'image_transport': ('', 'raw or compressed. Default: as in params_file.'),
    'namespace': ('', 'Namespace of the node.'),
    'params_file': (os.path.join(CONFIG, 'perceiver_flow.yaml'), 'Parameters of the node.'),
    'fastdds_profile': (
        os.environ.get('FASTDDS_DEFAULT_PROFILES_FILE', os.path.join(CONFIG, 'fastdds.xml')),
        'Fast DDS profile, "" for none. Default: the one already set, else one that does not lose '
        'large images. The camera needs the same.',
    ),
}


def launch_node(context):
    given = {name: context.launch_configurations[name] for name in ARGUMENTS}
    beside = os.path.join(os.path.dirname(given['image']), 'camera_info')
    info = given['camera_info'] or beside
    chosen = ('model', 'device', 'image_transport')
    changes = {name: given[name] for name in chosen if given[name]}
    profile = given['fastdds_profile']
    return [
        Node(
            package='perceiver_flow_ros',
            executable='perceiver_flow_node',
            name='perceiver_flow',
            namespace=given['namespace'],
            parameters=[given['params_file'], changes],
            remappings=[
                ('image', given['image']),
                ('camera_info', info),
                *((name, given[name]) for name in ('depth', 'range', 'imu')),
            ],
            additional_env={'FASTDDS_DEFAULT_PROFILES_FILE': profile} if profile else {},
            output='screen',
        )
    ]


def generate_launch_description():
    """Declare the arguments and start the node, which configures and activates itself."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in ARGUMENTS.items()
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=launch_node)])
