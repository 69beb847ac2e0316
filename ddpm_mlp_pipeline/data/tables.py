"""Tables of columns of any kind: find the kinds, leave out what can't be learned, and build the codec."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from ..errors import ConfigurationError, DatasetError
from ..runtime.columns import MAX_NUMBER, MAX_WHOLE, NO_NUMBER, NUMBER_KINDS, CodedRows, TableCodec
from ..runtime.dates import read_date
from .files import SUFFIXES, read_table

KINDS = ("number", "integer", "date", "category", "boolean")
MAX_CATEGORIES = 1024
MAX_WIDTH = 300  # coordinates of a table
MAX_ONE_HOT = 24  # states of a category; more are coded as ranges of one coordinate
MAX_PLATEAUS = 500  # different numbers of a column; of more, only the frequent ones have a range of coordinates
MAX_KNOTS = 256
MIN_SHARE = 0.01  # of the rows, by which a number is frequent
DATE_FORMATS = (
    *("%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d %H:%M", "%Y/%m/%d"),
    *("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"),
    *("%b %d %Y", "%b %d, %Y", "%d %b %Y", "%d-%b-%Y", "%d-%b-%y", "%d/%m/%y", "%m/%d/%y"),
)
BOOLEANS = (("false", "true"), ("no", "yes"), ("f", "t"), ("n", "y"), ("off", "on"), ("0", "1"))
IDENTIFIER = re.compile(r"(?:.*[\W_])?(?:id|idx|index|uuid|guid|key|rownum)|unnamed: \d+|row", re.IGNORECASE)
IDENTIFIER_CAMEL = re.compile(r".*[a-z0-9](?:Id|ID|Key|Index)")
EPOCH = datetime.datetime(1970, 1, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A data set of columns of any kind.

    Attributes:
        codec: the coding of the columns.
        frame: the rows. Values have the types that `TableCodec.decode` returns.
        left_out: for each column of the file that is left out, by name, the reason.
    """

    codec: TableCodec
    frame: pd.DataFrame
    left_out: dict[str, str]

    def points(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows' coordinates, float64 `[rows, D]`: numbers vary within what is decoded to the same number."""
        return self._coded.draw(rng)

    @functools.cached_property
    def _coded(self) -> CodedRows:
        return self.codec.prepare(to_arrays(self.frame))


@dataclasses.dataclass(frozen=True, eq=False)
class _Column:
    """A column whose kind is known.

    Attributes:
        kind: one of `KINDS`.
        values: for numbers and dates (in `unit`s since 1970) float64, NaN if missing; else objects, `None` if missing.
        more: `format` and `unit` of a date, `decimals` and `digits` of a number, `text` of a boolean.
        is_asked: whether the kind was asked for.
    """

    name: str
    kind: str
    values: np.ndarray
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_asked: bool = False

    @property
    def is_number(self) -> bool:
        return self.values.dtype != object

    @functools.cached_property
    def is_missing(self) -> np.ndarray:
        return np.asarray(pd.isna(self.values))

    @functools.cached_property
    def num_different(self) -> int:
        return len(pd.unique(self.values[~self.is_missing]))

    @functools.cached_property
    def counts(self) -> dict[Any, int]:
        """The different values in order, and how often each occurs."""
        counts = pd.Series(self.values[~self.is_missing]).value_counts()
        return dict(sorted(zip(counts.index.tolist(), counts.tolist(), strict=True)))

    def rows(self, chosen: np.ndarray) -> _Column:
        return dataclasses.replace(self, values=self.values[chosen])


def load_table(
    path: str | os.PathLike[str],
    *,
    column_kinds: Mapping[str, str] | None = None,
    exclude: Sequence[str] = (),
    num_samples: int | None = None,
    seed: int = 0,
) -> Table:
    """Read a file of columns of any kind.

    In a `.csv` file, kinds are found from the texts. A column whose numbers have leading zeros (`007`) holds texts. In
    other files, the columns' types count. Numbers of which there are only two are categories. Columns of identifiers
    (texts that all differ; whole numbers that all differ if they are consecutive, or if the column's name says that it
    is one) and columns with only one value are left out.

    Args:
        path: a `.csv`, `.parquet` or `.npy` file.
        column_kinds: the kinds of some columns, by name: `number`, `integer`, `date`, `category` or `boolean`. Such a
            column is left out only if it has a single value.
        exclude: names of columns to leave out. They may hold anything.
        num_samples: how many rows to choose at random. By default, take all.
        seed: seed of this choice.

    Raises:
        DatasetError: if the file is missing, unreadable or too small, a column is unknown, holds values of several
            kinds, infinite numbers or too many different texts, or the coordinates are too many.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DatasetError(f"can't read {path}: pass a .csv, .parquet or .npy file")
    frame = read_table(path, as_text=True)
    _check_names(frame, exclude, path, "to exclude")
    _check_kinds(frame, column_kinds or {}, path)
    try:
        columns = _columns(frame.drop(columns=list(exclude)), column_kinds or {}, is_text=path.suffix == ".csv")
        columns, left_out = _leave_out(columns)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    left_out = dict.fromkeys(exclude, "excluded") | left_out
    if num_samples is not None:
        columns, more = _choose_rows(columns, len(frame), num_samples, seed, path)
        left_out |= more
    if not columns:
        raise DatasetError(f"{path} has no column to learn: all are left out ({_reasons(left_out)})")
    return Table(_codec(columns, str(path)), _frame(columns), left_out)


def load_frame(
    path: str | os.PathLike[str], codec: TableCodec, num_samples: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Read a file's rows by the coding of another file's, as `load_table` reads them.

    Args:
        path: as for `load_table`.
        codec: the coding. Other columns of the file are left out.
        num_samples: how many rows to choose at random at most. By default, take all.
        seed: seed of this choice.

    Raises:
        DatasetError: if the file is missing or unreadable, lacks a column, or a value is not of its column's kind.
    """
    frame = read_table(Path(path), as_text=True)
    _check_names(frame, codec.names, path, "of the table")
    # (Categories that are numbers have their own kind found again, which knows what stands for an empty cell.)
    kinds = {
        column["name"]: column["kind"]
        for column in codec.columns
        if column["kind"] != "category" or isinstance(column["values"][0], str)
    }
    if num_samples is not None and len(frame) > num_samples:
        frame = frame.iloc[np.random.default_rng(seed).choice(len(frame), num_samples, replace=False)]
    try:
        frame = frame[codec.names].reset_index(drop=True)
        return _frame(_columns(frame, kinds, is_text=Path(path).suffix == ".csv"))
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None


def make_codec(frame: pd.DataFrame, column_kinds: Mapping[str, str] | None = None) -> TableCodec:
    """Return the codec of a data frame whose columns have types (texts are no numbers), without leaving out any.

    Args:
        frame: the rows.
        column_kinds: as in `load_table`.

    Raises:
        DatasetError: as `load_table`, or if a column has a single value.
    """
    _check_kinds(frame, column_kinds or {}, "the table")
    columns = _columns(frame, column_kinds or {}, is_text=False)
    if constant := [column.name for column in columns if _is_constant(column)]:
        raise DatasetError(f"column {constant[0]!r} has a single value: leave it out")
    if too_many := [message for column in columns if (message := _too_many(column))]:
        raise DatasetError("; ".join(too_many))
    return _codec(columns, "the table")


def to_arrays(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return a frame's columns as `TableCodec` takes them."""
    return {name: frame[name].to_numpy() for name in frame}


def describe(table: Table) -> str:
    """Return what is known of a table's columns as text of at most 100 characters a line."""
    codec, frame = table.codec, table.frame
    heads = ["column", "kind", "values", "missing", "coordinates"]
    rows = [heads]
    for column in codec.columns:
        share = frame[column["name"]].isna().mean()
        missing = "" if share == 0 else f"{share:.1%}" if share >= 0.001 else "< 0.1%"
        width = TableCodec([column]).width
        rows.append([_cut(column["name"], 28), column["kind"], _values_shown(column), missing, str(width)])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{len(frame):,} rows, {len(codec.names)} columns, {codec.width} coordinates")
    lines += [_cut(f"left out: {name} ({reason})", 100) for name, reason in table.left_out.items()]
    return "\n".join(lines)


def _values_shown(column: Mapping[str, Any]) -> str:
    values = column["values"]
    if column["kind"] in NUMBER_KINDS:
        ends: Any = [values[0], values[-1]]
        ends = np.array(ends, dtype=f"datetime64[{column['unit']}]" if column["kind"] == "date" else np.float64)
        return " to ".join(text for (text,) in TableCodec([column]).format({column["name"]: ends}))
    texts = [_cut(str(value), 12) for value in values[:3]]
    return _cut(", ".join(texts) + (f", … ({len(values):,} values)" if len(values) > 3 else ""), 40)


def _cut(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _check_names(frame: pd.DataFrame, names: Iterable[str], path: object, what: str) -> None:
    if missing := [name for name in names if name not in frame.columns]:
        raise DatasetError(f"{path} has no column {missing[0]!r} {what}, only {', '.join(map(repr, frame.columns))}")


def _check_kinds(frame: pd.DataFrame, column_kinds: Mapping[str, str], path: object) -> None:
    _check_names(frame, column_kinds, path, "to give a kind")
    for name, kind in column_kinds.items():
        if kind not in KINDS:
            raise DatasetError(f"column {name!r} can't be of the kind {kind!r}, only {', '.join(KINDS)}")


# --- the kinds ---


def _columns(frame: pd.DataFrame, kinds: Mapping[str, str], is_text: bool) -> list[_Column]:
    return [_column(str(name), frame[name], kinds.get(name), is_text) for name in frame.columns]


def _column(name: str, series: pd.Series, kind: str | None, is_text: bool) -> _Column:
    if isinstance(series.dtype, pd.CategoricalDtype):
        kind, series = kind or "category", series.astype(series.dtype.categories.dtype)
    source, values = _typed(name, series)
    if source == "texts":
        if is_text and (kind is None or kind in ("number", "integer")):
            column = _numbers_of_texts(name, values, kind)
        else:
            column = None
        column = column or _of_texts(name, values, kind)
    elif source == "numbers":
        column = _of_numbers(name, values, kind, bool(pd.api.types.is_integer_dtype(series.dtype)))
    elif source == "booleans":
        column = _of_booleans(name, values, kind)
    else:
        column = _of_dates(name, values, kind)
    return dataclasses.replace(column, is_asked=kind is not None)


def _typed(name: str, series: pd.Series) -> tuple[str, np.ndarray]:
    """Return which type the values have, and the values: numbers (float64), dates (datetime64), or objects."""
    types = pd.api.types
    if types.is_bool_dtype(series.dtype):
        return "booleans", _objects(series)
    if types.is_numeric_dtype(series.dtype) and not types.is_complex_dtype(series.dtype):
        return _typed_numbers(series)
    if types.is_datetime64_any_dtype(series.dtype):
        return "dates", _to_seconds(series)
    values = _objects(series)
    found = {type(value) for value in values if value is not None}
    if found <= {str}:
        return "texts", np.array([value or None for value in values], dtype=object)
    if found <= {bool, np.bool_}:
        return "booleans", values
    if found and all(issubclass(type_, datetime.date) for type_ in found):
        return "dates", np.array([_without_zone(value) for value in values], dtype="datetime64[s]")
    try:
        if found & {str, bytes, list, dict, bool}:
            raise TypeError
        return _typed_numbers(series.astype(np.float64))
    except (TypeError, ValueError):
        names = ", ".join(sorted(type_.__name__ for type_ in found)) or str(series.dtype)
        raise DatasetError(
            f"column {name!r} holds values that can't be learned ({names}): leave it out with --exclude "
            f"{shlex.quote(name)}"
        ) from None


def _typed_numbers(series: pd.Series) -> tuple[str, np.ndarray]:
    if pd.api.types.is_integer_dtype(series.dtype) and (series.abs() > MAX_WHOLE).any():
        return "texts", np.array([None if value is None else str(value) for value in _objects(series)], dtype=object)
    return "numbers", series.to_numpy(dtype=np.float64, na_value=np.nan)


def _objects(series: pd.Series) -> np.ndarray:
    """Return values as objects of Python's types, `None` for missing ones."""
    values = series.astype(object).to_numpy(dtype=object, copy=True)
    values[series.isna().to_numpy()] = None
    return values


def _to_seconds(series: pd.Series) -> np.ndarray:
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    return series.to_numpy().astype("datetime64[s]")


def _without_zone(date: Any) -> Any:
    if getattr(date, "tzinfo", None) is not None:
        date = date.astimezone(datetime.timezone.utc).replace(tzinfo=None)
    return date


def _numbers_of_texts(name: str, texts: np.ndarray, kind: str | None) -> _Column | None:
    """Return the column of numbers that are written as texts, or `None` if they are no numbers.

    Raises:
        DatasetError: if most are numbers, or numbers were asked for, and some are not.
    """
    present = np.array([text is not None and text not in NO_NUMBER for text in texts], dtype=bool)
    if not present.any():
        return None
    numbers = np.full(len(texts), np.nan)
    numbers[present] = pd.to_numeric(pd.Series(texts[present], dtype=object), errors="coerce")
    bad = present & np.isnan(numbers)
    if bad.sum() >= 0.5 * present.sum() and kind is None:
        return None
    written = texts[present & ~bad]
    if kind is None and any(map(re.compile(r"[-+]?0\d").match, written)):
        return None  # codes with leading zeros
    if bad.any():
        row = int(bad.argmax())
        remedy = f"correct the file, or pass --column_kinds {shlex.quote(name + '=category')}"
        raise DatasetError(f"column {name!r} holds numbers, but {texts[row]!r} in row {row + 1}: {remedy}")
    is_whole = not any(map(re.compile("[.eE]|inf|nan").search, written))
    if is_whole and (np.abs(numbers[present]) > MAX_WHOLE).any() and kind is None:
        return None  # float64 does not hold such whole numbers
    column = _of_numbers(name, numbers, kind, is_whole)
    if column.kind == "category" and not is_whole:
        return _of_texts(name, texts, "category")  # which keeps them as they are written
    if column.more.get("decimals") is not None and all(map(re.compile(r"-?\d+\.\d+").fullmatch, written)):
        digits = min(len(text) - text.index(".") - 1 for text in written)
        return dataclasses.replace(column, more=column.more | {"digits": min(digits, 15)})
    return column


def _of_numbers(name: str, numbers: np.ndarray, kind: str | None, is_whole: bool) -> _Column:
    """Return the column of some numbers; `is_whole` says whether they are whole numbers by type."""
    if (np.abs(numbers) > MAX_NUMBER).any():
        row = int((np.abs(numbers) > MAX_NUMBER).argmax())
        raise DatasetError(
            f"column {name!r} holds {numbers[row]:g} in row {row + 1}, which is not finite or too large: correct the "
            f"file, or pass --exclude {shlex.quote(name)}"
        )
    present = numbers[~np.isnan(numbers)]
    fraction = np.flatnonzero(numbers != np.rint(numbers))
    fraction = fraction[~np.isnan(numbers[fraction])]
    all_whole = len(fraction) == 0
    if kind == "integer" and not all_whole:
        row = int(fraction[0])
        raise DatasetError(f"column {name!r} holds {numbers[row]:g} in row {row + 1}, which is not a whole number")
    if kind in ("category", "boolean") or (kind is None and len(np.unique(present)) <= 2):
        objects = np.array([None if n != n else int(n) if all_whole else n for n in numbers.tolist()], dtype=object)
        return _of_booleans(name, objects, kind) if kind == "boolean" else _Column(name, "category", objects)
    if kind == "date":
        raise DatasetError(f"column {name!r} holds numbers, not dates")
    if kind is None:
        kind = "integer" if is_whole or (all_whole and len(present) < len(numbers)) else "number"
    if kind == "integer":
        return _Column(name, kind, numbers)
    decimals = _decimals(present)
    if decimals is None:
        numbers = np.array([float(f"{number:.9g}") for number in numbers.tolist()])
    return _Column(name, kind, numbers, {"decimals": decimals})


def _decimals(numbers: np.ndarray) -> int | None:
    """Return how many decimals numbers have, or `None` if these are too many to count, as of measured float64."""
    largest = np.abs(numbers).max(initial=0)
    for decimals in range(16):
        if largest * 10.0**decimals > 1e15:
            return None
        if (np.round(numbers, decimals) == numbers).all():
            return decimals
    return None


def _of_texts(name: str, texts: np.ndarray, kind: str | None) -> _Column:
    if kind in ("number", "integer"):
        raise DatasetError(f"column {name!r} holds texts, not numbers")
    different = pd.unique(texts[pd.notna(texts)])
    if kind in (None, "boolean") and (column := _booleans_of_texts(name, texts, different, kind)):
        return column
    if kind in (None, "date") and (column := _dates_of_texts(name, texts, different, kind)):
        return column
    return _Column(name, "category", texts)


def _booleans_of_texts(name: str, texts: np.ndarray, different: np.ndarray, kind: str | None) -> _Column | None:
    lower = {text.lower(): text for text in different[:3]}
    pairs = BOOLEANS[:1] if kind is None else BOOLEANS
    pair = next((pair for pair in pairs if lower and set(lower) <= set(pair)), None)
    if pair is None or len(lower) < len(different) or (kind is None and len(different) < 2):
        if kind == "boolean":
            shown = ", ".join(map(repr, different[:3]))
            raise DatasetError(f"column {name!r} can't be boolean: its texts ({shown}, …) are not true and false")
        return None
    first = next(iter(lower.values()))
    style: Callable[[str], str] = str.upper if first.isupper() else str.title if first.istitle() else str.lower
    text = [lower.get(word, style(word)) for word in pair]
    value_of = {None: None, text[0]: False, text[1]: True}
    values = np.array([value_of[cell] for cell in texts], dtype=object)
    return _Column(name, "boolean", values, {} if text == ["false", "true"] else {"text": text})


def _dates_of_texts(name: str, texts: np.ndarray, different: np.ndarray, kind: str | None) -> _Column | None:
    """Return the column of dates that are written as texts, or `None` if they are no dates."""
    best, dates = "", dict[str, datetime.datetime | None]()
    sample = different[:: max(1, len(different) // 100)]
    for date_format in DATE_FORMATS if len(different) else ():
        if np.mean([read_date(text, date_format) is not None for text in sample]) < (0.9 if kind is None else 0.5):
            continue
        read = {text: read_date(text, date_format) for text in different}
        if not best or sum(map(bool, read.values())) > sum(map(bool, dates.values())):
            best, dates = date_format, read
    bad = np.array([text is not None and dates.get(text) is None for text in texts], dtype=bool)
    present = max(1, int(pd.notna(texts).sum()))
    if not best or (kind is None and bad.sum() > 0.01 * present):
        if kind == "date":
            shown = f", such as {different[0]!r}" if len(different) else ""
            raise DatasetError(f"column {name!r} holds texts{shown}, in none of the known formats of dates")
        return None
    if bad.any():
        row = int(bad.argmax())
        remedy = f"correct the file, or pass --column_kinds {shlex.quote(name + '=category')}"
        raise DatasetError(f"column {name!r} holds dates, but {texts[row]!r} in row {row + 1}: {remedy}")
    unit = "s" if "%H" in best else "D"
    seconds = {text: (date - EPOCH).total_seconds() for text, date in dates.items() if date is not None}
    values = np.array([np.nan if text is None else seconds[text] for text in texts])
    return _Column(name, "date", values // (1 if unit == "s" else 86400), {"format": best, "unit": unit})


def _of_booleans(name: str, values: np.ndarray, kind: str | None) -> _Column:
    if kind in ("number", "integer"):
        return _of_numbers(name, np.array([np.nan if v is None else float(v) for v in values]), kind, True)
    if kind == "date" or any(value not in (None, False, True) for value in values):
        raise DatasetError(f"column {name!r} can't be of the kind {kind}: its values are not such")
    objects = np.array([None if value is None else bool(value) for value in values], dtype=object)
    return _Column(name, kind or "boolean", objects if kind != "category" else _words(objects))


def _words(booleans: np.ndarray) -> np.ndarray:
    return np.array([None if value is None else str(value).lower() for value in booleans], dtype=object)


def _of_dates(name: str, dates: np.ndarray, kind: str | None) -> _Column:
    if kind not in (None, "date", "category"):
        raise DatasetError(f"column {name!r} holds dates, which can't be of the kind {kind}")
    is_missing = np.isnat(dates)
    seconds = np.where(is_missing, np.nan, dates.astype(np.int64).astype(np.float64))
    is_days = not (seconds[~is_missing] % 86400).any()
    if kind == "category":
        words = dates.astype("datetime64[D]" if is_days else "datetime64[s]").astype(str).astype(object)
        words[is_missing] = None
        return _Column(name, kind, words)
    if is_days:
        return _Column(name, "date", seconds // 86400, {"format": "%Y-%m-%d", "unit": "D"})
    return _Column(name, "date", seconds, {"format": "%Y-%m-%d %H:%M:%S", "unit": "s"})


# --- what is left out ---


def _leave_out(columns: list[_Column]) -> tuple[list[_Column], dict[str, str]]:
    """Split columns into those to learn, and the reasons why the others are left out.

    Raises:
        DatasetError: if columns hold too many different texts. The message names all of them.
    """
    left_out: dict[str, str] = {}
    too_many = {}
    for column in columns:
        if _is_constant(column):
            left_out[column.name] = "a single value" if column.num_different else "empty"
        elif not column.is_asked and _is_identifier(column):
            left_out[column.name] = "an identifier: all values differ"
        elif message := _too_many(column):
            too_many[column.name] = message
    if too_many:
        raise DatasetError(f"{'; '.join(too_many.values())}: leave out with --exclude {shlex.join(too_many)}")
    return [column for column in columns if column.name not in left_out], left_out


def _is_constant(column: _Column) -> bool:
    return column.num_different == 0 or column.num_different + bool(column.is_missing.any()) < 2


def _is_identifier(column: _Column) -> bool:
    num_rows = len(column.values)
    if column.kind not in ("integer", "category") or column.num_different < num_rows or num_rows < 3:
        return False
    if column.kind == "category":
        return isinstance(column.values[0], str)
    first, last = column.values.min(), column.values.max()
    is_named = IDENTIFIER.fullmatch(column.name) or IDENTIFIER_CAMEL.fullmatch(column.name)
    is_consecutive = last - first == num_rows - 1
    return bool(is_named) or (is_consecutive and ((first in (0, 1) and num_rows >= 20) or num_rows >= 1000))


def _too_many(column: _Column) -> str | None:
    """Return the message for a category with too many values."""
    if column.kind != "category":
        return None
    different, present = column.num_different, int((~column.is_missing).sum())
    is_text = any(isinstance(value, str) for value in column.values[~column.is_missing][:1])
    if different > MAX_CATEGORIES or (is_text and not column.is_asked and different > max(3, 0.9 * present)):
        return f"column {column.name!r} holds {different:,} different {'texts' if is_text else 'values'}"
    return None


def _choose_rows(
    columns: list[_Column], num_rows: int, num_samples: int, seed: int, path: Path
) -> tuple[list[_Column], dict[str, str]]:
    if not 2 <= num_samples <= num_rows:
        raise DatasetError(f"{path} holds {num_rows} rows: {num_samples} of them can't be chosen")
    if seed < 0:
        raise DatasetError(f"the seed must be at least 0, got {seed}")
    chosen = np.random.default_rng(seed).choice(num_rows, num_samples, replace=False)
    columns = [column.rows(chosen) for column in columns]
    left_out = {column.name: "a single value in the chosen rows" for column in columns if _is_constant(column)}
    return [column for column in columns if column.name not in left_out], left_out


def _reasons(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in left_out.items())


# --- the codec ---


def _codec(columns: list[_Column], path: str) -> TableCodec:
    try:
        codec = TableCodec([_coded(column) for column in columns])
    except ConfigurationError as error:
        raise DatasetError(f"{path}: {error}") from None
    if codec.width > MAX_WIDTH:
        widths = {column["name"]: TableCodec([column]).width for column in codec.columns}
        widest = sorted(widths, key=lambda name: -widths[name])[:5]
        shown = ", ".join(f"{name!r} ({widths[name]})" for name in widest)
        raise DatasetError(
            f"{path}: the columns have {codec.width} coordinates, more than {MAX_WIDTH}; the widest are {shown}: "
            f"leave some out with --exclude {shlex.join(widest)}"
        )
    return codec


def _coded(column: _Column) -> dict[str, Any]:
    """Return a column's coding, as `TableCodec` takes it."""
    coded: dict[str, Any] = {"name": column.name, "kind": column.kind, "has_missing": bool(column.is_missing.any())}
    if not column.is_number:
        if len(column.counts) + coded["has_missing"] <= MAX_ONE_HOT:
            return coded | column.more | {"values": list(column.counts), "coding": "one_hot"}
        # The frequent ones, which have wide ranges, in the middle, and the rare ones to both sides
        by_count = sorted(column.counts, key=column.counts.__getitem__)
        values = by_count[::2] + by_count[1::2][::-1]
        ranks = np.cumsum([column.counts[value] for value in values]) / len(column.values)
        z = [round(NormalDist().inv_cdf(p), 7) for p in (ranks if coded["has_missing"] else ranks[:-1]).tolist()]
        return coded | column.more | {"values": values, "coding": "ranks", "z": z}
    different, counts = np.array(list(column.counts)), np.array(list(column.counts.values()))
    z, values = _knots(different, counts)
    if column.kind != "number":
        values = [int(value) for value in values]
    return {**coded, **column.more, "z": z, "values": values}


def _knots(values: np.ndarray, counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Return knots (z, value) that turn the standard normal distribution into that of a column.

    Args:
        values: the different values, in order.
        counts: how often each occurs.
    """
    ends = np.concatenate([[0], counts.cumsum()])
    ranks, middles = ends / ends[-1], (ends[1:] + ends[:-1]) / 2 / ends[-1]
    is_plateau = counts >= MIN_SHARE * ends[-1] if len(values) > MAX_PLATEAUS else np.ones(len(values), dtype=bool)
    if not is_plateau.any() and (z := _gaussian(values, counts, middles)) is not None:
        return z, [float(values[0]), float(values[-1])]

    knots: set[tuple[float, float]] = set()
    for j in np.flatnonzero(is_plateau).tolist():
        if j > 0:
            knots |= {(ranks[j], values[j - 1]), (ranks[j], values[j])}
        if j < len(values) - 1:
            knots |= {(ranks[j + 1], values[j]), (ranks[j + 1], values[j + 1])}
    if not is_plateau.all():
        # The others lie at equal distances of z, so that they are denser at the tails.
        first, last = (NormalDist().inv_cdf(p) for p in (middles[0], middles[-1]))
        wanted = [NormalDist().cdf(z) for z in np.linspace(first, last, MAX_KNOTS)]
        nearest = np.unique(np.clip(np.searchsorted(middles, wanted), 0, len(values) - 1))
        knots |= {(middles[j], values[j]) for j in {0, len(values) - 1, *nearest.tolist()} if not is_plateau[j]}
    if not knots:
        return [0.0], [float(values[0])]
    ordered = sorted(knots)
    return [round(NormalDist().inv_cdf(rank), 7) for rank, _ in ordered], [float(value) for _, value in ordered]


def _gaussian(values: np.ndarray, counts: np.ndarray, middles: np.ndarray) -> list[float] | None:
    """Return z of the first and the last value if the values are nearly Gaussian, else `None`."""
    mean = np.average(values, weights=counts)
    standardised = (values - mean) / np.sqrt(np.average((values - mean) ** 2, weights=counts))
    scores = np.array([NormalDist().inv_cdf(p) for p in middles.tolist()])
    difference = np.abs(standardised - scores)
    if difference.max() > 0.5 or difference[np.abs(scores) < 2].max(initial=0) > 0.1:
        return None
    return [round(float(standardised[0]), 7), round(float(standardised[-1]), 7)]


def _frame(columns: list[_Column]) -> pd.DataFrame:
    """Return the values as `TableCodec.decode` does."""
    series: dict[str, Any] = {}
    for column in columns:
        has_missing, values = bool(column.is_missing.any()), column.values
        if column.kind == "date":
            units = np.where(column.is_missing, 0, values).astype(np.int64)
            seconds = units * (86400 if column.more["unit"] == "D" else 1)
            dates = seconds.astype("datetime64[s]")
            dates[column.is_missing] = np.datetime64("NaT")
            series[column.name] = dates
        elif column.is_number:
            series[column.name] = values.astype(np.int64) if column.kind == "integer" and not has_missing else values
        else:
            type_ = type(next(iter(column.counts)))
            dtype: Any = object if has_missing or type_ is str else type_
            series[column.name] = pd.Series(values.astype(dtype), dtype=dtype)
    return pd.DataFrame(series)
