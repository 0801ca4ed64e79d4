# SPDX-License-Identifier: Apache-2.0
"""
What the fault tests run beside the node: something that is killed or stopped.

    fault_process.py camera HZ     VGA images, stamped now, until it is killed
    fault_process.py reader        subscribe to every output and say so

Prints "begun" when it works.
"""

import sys

import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile
from ros_images import image_message, picture
from sensor_msgs.msg import Image, TimeReference


def camera(hertz):
    node = Node('stream')
    publisher = node.create_publisher(Image, '/image', QoSProfile(depth=5))
    messages = [image_message(picture(3 * i, 480, 640), 0) for i in range(4)]
    sent = []

    def publish():
        if not publisher.get_subscription_count():
            return
        message = messages[len(sent) % 4]
        message.header.stamp = node.get_clock().now().to_msg()
        publisher.publish(message)
        sent.append(message)
        if len(sent) == 3:
            print('begun', flush=True)

    node.create_timer(1 / hertz, publish)
    rclpy.spin(node)


def reader():
    node = Node('reader')
    for name, kind in (('flow', Image), ('flow/previous', TimeReference), ('flow/color', Image)):
        node.create_subscription(kind, f'/perceiver_flow/{name}', took, QoSProfile(depth=5))
    rclpy.spin(node)


def took(_):
    print('begun', flush=True)


if __name__ == '__main__':
    rclpy.init(args=[])
    camera(float(sys.argv[2])) if sys.argv[1] == 'camera' else reader()
