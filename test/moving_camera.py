# SPDX-License-Identifier: Apache-2.0
"""A camera on a base that moves past surfaces of known depth, and the exact flow it sees."""

import array

import cv2
import numpy as np
from perceiver_flow_ros.odometry.geometry import inverse, rotation, skew, transform
from ros_images import texture
from sensor_msgs.msg import CameraInfo, Image, Imu, Range

WIDTH, HEIGHT, FOCAL = 160, 120, 120.0
CENTRE = (WIDTH - 1) / 2, (HEIGHT - 1) / 2
# Optical axes (right, down, forward) of a camera that looks along x of the base, 0.3 m before it.
FORWARD = np.array([[0, 0, 1, 0.3], [-1, 0, 0, 0], [0, -1, 0, 0.5], [0, 0, 0, 1.0]])
FORWARD_TEXT = '0.3 0 0.5 -1.5707963268 0 -1.5707963268'
PERIOD = 0.1  # s


def step_of(twist, dt=PERIOD):
    """T_previous_current (4, 4) of a body with a constant twist [v, w] in its own frame."""
    v, w = np.asarray(twist[:3], float) * dt, np.asarray(twist[3:], float) * dt
    angle, k = np.linalg.norm(w), skew(w)
    left = np.eye(3) + k / 2 + k @ k / 6
    if angle > 1e-6:
        left = np.eye(3) + (1 - np.cos(angle)) / angle**2 * k
        left = left + (angle - np.sin(angle)) / angle**3 * k @ k
    return transform(rotation(w), left @ v)


def rays():
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return np.stack([(x - CENTRE[0]) / FOCAL, (y - CENTRE[1]) / FOCAL, np.ones_like(x)], -1)


def boxes(seed=0):
    """Depth (H, W) in metres of boxes of 2 to 6 m."""
    return np.kron(np.random.default_rng(seed).uniform(2, 6, (6, 8)), np.ones((20, 20)))


def ground(height=0.5, wall=8.0):
    """Depth (H, W) of a level road below a level camera, and a wall before it."""
    with np.errstate(divide='ignore'):
        road = np.where(rays()[..., 1] > 0, height / rays()[..., 1], np.inf)
    return np.minimum(road, wall)


def flow_of_motion(depth, motion):
    """Exact flow (H, W, 2) of a camera that moves by T_previous_current."""
    points = rays() * depth[..., None]
    back = inverse(motion)
    moved = points @ back[:3, :3].T + back[:3, 3]
    seen = moved[..., :2] / moved[..., 2:] * FOCAL + CENTRE
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return (seen - np.stack([x, y], -1)).astype(np.float32)


class ExactFlow:
    """An estimator that gives the flow it was told, there and back, and counts its calls."""

    name, device, precision, query_stride = 'exact', 'cpu', 'float32', 1

    def __init__(self):
        self.depth, self.motion, self.noise = boxes(), np.eye(4), 0.05  # m, -, px
        self.calls, self.points = [], []
        self.during = lambda: None  # runs in every call

    def __call__(self, previous, current):
        if not (previous.any() or current.any()):  # the warm-up
            return np.zeros((*previous.shape[:2], 2), np.float32)
        self.calls.append((previous, current))
        self.during()
        flow = flow_of_motion(self.depth, self.motion)
        if len(self.calls) > 1 and previous is self.calls[-2][1] and current is self.calls[-2][0]:
            flow = -flow  # backward, as good as it is for a small motion
        noise = np.random.default_rng(len(self.calls)).normal(0, self.noise, flow.shape)
        return (flow + noise).astype(np.float32)

    def at(self, previous, current, points):
        self.points.append(points)
        x, y = np.asarray(points).T
        return self(previous, current)[y, x]


def frame_of(index):
    """Give an image with texture, another one for every index."""
    return texture(HEIGHT, WIDTH, seed=index)


def following(image, flow):
    """Give what the camera sees after a flow, roughly: without what comes into view."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    at = np.float32(x) - flow[..., 0], np.float32(y) - flow[..., 1]
    return cv2.remap(image, *at, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def stamped(message, stamp, frame='camera'):
    message.header.frame_id = frame
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(round(stamp * 1e9), 10**9)
    return message


def info_message(stamp, width=WIDTH, height=HEIGHT, focal=FOCAL, **fields):
    scale = width / WIDTH
    cx, cy = (scale * (c + 0.5) - 0.5 for c in CENTRE)
    k = [focal * scale, 0.0, cx, 0.0, focal * scale, cy, 0.0, 0.0, 1.0]
    return stamped(CameraInfo(width=width, height=height, k=k, **fields), stamp)


def depth_message(depth, stamp, encoding='32FC1'):
    values = np.ascontiguousarray(depth, {'32FC1': '<f4', '16UC1': '<u2'}.get(encoding, '<f4'))
    message = Image(height=depth.shape[0], width=depth.shape[1], encoding=encoding)
    message.step = values.strides[0]
    message.data = array.array('B', values.tobytes())
    return stamped(message, stamp)


def range_message(distance, stamp):
    return stamped(Range(range=distance, min_range=0.1, max_range=30.0), stamp)


def imu_message(rates, stamp, frame='imu'):
    message = stamped(Imu(), stamp, frame)
    w = message.angular_velocity
    w.x, w.y, w.z = (float(rate) for rate in rates)
    return message
