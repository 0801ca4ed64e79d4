# SPDX-License-Identifier: Apache-2.0
"""Seeded fuzzing of everything that is parsed: a right result, or the reason why there is none."""

import cv2
import numpy as np
from perceiver_flow_ros.commands.calibration import read_calibration
from perceiver_flow_ros.commands.main import main
from perceiver_flow_ros.flow.files import (
    FLOW_SUFFIXES,
    read_flow,
    read_image,
    write_flow,
    write_image,
)
from perceiver_flow_ros.model.weights import load_lite, WeightsError
from perceiver_flow_ros.ros.conversion import BadImage, to_frame
from perceiver_flow_ros.ros.parameter_file import read_yaml
import pytest
from ros_images import texture
from test_faults import malformed, ROOT

FLOW = np.random.default_rng(0).normal(0, 9, (24, 32, 2)).astype(np.float32)


def damaged(source, random, times):
    """Damage some bytes, now and then cut, repeat or insert some: `times` variants."""
    for i in range(times):
        data = bytearray(source)
        for _ in range(random.integers(1, 6)):
            data[random.integers(len(data))] = random.integers(256)
        if i % 3 == 0:
            start, end = sorted(random.integers(0, len(data), 2))
            data[start:end] = b'' if i % 2 else data[start:end] * 2
        yield bytes(data)


def test_image_messages():
    random = np.random.default_rng(1)
    frames = 0
    for _ in range(10_000):
        try:
            frame = to_frame(malformed(random))
        except BadImage as error:
            assert str(error)
        else:
            frames += 1
            assert frame.dtype == np.uint8 and (frame.ndim == 2 or frame.shape[2:] == (3,))
            assert min(frame.shape[:2]) >= 2
    assert 1_000 < frames < 9_000


@pytest.mark.parametrize('suffix', FLOW_SUFFIXES)
def test_flow_files(tmp_path, suffix):
    path = tmp_path / f'flow{suffix}'
    write_flow(path, FLOW)
    read = 0
    for data in damaged(path.read_bytes(), np.random.default_rng(2), 200):
        path.write_bytes(data)
        try:
            flow = read_flow(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            read += 1
            assert flow.dtype == np.float32 and flow.ndim == 3 and flow.shape[2] == 2
    assert read < 200


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.tiff', '.bmp', '.ppm', '.webp'])
def test_image_files(tmp_path, suffix):
    path = tmp_path / f'image{suffix}'
    write_image(path, cv2.GaussianBlur(texture(40, 50), (0, 0), 2))
    for data in damaged(path.read_bytes(), np.random.default_rng(3), 300):
        path.write_bytes(data)
        try:
            image = read_image(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


def test_parameter_files(tmp_path):
    path = tmp_path / 'parameters.yaml'
    refused = 0
    source = (ROOT / 'config' / 'perceiver_flow.yaml').read_bytes()
    bare = b'\n'.join(line for line in source.splitlines() if b'#' not in line)
    for data in damaged(bare, np.random.default_rng(4), 500):
        path.write_bytes(data)
        try:
            read_yaml(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert 300 < refused


@pytest.mark.parametrize('text', ['/**: {ros__parameters: {1: 2}}', '/**: {ros__parameters: 3}',
                                  '[1, 2]', '3', '', '/**:', '/**: {ros__parameters: }',
                                  '/**: {ros__parameters: {[1]: 2}}', '&a [*a, *a]'])  # fmt: skip
def test_parameter_files_of_another_kind(tmp_path, text):
    path = tmp_path / 'parameters.yaml'
    path.write_text(text)
    with pytest.raises(ValueError, match='parameters.yaml'):
        read_yaml(path)


def test_calibrations(tmp_path):
    path = tmp_path / 'camera.yaml'
    source = (
        b'image_width: 640\nimage_height: 480\ncamera_name: front\ncamera_matrix:\n  rows: 3\n'
        b'  cols: 3\n  data: [500, 0, 320, 0, 500, 240, 0, 0, 1]\ndistortion_model: plumb_bob\n'
        b'distortion_coefficients:\n  rows: 1\n  cols: 5\n  data: [0, 0, 0, 0, 0]\n'
    )
    for data in damaged(source, np.random.default_rng(5), 500):
        path.write_bytes(data)
        try:
            read_calibration(path)
        except ValueError as error:
            assert str(path) in str(error)


def test_weights(tmp_path):
    path = tmp_path / 'lite.safetensors'
    source = (ROOT / 'perceiver_flow_ros' / 'model' / 'lite.safetensors').read_bytes()
    head = 8 + int.from_bytes(source[:8], 'little')
    random = np.random.default_rng(6)
    for start in damaged(source[:head], random, 60):
        path.write_bytes(start + source[head:])
        try:
            load_lite(path)
        except WeightsError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize('storage', ['mcap', pytest.param('db3', marks=pytest.mark.slow)])
def test_bags(tmp_path, storage, capsys):
    (tmp_path / 'frames').mkdir()
    for i in range(3):
        write_image(tmp_path / 'frames' / f'{i}.png', texture(20, 30, i))
    bag, out = tmp_path / f'in.{storage}', tmp_path / 'out.mcap'
    assert main(['record', str(tmp_path / 'frames'), '-o', str(bag), '--fps', '10']) == 0
    source, refused = bag.read_bytes(), 0
    for data in damaged(source, np.random.default_rng(7), 60):
        bag.write_bytes(data)
        capsys.readouterr()
        code = main(['bag', str(bag), str(out), '--model', 'dis', '--force'])
        assert code in (0, 2)
        error = capsys.readouterr().err.splitlines()
        if code == 2:
            refused += 1
            assert error[-1].startswith('perceiver_flow: error: ')
    assert refused > 10
