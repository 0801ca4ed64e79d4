"""Command odometry: a rendered sequence in the layout of KITTI, and folders that are none."""

import json

import cv2
import numpy as np
from odometry_rig import DRIVES, street, VIEW, views
from perceiver_flow_ros.commands.main import main
from perceiver_flow_ros.commands.odometry import medians, opencv, slopes
from perceiver_flow_ros.odometry import Camera
from perceiver_flow_ros.odometry.geometry import inverse
import pytest

FRAMES = 6


@pytest.fixture(scope='module')
def sequence(tmp_path_factory):
    """Render six frames of a straight drive; KITTI's poses are those of the left camera."""
    folder = tmp_path_factory.mktemp('kitti') / '99'
    (folder / 'image_0').mkdir(parents=True)
    frames = views(DRIVES['forward'], FRAMES, scene=street(colours=True))
    rows = []
    for i, view in enumerate(frames):
        cv2.imwrite(str(folder / 'image_0' / f'{i:06d}.png'), view.image[:, :, ::-1])
        rows.append((inverse(frames[0].pose) @ view.pose)[:3].ravel())
    np.savetxt(folder / 'poses.txt', rows)
    np.savetxt(folder / 'times.txt', [view.time for view in frames])
    p = f'{VIEW.fx} 0 {VIEW.cx} 0 0 {VIEW.fy} {VIEW.cy} 0 0 0 1 0'
    (folder / 'calib.txt').write_text(f'P0: {p}\n')
    return folder


def copied(sequence, folder, **changed):
    """Copy the sequence, with the files named changed, or left out where None."""
    (folder / 'image_0').mkdir()
    for path in sequence.rglob('*.*'):
        (folder / path.relative_to(sequence)).write_bytes(path.read_bytes())
    for name, text in changed.items():
        path = folder / f'{name}.txt'
        path.unlink() if text is None else path.write_text(text)
    return folder


def test_the_motion_of_a_rendered_drive_is_measured(sequence, capsys):
    arguments = ['odometry', str(sequence), '--model', 'dis', '--camera-height', '1.5', '--json']
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report['layout'], report['frames'], report['model']) == ('kitti', FRAMES, 'dis')
    (row,) = report['gaps']
    assert row['gap'] == 1 and row['scale'] == 'camera_height'
    assert row['pairs'] == row['valid'] == row['metric'] == FRAMES - 1
    assert row['kinds'] == {'general': FRAMES - 1}
    assert row['ours']['rotation_deg'] < 0.1 and row['ours']['direction_deg'] < 2
    assert row['opencv']['rotation_deg'] < 1 and row['seconds'] > 0
    assert abs(row['distance_error']) < 0.05 and row['speed_error'] < 0.08
    assert row['slopes'] == {}  # it does not turn
    closure = report['closure']
    assert closure['pairs'] == 2 and closure['rotation_deg'] < 0.1
    assert 0 < closure['deviation'] < 10 and 0 < row['deviation'] < 20


def test_slopes_tell_whose_the_noise_is():
    """With as much noise as signal in one of the two, the slope on it falls to a half."""
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(2, 4000, 3))
    mine = slopes(list(zip(signal + noise, signal)))
    assert mine['true_on_estimated'] == pytest.approx(0.5, abs=0.05)
    assert mine['estimated_on_true'] == pytest.approx(1, abs=0.05)
    poses = slopes(list(zip(signal, signal + noise)))
    assert poses['true_on_estimated'] == pytest.approx(1, abs=0.05)
    assert poses['estimated_on_true'] == pytest.approx(0.5, abs=0.05)
    three = np.degrees(3**0.5)  # three axes of deviation 1 rad
    assert poses['noise_true_deg'] == pytest.approx(three, rel=0.05)
    assert poses['noise_estimated_deg'] < 0.2 * three
    assert mine['noise_estimated_deg'] == pytest.approx(three, rel=0.05)
    assert slopes([]) == {}


def test_opencv_is_left_out_where_it_has_too_little_to_go_by():
    image, flow = np.zeros((120, 160), np.uint8), np.full((120, 160, 2), np.nan, np.float32)
    camera = Camera.pinhole(160, 120, 100.0, 100.0, 80.0, 60.0)
    assert opencv(flow, image, camera, {}) is None
    unknown = np.full((120, 160), np.nan)
    assert opencv(np.zeros_like(flow), image, camera, {'depth': unknown}) is None
    rows = [(0.1, np.nan, 0.0), (0.3, np.nan, 0.002)]   # nobody moves: there is no direction
    assert medians(rows, metric=True) == {
        'rotation_deg': pytest.approx(0.2), 'direction_deg': None,
        'translation_mm': pytest.approx(1),
    }  # fmt: skip


def test_wrong_poses_are_told_as_errors(sequence, tmp_path, capsys):
    """The figures compare: with poses that turn 1 deg a frame the rotation is off by as much."""
    rows = np.loadtxt(sequence / 'poses.txt').reshape(-1, 3, 4)
    for i, row in enumerate(rows):
        row[:, :3] = row[:, :3] @ cv2.Rodrigues(np.array([0, np.radians(i), 0]))[0]
    poses = '\n'.join(' '.join(map(str, row.ravel())) for row in rows)
    folder = copied(sequence, tmp_path, poses=poses)
    assert main(['odometry', str(folder), '--model', 'dis', '--every', '2', '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report['gaps']
    assert row['pairs'] == 3 and row['scale'] == 'none' and 'distance_error' not in row
    assert row['ours']['rotation_deg'] == pytest.approx(1, abs=0.1)
    assert row['deviation'] > 100  # such errors the covariances do not tell; nor are they ours
    assert report['closure']['rotation_deg'] < 0.1 and report['closure']['deviation'] < 10


def test_a_table_for_people(sequence, capsys):
    assert main(['odometry', str(sequence), '--model', 'dis', '--gaps', '2', '--every', '3']) == 0
    text = capsys.readouterr().out
    for words in ('2 frames apart, ours', 'OpenCV five-point', '2 valid (2 general)', ' deg'):
        assert words in text


@pytest.mark.parametrize(
    'changed, words',
    [
        ({'poses': None}, 'neither KITTI odometry'),
        ({'times': '0\n0.1\n'}, '6 images, 6 poses, 2 times'),
        ({'poses': 'here\nthere\n'}, 'poses.txt: expected rows of numbers'),
        ({'poses': '1 0 0\n0 1 0\n'}, 'poses.txt: expected 12 numbers a row'),
        ({'calib': 'P1: 1 2 3\n'}, 'it has no P0'),
    ],
)
def test_a_folder_that_is_no_sequence_is_refused(sequence, tmp_path, capsys, changed, words):
    folder = copied(sequence, tmp_path, **changed)
    assert main(['odometry', str(folder), '--model', 'dis']) != 0
    error = capsys.readouterr().err
    assert words in error and 'Traceback' not in error


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--every', '0'], 'expected 1 or more'),
        (['--gaps', '0'], 'expected 1 or more'),
        (['--gaps', '6'], '6 frames, none of them 6 apart'),
    ],
)
def test_counts_that_leave_no_pair_are_refused(sequence, capsys, arguments, words):
    assert main(['odometry', str(sequence), '--model', 'dis', *arguments]) != 0
    assert words in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main(['odometry', str(tmp_path / 'nowhere'), '--model', 'dis']) != 0
    assert 'nowhere' in capsys.readouterr().err
