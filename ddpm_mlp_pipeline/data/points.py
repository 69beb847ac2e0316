"""Point sets: seven well-known 2-D distributions, and any file of numeric columns."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, Features, Value

from ..errors import DatasetError
from .files import SUFFIXES, read_table

Columns = dict[str, np.ndarray]


def heart(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """The heart curve x = sin³ θ, y = (13 cos θ − 5 cos 2θ − 2 cos 3θ − cos 4θ) / 16."""
    theta = rng.uniform(0, 2 * math.pi, n)
    y = 13 * np.cos(theta) - 5 * np.cos(2 * theta) - 2 * np.cos(3 * theta) - np.cos(4 * theta)
    return np.stack([np.sin(theta) ** 3, y / 16], axis=1), {"angle": theta}


def swiss_roll(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """The spiral of angle θ and radius θ / (4.5 π), θ from 1.5 π to 4.5 π, as scikit-learn's seen from its axis."""
    theta = 1.5 * math.pi * (1 + 2 * rng.uniform(size=n))
    return _polar(theta / (4.5 * math.pi), theta), {"angle": theta}


def two_moons(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """Two interleaving half circles of radius 1, the second shifted by (1, −0.5) and upside down."""
    theta, second = rng.uniform(0, math.pi, n), rng.integers(2, size=n)
    sign = 1 - 2 * second
    points = np.stack([sign * np.cos(theta) + second, sign * np.sin(theta) + 0.5 * second], axis=1)
    return points, {"label": np.array(["upper", "lower"])[second]}


def circles(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """Two concentric circles, of radius 1 and 0.5."""
    inner = rng.integers(2, size=n)
    return _polar(1 - 0.5 * inner, rng.uniform(0, 2 * math.pi, n)), {"label": np.array(["outer", "inner"])[inner]}


def eight_gaussians(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """Eight centres on the unit circle, labelled 0 to 7 from (1, 0) anticlockwise; the noise makes them Gaussians."""
    centre = rng.integers(8, size=n)
    return _polar(np.ones(n), centre * math.pi / 4), {"label": centre.astype(str)}


def checkerboard(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """The dark squares of a 4×4 board over [−1, 1]²."""
    column, pair = rng.integers(4, size=n), rng.integers(2, size=n)
    row = 2 * pair + column % 2
    return (np.stack([column, row], axis=1) + rng.uniform(size=(n, 2))) / 2 - 1, {}


def spiral(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Columns]:
    """Two arms of an Archimedean spiral, opposite to each other, of one and a half turns."""
    theta = 3 * math.pi * np.sqrt(rng.uniform(size=n))  # the root spreads the points evenly along the arms
    arm = rng.integers(2, size=n)
    return _polar(theta / (3 * math.pi), theta + math.pi * arm), {"label": np.array(["first", "second"])[arm]}


def _polar(radius: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)


MAX_CLASSES = 10_000
# The distribution, which draws points and what is known of each (a label or an angle); and the standard deviation of
# the Gaussian noise that is added to the points by default.
POINT_SETS: dict[str, tuple[Callable[[int, np.random.Generator], tuple[np.ndarray, Columns]], float]] = {
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
    label_column: str | None = None,
    condition_columns: Sequence[str] = (),
) -> Dataset:
    """Draw points from one of the 2-D point sets, or read a file of points.

    Args:
        name: a name in `POINT_SETS`, or the path of a `.csv`, `.parquet` or `.npy` file of numeric columns.
        num_samples: how many points to draw (by default 10,000), or to choose from the file (by default all).
        noise: standard deviation, in the data's units, of the Gaussian noise that is added to every coordinate; by
            default each set's own, and none for a file.
        seed: two calls with the same arguments give the same points.
        exclude: names of columns to leave out. They may hold anything.
        columns: names of the columns to take, in this order, and to leave out all others. Where the data or these
            names are only numbered (`x`, `y`; `x0`, `x1`, …), the columns are taken as they stand instead.
        label_column: name of a column of labels, strings or whole numbers, which is no coordinate. `two_moons`,
            `circles`, `eight_gaussians` and `spiral` have one, `label`.
        condition_columns: names of numeric columns to condition on, which are no coordinates. `heart` and `swiss_roll`
            have one, `angle`, in radians.

    Returns:
        A data set of the coordinates, float64 (`x` and `y` for the named sets, the file's own columns otherwise), then
        of the condition columns, float64, and of the label column, a `ClassLabel`.

    Raises:
        DatasetError: if the name is unknown; the file is missing, too small, or lacks a column; or a column that is
            not left out holds anything that is not a finite number (the message names every such column and its first
            such row), or a label is missing.
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
        points, more = distribution(10_000 if num_samples is None else num_samples, rng)
        table = pd.DataFrame({"x": points[:, 0], "y": points[:, 1], **more})
        exclude = [*exclude, *(column for column in more if column not in (label_column, *condition_columns))]
        noise = default_noise if noise is None else noise
    else:
        path = Path(name)
        if path.suffix not in SUFFIXES:
            known = ", ".join(POINT_SETS)
            raise DatasetError(
                f"unknown data set {str(path)!r}: pass one of {known}, or a .csv, .parquet or .npy file"
            )
        table = read_table(path)
        if num_samples is not None and num_samples > len(table):
            raise DatasetError(f"{name} holds {len(table)} points, fewer than the {num_samples} requested")
    labels, table = _take_labels(table, name, label_column)
    _check_has(table, name, condition_columns, "to condition on")
    conditions, table = table[list(condition_columns)], table.drop(columns=list(condition_columns))
    table = _choose_columns(table, name, exclude, columns)
    # All at once, so that an error names every column at fault
    numbers = _finite_numbers(pd.concat([table, conditions], axis=1), name)
    if name not in POINT_SETS and num_samples is not None:
        chosen = rng.choice(len(numbers), num_samples, replace=False)
        numbers, labels = numbers[chosen], labels.iloc[chosen]
    points, conditions_ = numbers[:, : table.shape[1]], numbers[:, table.shape[1] :]
    if noise:
        points = points + noise * rng.standard_normal(points.shape)
    values = dict(zip(table.columns, points.T, strict=True)) | dict(zip(condition_columns, conditions_.T, strict=True))
    features = Features({column: Value("float64") for column in values})
    if label_column is not None:
        features[label_column] = ClassLabel(names=_names(labels))
        values[label_column] = features[label_column].str2int(labels.tolist())
    return Dataset.from_dict(values, features=features)


def to_array(dataset: Dataset) -> np.ndarray:
    """Return the points as one float64 array, `[number of points, number of columns]`."""
    return dataset.with_format("pandas")[:].to_numpy(dtype=np.float64)


def split_columns(
    dataset: Dataset, label_column: str | None = None, condition_columns: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[str]]:
    """Split what `load_points` returns.

    Returns:
        The points, float64 `[number, dimension]`; the conditions, float64 `[number, condition columns]`; the labels,
        int64 `[number]`, or `None`; and the names of the classes.
    """
    coordinates = [name for name in dataset.column_names if name not in (label_column, *condition_columns)]
    points, conditions = (
        to_array(dataset.select_columns(names)).reshape(len(dataset), len(names))  # without columns, it has no rows
        for names in (coordinates, list(condition_columns))
    )
    if label_column is None:
        return points, conditions, None, []
    return points, conditions, np.array(dataset[label_column][:], dtype=np.int64), dataset.features[label_column].names


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


def _take_labels(
    table: pd.DataFrame, name: str | os.PathLike[str], label_column: str | None
) -> tuple[pd.Series, pd.DataFrame]:
    """Split a table into its labels, as strings, and the other columns."""
    if label_column is None:
        return pd.Series("", index=table.index), table
    _check_has(table, name, [label_column], "of labels")
    labels = table[label_column]
    if labels.isna().any():
        raise DatasetError(f"{name} has no label in row {labels.isna().argmax() + 1}, column {label_column!r}")
    if pd.api.types.is_float_dtype(labels) and (labels != np.rint(labels)).any():
        raise DatasetError(f"labels are strings or whole numbers, but column {label_column!r} of {name} holds others")
    labels = (labels.astype(np.int64) if pd.api.types.is_float_dtype(labels) else labels).astype(str)
    if labels.nunique() > MAX_CLASSES:
        raise DatasetError(
            f"column {label_column!r} of {name} holds {labels.nunique():,} different labels, more than {MAX_CLASSES:,}"
        )
    return labels, table.drop(columns=label_column)


def _names(labels: pd.Series) -> list[str]:
    """Return the classes' names in the order of their numbers, if all are whole numbers, else of the alphabet."""
    names = labels.unique().tolist()
    return sorted(names, key=int) if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names) else sorted(names)


def _check_has(table: pd.DataFrame, name: str | os.PathLike[str], columns: Iterable[str], what: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise DatasetError(f"{name} has no column {missing[0]!r} {what}, only {_quoted(table.columns)}")


def _is_numbered(names: Iterable[str]) -> bool:
    names = list(names)
    return names == ["x", "y"] or names == [f"x{i}" for i in range(len(names))]


def _choose_columns(
    table: pd.DataFrame, name: str | os.PathLike[str], exclude: Sequence[str], columns: Sequence[str] | None
) -> pd.DataFrame:
    _check_has(table, name, exclude, "to exclude")
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
        remedy = f"correct the file, train a table (train_table.py), or train with --exclude {names}"
        raise DatasetError(f"{name}: {'; '.join(faults)} {are_not}: {remedy}")
    return numbers


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _to_numbers(column: pd.Series) -> pd.Series:
    """Convert a column to numbers, with NaN for other values."""
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_complex_dtype(column):
        return pd.Series(np.nan, index=column.index)  # to_numeric would convert them
    return pd.to_numeric(column, errors="coerce")
