"""What the console commands share: a user's mistake ends them with one line and a non-zero status, not a traceback."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from .errors import ConfigurationError, DDPMPipelineError, ParityError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line if the block fails by the user's or the file system's doing.

    The exit status is 1 after an error, 130 after Ctrl-C and 143 after SIGTERM (as shells have it).
    """
    try:
        yield
    except DDPMPipelineError as error:
        if isinstance(error, ParityError) and error.report is not None:
            print(error.report)
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except MemoryError as error:
        message = f"there is not enough memory: {error}"
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Decorate a command's `main(argv)`, so that its errors become one line."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        with one_line_errors():
            main(argv)

    return run


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage: that is what --help is for."""

    def __init__(self, **kwargs: object):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add the flag without which no command replaces an output that exists: see `files`."""
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist (default: refuse)")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = _int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def noise_seed(text: str) -> int:
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
