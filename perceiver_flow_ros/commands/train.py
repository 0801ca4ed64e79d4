# SPDX-License-Identifier: Apache-2.0
"""Training of the lite network on pairs made on the fly; in pieces, on CPU or GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import sys

HELP = 'train the lite network on synthetic pairs with exact flow, made on the fly'
EXAMPLE = 'perceiver_flow train runs/lite --textures ~/Pictures --pairs 100000 --minutes 30'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument(
        'folder',
        type=Path,
        help='state.pt (to go on from), log.jsonl and lite.safetensors are kept here; a folder '
        'that holds a state is continued',
    )
    parser.add_argument(
        '--textures',
        type=Path,
        action='append',
        metavar='DIR',
        help='photographs to move, searched recursively; may be given several times (always '
        'added: those that scikit-image and scikit-learn ship, and procedural noise)',
    )
    parser.add_argument('--weights', type=Path, metavar='FILE', help='weights to begin with')
    parser.add_argument('--pairs', type=int, default=100_000, help='schedule length (100000)')
    parser.add_argument('--minutes', type=float, help='pause after this long, to be continued')
    parser.add_argument('--batch', type=int, default=8, help='pairs a step and worker (8)')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(128, 160), metavar=('H', 'W'), help='crop (128 160)'
    )
    parser.add_argument('--learning-rate', type=float, default=8e-4, help='peak (0.0008)')
    parser.add_argument(
        '--largest', type=float, default=36.0, metavar='PX', help='largest motion scale (36)'
    )
    parser.add_argument(
        '--plain',
        action='store_true',
        help='the last phase: no photometric changes, fog, blur or noise, and every pair forward '
        'and reversed',
    )
    parser.add_argument(
        '--reuse',
        type=int,
        default=1,
        metavar='N',
        help='times that a pair is learned from, on average, later ones mirrored (1); 2 on a GPU, '
        'which waits for new pairs (--pairs counts every time)',
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        '--keep-choice',
        action='store_true',
        help='leave how tokens choose between candidates as it is, and train all else',
    )
    part.add_argument(
        '--only-choice',
        action='store_true',
        help='train how tokens choose between candidates, and leave all else as it is; pairs are '
        'made at half of the size and motion given, matched one level finer: more in less time',
    )
    parser.add_argument('--evaluate-every', type=int, default=3000, metavar='PAIRS')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='auto', metavar='auto|cpu|cuda[:N]')
    parser.add_argument('--json', action='store_true', help='print each evaluation as JSON')


def run(args: argparse.Namespace) -> int:
    """Train, and keep the averaged weights that evaluate best as lite.safetensors."""
    from perceiver_flow_ros.flow.estimator import resolve_device
    from perceiver_flow_ros.model.weights import load_lite, save_lite
    from perceiver_flow_ros.training.loop import Trainer
    from perceiver_flow_ros.training.recipe import Recipe
    from perceiver_flow_ros.training.synthesis import Motion
    from perceiver_flow_ros.training.textures import HELD_OUT, Textures
    from perceiver_flow_ros.training.workers import start_workers
    import torch
    from tqdm import tqdm

    for name in ('pairs', 'batch', 'reuse', 'evaluate_every'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} is {getattr(args, name)}, expected >= 1')
    if args.plain and args.batch % 2:
        raise ValueError(f'--batch is {args.batch}, expected an even number with --plain: every '
                         'pair comes forward and reversed')
    if min(args.size) < 64:
        raise ValueError(f'--size is {args.size}, expected at least 64 pixels each way')
    if args.only_choice and min(args.size) < 112:
        raise ValueError(f'--size is {args.size}, expected at least 112 pixels each way with '
                         '--only-choice: smaller frames lack the level where tokens choose')
    smallest = 2.0 if args.only_choice else 0.5  # (there is no choice about less)
    if not args.largest > smallest:
        raise ValueError(f'--largest is {args.largest}, expected more than {smallest} pixels')
    if args.only_choice and args.reuse > 1:
        raise ValueError(f'--reuse is {args.reuse}, expected 1 with --only-choice, which learns '
                         'from every pair several times anyway')
    if args.keep_choice and not args.weights:
        raise ValueError('--keep-choice without --weights would keep a choice that has learned '
                         'nothing: give weights, or train it first with --only-choice')
    device = start_workers(resolve_device(args.device))
    textures, held_out = Textures(args.textures, device).split(HELD_OUT)
    recipe = Recipe(
        pairs=args.pairs,
        batch=args.batch,
        height=args.size[0],
        width=args.size[1],
        learning_rate=args.learning_rate,
        motion=Motion(
            smallest=smallest,
            largest=args.largest,
            augment=0.0 if args.plain else 0.5 if args.only_choice else 1.0,
            both_ways=args.plain,
        ),
        untaught=0 if args.weights else 2_500,
        keep_choice=args.keep_choice,
        only_choice=args.only_choice,
        reuse=args.reuse,
        autocast=device != 'cpu',
        seed=args.seed,
    )
    start = load_lite(args.weights) if args.weights else None
    trainer = Trainer(args.folder, recipe, textures, held_out, start=start)
    resumed = trainer.resume()
    best = args.folder / 'lite.safetensors'
    first = trainer.rank == 0
    bar = tqdm(total=args.pairs, initial=trainer.seen, unit='pair', file=sys.stderr,
               disable=None if first else True)

    def on_step(seen: int, loss: float) -> None:
        bar.update(seen - bar.n)
        bar.set_postfix(loss=f'{loss:.3f}', refresh=False)

    def on_evaluation(record: dict) -> None:
        if record['best']:
            save_lite(trainer.averaged, best)
        with tqdm.external_write_mode(file=sys.stdout):
            if args.json:
                print(json.dumps(record), flush=True)
            else:
                errors = '  '.join(f'{k[4:] or "all"}: {v:.3f}' for k, v in record.items()
                                   if k.startswith('epe'))
                print(f'{record["pairs"]} pairs  loss {record["loss"]:.3f}  held-out EPE '
                      f'{errors}{"  (kept)" if record["best"] else ""}', flush=True)

    if first and not args.json:
        size = sum(p.numel() for p in trainer.network.parameters())
        print(f'{size / 1e6:.2f} M parameters, {textures.weights.count_nonzero()} photographs, '
              f'on {device}, {"continuing" if resumed else "beginning"} at {trainer.seen} pairs')
    trainer.run(args.evaluate_every, args.minutes and args.minutes * 60, on_step, on_evaluation)
    bar.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if first and not args.json:
        done = trainer.seen >= args.pairs
        print(f'{best}: {"finished" if done else "paused; the same command goes on"}')
    return 0
