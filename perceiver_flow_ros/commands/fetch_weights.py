# SPDX-License-Identifier: Apache-2.0
"""The official checkpoint into the local Hugging Face cache: at deploy time, never at boot."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import sys

from perceiver_flow_ros.flow.estimator import OFFICIAL_ID

HELP = 'fetch the official checkpoint into the local cache, once, where there is a network'
EXAMPLE = 'perceiver_flow fetch_weights'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's arguments."""
    parser.add_argument('--model', default=OFFICIAL_ID, metavar='HF_ID',
                        help=f'Hugging Face id (default: {OFFICIAL_ID})')
    parser.add_argument('--force', action='store_true', help='fetch again what is there')
    parser.add_argument('--json', action='store_true', help='print what was done as JSON')


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing, load it as a check, say where it is."""
    from perceiver_flow_ros.model.weights import cached, downloaded, load_official

    folder = None if args.force else cached(args.model)
    fetched = folder is None
    if folder is None:
        print(f'fetching {args.model} ...', file=sys.stderr)
        folder = downloaded(args.model, force=args.force)
    network = load_official(folder)             # does it load? a WeightsError says why not

    parameters = sum(weight.numel() for weight in network.parameters())
    if args.json:
        print(json.dumps({'model': args.model, 'folder': str(folder), 'fetched': fetched,
                          'parameters': parameters}, indent=2))
    else:
        print(f'{args.model}: {parameters:,} parameters, '
              f'{"fetched to" if fetched else "already in"} {folder}')
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run as the executable `fetch_weights` (`ros2 run perceiver_flow_ros fetch_weights`)."""
    from perceiver_flow_ros.commands.main import main as perceiver_flow

    return perceiver_flow(['fetch_weights', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    raise SystemExit(main())
