"""Options and error handling that the console commands share."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoints import shipped
from ..errors import ConfigurationError, DDPMPipelineError, ParityError, explain_missing_extra

FEATURES_HELP = (
    "features to compare images on: pixels, a feature network's folder, or torch-fidelity's file of Inception weights "
    "(default: the shipped network of MNIST for grey images, of CIFAR-10 for colour; pixels if there are few images)"
)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that the user or the file system causes into one line on stderr and a non-zero exit status.

    The status is 1 after an error, and as in a shell 130 after Ctrl-C and 143 after SIGTERM.
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
        message = f"out of memory: {error}"
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(1)


command = one_line_errors()  # decorates a command's `main`: each call enters a new context


def add_data_options(
    parser: CommandParser,
    num_samples: str,
    split: str,
    *,
    dataset: str = "a point set's name, a file of points, or an image data set",
    required: bool = True,
    points: bool = True,
    fit: str = "resize",
) -> None:
    """Add the options that select a data set and say how to read it.

    The defaults are `None` and `--fit resize`; a command changes them with `parser.set_defaults`.

    Args:
        parser: the command's parser.
        num_samples, dataset: the help texts of these options.
        split, fit: the defaults of these options, as the help describes them.
        required: whether `--dataset` must be given.
        points: whether the data may be points.
    """
    parser.add_argument("--dataset", required=required, help=dataset)
    parser.add_count("--num_samples", num_samples)
    if points:
        noise = "noise of a point set, as in training (default: the set's own)"
        parser.add_argument("--dataset_noise", type=float, help=noise)
    parser.add_argument("--split", help=f"split of an image data set (default: {split})")
    parser.add_argument(
        "--fit",
        choices=["resize", "pad"],
        default="resize",
        help=f"how images are fitted, as in training (default: {fit})",
    )
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out unreadable images and list them")


@contextlib.contextmanager
def leaving_out(skip_corrupt: bool, silent: bool = False) -> Iterator[Callable[[str], None] | None]:
    """Yield the `on_corrupt` argument of `load_images`; at the end, print which images were left out to stderr.

    Args:
        skip_corrupt: whether to leave out unreadable images; if not, yield `None`.
        silent: print nothing, because another process prints the same.
    """
    messages: list[str] = []
    yield messages.append if skip_corrupt else None
    if messages and not silent:
        messages = list(dict.fromkeys(messages))
        print(f"left out {len(messages)} image{'s' if len(messages) > 1 else ''}:", file=sys.stderr)
        print(*messages, sep="\n", file=sys.stderr)


@contextlib.contextmanager
def command_imports(name: str, module: str) -> Iterator[None]:
    """Guard a command's imports of optional packages, and name the extra to install if one is missing.

    Args:
        name: the command's name, with which the message begins.
        module: the module's `__name__`. If it is `"__main__"`, the message is printed and the program ends.

    Raises:
        MissingExtraError: if a package is missing and the module was imported.
    """
    with one_line_errors() if module == "__main__" else contextlib.nullcontext(), explain_missing_extra(name):
        yield


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage that `--help` prints."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def add_count(self, name: str, help: str, **options: Any) -> None:
        """Add an option whose value is an integer of at least 1."""
        self.add_argument(name, type=_positive_int, metavar="N", help=help, **options)

    def add_checkpoint(self, name: str, also: str = "") -> None:
        """Add a checkpoint folder, or a shipped checkpoint's name; `also` ends its help text."""
        self.add_argument(name, type=checkpoint_folder, help=f"a checkpoint folder, or a shipped one's name{also}")

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`, which lets a command replace its existing outputs (see `files`)."""
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs (default: refuse)")


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add `--device`."""
    parser.add_argument("--device", help="what torch runs on: cuda, mps, cpu … (default: the accelerator, if any)")


def add_provider(parser: argparse._ActionsContainer) -> None:
    """Add `--provider`."""
    parser.add_argument("--provider", help="what ONNX Runtime runs a bundle on: cuda, openvino … (default: cpu)")


def add_engine(parser: argparse._ActionsContainer) -> None:
    """Add what says where samples are drawn: `--device`, `--provider`, `--engine` and `--address`."""
    add_device(parser)
    add_provider(parser)
    parser.add_argument("--engine", choices=["ray"], help="draw in Ray's workers (default: in this process)")
    parser.add_argument(
        "--address", help="of a Ray cluster, such as 'auto' or HOST:PORT (default: start one on this machine)"
    )


def check_engine(args: argparse.Namespace) -> None:
    """Refuse options of an engine that contradict each other.

    Raises:
        ConfigurationError: if an address is given without an engine, or a device or provider with one.
    """
    if args.address is not None and args.engine is None:
        raise ConfigurationError("--address needs --engine ray")
    if args.engine is not None and (args.device or args.provider):
        raise ConfigurationError("--device and --provider are for this process, not for Ray's workers")


def _positive_int(text: str) -> int:
    value = _int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def noise_seed(text: str) -> int:
    """Parse a seed of the runtime's noise, an integer from 0 to 2^63 - 1, as an argparse type."""
    value = _int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2^63, got {value}")
    return value


def sample_range(text: str) -> range:
    """Parse the numbers of some samples, `FIRST:END`, as an argparse type."""
    first, colon, end = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:END, such as 0:1000")
    samples = range(_int(first), _int(end))
    if not samples or samples.start < 0:
        raise argparse.ArgumentTypeError(f"{text} holds no samples: it must go from 0 or more to a larger number")
    return samples


def checkpoint_folder(text: str) -> Path:
    """Parse a folder, or the name of a shipped checkpoint where no such folder exists, as an argparse type."""
    return Path(text) if Path(text).exists() else shipped().get(text, Path(text))


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
