"""Read files of tables: CSV, Parquet, and arrays of numpy."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import DatasetError
from .arrays import read_array

SUFFIXES = (".csv", ".parquet", ".npy")


def read_table(path: Path, *, as_text: bool = False) -> pd.DataFrame:
    """Read a file's columns of any type, with unique names.

    Args:
        path: a `.csv`, `.parquet` or `.npy` file.
        as_text: whether to leave the cells of a `.csv` file as they are written (`""` for empty cells), and to refuse
            lines that are too short. By default, pandas finds the columns' types.

    Raises:
        DatasetError: if the file is missing, unreadable or too small, or two columns have the same name.
    """
    if not path.is_file():
        raise DatasetError(f"there is no file {path}")
    try:
        if path.suffix == ".csv":
            table = _read_csv(path, as_text)
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
        raise DatasetError(f"can't read {path}: {' '.join(str(error).split())}") from None

    if len(table) < 2 or table.shape[1] < 1:
        raise DatasetError(f"{path} holds {len(table)} {'rows' if as_text else 'points'}: at least 2 are needed")
    if all(isinstance(column, int) for column in table.columns):
        table.columns = numbered(table.shape[1])
    table.columns = [str(column) or f"Unnamed: {i}" for i, column in enumerate(table.columns)]
    if not table.columns.is_unique:
        twice = table.columns[table.columns.duplicated()][0]
        raise DatasetError(f"{path} has two columns named {twice!r}: rename one")
    return table


def _read_csv(path: Path, as_text: bool) -> pd.DataFrame:
    """Read a CSV file, whose first line may hold the columns' names."""
    with path.open(encoding="utf-8-sig") as file:
        first_line, line = next(((i, line) for i, line in enumerate(file) if line.strip()), (0, ""))
        next_line = next(file, "")
    read = functools.partial(pd.read_csv, path, skipinitialspace=True, header=None)
    as_written = {"dtype": str, "keep_default_na": False} if as_text else {}
    first = read(nrows=1)
    if as_text:
        _check_lines(path, first.shape[1])
    words = [not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype) for dtype in first.dtypes]
    has_header = any(words) or not np.isfinite(first.to_numpy(dtype=np.float64)).any()  # a name can be "nan"
    # Numbers can be names, too ("2019", "2020"): then they are in quotes, which those in the line below are not.
    has_header |= '"' in line and '"' not in next_line
    if not has_header:
        return read(**as_written)

    names = read(nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    try:
        # With the header, pandas would turn the surplus fields of a longer line into an index.
        table = read(skiprows=first_line + 1, **as_written)
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=names)
    if table.shape[1] != len(names):
        raise ValueError(
            f"its first line names {len(names)} columns, but the next lines have {table.shape[1]} fields: put names "
            "that contain a comma in quotes"
        )
    table.columns = names
    return table


def _check_lines(path: Path, num_fields: int) -> None:
    """Refuse lines that are too short, which pandas fills up. (It refuses those that are too long.)"""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, skipinitialspace=True)
        for line in lines:
            if len(line) < num_fields and line:
                fields = f"{len(line)} field" + "s" * (len(line) != 1)
                raise ValueError(f"line {lines.line_num} has {fields}, but the first line has {num_fields}")


def numbered(number: int) -> list[str]:
    """Return generic names of columns."""
    return ["x", "y"] if number == 2 else [f"x{i}" for i in range(number)]
