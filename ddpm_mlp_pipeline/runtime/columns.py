"""Turn the rows of a table into the numbers that a network diffuses ("coordinates"), and back."""

from __future__ import annotations

import collections
import copy
import datetime
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError
from .dates import is_date_format, read_date, write_date

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Empty = Literal["missing", "unknown"]

# What stands for an empty cell in a column of numbers. In a column of texts, it is a text.
NO_NUMBER = frozenset(
    ["NA", "N/A", "n/a", "#N/A", "na", "NaN", "nan", "NAN", "null", "NULL", "None", "none", "?", "-"]
)
MAX_SIZE = 2**16  # coordinates of a table, knots and categories of a column
MAX_WHOLE = 2**53  # whole numbers up to it are exact in every language
MAX_NUMBER = 1e100
MAX_STR = 64  # characters; columns of longer texts are arrays of objects, to save memory
NUMBER_KINDS, CATEGORY_KINDS = ("number", "integer", "date"), ("category", "boolean")
_EPOCH = datetime.datetime(1970, 1, 1)
_SECONDS = {"D": 86400, "s": 1}
_NUMPY = {"D": "datetime64[D]", "s": "datetime64[s]"}


class TableCodec:
    """The coding of a table's columns. FORMAT.md specifies it.

    Args:
        columns: one mapping for each column, as `columns` of `bundle.json` holds them. Unknown keys are ignored.

    Attributes:
        columns: the same, checked, with the known keys only.
        names: names of the columns.
        width: D, the number of coordinates.
        num_numbers: how many of the coordinates are continuous: the first ones. The others are ±1.
        coordinate_names: D names, such as `age`, `age is missing` and `color=red`.

    Raises:
        ConfigurationError: if the mappings don't describe columns.
    """

    def __init__(self, columns: Sequence[Mapping[str, Any]]):
        if not isinstance(columns, list | tuple) or not 1 <= len(columns) <= MAX_SIZE:
            raise ConfigurationError(f"columns must be a list of 1 to {MAX_SIZE:,} columns")
        self._columns = [_read_column(i, column) for i, column in enumerate(columns)]
        self.names: list[str] = [column.name for column in self._columns]
        if twice := [name for name, number in collections.Counter(self.names).items() if number > 1]:
            raise ConfigurationError(f"two columns are named {_shown(twice[0])}")
        self.columns: list[dict[str, Any]] = [column.spec for column in self._columns]
        self.num_numbers: int = sum(column.is_number for column in self._columns)
        self.width: int = self.num_numbers + sum(column.num_signs for column in self._columns)
        if self.width > MAX_SIZE:
            raise ConfigurationError(f"the columns have {self.width:,} coordinates, more than {MAX_SIZE:,}")
        self.coordinate_names: list[str] = [c.name for c in self._columns if c.is_number]
        self.coordinate_names += [name for c in self._columns for name in c.sign_names()]

    def to_json(self) -> list[dict[str, Any]]:
        """Return a copy of `columns`, for `json.dump`."""
        return copy.deepcopy(self.columns)

    def decode(self, points: npt.ArrayLike) -> dict[str, Array]:
        """Return the rows that coordinates stand for.

        Args:
            points: coordinates, `[rows, D]`.

        Returns:
            An array for each column, by name and in the columns' order: float64 for a number, int64 for an integer,
            `datetime64` for a date, and strings, int64, float64 or bool for a category. A missing value is NaN, NaT or
            `None`. So an integer that can be missing is float64, and a category that can be missing is of objects.
            Texts are objects, too, if some are longer than 64 characters.

        Raises:
            ConfigurationError: if the shape is another, or a coordinate is NaN.
        """
        points = np.asarray(points, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != self.width:
            raise ConfigurationError(f"points must have the shape [rows, {self.width}], got {points.shape}")
        if np.isnan(points).any():
            raise ConfigurationError("points must not be nan")
        return {
            column.name: column.decode(points[:, number], points[:, signs]) for column, number, signs in self._layout()
        }

    def prepare(self, table: Mapping[str, Any], *, empty: Empty = "missing") -> CodedRows:
        """Return what `encode` draws coordinates from. Drawing repeatedly from it saves time."""
        num_rows, cells = self._cells(table, absent_is_error=empty == "missing")
        low, high = (np.full((num_rows, self.num_numbers), np.nan) for _ in range(2))
        signs_ = np.full((num_rows, self.width - self.num_numbers), np.nan)
        for column, number, signs in self._layout():
            if column.name not in cells:
                continue
            signs = slice(signs.start - self.num_numbers, signs.stop - self.num_numbers)
            lowest, highest, signs_[:, signs] = column.encode(cells[column.name], empty)
            if column.is_number:
                low[:, number], high[:, number] = lowest, highest
        return CodedRows(low, high, signs_)

    def encode(
        self, table: Mapping[str, Any], *, empty: Empty = "missing", rng: np.random.Generator | None = None
    ) -> Floats:
        """Return the coordinates of rows.

        A number has a range of coordinates. A number outside the range of the data has those of the nearest one that
        the data hold, and a number that the data lie around but don't hold has the coordinate between its neighbours.

        Args:
            table: for each column, by name, one value a row: numbers, strings, booleans or dates, or the text of each.
                `None`, NaN, NaT, `pandas.NA` and `""` are empty, and in columns of numbers the texts `NO_NUMBER`.
            empty: whether empty values are missing as in the data, or unknown. Unknown values, and with `"unknown"`
                columns that are not in the table, have the coordinates NaN.
            rng: if given, draw a number's coordinate uniformly by rank within its range, as training needs. By
                default, take the middle.

        Returns:
            Coordinates, float64 `[rows, D]`.

        Raises:
            ConfigurationError: if there is no such column, a column is absent or of another length, or a value does
                not fit its column. The message names row (from 1) and column.
        """
        return self.prepare(table, empty=empty).draw(rng)

    def format(self, table: Mapping[str, Any]) -> Iterator[list[str]]:
        """Return the rows of a table, such as `decode` returns, as text for a CSV file. A missing value is `""`.

        Raises:
            ConfigurationError: as `encode`.
        """
        _, cells = self._cells(table, absent_is_error=True)
        texts = [column.format(cells[column.name]) for column in self._columns]
        return map(list, zip(*texts, strict=True))

    @property
    def column_numbers(self) -> list[int]:
        """The number of the column, from 0, that each of the D coordinates belongs to."""
        columns = [*enumerate(self._columns)]
        numbers = [i for i, column in columns if column.is_number]
        return numbers + [i for i, column in columns for _ in range(column.num_signs)]

    def _layout(self) -> Iterator[tuple[_Number | _Category, int, slice]]:
        """Yield each column, the index of its continuous coordinate (−1 without one), and its other coordinates."""
        number, start = 0, self.num_numbers
        for column in self._columns:
            yield column, number if column.is_number else -1, slice(start, start + column.num_signs)
            number += column.is_number
            start += column.num_signs

    def _cells(self, table: Mapping[str, Any], absent_is_error: bool) -> tuple[int, dict[str, Array]]:
        """Return the number of rows, and an array for each column."""
        known = set(self.names)
        if unknown := [name for name in table if name not in known]:
            shown = _some(self.names)
            raise ConfigurationError(f"there is no column {_shown(unknown[0])}, only {shown}")
        if absent_is_error and (absent := [name for name in self.names if name not in table]):
            raise ConfigurationError(f"the table lacks the column {_shown(absent[0])}")
        cells = {name: _as_array(name, table[name]) for name in table}
        lengths = {len(values) for values in cells.values()}
        if len(lengths) > 1:
            raise ConfigurationError(f"the columns have different lengths: {', '.join(map(str, sorted(lengths)))}")
        return max(lengths, default=0), cells


@dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows whose numbers have ranges of coordinates.

    Attributes:
        low, high: the ends of the ranges, float64 `[rows, num_numbers]`.
        signs: all other coordinates, float64 `[rows, D − num_numbers]`.
    """

    low: Floats
    high: Floats
    signs: Floats

    def draw(self, rng: np.random.Generator | None = None) -> Floats:
        """Return coordinates, float64 `[rows, D]`: uniform by rank within the ranges, or their middles by rank."""
        low, high = self._ranks
        share = 0.5 if rng is None else rng.random(low.shape)
        z, ranks = normal_ranks()
        numbers = np.interp(low + share * (high - low), ranks, z)
        # A range ends where the next one begins: its end belongs to the next value.
        numbers = np.clip(numbers, self.low, np.maximum(self.low, np.nextafter(self.high, -np.inf)))
        return np.concatenate([numbers, self.signs], axis=1)

    @functools.cached_property
    def _ranks(self) -> tuple[Floats, Floats]:
        z, ranks = normal_ranks()
        return np.interp(self.low, z, ranks), np.interp(self.high, z, ranks)


@functools.cache
def normal_ranks() -> tuple[Floats, Floats]:
    """Return z from −8 to 8 and the normal distribution function Φ(z), to interpolate Φ and its inverse."""
    z = np.linspace(-8, 8, 8001)
    return z, np.array([NormalDist().cdf(x) for x in z.tolist()])


class _Number:
    """A column of kind `number`, `integer` or `date`: one continuous coordinate."""

    is_number = 1

    def __init__(self, name: str, kind: str, column: Mapping[str, Any]):
        self.name, self.kind = name, kind
        self.z, self.values = (_non_decreasing(name, key, column.get(key)) for key in ("z", "values"))
        if len(self.z) != len(self.values):
            raise _invalid(name, "z and values must be of the same length")
        self.has_missing = _flag(name, column)
        self.num_signs = int(self.has_missing)
        self.spec: dict[str, Any] = {"name": name, "kind": kind, "z": self.z.tolist(), "values": self.values.tolist()}
        self.decimals: int | None = 0
        self.digits: int | None = None
        if kind == "number":
            self.decimals, self.digits = (_decimals(name, key, column.get(key)) for key in ("decimals", "digits"))
            self.spec["decimals"] = self.decimals
            if self.digits is not None:
                self.spec["digits"] = self.digits
        else:
            self._check_whole()
            self.spec["values"] = self.values.astype(np.int64).tolist()
        if kind == "date":
            self._read_date_format(column)
        self.spec["has_missing"] = self.has_missing

    def _check_whole(self) -> None:
        if (self.values != np.rint(self.values)).any() or (np.abs(self.values) > MAX_WHOLE).any():
            raise _invalid(self.name, "values must be whole numbers of at most 2^53")

    def _read_date_format(self, column: Mapping[str, Any]) -> None:
        date_format, unit = column.get("format"), column.get("unit")
        if not isinstance(date_format, str) or not _is_text(date_format) or not is_date_format(date_format):
            raise _invalid(self.name, "format must be a date's, with some of %Y %y %m %b %d %H %M %S")
        if not isinstance(unit, str) or unit not in _SECONDS:
            raise _invalid(self.name, "unit must be D or s")
        self.format_, self.unit = date_format, unit
        ends = (date.replace(microsecond=0) for date in (datetime.datetime.min, datetime.datetime.max))
        first, last = ((date - _EPOCH).total_seconds() // _SECONDS[self.unit] for date in ends)
        if self.values[0] < first or self.values[-1] > last:
            raise _invalid(self.name, "dates must be of the years 1 to 9999")
        self.spec |= {"format": self.format_, "unit": self.unit}

    def sign_names(self) -> list[str]:
        return [f"{self.name} is missing"] if self.has_missing else []

    def decode(self, z: Floats, signs: Floats) -> Array:
        values: Floats = np.clip(np.interp(z, self.z, self.values), self.values[0], self.values[-1])
        if self.decimals is not None:
            values = np.round(values, self.decimals)
        is_missing = signs[:, 0] > 0 if self.has_missing else np.zeros(len(z), dtype=bool)
        if self.kind == "date":
            dates = values.astype(np.int64).astype(_NUMPY[self.unit])
            dates[is_missing] = np.datetime64("NaT")
            return dates
        if self.kind == "integer" and not self.has_missing:
            return values.astype(np.int64)
        values[is_missing] = np.nan
        return values + 0.0  # no −0

    def encode(self, cells: Array, empty: Empty) -> tuple[Floats, Floats, Floats]:
        """Return the ends of the range of each value's coordinate, and the indicator of missing values."""
        values = self._read(cells)
        is_empty = np.isnan(values)
        if is_empty.any() and empty == "missing" and not self.has_missing:
            raise _never_missing(self.name, int(is_empty.argmax()))
        # Values that are rounded to this one (without decimals, to 9 digits), just within the ties
        half = 5.001e-9 * np.abs(values) if self.decimals is None else 0.4999 / 10**self.decimals
        low, high = self._lowest(values - half), self._highest(values + half)
        signs = np.where(is_empty, 1.0, -1.0)[:, None][:, : self.num_signs]
        low[is_empty] = high[is_empty] = 0.0 if empty == "missing" else np.nan
        if empty == "unknown":
            signs[is_empty] = np.nan
        return low, high, signs

    def _lowest(self, values: Floats) -> Floats:
        """Return the lowest coordinate of each value, −∞ for the first value and those below it."""
        j = np.searchsorted(self.values, values, side="left")
        return np.where(j == 0, -np.inf, self._between(values, j))

    def _highest(self, values: Floats) -> Floats:
        """Return the highest coordinate of each value, ∞ for the last value and those above it."""
        j = np.searchsorted(self.values, values, side="right")
        return np.where(j == len(self.values), np.inf, self._between(values, j))

    def _between(self, values: Floats, j: npt.NDArray[np.intp]) -> Floats:
        """Interpolate z between the knots j − 1 and j."""
        left, right = np.clip(j - 1, 0, None), np.clip(j, None, len(self.values) - 1)
        gap = self.values[right] - self.values[left]
        share = np.clip((values - self.values[left]) / np.where(gap > 0, gap, 1), 0, 1)
        z: Floats = self.z[left] + share * (self.z[right] - self.z[left])
        return z

    def format(self, cells: Array) -> list[str]:
        values, places = np.unique(self._read(cells) + 0.0, return_inverse=True)  # columns repeat their numbers
        texts = [*map(self._write, values.tolist())]
        return [texts[place] for place in places.tolist()]

    def _write(self, value: float) -> str:
        if value != value:
            return ""
        if self.decimals is None:
            return f"{value:.9g}"
        if self.kind == "date":
            return write_date(np.int64(value).astype(_NUMPY[self.unit]).tolist(), self.format_)
        return str(int(value)) if self.kind == "integer" else _fixed(value, self.digits or 0, self.decimals)

    def _read(self, cells: Array) -> Floats:
        """Return the numbers of cells, in the unit of a date, NaN for empty ones."""
        kinds = "M" if self.kind == "date" else "iuf"
        if cells.dtype.kind in kinds:
            if self.kind == "date":
                dates = cells.astype(_NUMPY[self.unit])
                return np.where(np.isnat(dates), np.nan, dates.astype(np.int64).astype(np.float64))
            numbers = cells.astype(np.float64)
            if np.isinf(numbers).any():
                self._refuse(int(np.isinf(numbers).argmax()), math.inf)
            return numbers
        read = self._date if self.kind == "date" else _number
        numbers = np.full(len(cells), np.nan)
        for i, cell in enumerate(_listed(cells)):
            stands_for_empty = self.kind != "date" and isinstance(cell, str) and cell in NO_NUMBER
            if not stands_for_empty and not _is_empty(cell):
                number = read(cell)
                numbers[i] = self._refuse(i, cell) if number is None else number
        return numbers

    def _refuse(self, row: int, cell: Any) -> float:
        if self.kind == "date":
            what = f"a date such as {write_date(datetime.date(2024, 12, 31), self.format_)}"
        else:
            what = "a finite number"
        raise ConfigurationError(f"row {row + 1}, column {_shown(self.name)}: {_shown(cell)} is not {what}")

    def _date(self, cell: Any) -> float | None:
        if isinstance(cell, str):
            cell = read_date(cell, self.format_) or _iso_date(cell)
        elif isinstance(cell, np.datetime64):
            cell = cell.astype("datetime64[s]").tolist()
        if not isinstance(cell, datetime.date):
            return None
        date = cell if isinstance(cell, datetime.datetime) else datetime.datetime(cell.year, cell.month, cell.day)
        if date.tzinfo is not None:
            date = date.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        return float((date - _EPOCH).total_seconds() // _SECONDS[self.unit])


class _Category:
    """A column of kind `category` or `boolean`: a state, coded as one-hot, or as a range of one coordinate."""

    def __init__(self, name: str, kind: str, column: Mapping[str, Any]):
        self.name, self.kind = name, kind
        self.values = _categories(name, kind, column.get("values"))
        self.coding = column.get("coding")
        if not isinstance(self.coding, str) or self.coding not in ("one_hot", "ranks"):
            raise _invalid(name, "coding must be one_hot or ranks")
        self.has_missing = _flag(name, column)
        self.num_states = len(self.values) + self.has_missing
        if self.num_states < 2:
            raise _invalid(name, "a category needs at least 2 states")
        self.is_number = int(self.coding == "ranks")
        self.num_signs = 0 if self.is_number else self.num_states
        if self.num_signs > MAX_SIZE:
            raise _invalid(name, f"there may be {MAX_SIZE:,} coordinates at most")
        self.spec: dict[str, Any] = {"name": name, "kind": kind, "values": self.values, "coding": self.coding}
        if self.is_number:
            self.z = _non_decreasing(name, "z", column.get("z"))
            if len(self.z) != self.num_states - 1:
                raise _invalid(name, "z must have a number for each pair of neighbouring states")
            self.spec["z"] = self.z.tolist()
        self.texts = [_text(value) for value in self.values]
        if kind == "boolean" and column.get("text") is not None:
            self._read_texts(column["text"])
        self.spec["has_missing"] = self.has_missing

    def _read_texts(self, texts: Any) -> None:
        if not isinstance(texts, list) or len(texts) != len(self.values) or len(set(map(str, texts))) != len(texts):
            raise _invalid(self.name, "text must hold a different text for each value")
        if not all(isinstance(text, str) and text and _is_text(text) for text in texts):
            raise _invalid(self.name, "text must hold a different text for each value")
        self.spec["text"] = self.texts = list(texts)

    def sign_names(self) -> list[str]:
        if self.is_number:
            return []
        return [f"{self.name}={text}" for text in self.texts] + [f"{self.name} is missing"] * self.has_missing

    def _codes(self, states: npt.NDArray[np.intp]) -> Floats:
        codes = np.full((len(states), self.num_signs), -1.0)
        codes[np.arange(len(states)), states] = 1
        return codes

    def decode(self, z: Floats, signs: Floats) -> Array:
        return self._values_of(np.searchsorted(self.z, z, side="right") if self.is_number else signs.argmax(axis=1))

    def _values_of(self, states: npt.NDArray[np.intp]) -> Array:
        is_long = isinstance(self.values[0], str) and any(len(v) > MAX_STR or v.endswith("\0") for v in self.values)
        values: Array
        if self.has_missing or is_long:
            values = np.fromiter([*self.values, None][: self.num_states], dtype=object, count=self.num_states)
        else:
            values = np.array(self.values)
        taken: Array = values[states]
        return taken

    def encode(self, cells: Array, empty: Empty) -> tuple[Floats, Floats, Floats]:
        """Return the ends of the range of each state's coordinate, if it has one, and its other coordinates."""
        states = self._states(cells)
        is_empty = states < 0
        if is_empty.any() and empty == "missing" and not self.has_missing:
            raise _never_missing(self.name, int(is_empty.argmax()))
        states = np.where(is_empty, self.num_states - 1, states)
        if not self.is_number:
            none, codes = np.full(len(cells), np.nan), self._codes(states)
            if empty == "unknown":
                codes[is_empty] = np.nan
            return none, none, codes
        ends = np.concatenate([[-np.inf], self.z, [np.inf]])
        low, high = ends[states], ends[states + 1]
        if empty == "unknown":
            low[is_empty] = high[is_empty] = np.nan
        return low, high, np.empty((len(cells), 0))

    def format(self, cells: Array) -> list[str]:
        try:
            return [self._text_of[cell] for cell in _listed(cells)]
        except (KeyError, TypeError):  # empty, or written in another way
            texts = [*self.texts, ""]  # the last one for empty cells, whose state is −1
            return [texts[state] for state in self._states(cells).tolist()]

    @functools.cached_property
    def _text_of(self) -> dict[Any, str]:
        return {None: ""} | dict(zip(self.values, self.texts, strict=True))

    @functools.cached_property
    def _state_of(self) -> dict[Any, int]:
        by_text = {text: i for i, text in enumerate(self.texts)}
        return {None: -1, "": -1} | by_text | {value: i for i, value in enumerate(self.values)}

    def _states(self, cells: Array) -> npt.NDArray[np.intp]:
        """Return the number of each cell's state, −1 for an empty one."""
        known = self._state_of
        states = np.empty(len(cells), dtype=np.intp)
        for i, cell in enumerate(_listed(cells)):
            try:
                states[i] = known[cell]
            except (KeyError, TypeError):
                states[i] = self._find(i, cell)
        return states

    def _find(self, row: int, cell: Any) -> int:
        """Return the state of a cell that is written in another way than the data's."""
        if _is_empty(cell):
            return -1
        if self.kind == "boolean":
            other: Any = {"true": True, "false": False}.get(cell.lower()) if isinstance(cell, str) else None
        elif isinstance(self.values[0], str):
            other = str(cell) if isinstance(cell, int | np.integer) and not isinstance(cell, bool) else None
        else:
            other = _number(cell)
        if other is None or (state := self._state_of.get(other)) is None:
            raise ConfigurationError(
                f"row {row + 1}, column {_shown(self.name)}: {_shown(cell)} is not one of its values, "
                f"{_some(self.values)}"
            )
        return state


def _read_column(i: int, column: Any) -> _Number | _Category:
    if not isinstance(column, Mapping):
        raise ConfigurationError(f"column {i} must be an object with a name and a kind")
    name, kind = column.get("name"), column.get("kind")
    if not isinstance(name, str) or not name or not _is_text(name):
        raise ConfigurationError(f"column {i} has no name")
    if isinstance(kind, str) and kind in NUMBER_KINDS:
        return _Number(name, kind, column)
    if isinstance(kind, str) and kind in CATEGORY_KINDS:
        return _Category(name, kind, column)
    known = ", ".join((*NUMBER_KINDS, *CATEGORY_KINDS))
    raise ConfigurationError(f"column {_shown(name)} is of the kind {_shown(kind)}, not one of {known}")


def _non_decreasing(name: str, key: str, numbers: Any) -> Floats:
    if not isinstance(numbers, list | tuple) or not 1 <= len(numbers) <= MAX_SIZE:
        raise _invalid(name, f"{key} must be a list of 1 to {MAX_SIZE:,} numbers")
    # (Comparing before converting, because a whole number can be too large for a float.)
    if not all(type(number) in (int, float) and -MAX_NUMBER <= number <= MAX_NUMBER for number in numbers):
        raise _invalid(name, f"{key} must hold numbers, none beyond {MAX_NUMBER:g}")
    array = np.array(numbers, dtype=np.float64)
    if (np.diff(array) < 0).any():
        raise _invalid(name, f"{key} must not decrease")
    return array


def _decimals(name: str, key: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= 15):
        raise _invalid(name, f"{key} must be a whole number from 0 to 15, or null")
    return value


def _flag(name: str, column: Mapping[str, Any]) -> bool:
    flag = column.get("has_missing", False)
    if not isinstance(flag, bool):
        raise _invalid(name, "has_missing must be true or false")
    return flag


def _categories(name: str, kind: str, values: Any) -> list[Any]:
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= MAX_SIZE:
        raise _invalid(name, f"values must be a list of 1 to {MAX_SIZE:,} values")
    types = {type(value) for value in values}
    if len(types) > 1 or not types <= ({bool} if kind == "boolean" else {str, int, float}):
        what = "booleans" if kind == "boolean" else "strings, whole numbers or other numbers, all of one type"
        raise _invalid(name, f"values must be {what}")
    if len(set(values)) < len(values):
        raise _invalid(name, "values must differ")
    if types == {str} and not all(value and _is_text(value) for value in values):
        raise _invalid(name, "values must be valid texts and not empty")
    limit = {int: MAX_WHOLE, float: MAX_NUMBER}.get(next(iter(types)), math.inf)
    if not types <= {str, bool} and not all(-limit <= value <= limit for value in values):
        raise _invalid(name, f"values must be numbers, none beyond {limit:g}")
    return list(values)


def _invalid(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"column {_shown(name)}: {what}")


def _never_missing(name: str, row: int) -> ConfigurationError:
    return ConfigurationError(f"row {row + 1}, column {_shown(name)} is empty, which it never is in the data")


def _is_text(value: str) -> bool:
    """Return whether a string can be written to a file. (JSON can hold halves of characters.)"""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_array(name: str, values: Any) -> Array:
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise ConfigurationError(f"column {_shown(name)} must be a list of values")
    array = np.asarray(values) if hasattr(values, "__array__") else np.fromiter(values, object, len(values))
    if array.ndim != 1:
        raise ConfigurationError(f"column {_shown(name)} must be a list of values, got the shape {array.shape}")
    return array


def _listed(cells: Array) -> list[Any]:
    """Return cells as Python's types. (Dates as numpy's own: `tolist` makes some of them numbers.)"""
    return list(cells) if cells.dtype.kind in "mM" else cells.tolist()


def _is_empty(cell: Any) -> bool:
    if cell is None or (isinstance(cell, str) and not cell):
        return True
    if isinstance(cell, float | np.floating | np.datetime64):
        return bool(cell != cell)
    return type(cell).__name__ in ("NAType", "NaTType")  # of pandas, which is not imported here


def _number(cell: Any) -> float | None:
    """Return the finite number of a cell, or of its text."""
    if isinstance(cell, bool | np.bool_ | np.datetime64 | np.timedelta64) or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _iso_date(text: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return None


def _fixed(value: float, least: int, most: int) -> str:
    """Return a number with as few decimals as needed, but at least `least`."""
    text = f"{value:.{max(least, most)}f}"
    if least < most:
        whole, _, decimals = text.partition(".")
        decimals = decimals.rstrip("0").ljust(least, "0")
        text = f"{whole}.{decimals}" if decimals else whole
    return text


def _shortest(value: float) -> str:
    """Return the shortest text that stands for a number."""
    text = repr(value)
    return text[:-2] if text.endswith(".0") else text


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _shortest(value) if isinstance(value, float) else str(value)


def _shown(value: Any) -> str:
    """Return a value for a message: on one line, and not too long."""
    text = repr(value.item() if isinstance(value, np.generic) and value.dtype.kind not in "mM" else value)
    text = text if isinstance(value, str) else " ".join(text.split())
    return text if len(text) <= 60 else text[:59] + "…"


def _some(values: Sequence[Any]) -> str:
    shown = [_shown(value) for value in itertools.islice(values, 8)]
    return ", ".join(shown) + (f", … ({len(values):,} in all)" if len(values) > len(shown) else "")
