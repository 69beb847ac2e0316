"""The options by which one asks `ddpm-sample` for samples: labels, conditions, known values."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from ..runtime.columns import TableCodec
from ..runtime.request import Asked, numbered
from ..runtime.sampler import Sampler
from .parser import CommandParser, sample_range


def add_asking_options(parser: CommandParser) -> None:
    """Add the options that `read_asking` reads."""
    parser.add_count("--num_samples", "number of samples (default: 1)")
    parser.add_argument(
        "--samples",
        type=sample_range,
        metavar="FIRST:END",
        help="draw the samples of these numbers, from FIRST to END - 1: a part of what is asked for",
    )
    parser.add_argument(
        "--class_labels", nargs="+", metavar="CLASS", help="classes, by name or number: num_samples of each"
    )
    parser.add_argument(
        "--condition", nargs="+", metavar="NAME=VALUE", help="the condition's numbers; of a table, cells of the rows"
    )
    parser.add_argument("--conditions", type=Path, metavar="CSV", help="a condition in each row: num_samples of each")
    add_guidance_options(parser)
    parser.add_argument(
        "--known",
        nargs="+",
        metavar="NAME=VALUE|FILE",
        help="what part of the samples is to be: numbers of a point or cells of a row by name; a .csv file, whose "
        "empty cells are filled, num_samples of each row; or a picture, with --mask",
    )
    parser.add_argument("--mask", type=Path, metavar="PICTURE", help="white where the picture of --known is known")
    parser.add_count("--resample", "times that each step is taken, so that known and drawn parts fit", default=1)


def add_guidance_options(parser: argparse._ActionsContainer) -> None:
    """Add `--guidance_scale` and `--guidance_interval`."""
    parser.add_argument(
        "--guidance_scale", type=float, metavar="W", help="classifier-free guidance; 1 is none (default: as exported)"
    )
    parser.add_argument(
        "--guidance_interval",
        nargs=2,
        type=float,
        metavar=("T_HIGH", "T_LOW"),
        help="guide only at timesteps between these (default: all)",
    )


def read_guidance(args: Namespace) -> Asked:
    """Return what the options of `add_guidance_options` ask for."""
    asked = Asked()
    if args.guidance_scale is not None:
        asked["guidance_scale"] = args.guidance_scale
    if args.guidance_interval is not None:
        asked["guidance_interval"] = tuple(args.guidance_interval)
    return asked


@dataclass(frozen=True, eq=False)
class Asking:
    """What is asked of the samples of a draw.

    Attributes:
        samples: the numbers of the samples.
        of_all: what is asked of all of them.
        of_each: where several things are asked for, the rows of each argument.
        num_samples: number of samples of each row, one row after the other.
    """

    samples: range
    of_all: Asked
    of_each: dict[str, Sequence[Any] | np.ndarray]
    num_samples: int

    def of(self, samples: range) -> Asked:
        """Return the arguments for some of the samples."""
        asked, rows = self.of_all.copy(), np.arange(samples.start, samples.stop) // self.num_samples
        for name, values in self.of_each.items():
            each = [values[row] for row in rows.tolist()]
            asked[name] = each if name == "class_labels" else np.array(each)  # type: ignore[literal-required]
        return asked

    def digest(self) -> str:
        """Return a checksum of what is asked."""
        asked = {"num_samples": self.num_samples, **self.of_all, **self.of_each}

        def to_lists(values: Any) -> Any:  # a picture's numbers may be those of a palette
            return np.asarray(values.convert("RGBA") if hasattr(values, "convert") else values).tolist()

        text = json.dumps(asked, sort_keys=True, default=to_lists)
        return hashlib.sha256(text.encode()).hexdigest()


def read_asking(args: Namespace, sampler: Sampler) -> Asking:
    """Return what is asked for. Every class, condition and row of known values gets `args.num_samples` samples.

    Raises:
        ConfigurationError: if a file can't be read or names a column that the sampler doesn't know, or if the numbers
            of rows differ, or if there are fewer samples than `args.samples` numbers.
    """
    several: dict[str, Any] = {}  # with one row for each of the things that are asked for
    asked = read_guidance(args)
    if args.class_labels is not None:
        several["class_labels"] = [_class(label, sampler.class_names) for label in args.class_labels]
    if args.conditions is not None and args.condition is not None:
        raise ConfigurationError("give --condition or --conditions, not both")
    if sampler.codec is not None:
        several |= _known_cells(args, sampler.codec)
    elif args.condition is not None:
        asked["condition"] = _values(args.condition, "--condition takes NAME=VALUE")
    elif args.conditions is not None:
        several["condition"] = _read_rows(args.conditions, sampler.condition_columns, may_be_empty=False)
    if args.known is not None and sampler.codec is None:
        path = Path(args.known[0])
        if len(args.known) == 1 and path.suffix == ".csv" and sampler.is_points:
            several["known"] = _read_rows(path, sampler.data_columns, may_be_empty=True)
        elif sampler.is_points:
            asked["known"] = _values(args.known, "--known takes NAME=VALUE, or a .csv file")
        elif len(args.known) == 1 and args.mask is not None:
            asked["known"], asked["mask"] = _open_picture(path), np.asarray(_open_picture(args.mask).convert("L"))
        else:
            raise ConfigurationError("known images are a picture and a --mask")
    asked["resample"] = args.resample

    numbers = {name: len(rows) for name, rows in several.items() if len(rows) > 1}
    if len(set(numbers.values())) > 1:
        raise ConfigurationError(f"there must be as many of each: {', '.join(f'{n} {k}' for k, n in numbers.items())}")
    asked |= {name: rows for name, rows in several.items() if len(rows) == 1}  # type: ignore[typeddict-item]
    of_each = {name: rows for name, rows in several.items() if len(rows) > 1}
    samples, num_samples = args.samples, args.num_samples or 1
    if not of_each and samples is not None and args.num_samples is not None:
        raise ConfigurationError("give --num_samples or --samples, not both: only one thing is asked for")
    total = num_samples * max([1, *numbers.values()])
    if samples is None:
        samples = range(total)
    elif of_each and samples.stop > total:
        raise ConfigurationError(f"--samples ends at {samples.stop}, but {total} are asked for")
    return Asking(numbered(samples), asked, of_each, num_samples)


def _class(label: str, class_names: list[str]) -> str | int:
    return int(label) if label not in class_names and label.isascii() and label.isdigit() else label


def _known_cells(args: Namespace, codec: TableCodec) -> dict[str, np.ndarray]:
    """Return the coordinates of a table's known cells, NaN for unknown ones: `[rows, D]` by `"known"`, or nothing."""
    given = [name for name in ("condition", "conditions", "known") if getattr(args, name) is not None]
    if not given:
        return {}
    if len(given) > 1:
        raise ConfigurationError("of a table, --condition, --conditions and --known are the same: give one of them")
    words = [str(args.conditions)] if args.conditions is not None else args.condition or args.known
    if len(words) == 1 and Path(words[0]).suffix == ".csv":
        names, rows = _read_cells(Path(words[0]))
        if not set(names) & set(codec.names):
            raise ConfigurationError(f"{words[0]} has none of the columns {', '.join(codec.names)}")
        if unknown := [name for name in names if name not in codec.names]:  # training may have left them out
            print(f"{words[0]}: the table has no column {', '.join(map(repr, unknown))}: ignored", file=sys.stderr)
        cells: dict[str, list[str]] = {
            name: [line[i] for _, line in rows] for i, name in enumerate(names) if name in codec.names
        }
    else:
        cells = {name: [value] for name, value in (_known_cell(word, codec.names) for word in words)}
    return {"known": codec.encode(cells, empty="unknown")}


def _known_cell(word: str, columns: list[str]) -> tuple[str, str]:
    """Split NAME=VALUE, where a column's name may contain an equals sign."""
    names = [name for name in columns if word.startswith(f"{name}=")]
    name = max(names, key=len) if names else word.partition("=")[0]
    if name == word:
        raise ConfigurationError(f"known cells are NAME=VALUE, or a .csv file, got {word!r}")
    return name, word[len(name) + 1 :]


def _values(words: Sequence[str], what: str) -> dict[str, float]:
    """Parse words of the form NAME=VALUE with a finite number."""
    values = {}
    for word in words:
        name, _, value = word.rpartition("=")
        number = _number(value)
        if not name or number is None:
            raise ConfigurationError(f"{what}: {word!r} is not NAME=VALUE with a finite number")
        values[name] = number
    return values


def _number(text: str) -> float | None:
    """Parse a finite number; return `None` for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_rows(path: Path, columns: list[str], may_be_empty: bool) -> np.ndarray:
    """Read a CSV file's rows, `[rows, columns]`; NaN for empty cells and, if these may be, for columns it lacks."""
    names, rows = _read_cells(path)
    if unknown := [name for name in names if name not in columns]:
        raise ConfigurationError(f"{path} has the column {unknown[0]!r}; the columns are {', '.join(columns)}")
    if not may_be_empty and (missing := [name for name in columns if name not in names]):
        raise ConfigurationError(f"{path} has no column {missing[0]!r}")
    table = np.full((len(rows), len(columns)), np.nan)
    for i, (line_number, line) in enumerate(rows):
        for name, cell in zip(names, line, strict=True):
            if not cell and may_be_empty:
                continue
            number = _number(cell)
            if number is None:
                raise ConfigurationError(f"line {line_number} of {path}: {cell!r} in column {name!r} is not a number")
            table[i, columns.index(name)] = number
    return table


def _read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read the columns' names and the rows of a CSV file, with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, skipinitialspace=True, strict=True)
            names = next(lines, [])
            rows = [(lines.line_num, line) for line in lines if line]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigurationError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{path} has two columns of one name")
    if not rows:
        raise ConfigurationError(f"{path} has no rows")
    for line_number, line in rows:
        if len(line) != len(names):
            raise ConfigurationError(f"line {line_number} of {path} has {len(line)} cells, but {len(names)} names")
    return names, rows


def _open_picture(path: Path) -> Any:
    from PIL import Image

    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} is not a picture that can be read: {error}") from None
    return picture
