# SPDX-License-Identifier: Apache-2.0
"""Synthetic pairs are exact; training learns, pauses and resumes without a trace."""

from dataclasses import replace
import itertools
import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

torch = pytest.importorskip('torch')

from perceiver_flow_ros.commands.main import main  # noqa: E402
from perceiver_flow_ros.flow.estimator import load_estimator  # noqa: E402
from perceiver_flow_ros.flow.lite import PACKAGED  # noqa: E402
from perceiver_flow_ros.model.choice import Options  # noqa: E402
from perceiver_flow_ros.model.evidence import (  # noqa: E402
    averaging,
    centres,
    displacements,
    inside,
    warp,
)
from perceiver_flow_ros.model.layers import tokens  # noqa: E402
from perceiver_flow_ros.model.lite import (  # noqa: E402
    LiteConfig,
    LitePerceiver,
    PASSES,
    waves,
)
from perceiver_flow_ros.model.matching import filters  # noqa: E402
from perceiver_flow_ros.training import textures  # noqa: E402
from perceiver_flow_ros.training.loop import Trainer  # noqa: E402
from perceiver_flow_ros.training.losses import (  # noqa: E402
    averaged_flow,
    choice_loss,
    sequence_loss,
    UNSURE,
)
from perceiver_flow_ros.training.photometric import fog, shake  # noqa: E402
from perceiver_flow_ros.training.recipe import learning_rate, Recipe, unsure  # noqa: E402
from perceiver_flow_ros.training.synthesis import (  # noqa: E402
    drive_flow,
    Kind,
    KINDS,
    make_pairs,
    Motion,
)
from perceiver_flow_ros.training.textures import Textures  # noqa: E402
from perceiver_flow_ros.training.workers import start_workers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

SMALL = LiteConfig(feature_channels=8, joint_channels=16, token_channels=16, latents=8,
                   latent_channels=16, layers=1, heads=2, head_channels=8)
TEXTURES = Textures()
MOVING = (Kind(1., still=0., rigid=0.15, drives=0.15, fewest=0, most=6, size=1., begin=0.),)
RECIPE = Recipe(pairs=24, batch=2, height=64, width=64, warmup=2, motion=Motion(kinds=MOVING))


def test_flow_is_exact_where_nothing_hides_anything():
    """Sampling frame 2 along the flow gives frame 1 back, far better than without it."""
    torch.manual_seed(1)
    motion = Motion(smallest=2, largest=6, layers=0, augment=0, kinds=MOVING)
    first, second, flow = make_pairs(6, 96, 128, TEXTURES, motion)
    inside = slice(12, -12)
    back = (warp(second, flow) - first)[..., inside, inside].abs().mean()
    still = (second - first)[..., inside, inside].abs().mean()
    assert back < 0.35 * still and back < 0.03


def test_pairs_both_ways_are_exchanged_and_exact_in_both():
    """What a pair's reverse says of its motion fits the images as well as the pair's own flow."""
    torch.manual_seed(6)
    motion = Motion(2, 12, layers=3, augment=0, both_ways=True, kinds=MOVING)
    first, second, flow = make_pairs(8, 96, 128, TEXTURES, motion)
    assert torch.equal(first[:4], second[4:]) and torch.equal(second[:4], first[4:])
    known = torch.isfinite(flow)
    assert known[:4].all() and 0.7 < known[4:].float().mean() < 1
    back = (warp(second, flow.nan_to_num()) - first).abs().mean(1)[known[:, 0]].median()
    still = (second - first).abs().mean(1)[known[:, 0]].median()
    assert back < 0.2 * still
    back = (warp(second, flow.nan_to_num()) - first).abs().mean(1)[4:][known[4:, 0]].median()
    assert back < 0.2 * still
    with pytest.raises(ValueError, match='make it even'):
        make_pairs(3, 96, 128, TEXTURES, motion)


def test_drives_have_a_focus_of_expansion_and_leave_the_far_alone():
    torch.manual_seed(2)
    y, x = torch.linspace(-0.75, 0.75, 24), torch.linspace(-1, 1, 32)
    grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1])[None]
    scale = torch.full((20, 1, 1, 1), 40.)
    outward = 0
    for flow in drive_flow(grid, scale, 160.):
        u, v = flow.flatten(1)
        assert flow.norm(dim=0).max() < 0.4 * 160 * 1.5 * 3
        lines = torch.stack([v, -u], 1)         # every vector lies on a line through the focus
        focus = torch.linalg.lstsq(lines, (lines * grid[0].flatten(1).T).sum(1)[:, None]).solution
        away = grid[0].flatten(1) - focus
        assert (u * away[1] - v * away[0]).abs().max() < 1e-3 * flow.abs().max()
        outward += bool((flow.flatten(1) * away).sum() > 0)
    assert 10 < outward < 20                    # four of five drive forward


def test_flow_that_is_not_known_teaches_nothing():
    """The loss, and its gradient, are those of the known part alone."""
    truth = torch.randn(2, 2, 16, 16)
    flow = torch.randn(2, 2, 8, 8, requires_grad=True)
    truth[:, :, :, 8:] = float('nan')
    loss = sequence_loss([flow], truth, 0.8)
    alone = sequence_loss([flow[..., :4]], truth[..., :8], 0.8)
    assert loss.item() == pytest.approx(alone.item() / 2)
    gradient = torch.autograd.grad(loss, flow)[0]
    assert torch.isfinite(gradient).all() and not gradient[..., 4:].any()
    assert gradient[..., :4].all()


def test_shaking_blurs_along_its_direction_and_fog_hides():
    image = torch.zeros(2, 3, 41, 41)
    image[:, :, 20, 20] = 1
    blurred = shake(image, torch.tensor([0., torch.pi / 2]), torch.tensor([8., 8.]))
    assert blurred.sum((2, 3)).allclose(torch.ones(2, 3), atol=1e-5)
    wide = (blurred[:, 0] > 0.05).float()
    assert wide[0].sum(1).max() >= 8 and wide[0].sum(0).max() <= 2     # along x
    assert wide[1].sum(0).max() >= 8 and wide[1].sum(1).max() <= 2     # along y
    assert shake(image, torch.zeros(2), torch.zeros(2)).allclose(image, atol=1e-5)
    torch.manual_seed(0)
    scene = torch.rand(2, 4, 3, 64, 64)
    hidden = fog(scene)
    assert hidden.min() >= 0 and hidden.max() <= 1
    assert (hidden.std((0, 2, 3, 4)) < scene.std((0, 2, 3, 4))).all()


def test_layers_bring_motion_edges_and_scale_bounds_the_motion():
    torch.manual_seed(3)
    motion = Motion(smallest=4, largest=8, augment=0, kinds=MOVING)
    _, _, flow = make_pairs(8, 96, 128, TEXTURES, motion)
    jumps = (flow[..., 1:] - flow[..., :-1]).abs().amax((1, 2, 3))
    assert (jumps > 1).sum() >= 4
    assert flow.abs().max() < 80 and flow.norm(dim=1).mean() > 1


def test_pairs_are_a_function_of_the_seed():
    pairs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        pairs.append(make_pairs(2, 64, 64, TEXTURES))
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1]))
    assert not torch.equal(pairs[0][2], pairs[2][2])
    assert all(0 <= frame.min() and frame.max() <= 1 for frame in pairs[0][:2])


def test_learning_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(pairs=1000, warmup=100, decay_from=0.5, learning_rate=1.0)
    rates = [learning_rate(recipe, seen) for seen in (0, 50, 100, 500, 750, 1000)]
    assert rates[0] < 0.02 and rates[2] == rates[3] == 1
    assert rates[4] == pytest.approx(0.5) and rates[5] == pytest.approx(0, abs=1e-9)


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for name, value in (('WORLD_SIZE', '2'), ('LOCAL_RANK', '1')):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='GPU 1, but there are 1: give --nproc-per-node 1'):
        start_workers('cuda:0')


@pytest.mark.slow
def test_a_state_of_a_gpu_goes_on_on_a_cpu(tmp_path):
    trainer = train(tmp_path, 1)
    state = torch.load(trainer.state_file, weights_only=True)
    for group in state['optimiser']['param_groups']:
        group['capturable'] = True
    torch.save(state, trainer.state_file)
    train(tmp_path, 1, resume=True)


def train(folder, steps: int, resume: bool = False) -> Trainer:
    trainer = Trainer(folder, RECIPE, TEXTURES, TEXTURES, SMALL)
    assert trainer.resume() == resume
    losses = [trainer.step() for _ in range(steps)]
    assert np.isfinite(losses).all()
    trainer.save()
    return trainer


def test_resuming_equals_never_having_stopped(tmp_path):
    whole = train(tmp_path / 'whole', 4)
    train(tmp_path / 'parts', 2)
    parts = train(tmp_path / 'parts', 2, resume=True)
    assert parts.seen == whole.seen == 8
    for a, b in zip(whole.averaged.parameters(), parts.averaged.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_pair_is_learned_again_mirrored(tmp_path):
    recipe = replace(RECIPE, reuse=3)
    trainer = Trainer(tmp_path, recipe, TEXTURES, TEXTURES, SMALL)
    batches = []
    for _ in range(6):
        batches.append(tuple(x.clone() for x in trainer.make_batch()))
        trainer.seen += recipe.batch
    assert len(trainer.made) == 2
    for made, batch in zip(trainer.made, (batches[0], batches[3])):     # as they were
        assert all(map(torch.equal, made, batch))
    turns = [turn for k in (1, 2, 4, 5) for turn in itertools.product((False, True), repeat=2)
             for made in trainer.made if all(map(torch.equal, turned(made, *turn), batches[k]))]
    assert len(turns) == 4 and len(set(turns)) > 1


def turned(batch, across: bool, down: bool):
    """Mirror images and flow, by hand."""
    axes = [-1] * across + [-2] * down
    sign = torch.tensor([1. - 2 * across, 1. - 2 * down]).view(1, 2, 1, 1)
    first, second, flow = (x.flip(axes) if axes else x for x in batch)
    return first, second, flow * sign


@pytest.fixture
def small_validation(monkeypatch):
    """Evaluate on two pairs: those of a training take seconds."""
    monkeypatch.setattr(Trainer, 'validation', property(lambda trainer: [
        make_pairs(2, 64, 64, trainer.held_out, trainer.recipe.motion)]))


@pytest.mark.parametrize('only', [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_its_steps(tmp_path, small_validation, only):
    """To make the next batch early, and to evaluate in between, changes nothing."""
    recipe = replace(RECIPE, pairs=4 * RECIPE.batch, height=128, width=128, only_choice=only,
                     repeats=2)
    by_steps, by_run = (Trainer(tmp_path / name, recipe, TEXTURES, TEXTURES, SMALL)
                        for name in ('steps', 'run'))
    for _ in range(4):
        by_steps.step()
    by_run.run(evaluate_every=recipe.batch)
    assert by_run.seen == by_steps.seen == recipe.pairs
    for a, b in zip(by_steps.averaged.parameters(), by_run.averaged.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_training_shows_what_goes_far_before_what_does_not():
    torch.manual_seed(0)
    motion = Motion(smallest=1, largest=40, augment=0)
    sizes = torch.hypot(*make_pairs(64, 96, 128, TEXTURES, motion)[2].unbind(1)).flatten(1)
    far = ((sizes > 12).float().mean(1) > 0.01) & (sizes.median(1)[0] < 2)
    assert 0.15 < far.float().mean() < 0.5


def test_some_pairs_show_little_but_a_small_object_that_goes_far():
    torch.manual_seed(0)
    motion = Motion(smallest=4, largest=40, augment=0, kinds=KINDS[3:])
    flow = make_pairs(48, 96, 128, TEXTURES, motion)[2]
    moves = (flow - flow.flatten(2).median(2)[0][:, :, None, None]).norm(dim=1) > 4
    share = moves.float().mean((1, 2))
    assert (share < 0.25).float().mean() > 0.8 and share.max() < 0.6
    assert ((0.005 < share) & (share < 0.25)).float().mean() > 0.8


def test_a_state_that_is_none_is_refused_and_none_is_left_unfinished(tmp_path, monkeypatch):
    trainer = train(tmp_path, 1)
    whole = trainer.state_file.read_bytes()
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError(28, 'full')))
    with pytest.raises(OSError, match='full'):
        trainer.save()
    assert trainer.state_file.read_bytes() == whole and len([*tmp_path.iterdir()]) == 1
    trainer.state_file.write_bytes(b'junk')
    with pytest.raises(ValueError, match='is no state of a training'):
        trainer.resume()
    torch.save({'epoch': 3}, trainer.state_file)                # another program's
    with pytest.raises(ValueError, match='is no state of a training'):
        trainer.resume()


def test_weights_are_kept_before_their_error_is(tmp_path, small_validation):
    """Else, where they cannot be written, the next run would wait for better ones."""
    trainer = Trainer(tmp_path, replace(RECIPE, pairs=RECIPE.batch), TEXTURES, TEXTURES, SMALL)
    seen = []
    trainer.run(on_evaluation=lambda record: seen.append(trainer.state_file.exists()))
    assert seen == [False] and trainer.state_file.exists()


@pytest.mark.parametrize('arguments', [
    ('--largest', '-5'), ('--largest', '2', '--only-choice', '--size', '128', '128'),
    ('--reuse', '2', '--only-choice', '--size', '128', '128'), ('--reuse', '0')])
def test_training_is_not_told_nonsense(tmp_path, capsys, arguments):
    assert main(['train', str(tmp_path / 'run'), *arguments]) == 2
    assert f'{arguments[0]} is {arguments[1]}' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_photographs_that_are_too_small_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / 'small.png'), np.zeros((100, 400, 3), np.uint8))
    with pytest.raises(ValueError, match='of at least 128 pixels each way'):
        Textures([tmp_path])


@pytest.mark.slow
def test_two_workers_train_frames_of_which_some_are_too_small_for_a_choice(tmp_path):
    """Each draws its own shape; where one has no level to choose at, the choice rests there."""
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '-m',
         'perceiver_flow_ros', 'train', str(tmp_path), '--pairs', '8', '--batch', '1', '--size',
         '80', '96', '--device', 'cpu'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'finished' in done.stdout and (tmp_path / 'state.pt').exists()


def test_a_state_of_another_network_is_refused(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(ValueError, match='holds another network'):
        Trainer(tmp_path, RECIPE, TEXTURES, TEXTURES, LiteConfig()).resume()
    with pytest.raises(ValueError, match='as it was begun'):
        Trainer(tmp_path, replace(RECIPE, only_choice=True), TEXTURES, TEXTURES, SMALL).resume()


@pytest.mark.slow
def test_loss_falls_on_one_batch_seen_again_and_again(tmp_path):
    trainer = Trainer(tmp_path, RECIPE, TEXTURES, TEXTURES, SMALL)
    losses = []
    for _ in range(25):
        trainer.seen = 6  # the batch and the rate are functions of what was seen
        losses.append(trainer.step())
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


@pytest.fixture
def nothing_fake_is_kept():
    yield
    for keeps in (inside, averaging, centres, displacements, waves, tokens):
        keeps.cache_clear()


@pytest.mark.slow
def test_learning_from_a_batch_depends_on_no_values(nothing_fake_is_kept):
    """Nothing waits for a result, so a GPU can be given all of it as one graph."""
    filters(torch.device('cpu'))    # (kept, so real ones)
    with FakeTensorMode(allow_non_fake_inputs=True):    # refuses whatever would need a value
        trainer = object.__new__(Trainer)
        trainer.recipe, trainer.device, trainer.unsure = RECIPE, 'cpu', UNSURE
        trainer.network = LitePerceiver(SMALL)
        previous, current, truth = (torch.empty(2, c, 128, 160) for c in (3, 3, 2))
        trainer.loss(previous, current, truth).backward()
        assert all(p.grad is not None for p in trainer.network.parameters())
        with pytest.raises(Exception, match='item|data-dependent|aten._local_scalar_dense'):
            float(truth.sum())


def test_all_but_the_choice_is_trained(tmp_path):
    recipe = replace(RECIPE, height=128, width=128, keep_choice=True)
    trainer = Trainer(tmp_path, recipe, TEXTURES, TEXTURES, SMALL)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    for _ in range(2):      # (the heads begin at zero: nothing before them learns in a first step)
        trainer.step()
    same = {name.split('.')[0] for name, value in trainer.network.state_dict().items()
            if torch.equal(value, before[name])}
    assert same == {'choice'}


@pytest.mark.slow
def test_the_choice_alone_is_trained_and_learns(tmp_path):
    recipe = replace(RECIPE, height=128, width=128, only_choice=True, repeats=2,
                     learning_rate=3e-3)
    trainer = Trainer(tmp_path, recipe, TEXTURES, TEXTURES, SMALL)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    losses = []
    for _ in range(25):
        trainer.seen = 8
        losses.append(trainer.step())
    changed = {name.split('.')[0] for name, value in trainer.network.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {'choice'}
    assert {len(remembered) for remembered in trainer.memory} == {PASSES}
    flows = trainer.memory[0][0][0]
    assert flows.shape[-2:] == (8, 8)       # tokens of a level of 32x32, of pairs of 64x64
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_the_nearest_candidate_is_the_one_to_choose():
    flows = torch.zeros(3, 1, 2, 4, 5)
    flows[1], flows[2] = 8., -20.
    truth = torch.full((1, 2, 32, 40), 16.)     # twice the size of the level, 8 there
    truth[..., :16] = torch.nan
    target, share = averaged_flow(truth, flows.shape[-2:], 4)
    right, wrong = torch.zeros(3, 1, 1, 4, 5), torch.zeros(3, 1, 1, 4, 5)
    right[1, ..., 2:], wrong[2] = 10., 10.
    right[2, ..., :2] = 10.                     # what is not known counts for nothing
    losses = [float(choice_loss(Options(flows, flows, logits), target, share > 0.5))
              for logits in (right, wrong)]
    assert losses[0] < 0.1 * losses[1]


def test_an_untaught_choice_learns_from_what_it_is_sure_of_and_wrong():
    flows = torch.zeros(2, 1, 2, 4, 5)
    flows[1] = 8.
    slopes = []
    for share in (0., unsure(replace(RECIPE, untaught=100.), 0)):
        logits = torch.zeros(2, 1, 1, 4, 5)
        logits[1] = 30.
        logits.requires_grad_()
        choice_loss(Options(flows, flows, logits), flows[0], torch.ones(1, 1, 4, 5),
                    share).backward()
        slopes.append(float(logits.grad.abs().mean()))
    assert slopes[0] < 1e-6 and slopes[1] > 0.01
    taught = [unsure(replace(RECIPE, untaught=100.), seen) for seen in (50, 99, 200)]
    assert taught[0] == 0.5 and taught[1:] == [UNSURE] * 2 and unsure(RECIPE, 0) == UNSURE


@pytest.mark.parametrize('only', [False, True])
def test_training_begins_an_untaught_choice_with_cross_entropy(tmp_path, only):
    recipe = replace(RECIPE, height=128, width=128, untaught=8., only_choice=only, repeats=1)
    trainer = Trainer(tmp_path, recipe, TEXTURES, TEXTURES, SMALL)
    shares = []
    for _ in range(3):
        trainer.step()
        shares.append(float(trainer.unsure))
    assert shares == [1., 0.75, 0.5]
    batch = make_pairs(2, 128, 128, TEXTURES, RECIPE.motion)
    losses = []
    for share in (0., 1.):
        trainer.unsure.fill_(share)
        torch.manual_seed(0)        # (which of the remembered batches)
        loss = trainer.remembered_loss() if only else trainer.loss(*batch)
        losses.append(float(loss.detach()))
    assert losses[1] > losses[0] + 1e-3


@pytest.mark.parametrize('options, expected', [
    ([], (False, False, True)),
    (['--weights'], (False, False, False)),
    (['--only-choice'], (False, True, True)),
    (['--weights', '--keep-choice'], (True, False, False)),
])
def test_the_command_trains_the_part_that_is_asked_for(tmp_path, monkeypatch, options, expected):
    class Told(Exception):
        pass

    def trainer(folder, recipe, *_, **__):
        raise Told(recipe)

    monkeypatch.setattr('perceiver_flow_ros.training.loop.Trainer', trainer)
    at = options.index('--weights') + 1 if '--weights' in options else 0
    options = options[:at] + [str(PACKAGED)] * bool(at) + options[at:]
    args = ['train', str(tmp_path), '--size', '128', '128', '--device', 'cpu', *options]
    with pytest.raises(Told) as told:
        main(args)
    recipe = told.value.args[0]
    assert (recipe.keep_choice, recipe.only_choice, recipe.untaught > 0) == expected


def test_a_choice_that_has_learned_nothing_is_not_kept(tmp_path, capsys):
    assert main(['train', str(tmp_path), '--keep-choice']) == 2
    assert 'give weights' in capsys.readouterr().err


def test_textures_of_a_folder_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match='no images under'):
        Textures([tmp_path])


def test_pictures_of_test_data_are_never_cut_from(tmp_path, monkeypatch):
    monkeypatch.setattr(textures, 'packaged_photographs', list)
    for name, colour in (('7f_Ambush_5_left', (0, 0, 255)), ('meadow', (0, 255, 0))):
        cv2.imwrite(str(tmp_path / f'{name}.png'), np.full((160, 160, 3), colour, np.uint8))
    bank = Textures([tmp_path])
    assert len(bank) == 2
    cut = bank.patches(40, 32, 32, noise=0.)
    assert (cut[:, 1] > 0.99).all() and (cut[:, 0] < 0.01).all()
    (tmp_path / 'meadow.png').unlink()
    assert Textures([tmp_path]).patches(4, 32, 32, noise=0.).std() > 0.02   # (noise is left)


@pytest.mark.slow
def test_the_command_pauses_resumes_and_leaves_weights_that_load(tmp_path, capsys,
                                                                 small_validation):
    command = ['train', str(tmp_path / 'run'), '--pairs', '6', '--batch', '2', '--size', '64',
               '64', '--evaluate-every', '4', '--device', 'cpu', '--json']
    assert main([*command, '--minutes', '0.0001']) == 0
    assert main(command) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r['pairs'] for r in records][0] == 2 and records[-1]['pairs'] == 6
    estimator = load_estimator(tmp_path / 'run' / 'lite.safetensors', device='cpu')
    assert estimator.name == 'lite'
    assert estimator(*np.zeros((2, 40, 50, 3), np.uint8)).shape == (40, 50, 2)
    assert main(['train', str(tmp_path / 'run'), '--pairs', '0']) == 2
    assert main(['train', str(tmp_path / 'run'), '--plain', '--batch', '3']) == 2
