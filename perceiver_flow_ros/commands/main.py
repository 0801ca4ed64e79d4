# SPDX-License-Identifier: Apache-2.0
"""The command `perceiver_flow`: a file of this folder per subcommand, a line per wrong input."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import importlib
from importlib import metadata
import os
import signal
import sys
import threading
from types import FrameType

SUBCOMMANDS = (
    'estimate', 'evaluate', 'benchmark', 'record', 'bag', 'odometry', 'train', 'fetch_weights',
    'demo', 'soak', 'pairs',
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        """Exit with code 2 and one line."""
        self.exit(2, f'perceiver_flow: error: {message} (see {self.prog} --help)\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand: 0 when it worked, 2 with one line on stderr when its input was wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')  # what it cannot read we tell in one line
    args = make_parser(argv).parse_args(argv)
    end_in_order()
    try:
        return args.run(args)
    except BrokenPipeError:  # `perceiver_flow evaluate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print('perceiver_flow: interrupted', file=sys.stderr)
        return 130
    except input_errors() as error:
        print(f'perceiver_flow: error: {describe(error)}', file=sys.stderr)
        return 2


def end_in_order() -> None:
    """Have SIGTERM and SIGHUP end the process as an exception does: what is half written goes."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return  # Python allows it there only
    for number in (signal.SIGTERM, signal.SIGHUP):  # (nohup has it ignored: so it stays)
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, leave)


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser; a subcommand that is named first is the only one imported."""
    parser = Parser(prog='perceiver_flow', description='Dense optical flow with Perceiver IO.')
    parser.add_argument('--version', action='version', version=f'perceiver_flow {version()}')
    subparsers = parser.add_subparsers(title='subcommands', metavar='SUBCOMMAND', required=True)
    for name in argv[:1] if argv and argv[0] in SUBCOMMANDS else SUBCOMMANDS:
        command = importlib.import_module(f'perceiver_flow_ros.commands.{name}')
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            epilog=f'example:\n  {command.EXAMPLE}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def input_errors() -> tuple[type[Exception], ...]:
    """List the errors that a wrong input causes."""
    weights = sys.modules.get('perceiver_flow_ros.model.weights')  # where loaded: it needs torch
    return (ValueError, OSError, ImportError, *([weights.WeightsError] if weights else []))


def describe(error: BaseException) -> str:
    """Say an error in one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f'{error.filename}: {error.strerror}'
    return ' '.join(str(error).split()) or type(error).__name__


def version() -> str:
    """Tell the installed version."""
    try:
        return metadata.version('perceiver_flow_ros')
    except metadata.PackageNotFoundError:
        return '(not installed)'


if __name__ == '__main__':
    raise SystemExit(main())
