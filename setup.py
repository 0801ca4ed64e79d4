# SPDX-License-Identifier: Apache-2.0
"""Installs the package: `colcon build` in a ROS 2 workspace, or `pip install .`."""

from glob import glob

from setuptools import find_packages, setup

NAME = 'perceiver_flow_ros'

setup(
    name=NAME,
    version='0.1.0',
    description='Dense optical flow from a camera topic with Perceiver IO, for ROS 2',
    license='Apache-2.0',
    maintainer='perceiver_flow_ros maintainers',
    maintainer_email='maintainers@perceiver-flow-ros.example',
    python_requires='>=3.10',
    packages=find_packages(include=[NAME, f'{NAME}.*']),
    package_data={f'{NAME}.model': ['*.safetensors']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{NAME}']),
        (f'share/{NAME}', ['package.xml']),
        (f'share/{NAME}/launch', sorted(glob('launch/*.launch.py'))),
        (f'share/{NAME}/config', sorted(glob('config/*'))),
    ],
    # No torch here: on a robot it comes with the system or the vendor, and pip would replace it.
    install_requires=['setuptools'],
    extras_require={
        'all': [
            'huggingface_hub',
            'numpy',
            'opencv-python-headless',
            'PyYAML',
            'rosbags',
            'safetensors',
            'scikit-image',
            'scikit-learn',
            'torch',
            'tqdm',
        ],
    },
    zip_safe=True,
    entry_points={
        'console_scripts': [
            f'perceiver_flow = {NAME}.commands.main:main',
            f'perceiver_flow_node = {NAME}.ros.node:main',
            f'fetch_weights = {NAME}.commands.fetch_weights:main',
        ],
    },
)
