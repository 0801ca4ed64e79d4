# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands share: which estimator, and how it runs."""

from __future__ import annotations

import argparse

from perceiver_flow_ros.flow.estimator import (
    FlowEstimator,
    load_estimator,
    PRECISIONS,
    QUALITIES,
    QUERY_STRIDES,
    TILINGS,
)


def add_estimator_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `load_estimator`."""
    group = parser.add_argument_group('estimator')
    group.add_argument(
        '--model',
        default='lite',
        metavar='lite|official|dis|PATH|HF_ID',
        help='packaged weights, the checkpoint in the local cache, OpenCV DIS, a folder or file '
        'of weights, or a Hugging Face id (default: lite)',
    )
    group.add_argument(
        '--device', default='auto', metavar='auto|cpu|cuda[:N]', help='default: auto'
    )
    group.add_argument(
        '--precision',
        default='auto',
        choices=('auto', *PRECISIONS),
        help='default: auto (float32; of official on CUDA see the README)',
    )
    group.add_argument(
        '--tiling',
        default='tile',
        choices=TILINGS,
        help='the official model on other sizes (default: tile)',
    )
    group.add_argument(
        '--quality',
        default='auto',
        choices=QUALITIES,
        help='speed against accuracy of lite and dis',
    )
    group.add_argument(
        '--query-stride',
        type=int,
        default=1,
        choices=QUERY_STRIDES,
        help='estimate every n-th row and column only (default: 1)',
    )
    group.add_argument(
        '--allow-download', action='store_true', help='fetch missing weights from the hub'
    )


def estimator_from(args: argparse.Namespace) -> FlowEstimator:
    """Load the estimator that the arguments of `add_estimator_arguments` describe."""
    return load_estimator(
        args.model,
        device=args.device,
        precision=args.precision,
        tiling=args.tiling,
        query_stride=args.query_stride,
        quality=args.quality,
        allow_download=args.allow_download,
    )
