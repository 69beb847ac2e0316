"""What the console commands share: a user's mistake ends them with one line and a non-zero status, not a traceback."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import ConfigurationError, DDPMPipelineError


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], int]:
    """Decorate a command's `main(argv)`: errors of the user's making, and of the file system's, become one line.

    The decorated function returns the exit status: 0, 1 after an error, 130 after Ctrl-C (as shells have it).
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except DDPMPipelineError as error:
            message = str(error)
        except OSError as error:
            message = f"{error.strerror}: {error.filename}" if error.filename and error.strerror else str(error)
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or "interrupted", file=sys.stderr)
            return 130
        else:
            return 0
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 1

    return run


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage: that is what --help is for."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = _int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    """An argparse type: a seed of the runtime's noise."""
    value = _int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^63, got {value}")
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
