# SPDX-License-Identifier: Apache-2.0
"""The commands estimate, evaluate and record, as they are typed."""

import json
import sqlite3
import subprocess
import sys

import cv2
import numpy as np
from perceiver_flow_ros.commands import pairs
from perceiver_flow_ros.commands.calibration import read_calibration
from perceiver_flow_ros.commands.main import main, SUBCOMMANDS
from perceiver_flow_ros.flow import load_estimator
from perceiver_flow_ros.flow.files import read_flow, read_image, write_flow, write_image
import pytest
from rosbags.highlevel import AnyReader


def textured(height=70, width=90, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)


@pytest.fixture
def frames(tmp_path):
    """Give two images that differ by a shift of 2 px to the right."""
    picture = textured(width=100)
    paths = tmp_path / 'a.png', tmp_path / 'b.png'
    write_image(paths[0], picture[:, 10:])
    write_image(paths[1], picture[:, 8:-2])
    return [str(path) for path in paths]


def refused(capsys, *arguments):
    """Run a command that must fail: give the one line that says why."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ''
    assert captured.err.startswith('perceiver_flow: error: ')
    assert captured.err.count('\n') == 1
    return captured.err


# The command itself


def test_help_tells_every_subcommand_and_an_example_of_each(capsys):
    with pytest.raises(SystemExit) as end:
        main(['--help'])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert name in text
        with pytest.raises(SystemExit) as end:
            main([name, '--help'])
        assert end.value.code == 0
        assert f'example:\n  perceiver_flow {name}' in capsys.readouterr().out


def test_wrong_words_are_one_line(capsys, frames):
    assert 'invalid choice' in refused(capsys, 'estimat')
    assert 'arguments are required' in refused(capsys)
    assert 'frame2' in refused(capsys, 'estimate', 'a.png')
    assert "'int8'" in refused(capsys, 'estimate', *frames, '-o', 'x.flo', '--precision', 'int8')


def test_ctrl_c_is_told(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pairs, 'run', interrupted)
    assert main(['pairs', 'anywhere']) == 130
    assert capsys.readouterr().err == 'perceiver_flow: interrupted\n'


def test_it_runs_as_a_module_too(frames, tmp_path):
    command = [sys.executable, '-m', 'perceiver_flow_ros', 'estimate', *frames]
    command += ['-o', str(tmp_path / 'flow.flo'), '--model', 'dis', '--json']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)['model'] == 'dis'
    command[-3:] = ['no/such/model']
    assert subprocess.run(command, capture_output=True).returncode == 2


# estimate


@pytest.mark.parametrize('suffix', ['.flo', '.npy', '.png'])
def test_estimate_writes_the_flow_and_its_picture(capsys, frames, tmp_path, suffix):
    output, color = tmp_path / f'flow{suffix}', tmp_path / 'color.png'
    arguments = ['estimate', *frames, '-o', output, '--color', color, '--model', 'dis', '--json']
    assert main([str(a) for a in arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['image_size'] == report['flow_size'] == [90, 70]
    assert report['files'] == [str(output), str(color)]
    expected = load_estimator('dis')(*map(read_image, frames))
    np.testing.assert_allclose(read_flow(output), expected, atol=1 / 128)
    np.testing.assert_allclose(np.median(expected, axis=(0, 1)), (2, 0), atol=0.1)
    assert read_image(color).shape == (70, 90, 3)


def test_estimate_on_a_sparse_grid(capsys, frames, tmp_path):
    output = tmp_path / 'flow.npy'
    assert (
        main(['estimate', *frames, '-o', str(output), '--model', 'dis', '--query-stride', '4'])
        == 0
    )
    assert read_flow(output).shape == (18, 23, 2)
    assert '23x18 vectors' in capsys.readouterr().out


def test_estimate_refuses_bad_input_and_leaves_nothing(capsys, frames, tmp_path):
    out = tmp_path / 'flow.flo'
    (tmp_path / 'corrupt.png').write_bytes((tmp_path / 'a.png').read_bytes()[:500])
    write_image(tmp_path / 'small.png', textured(60, 90))

    def estimate(*arguments):
        return refused(capsys, 'estimate', *arguments, '--model', 'dis')

    message = estimate(frames[0], tmp_path / 'small.png', '-o', out)
    assert 'a.png is 90x70' in message and 'small.png is 90x60' in message
    assert 'corrupt.png: not a whole image' in estimate(
        frames[0], tmp_path / 'corrupt.png', '-o', out
    )
    assert 'none.png: No such file' in estimate(frames[0], tmp_path / 'none.png', '-o', out)
    assert 'nothing to write' in estimate(*frames)
    assert "'.gif', expected one of .flo, .png, .npy" in estimate(
        *frames, '-o', tmp_path / 'a.gif'
    )
    assert 'No such folder' in estimate(*frames, '-o', tmp_path / 'none' / 'a.flo')
    assert 'same file' in estimate(
        *frames, '-o', tmp_path / 'f.png', '--color', tmp_path / 'f.png'
    )
    for name in ('-o', '--color'):
        assert 'b.png: that is one of the frames' in estimate(*frames, name, frames[1])
    assert 'CPU only' in estimate(*frames, '-o', out, '--device', 'cuda')
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'a.png',
        'b.png',
        'corrupt.png',
        'small.png',
    ]


def test_estimate_says_what_is_wrong_with_a_model(capsys, frames, tmp_path):
    out = tmp_path / 'flow.flo'
    missing = tmp_path / 'no' / 'such' / 'model.safetensors'
    assert str(missing) in refused(capsys, 'estimate', *frames, '-o', out, '--model', missing)
    (tmp_path / 'junk.safetensors').write_bytes(b'junk')
    bad = tmp_path / 'junk.safetensors'
    assert 'junk.safetensors' in refused(capsys, 'estimate', *frames, '-o', out, '--model', bad)
    assert not out.exists()


# evaluate


def make_pair(first, second, truth, invalid=None, size=(70, 90)):
    """Write a pair that moves by (2, 0), with the truth saying (2, 1)."""
    picture = textured(size[0], size[1] + 10)
    for path, image in ((first, picture[:, 10:]), (second, picture[:, 8:-2])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, image)
    truth.parent.mkdir(parents=True, exist_ok=True)
    flow = np.full((*size, 2), (2, 1), np.float32)
    flow[:, :5] = np.nan
    if invalid:
        invalid.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros(size, np.uint8)
        flow[-10:] = 1000
        mask[-10:] = 255
        write_image(invalid, mask)
    write_flow(truth, flow)


LAYOUTS = {
    'frame10.png frame11.png flow10.flo': ['.'],
    'Beanbags/frame10.png Beanbags/frame11.png Beanbags/flow10.flo': ['Beanbags'],
    'other-data/Dogs/frame10.png other-data/Dogs/frame11.png other-gt-flow/Dogs/flow10.flo': [
        'other-gt-flow/Dogs'
    ],
    'training/clean/ambush_2/frame_0009.png training/clean/ambush_2/frame_0010.png '
    'training/flow/ambush_2/frame_0009.flo training/invalid/ambush_2/frame_0009.png': [
        'training/clean/ambush_2/frame_0009'
    ],
    'alley_1/final/frame_0002.png alley_1/final/frame_0003.png alley_1/final/gt/frame_0002.flo '
    'alley_1/final/gt/invalid/frame_0002.png': ['alley_1/final/frame_0002'],
    'training/image_2/000007_10.png training/image_2/000007_11.png '
    'training/flow_occ/000007_10.png': ['training/000007_10'],
    'image_0/000007_10.png image_0/000007_11.png flow_noc/000007_10.png': ['000007_10'],
    'colored_0/000007_10.png colored_0/000007_11.png flow_occ/000007_10.png': ['000007_10'],
    'data/00001_img1.ppm data/00001_img2.ppm data/00001_flow.flo': ['data/00001'],
    '0000003-img0.ppm 0000003-img1.ppm 0000003-gt.flo': ['0000003'],
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_evaluate_finds_every_layout(capsys, tmp_path, layout):
    make_pair(*[tmp_path / name for name in layout.split()])
    assert main(['evaluate', str(tmp_path), '--model', 'dis', '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    names = [tmp_path.name if name == '.' else name for name in LAYOUTS[layout]]
    assert [row['name'] for row in report['pairs']] == names
    row = report['pairs'][0]
    rows = 60 if 'invalid' in layout else 70  # what is invalid or unknown is not counted
    assert row['model']['pixels'] == row['zero']['pixels'] == rows * 85
    assert row['zero']['epe'] == pytest.approx(5**0.5, rel=1e-4)
    assert row['model']['epe'] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(('folder', 'files', 'name'), [
    ('grove', 'frame10.png frame11.png flow10.flo', 'grove'),
    ('k/flow_occ', '../image_2/000000_10.png ../image_2/000000_11.png 000000_10.png', '000000_10'),
])  # fmt: skip
def test_evaluate_in_the_folder_itself(capsys, tmp_path, monkeypatch, folder, files, name):
    (tmp_path / folder).mkdir(parents=True)
    make_pair(*[tmp_path / folder / file for file in files.split()])
    monkeypatch.chdir(tmp_path / folder)
    assert main(['evaluate', '.', '--model', 'dis', '--json']) == 0
    assert [row['name'] for row in json.loads(capsys.readouterr().out)['pairs']] == [name]


def test_evaluate_tells_how_the_confidence_sorts(capsys, tmp_path):
    make_pair(tmp_path / 'frame10.png', tmp_path / 'frame11.png', tmp_path / 'flow10.flo')
    command = ['evaluate', str(tmp_path), '--model', 'dis', '--confidence']
    assert main(command) == 0
    assert 'AUSE' in capsys.readouterr().out.splitlines()[0]
    assert main([*command, '--json']) == 0
    assert 0 <= json.loads(capsys.readouterr().out)['mean']['model']['ause'] < 1


def test_evaluate_takes_clean_and_final_and_counts_kitti_once(capsys, tmp_path):
    base = tmp_path / 'MPI' / 'training'
    for kind in ('clean', 'final'):
        folder = base / kind / 'cave_2'
        make_pair(
            folder / 'frame_0001.png',
            folder / 'frame_0002.png',
            base / 'flow/cave_2/frame_0001.flo',
        )
    base = tmp_path / 'KITTI'
    for truth in ('flow_occ', 'flow_noc'):
        frames = [base / 'image_2' / f'000000_1{i}.png' for i in (0, 1)]
        make_pair(*frames, base / truth / '000000_10.png')
    write_flow(tmp_path / 'flow10.flo', np.zeros((3, 3, 2)))  # its frames are missing
    assert main(['evaluate', str(tmp_path), '--model', 'dis']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [
        'KITTI/000000_10',
        'MPI/training/clean/cave_2/frame_0001',
        'MPI/training/final/cave_2/frame_0001',
    ]
    assert lines[6].split()[0] == 'mean'
    command = ['evaluate', str(tmp_path), '--model', 'dis', '--non-occluded']
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5:2]] == ['KITTI/000000_10', 'mean']
    (base / 'flow_noc' / '000000_10.png').unlink()  # never flow_occ/ in its place
    assert main(command) == 2


def test_evaluate_prints_dis_and_zero_beside_the_model(capsys, tmp_path, monkeypatch):
    class Zero:
        name, device, precision, query_stride = 'lite', 'cpu', 'float32', 1

        def __call__(self, previous, current):
            return np.zeros((*previous.shape[:2], 2), np.float32)

    monkeypatch.setattr('perceiver_flow_ros.commands.evaluate.estimator_from', lambda args: Zero())
    make_pair(*[tmp_path / name for name in ('frame10.png', 'frame11.png', 'flow10.flo')])
    assert main(['evaluate', str(tmp_path)]) == 0
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split('|')[0].split()[:3] == ['pair', 'lite', 'EPE']
    model, dis, zero = (part.split() for part in row.split('|'))
    assert model[1] == zero[0] == '2.24'
    assert float(dis[0]) == pytest.approx(1, abs=0.2)


def test_evaluate_says_what_is_wrong(capsys, tmp_path):
    message = refused(capsys, 'evaluate', tmp_path, '--model', 'dis')
    for name in ('Middlebury', 'Sintel', 'KITTI', 'FlyingChairs'):
        assert name in message
    assert 'No such folder' in refused(capsys, 'evaluate', tmp_path / 'none', '--model', 'dis')
    make_pair(*[tmp_path / name for name in ('frame10.png', 'frame11.png', 'flow10.flo')])
    (tmp_path / 'flow10.flo').write_bytes((tmp_path / 'flow10.flo').read_bytes()[:-8])
    assert 'flow10.flo: corrupt' in refused(capsys, 'evaluate', tmp_path, '--model', 'dis')
    write_flow(tmp_path / 'flow10.flo', np.zeros((5, 5, 2)))
    assert 'frame10.png is 90x70' in refused(capsys, 'evaluate', tmp_path, '--model', 'dis')


def test_evaluate_names_the_pair_that_nothing_can_be_compared_with(capsys, tmp_path):
    names = ('frame_0001.png', 'frame_0002.png', 'gt/frame_0001.flo', 'gt/invalid/frame_0001.png')
    mask = tmp_path / names[3]
    make_pair(*[tmp_path / name for name in names])
    write_image(mask, np.zeros((60, 80), np.uint8))
    message = refused(capsys, 'evaluate', tmp_path, '--model', 'dis')
    assert f'{mask} is 80x60, but its true flow' in message and 'frame_0001.flo 90x70' in message
    write_image(mask, np.full((70, 90), 255, np.uint8))
    message = refused(capsys, 'evaluate', tmp_path, '--model', 'dis')
    assert f'{tmp_path / names[2]}: the flow is unknown everywhere' in message


def test_evaluate_follows_links_and_counts_nothing_twice(capsys, tmp_path):
    frames = 'frame10.png', 'frame11.png', 'flow10.flo'
    for folder in ('root/Dogs', 'root/.made.7.partial', 'elsewhere/Army', 'beside'):
        make_pair(*[tmp_path / folder / name for name in frames])
    for link, target in {
        'root/Linked': 'elsewhere',
        'root/Again': 'root/Dogs',
        'root/Dogs/above': '.',
        'elsewhere/Army/circle': 'elsewhere',
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    assert main(['evaluate', str(tmp_path / 'root'), '--model', 'dis', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)['pairs']
    assert [row['name'] for row in rows] == ['Dogs', 'Linked/Army']


def test_pairs_come_whole_or_not_at_all(capsys, monkeypatch, tmp_path):
    pair = pairs.MadePair(textured(), textured(), np.zeros((70, 90, 2)), np.ones((70, 90), bool))

    def drives(end):
        yield pair
        if end:
            raise end
        yield pair

    for name in ('new/one', 'empty'):
        folder, before = tmp_path / name, sorted(tmp_path.rglob('*'))
        command = ['pairs', str(folder), '--count', '2']
        for end, code in ((KeyboardInterrupt(), 130), (ValueError('wrong'), 2), (None, 0)):
            assert sorted(tmp_path.rglob('*')) == before
            monkeypatch.setattr(pairs, 'drives', lambda seed, end=end: drives(end))
            assert main(command) == code
        assert sorted(path.name for path in folder.iterdir()) == list(pairs.FOLDERS)
        assert len(list(folder.rglob('*.png'))) == 8
        capsys.readouterr()
        assert 'holds pairs already' in refused(capsys, *command)
        (tmp_path / 'empty').mkdir(exist_ok=True)


@pytest.mark.slow
def test_pairs_are_made_and_evaluate_reads_them(capsys, tmp_path):
    """Drives and objects have truth for all pixels and for those the second frame shows."""
    torch = pytest.importorskip('torch')
    from perceiver_flow_ros.model.evidence import warp

    drive, layers, objects = (tmp_path / name for name in ('drive', 'layers', 'objects'))
    assert main(['pairs', str(drive), '--count', '1']) == 0
    assert main(['pairs', str(layers), '--kind', 'layers', '--count', '1', '--seed', '2']) == 0
    assert main(['pairs', str(objects), '--kind', 'objects', '--count', '1']) == 0
    first, second = (read_image(objects / f'image_2/000000_{k}.png') for k in (10, 11))
    flow = read_flow(objects / 'flow_noc/000000_10.png')
    there = warp(*(torch.from_numpy(x).float().permute(2, 0, 1)[None] for x in (
        second, np.nan_to_num(flow))))[0].permute(1, 2, 0).numpy()
    seen = np.isfinite(flow).all(2)
    assert np.abs(there - first)[seen].mean() < 0.1 * np.abs(second - first)[seen].mean()
    capsys.readouterr()
    means = []
    for command in ([drive], [drive, '--non-occluded'], [layers]):
        assert main(['evaluate', *map(str, command), '--model', 'dis', '--json']) == 0
        means.append(json.loads(capsys.readouterr().out)['mean'])
    occluded, visible, far = means
    assert visible['zero']['pixels'] < 0.9 * occluded['zero']['pixels']
    assert visible['model']['epe'] < 0.5 * visible['zero']['epe']
    assert visible['model']['epe'] < 0.5 * occluded['model']['epe']
    assert 30 <= far['zero']['epe'] <= 100 and far['zero']['pixels'] == 480 * 640
    assert '--count is 0' in refused(capsys, 'pairs', drive, '--count', 0)
    assert 'holds pairs already' in refused(capsys, 'pairs', drive)
    assert 'for objects and layers' in refused(capsys, 'pairs', drive, '--textures', tmp_path)


def test_evaluate_on_real_pairs(capsys, flow_data):
    assert main(['evaluate', str(flow_data), '--model', 'dis', '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report['pairs']) == 9
    assert report['mean']['model']['epe'] == pytest.approx(0.93, abs=0.02)
    assert report['mean']['zero']['epe'] == pytest.approx(3.96, abs=0.01)


# record

CAMERA_YAML = """
image_width: 90
image_height: 70
camera_name: test
camera_matrix: {rows: 3, cols: 3, data: [80, 0, 45, 0, 81, 35, 0, 0, 1]}
distortion_model: plumb_bob
distortion_coefficients: {rows: 1, cols: 5, data: [0.1, 0.2, 0.3, 0.4, 0.5]}
rectification_matrix: {rows: 3, cols: 3, data: [1, 0, 0, 0, 1, 0, 0, 0, 1]}
projection_matrix: {rows: 3, cols: 4, data: [70, 0, 44, 0, 0, 71, 34, 0, 0, 0, 1, 0]}
"""


def test_two_matrices_of_a_calibration_may_be_missing(tmp_path):
    whole, part = tmp_path / 'whole.yaml', tmp_path / 'part.yaml'
    whole.write_text(CAMERA_YAML)
    part.write_text('\n'.join(CAMERA_YAML.splitlines()[:-2]))
    whole, part = read_calibration(whole), read_calibration(part)
    assert (part.k, part.d, part.r) == (whole.k, whole.d, whole.r)
    assert part.p == [80, 0, 45, 0, 0, 81, 35, 0, 0, 0, 1, 0]


def make_images(folder, count=12, suffix='.png', **kind):
    folder.mkdir()
    for i in range(count):  # not padded: 10 comes after 2
        write_image(folder / f'frame_{i}{suffix}', textured(seed=i, **kind))
    return folder


def read_bag(path):
    """Give {topic: [(time, message)]} of a bag."""
    messages = {}
    with AnyReader([path]) as reader:
        for connection, time, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            messages.setdefault(connection.topic, []).append((time, message))
    return messages


def stamps(messages):
    return [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for _, m in messages]


@pytest.mark.parametrize('name', ['drive.mcap', 'drive.db3', 'drive'])
def test_record_gives_a_bag_that_reads_back(capsys, tmp_path, name):
    folder, bag = make_images(tmp_path / 'images'), tmp_path / name
    (tmp_path / 'camera.yaml').write_text(CAMERA_YAML)
    arguments = [
        'record',
        folder,
        '-o',
        bag,
        '--fps',
        10,
        '--calibration',
        tmp_path / 'camera.yaml',
    ]
    assert main([str(a) for a in [*arguments, '--frame-id', 'front', '--json']]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report['frames'], report['encoding'], report['size']) == (12, 'bgr8', [90, 70])
    assert bag.is_dir() == (name == 'drive')

    messages = read_bag(bag)
    images, infos = messages['/camera/image_raw'], messages['/camera/camera_info']
    assert stamps(images) == stamps(infos) == [10**9 + i * 10**8 for i in range(12)]
    assert [time for time, _ in images] == stamps(images)
    for i, (_, image) in enumerate(images):
        assert (image.height, image.width, image.step, image.encoding) == (70, 90, 270, 'bgr8')
        assert image.header.frame_id == 'front'
        np.testing.assert_array_equal(image.data.reshape(70, 90, 3)[..., ::-1], textured(seed=i))
    info = infos[-1][1]
    assert (info.width, info.height, info.distortion_model) == (90, 70, 'plumb_bob')
    assert info.header.frame_id == 'front'
    assert info.d.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert info.k.tolist() == [80, 0, 45, 0, 81, 35, 0, 0, 1]
    assert info.p.tolist() == [70, 0, 44, 0, 0, 71, 34, 0, 0, 0, 1, 0]


@pytest.mark.parametrize('label', ['P{}: ', ''])
def test_record_takes_times_and_a_kitti_calibration(tmp_path, label):
    folder = tmp_path / 'image_0'
    folder.mkdir()
    for i in range(3):
        write_image(folder / f'{i:06}.png', textured(seed=i)[..., 0])
    (tmp_path / 'times.txt').write_text('0.000000e+00\n1.044989e-01\n2.077935e-01\n')
    rows = ['700 0 600 0 0 700 180 0 0 0 1 0', '710 0 601 -379.8 0 711 181 0 0 0 1 0']
    calibration = ''.join(label.format(i) + row + '\n' for i, row in enumerate(rows))
    (tmp_path / 'calib.txt').write_text(calibration)
    arguments = ['--calibration', str(tmp_path / 'calib.txt'), '--kitti-camera', '1']
    bag = tmp_path / 'a.mcap'
    arguments += ['--image-topic', '/cam/image', '--camera-info-topic', '/info']
    assert main(['record', str(folder), '-o', str(bag), *arguments]) == 0
    messages = read_bag(bag)
    assert stamps(messages['/cam/image']) == [0, 104498900, 207793500]
    image, info = messages['/cam/image'][2][1], messages['/info'][2][1]
    assert (image.encoding, image.step) == ('mono8', 90)
    np.testing.assert_array_equal(image.data.reshape(70, 90), textured(seed=2)[..., 0])
    assert info.k.tolist() == [710, 0, 601, 0, 711, 181, 0, 0, 1]
    assert info.p[3] == -379.8
    assert not info.d.any()
    assert (info.width, info.height) == (90, 70)


def test_record_takes_a_video(tmp_path):
    video = cv2.VideoWriter(str(tmp_path / 'a.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 25, (90, 70))
    for i in range(5):
        video.write(textured(seed=i))
    video.release()
    bag = tmp_path / 'bag.mcap'
    fast = ['record', str(tmp_path / 'a.avi'), '-o', str(bag), '--fps', '2000']
    assert main(fast) == 0
    assert np.diff(stamps(read_bag(bag)['/camera/image_raw'])).tolist() == [500_000] * 4
    bag.unlink()
    assert main(['record', str(tmp_path / 'a.avi'), '-o', str(bag), '--start', '100']) == 0
    messages = read_bag(bag)
    assert stamps(messages['/camera/image_raw']) == [100 * 10**9 + i * 4 * 10**7 for i in range(5)]
    image = messages['/camera/image_raw'][3][1].data.reshape(70, 90, 3)
    assert np.abs(image.astype(int) - textured(seed=3)).mean() < 8  # it was compressed
    assert not messages['/camera/camera_info'][0][1].k.any()  # uncalibrated


def test_record_replaces_a_bag_only_when_told_and_nothing_else(capsys, tmp_path):
    folder = make_images(tmp_path / 'images', 2)
    for name in ('bag', 'bag.mcap'):
        command = ['record', folder, '--fps', 5, '-o', tmp_path / name]
        assert main([str(a) for a in command]) == 0
        capsys.readouterr()
        assert 'give --force' in refused(capsys, *command)
        assert main([str(a) for a in [*command, '--start', 50, '--force']]) == 0
        capsys.readouterr()
        assert stamps(read_bag(tmp_path / name)['/camera/image_raw'])[0] == 50 * 10**9
    message = refused(capsys, 'record', folder, '--fps', 5, '-o', folder, '--force')
    assert 'not a bag' in message
    assert len(list(folder.iterdir())) == 2


def test_record_replaces_no_file_that_only_bears_the_name_of_a_bag(capsys, tmp_path):
    folder = make_images(tmp_path / 'images', 2)
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'metadata.yaml').write_text('a: 1')
    for name in ('notes.db3', 'notes.mcap', 'notes/notes.mcap'):
        (tmp_path / name).write_text('notes')
    for name in ('other', 'bag'):
        with sqlite3.connect(tmp_path / f'{name}.db3') as database:
            database.execute('CREATE TABLE ' + {'bag': 'topics', 'other': 'people'}[name] + '(id)')
        database.close()
    for name in ('notes.db3', 'notes.mcap', 'notes', 'other.db3', 'bag.db3'):
        before = sorted(tmp_path.rglob('*'))
        command = ['record', folder, '--fps', 5, '-o', tmp_path / name]
        message = 'give --force' if name == 'bag.db3' else 'is not a bag; choose another name'
        assert message in refused(capsys, *command)
        if name != 'bag.db3':
            assert message in refused(capsys, *command, '--force')
        assert sorted(tmp_path.rglob('*')) == before
    assert main([str(a) for a in [*command, '--force']]) == 0
    assert len(read_bag(tmp_path / 'bag.db3')['/camera/image_raw']) == 2


def test_record_refuses_bad_input_and_leaves_nothing(capsys, tmp_path):
    folder = make_images(tmp_path / 'images', 3)
    calibration = tmp_path / 'camera.yaml'
    bag = tmp_path / 'bag.mcap'

    def record(*arguments, source=folder, output=bag):
        return refused(capsys, 'record', source, '-o', output, *arguments)

    assert 'no times.txt' in record()
    assert '--fps is 0' in record('--fps', 0)
    assert 'no images match' in record('--fps', 1, '--pattern', '*.jpg')
    assert 'beyond what ROS holds' in record('--fps', 1, '--start', 2**31 - 1)
    assert 'expected names below the folder' in record('--fps', 1, '--pattern', folder / '*.png')
    assert 'No such folder or video' in record('--fps', 1, source=tmp_path / 'none')
    assert 'not an absolute topic' in record('--fps', 1, '--image-topic', 'image raw')
    assert '.mcap is mcap' in record('--fps', 1, '--storage', 'sqlite3')
    assert 'No such folder' in record('--fps', 1, output=tmp_path / 'none' / 'bag')

    calibration.write_text(CAMERA_YAML.replace('image_width: 90', 'image_width: 640'))
    assert 'is for 640x70 images' in record('--fps', 1, '--calibration', calibration)
    calibration.write_text(CAMERA_YAML.replace('camera_matrix', 'matrix'))
    assert "no 'camera_matrix'" in record('--fps', 1, '--calibration', calibration)
    calibration.write_text('a: [b')
    assert 'camera.yaml: not a calibration' in record('--fps', 1, '--calibration', calibration)
    (tmp_path / 'calib.txt').write_text('P0: 1 2 3\n')
    assert 'P0 has 3 numbers' in record('--fps', 1, '--calibration', tmp_path / 'calib.txt')

    (tmp_path / 'times.txt').write_text('0\n1\n')
    assert 'times.txt: 2 times for 3 images' in record()
    (tmp_path / 'times.txt').write_text('0\n2\n1\n')
    assert 'do not increase' in record()
    (tmp_path / 'times.txt').write_text('0\n1\n1403636579763555584\n')  # EuRoC's
    assert 'ends at 1.40363658e+18, expected seconds' in record()
    (tmp_path / 'video.avi').write_bytes(b'junk' * 1000)
    assert 'nor a video' in record(source=tmp_path / 'video.avi')

    write_image(folder / 'frame_9.png', textured(seed=9)[..., 0])  # after three in colour
    message = record('--fps', 1)
    assert 'frame_9.png: 90x70 mono8, but the first frame is 90x70 bgr8' in message
    (folder / 'frame_9.png').write_bytes((folder / 'frame_1.png').read_bytes()[:300])
    assert 'frame_9.png: not a whole image' in record('--fps', 1)
    kept = ['calib.txt', 'camera.yaml', 'images', 'times.txt', 'video.avi']
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
