"""Point sets: seven well-known 2-D distributions, and any file of numeric columns."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from datasets import Dataset

from ..errors import DatasetError
from .arrays import read_array


def heart(n: int, rng: np.random.Generator) -> np.ndarray:
    """The heart curve x = sin³ θ, y = (13 cos θ − 5 cos 2θ − 2 cos 3θ − cos 4θ) / 16."""
    theta = rng.uniform(0, 2 * math.pi, n)
    y = 13 * np.cos(theta) - 5 * np.cos(2 * theta) - 2 * np.cos(3 * theta) - np.cos(4 * theta)
    return np.stack([np.sin(theta) ** 3, y / 16], axis=1)


def swiss_roll(n: int, rng: np.random.Generator) -> np.ndarray:
    """The spiral of angle θ and radius θ / (4.5 π), θ from 1.5 π to 4.5 π, like scikit-learn's seen along its axis."""
    theta = 1.5 * math.pi * (1 + 2 * rng.uniform(size=n))
    return _polar(theta / (4.5 * math.pi), theta)


def two_moons(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two interleaving half circles of radius 1, the second shifted by (1, −0.5) and upside down."""
    theta, second = rng.uniform(0, math.pi, n), rng.integers(2, size=n)
    sign = 1 - 2 * second
    return np.stack([sign * np.cos(theta) + second, sign * np.sin(theta) + 0.5 * second], axis=1)


def circles(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two concentric circles, of radius 1 and 0.5."""
    return _polar(1 - 0.5 * rng.integers(2, size=n), rng.uniform(0, 2 * math.pi, n))


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight points on the unit circle; the added noise makes them Gaussians."""
    return _polar(np.ones(n), rng.integers(8, size=n) * math.pi / 4)


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """The dark squares of a 4×4 board over [−1, 1]²."""
    column, pair = rng.integers(4, size=n), rng.integers(2, size=n)
    row = 2 * pair + column % 2
    return (np.stack([column, row], axis=1) + rng.uniform(size=(n, 2))) / 2 - 1


def spiral(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two opposite arms of an Archimedean spiral, each of one and a half turns."""
    theta = 3 * math.pi * np.sqrt(rng.uniform(size=n))  # the root spreads the points evenly along the arms
    return _polar(theta / (3 * math.pi), theta + math.pi * rng.integers(2, size=n))


def _polar(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)


SUFFIXES = (".csv", ".parquet", ".npy")  # of files of points
# By name: the distribution, and the default standard deviation of the Gaussian noise added to it
POINT_SETS: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], float]] = {
    "heart": (heart, 0.03),
    "swiss_roll": (swiss_roll, 0.03),
    "two_moons": (two_moons, 0.05),
    "circles": (circles, 0.03),
    "eight_gaussians": (eight_gaussians, 0.1),
    "checkerboard": (checkerboard, 0.0),
    "spiral": (spiral, 0.02),
}


def is_point_set(name: str | os.PathLike[str]) -> bool:
    """Return whether a data set's name is a point set or a file of points, and not an image data set."""
    return (str(name) in POINT_SETS or Path(name).suffix in SUFFIXES) and not Path(name).is_dir()


def load_points(
    name: str | os.PathLike[str],
    num_samples: int | None = None,
    noise: float | None = None,
    seed: int = 0,
    *,
    exclude: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> Dataset:
    """Draw points from one of the 2-D point sets, or read a file of points.

    Args:
        name: a name in `POINT_SETS`, or the path of a `.csv`, `.parquet` or `.npy` file of numeric columns.
        num_samples: number of points to draw (by default 10,000) or to choose from the file (by default all).
        noise: standard deviation, in the data's units, of the Gaussian noise added to every coordinate; by default the
            point set's own, and 0 for a file.
        seed: the seed of the points, the choice and the noise.
        exclude: names of columns to drop, whatever their type.
        columns: names of the columns to keep, in this order. If these names or the data's are generic (`x`, `y`; `x0`,
            `x1`, …), all columns are kept in their own order.

    Returns:
        A data set of float64 columns: `x` and `y` for a point set, the file's own columns otherwise.

    Raises:
        DatasetError: if the name is unknown; if the file is missing, too small, or lacks a column; or if a column
            holds a value that is not a finite number (the message names every such column and its first such row).
    """
    if num_samples is not None and num_samples < 1:
        raise DatasetError(f"the number of points must be at least 1, got {num_samples}")
    if noise is not None and not 0 <= noise < math.inf:
        raise DatasetError(f"the noise's standard deviation must be finite and at least 0, got {noise}")
    if seed < 0:
        raise DatasetError(f"the seed must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)

    if name in POINT_SETS:
        distribution, default_noise = POINT_SETS[name]
        table = pd.DataFrame(distribution(num_samples or 10_000, rng), columns=["x", "y"])
        noise = default_noise if noise is None else noise
    else:
        table = _read_file(Path(name))
    table = _choose_columns(table, name, exclude, columns)
    points = _finite_numbers(table, name)
    if num_samples is not None and name not in POINT_SETS:
        if num_samples > len(points):
            raise DatasetError(f"{name} holds {len(points)} points, fewer than the {num_samples} requested")
        points = points[rng.choice(len(points), num_samples, replace=False)]
    if noise:
        points = points + noise * rng.standard_normal(points.shape)
    return Dataset.from_dict(dict(zip(table.columns, points.T, strict=True)))


def to_array(dataset: Dataset) -> np.ndarray:
    """Return the points as one float64 array, `[number of points, number of columns]`."""
    return dataset.with_format("pandas")[:].to_numpy(dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class ColumnWarning:
    """A warning about columns that a DDPM learns badly.

    Attributes:
        check: the name of the check.
        message: the columns and what was found.
        remedy: what to do.
    """

    check: str
    message: str
    remedy: str


def check_columns(name: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Iterator[ColumnWarning]:
    """Find columns of heavy tails and of whole numbers in a file of points.

    A tail is heavy if a value is more than 2 z standard deviations from the mean, where 999 of 1,000 Gaussian samples
    of this size lie within z. (With the factor 2, an exponential distribution passes.) Such values compress all others
    into a small part of the network's range, and widen the range that samples are clipped to.

    Args:
        name, columns: as in `load_points`.

    Raises:
        DatasetError: if the file can't be read.
    """
    if name in POINT_SETS:
        return  # which have neither
    dataset = load_points(name, columns=columns)
    points, columns = to_array(dataset), dataset.column_names
    mean, std = points.mean(axis=0), points.std(axis=0)
    farthest = np.abs(points - mean).max(axis=0) / np.where(std > 0, std, 1)
    limit = 2 * -NormalDist().inv_cdf(0.001 / (2 * len(points)))
    if (farthest > limit).any():
        named = [f"{c!r} ({z:.0f})" for c, z in zip(columns, farthest, strict=True) if z > limit]
        yield ColumnWarning(
            "heavy tails",
            f"values are more than {limit:.0f} standard deviations from the mean in {', '.join(named)}, where samples "
            "will differ from the data",
            "transform the column (to its logarithm or ranks), or remove the outliers",
        )
    if whole := [repr(c) for c, values in zip(columns, points.T, strict=True) if (values == np.rint(values)).all()]:
        yield ColumnWarning(
            "whole numbers", f"in {', '.join(whole)}, which samples only approximate: 2.996 for 3", "round the samples"
        )


def warn_of_columns(name: str | os.PathLike[str], columns: Sequence[str] | None = None) -> None:
    """Print the warnings of `check_columns` to stderr."""
    for warning in check_columns(name, columns):
        print(f"warning: {warning.check}: {warning.message}: {warning.remedy}", file=sys.stderr)


def _read_file(path: Path) -> pd.DataFrame:
    """Read a file's columns of any type, with unique names."""
    if path.suffix not in SUFFIXES:
        known = ", ".join(POINT_SETS)
        raise DatasetError(f"unknown data set {str(path)!r}: pass one of {known}, or a .csv, .parquet or .npy file")
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    try:
        if path.suffix == ".csv":
            table = _read_csv(path)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            array = read_array(path)
            if array.ndim != 2:
                raise ValueError("the array must have the shape [points, columns]")
            table = pd.DataFrame(array)
    except DatasetError:
        raise
    except Exception as error:  # the parsers of pandas and pyarrow raise many types of errors
        raise DatasetError(f"can't read {path}: {error}") from None

    if len(table) < 2 or table.shape[1] < 1:
        raise DatasetError(f"{path} holds {len(table)} points: at least 2 are needed")
    if all(isinstance(column, int) for column in table.columns):
        table.columns = _numbered(table.shape[1])
    table.columns = [str(column) or f"Unnamed: {i}" for i, column in enumerate(table.columns)]
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise DatasetError(f"{path} has two columns named {twice!r}: rename one")
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file, whose first line may hold the columns' names."""
    with path.open(encoding="utf-8-sig") as file:
        first_line, line = next(((i, line) for i, line in enumerate(file) if line.strip()), (0, ""))
        next_line = next(file, "")
    read = functools.partial(pd.read_csv, path, skipinitialspace=True, header=None)
    has_header = not all(pd.api.types.is_numeric_dtype(dtype) for dtype in read(nrows=1).dtypes)
    # Names can be numbers, too ("2019", "2020"): then they are in quotes, unlike the values in the next line.
    has_header |= '"' in line and '"' not in next_line
    if not has_header:
        return read()

    names = read(nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    try:
        # With the header, pandas would turn the surplus fields of a longer line into an index.
        table = read(skiprows=first_line + 1)
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=names)
    if table.shape[1] != len(names):
        raise ValueError(
            f"its first line names {len(names)} columns, but the next lines have {table.shape[1]} fields: put names "
            "that contain a comma in quotes"
        )
    table.columns = names
    return table


def _numbered(number: int) -> list[str]:
    """Return generic names of columns."""
    return ["x", "y"] if number == 2 else [f"x{i}" for i in range(number)]


def _is_numbered(names: Iterable[str]) -> bool:
    names = list(names)
    return names == ["x", "y"] or names == [f"x{i}" for i in range(len(names))]


def _choose_columns(
    table: pd.DataFrame, name: str | os.PathLike[str], exclude: Sequence[str], columns: Sequence[str] | None
) -> pd.DataFrame:
    if missing := [column for column in exclude if column not in table.columns]:
        raise DatasetError(f"{name} has no column {missing[0]!r} to exclude, only {_quoted(table.columns)}")
    table = table.drop(columns=list(exclude))
    if table.shape[1] == 0:
        raise DatasetError(f"all columns of {name} are excluded: exclude fewer")
    if columns is None:
        return table
    if set(columns) <= set(table.columns):
        return table[list(columns)]
    if _is_numbered(columns) or _is_numbered(table.columns):
        return table
    missing = [column for column in columns if column not in table.columns]
    raise DatasetError(f"{name} has no column {_quoted(missing)}, only {_quoted(table.columns)}")


def _finite_numbers(table: pd.DataFrame, name: str | os.PathLike[str]) -> np.ndarray:
    numbers = table.apply(_to_numbers).to_numpy(dtype=np.float64)
    is_bad = ~np.isfinite(numbers)
    faults = []
    for column in np.flatnonzero(is_bad.any(axis=0)):
        row = is_bad[:, column].argmax()
        value = table.iat[row, column]
        value = "nan, or an empty cell," if pd.isna(value) else repr(value) if isinstance(value, str) else value
        faults.append(f"{value} in row {row + 1}, column {table.columns[column]!r}")
    if faults:
        are_not = "is not a finite number" if len(faults) == 1 else "are not finite numbers"
        names = shlex.join(table.columns[is_bad.any(axis=0)])
        raise DatasetError(f"{name}: {'; '.join(faults)} {are_not}: correct the file, or train with --exclude {names}")
    return numbers


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _to_numbers(column: pd.Series) -> pd.Series:
    """Convert a column to numbers, with NaN for other values."""
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_complex_dtype(column):
        return pd.Series(np.nan, index=column.index)  # to_numeric would convert them
    return pd.to_numeric(column, errors="coerce")
