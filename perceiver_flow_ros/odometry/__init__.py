# SPDX-License-Identifier: Apache-2.0
"""
Motion from flow, with metres where there is a source of them; knows nothing of ROS.

>>> from perceiver_flow_ros.odometry import Camera, Odometry, Settings
>>> odometry = Odometry(Settings(scale='camera_height', camera_height=1.65))
>>> estimate = odometry.update(flow, Camera.pinhole(640, 480, 500, 500, 320, 240), 0.0, 0.1)
>>> estimate.twist if estimate.usable else estimate.message
"""

from perceiver_flow_ros.odometry import cues
from perceiver_flow_ros.odometry.camera import Camera, CameraError, Uncalibrated
from perceiver_flow_ros.odometry.depth import register_depth
from perceiver_flow_ros.odometry.gyro import GyroGap, mean_rate
from perceiver_flow_ros.odometry.odometry import Odometry
from perceiver_flow_ros.odometry.settings import Estimate, Reason, Settings

__all__ = [
    'Camera',
    'CameraError',
    'Estimate',
    'GyroGap',
    'Odometry',
    'Reason',
    'Settings',
    'Uncalibrated',
    'cues',
    'mean_rate',
    'register_depth',
]
