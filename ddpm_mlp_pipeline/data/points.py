"""Point sets: seven well-known 2-D distributions, and any file of numeric columns."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd  # comes with datasets
from datasets import Dataset

from ..errors import DatasetError
from .arrays import read_array


def heart(n: int, rng: np.random.Generator) -> np.ndarray:
    """The heart curve x = sin³ θ, y = (13 cos θ − 5 cos 2θ − 2 cos 3θ − cos 4θ) / 16."""
    theta = rng.uniform(0, 2 * math.pi, n)
    y = 13 * np.cos(theta) - 5 * np.cos(2 * theta) - 2 * np.cos(3 * theta) - np.cos(4 * theta)
    return np.stack([np.sin(theta) ** 3, y / 16], axis=1)


def swiss_roll(n: int, rng: np.random.Generator) -> np.ndarray:
    """The spiral of angle θ and radius θ / (4.5 π), θ from 1.5 π to 4.5 π, as scikit-learn's seen from its axis."""
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
    """Eight centres on the unit circle; the noise makes them Gaussians."""
    return _polar(np.ones(n), rng.integers(8, size=n) * math.pi / 4)


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """The dark squares of a 4×4 board over [−1, 1]²."""
    column, pair = rng.integers(4, size=n), rng.integers(2, size=n)
    row = 2 * pair + column % 2
    return (np.stack([column, row], axis=1) + rng.uniform(size=(n, 2))) / 2 - 1


def spiral(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two arms of an Archimedean spiral, opposite to each other, of one and a half turns."""
    theta = 3 * math.pi * np.sqrt(rng.uniform(size=n))  # the root spreads the points evenly along the arms
    return _polar(theta / (3 * math.pi), theta + math.pi * rng.integers(2, size=n))


def _polar(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)


SUFFIXES = (".csv", ".parquet", ".npy")  # of files of points
# The distribution, and the standard deviation of the Gaussian noise that is added to it by default.
POINT_SETS: dict[str, tuple[Callable[[int, np.random.Generator], np.ndarray], float]] = {
    "heart": (heart, 0.03),
    "swiss_roll": (swiss_roll, 0.03),
    "two_moons": (two_moons, 0.05),
    "circles": (circles, 0.03),
    "eight_gaussians": (eight_gaussians, 0.1),
    "checkerboard": (checkerboard, 0.0),
    "spiral": (spiral, 0.02),
}


def is_point_set(name: str | os.PathLike) -> bool:
    """Return whether a data set's name is that of a point set or of a file of points, and so of no image data set."""
    return (str(name) in POINT_SETS or Path(name).suffix in SUFFIXES) and not Path(name).is_dir()


def load_points(
    name: str | os.PathLike, num_samples: int | None = None, noise: float | None = None, seed: int = 0
) -> Dataset:
    """Draw one of the 2-D point sets, or read a file of points.

    Args:
        name: a name in `POINT_SETS`, or the path of a `.csv`, `.parquet` or `.npy` file of numeric columns.
        num_samples: how many points to draw (by default 10,000), or to choose from the file (by default all).
        noise: standard deviation, in the data's units, of the Gaussian noise that is added to every coordinate; by
            default each set's own, and none for a file.
        seed: two calls with the same arguments give the same points.

    Returns:
        A data set of float64 columns: `x` and `y` for the named sets, the file's own columns otherwise.

    Raises:
        DatasetError: if the name is unknown, or the file is missing, too small, or holds anything that is not a
            finite number (the message names row and column).
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
        points = distribution(10_000 if num_samples is None else num_samples, rng)
        columns = ["x", "y"]
        noise = default_noise if noise is None else noise
    else:
        points, columns = _read_file(Path(name))
        if num_samples is not None:
            if num_samples > len(points):
                raise DatasetError(f"{name} holds {len(points)} points, fewer than the {num_samples} asked for")
            points = points[rng.choice(len(points), num_samples, replace=False)]
    if noise:
        points = points + noise * rng.standard_normal(points.shape)
    return Dataset.from_dict(dict(zip(columns, points.T, strict=True)))


def to_array(dataset: Dataset) -> np.ndarray:
    """The points as one float64 array, `[number of points, number of columns]`."""
    return dataset.with_format("pandas")[:].to_numpy(dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class ColumnWarning:
    """Columns that a DDPM learns badly.

    Attributes:
        check: what they were looked at for.
        message: which they are, and what was seen.
        remedy: what helps.
    """

    check: str
    message: str
    remedy: str


def check_columns(name: str | os.PathLike) -> Iterator[ColumnWarning]:
    """Look for heavy tails and whole numbers in the columns of a file of points; the named sets have neither.

    A tail is heavy if a value is more than twice as many standard deviations from the mean as any of a Gaussian
    sample of this size is, in 999 of 1,000 such samples. (Twice, so that an exponential distribution passes.) Such
    values leave little of the network's range to all others, and widen the range that samples are clipped to.

    Args:
        name: as `load_points` takes it.

    Raises:
        DatasetError: if the file can't be read.
    """
    if name in POINT_SETS:
        return
    dataset = load_points(name)
    points, columns = to_array(dataset), dataset.column_names
    mean, std = points.mean(axis=0), points.std(axis=0)
    farthest = np.abs(points - mean).max(axis=0) / np.where(std > 0, std, 1)
    limit = 2 * -NormalDist().inv_cdf(0.001 / (2 * len(points)))
    if (farthest > limit).any():
        named = [f"{c!r} ({z:.0f})" for c, z in zip(columns, farthest, strict=True) if z > limit]
        yield ColumnWarning(
            "heavy tails",
            f"values are more than {limit:.0f} standard deviations from the mean in {', '.join(named)}, where samples "
            "will not keep to the data",
            "transform the column (its logarithm, or its ranks), or leave the outliers out",
        )
    if whole := [repr(c) for c, values in zip(columns, points.T, strict=True) if (values == np.rint(values)).all()]:
        yield ColumnWarning(
            "whole numbers", f"in {', '.join(whole)}, which samples will not keep to: 2.996 for 3", "round the samples"
        )


def warn_of_columns(name: str | os.PathLike) -> None:
    """Print, to stderr, what `check_columns` finds."""
    for warning in check_columns(name):
        print(f"warning: {warning.check}: {warning.message}: {warning.remedy}", file=sys.stderr)


def _read_file(path: Path) -> tuple[np.ndarray, list[str]]:
    if path.suffix not in SUFFIXES:
        known = ", ".join(POINT_SETS)
        raise DatasetError(f"unknown data set {str(path)!r}: give one of {known}, or a .csv, .parquet or .npy file")
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    try:
        if path.suffix == ".csv":
            first_line = pd.read_csv(path, skipinitialspace=True, header=None, nrows=1)
            has_header = not all(pd.api.types.is_numeric_dtype(dtype) for dtype in first_line.dtypes)
            table = pd.read_csv(path, skipinitialspace=True, header=0 if has_header else None)
            if not table.index.equals(pd.RangeIndex(len(table))):  # pandas has made one of the fields the index
                raise ValueError("its lines have more fields than its header")
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            array = read_array(path)
            if array.ndim != 2:
                raise ValueError("it must hold an array of the shape [points, columns]")
            table = pd.DataFrame(array)
    except DatasetError:
        raise
    except Exception as error:  # pandas' and pyarrow's parsers raise errors of many kinds
        raise DatasetError(f"can't read {path}: {error}") from None

    if len(table) < 2 or table.shape[1] < 1:
        raise DatasetError(f"{path} holds {len(table)} points: at least 2 are needed")
    if all(isinstance(column, int) for column in table.columns):
        table.columns = ["x", "y"] if table.shape[1] == 2 else [f"x{i}" for i in range(table.shape[1])]
    numbers = table.apply(_to_numbers).to_numpy(dtype=np.float64)
    bad = np.argwhere(~np.isfinite(numbers))
    if len(bad):
        row, column = bad[0]
        value = table.iat[row, column]
        value = "nan, or an empty cell," if pd.isna(value) else repr(value)
        raise DatasetError(
            f"{path}: {value} in row {row + 1}, column {str(table.columns[column])!r} is not a finite number"
        )
    return numbers, [str(column) for column in table.columns]


def _to_numbers(column: pd.Series) -> pd.Series:
    """The column as numbers, with NaN in place of what is none."""
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_complex_dtype(column):
        return pd.Series(np.nan, index=column.index)  # to_numeric would make some number or other of them
    return pd.to_numeric(column, errors="coerce")
