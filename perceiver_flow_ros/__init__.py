# SPDX-License-Identifier: Apache-2.0
"""Dense optical flow with Perceiver IO, as a ROS 2 node, a command and a library."""
