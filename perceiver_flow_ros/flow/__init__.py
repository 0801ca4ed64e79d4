# SPDX-License-Identifier: Apache-2.0
"""Frame pair -> flow field: estimators, tiling, colour, files, metrics. Knows nothing of ROS."""

from perceiver_flow_ros.flow.estimator import load_estimator

__all__ = ['load_estimator']
