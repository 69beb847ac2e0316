"""What the console commands share: a user's mistake ends them with one line and a non-zero status, not a traceback."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

from ..errors import ConfigurationError, DDPMPipelineError, ParityError, explain_missing_extra

FEATURES_HELP = (
    "what images are compared on: pixels, a feature network's folder, or a file of torch-fidelity's Inception weights "
    "(default: the shipped MNIST network for grey images, if there are enough of them, else pixels)"
)


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


class Command(Protocol):
    """A command's `main`, with the arguments after its name, or by default `sys.argv`'s."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


def command(main: Command) -> Command:
    """Decorate a command's `main(argv)`, so that its errors become one line."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        with one_line_errors():
            main(argv)

    return run


def add_data_options(
    parser: argparse.ArgumentParser,
    num_samples: str,
    split: str,
    *,
    dataset: str = "a point set's name, a file of points, or an image data set",
    required: bool = True,
    points: bool = True,
    fit: str = "resize",
) -> None:
    """Add the options that name a data set and say how it is read.

    Args:
        parser: of a command, which sets other defaults than None and `--fit resize` itself.
        num_samples, dataset: the help of the options of these names.
        split, fit: the defaults of the options of these names, in words.
        required: whether `--dataset` must be given.
        points: whether the data may be points.
    """
    parser.add_argument("--dataset", required=required, help=dataset)
    parser.add_argument("--num_samples", type=positive_int, metavar="N", help=num_samples)
    if points:
        noise = "of a point set, as in training (default: the set's own)"
        parser.add_argument("--dataset_noise", type=float, help=noise)
    parser.add_argument("--split", help=f"of an image data set (default: {split})")
    parser.add_argument("--fit", choices=["resize", "pad"], default="resize", help=f"as in training (default: {fit})")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out unreadable images, and list them")


@contextlib.contextmanager
def leaving_out(skip_corrupt: bool, silent: bool = False) -> Iterator[Callable[[str], None] | None]:
    """Yield what `load_images` takes as `on_corrupt`, and print at the end, to stderr, how many images were left out,
    and each one's message, once.

    Args:
        skip_corrupt: whether to leave any out; if not, `None` is yielded.
        silent: whether to print nothing, because another process does.
    """
    messages: list[str] = []
    yield messages.append if skip_corrupt else None
    if messages and not silent:
        messages = list(dict.fromkeys(messages))
        print(f"left out {len(messages)} image{'s' if len(messages) > 1 else ''}:", file=sys.stderr)
        print(*messages, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def command_imports(name: str, module: str) -> Iterator[None]:
    """Explain a missing extra at the top of a command's module.

    Where the module runs as a program, one line ends it. Where it is imported, `MissingExtraError` is raised.

    Args:
        name: of the command, to begin the line with.
        module: `__name__`.
    """
    with one_line_errors() if module == "__main__" else contextlib.nullcontext(), explain_missing_extra(name):
        yield


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage: that is what --help is for."""

    def __init__(self, **kwargs: Any):
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
