"""Write samples to files: arrays, tables, pictures. Only what a format needs is imported."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigurationError, explain_missing_extra
from .runtime.sampler import Sampler

if TYPE_CHECKING:
    import pyarrow

MAX_POINTS, MAX_GRID = 10**6, 2**28  # points, and bytes of a grid of images, in one picture
ROW_GROUP = 2**21  # values in a row group of a Parquet file, of at least 100 and at most 2²⁰ rows
SUFFIXES = (".png", ".npy", ".csv", ".parquet", "")
PLAIN_NAME = re.compile(r'(?!(?:nan|inf|infinity)$)[A-Z_][^",\r\n]*', re.IGNORECASE | re.ASCII)

Writer = Callable[[Path, Iterable[np.ndarray], int, Sampler], None]
"""`write(path, batches, number, sampler)` writes so many samples. Images are of uint8, except for `.npy`."""


def find_writer(sampler: Sampler, suffix: str, number: int) -> Writer:
    """Return the writer for a sampler's samples, a suffix (`""` for a folder) and a number of samples.

    Raises:
        ConfigurationError: if such samples can't be written so.
        MissingExtraError: if the format needs a package that is not installed.
    """
    sample_shape = sampler.sample_shape
    if suffix == ".npy":
        return _write_npy
    if sampler.codec is not None:
        if suffix not in (".csv", ".parquet"):
            raise ConfigurationError("a table goes to a .csv or .parquet file, or its coordinates to a .npy file")
        return _write_cells if suffix == ".csv" else _parquet_writer(_cells)
    if len(sample_shape) == 1:
        if suffix == "":
            raise ConfigurationError("a folder is for images, but these are points: use .png, .npy, .csv or .parquet")
        if suffix == ".parquet":
            return _parquet_writer(_columns)
        if suffix == ".csv":
            return _write_csv
        if sample_shape[0] < 2:
            raise ConfigurationError("a picture needs points of at least two coordinates: use .npy or .csv")
        if number > MAX_POINTS:
            raise ConfigurationError(f"a picture holds {MAX_POINTS:,} points at most: use .npy, .csv or .parquet")
        return _write_scatter
    if suffix == ".csv":
        raise ConfigurationError("a .csv holds points, but these are images: use .png, .npy, .parquet or a folder")
    if sample_shape[0] not in (1, 3):
        raise ConfigurationError(f"a picture needs 1 or 3 channels, not {sample_shape[0]}: use .npy")
    if suffix == ".parquet":
        return _parquet_writer(_pictures)
    if suffix and number * math.prod(sample_shape) > MAX_GRID:
        limit = MAX_GRID // math.prod(sample_shape)
        raise ConfigurationError(f"a grid holds {limit:,} images of this size at most: use .npy, .parquet or a folder")
    return _write_grid if suffix else _write_folder


def _write_npy(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    with path.open("wb") as file:
        for i, batch in enumerate(batches):
            if i == 0:
                shape = (number, *batch.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(batch.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch).tobytes())


def _write_csv(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(csv_header(sampler.data_columns) + "\n")
        for batch in batches:
            np.savetxt(file, batch, fmt="%.9g", delimiter=",")


def _write_cells(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    codec = sampler.codec
    assert codec is not None
    with path.open("w", encoding="utf-8", newline="") as file:
        # Before Python 3.13, cells with a carriage return are quoted only if lines end with one.
        lines = SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
        writer = csv.writer(lines, lineterminator="\r\n")
        writer.writerow(codec.names)
        for batch in batches:
            writer.writerows(codec.format(codec.decode(batch)))


def csv_header(names: Iterable[str]) -> str:
    """Return the first line of a CSV file, the same as that of `toCsv` in `web/ddpm.js`.

    A name is quoted if readers could split it, change it or take it for a number. No quotes are needed if it begins
    with a letter or underscore and has no quotes, commas or line breaks.
    """
    return ",".join(name if PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"' for name in names)


def _parquet_writer(to_table: Callable[[np.ndarray, Sampler], pyarrow.Table]) -> Writer:
    with explain_missing_extra("a .parquet file"):
        import pyarrow.parquet

    def write(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
        rows = min(max(100, ROW_GROUP // math.prod(sampler.sample_shape)), 2**20)
        writer = None
        try:
            for group in _regroup(batches, rows):
                table = to_table(group, sampler)
                writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
                writer.write_table(table, row_group_size=rows)
        finally:
            if writer is not None:
                writer.close()

    return write


def _columns(points: np.ndarray, sampler: Sampler) -> pyarrow.Table:
    import pyarrow

    return pyarrow.table([*np.ascontiguousarray(points.T)], names=sampler.data_columns)


def _cells(points: np.ndarray, sampler: Sampler) -> pyarrow.Table:
    """Return rows of a table, with nulls for missing cells."""
    import pyarrow

    assert sampler.codec is not None
    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string(), bool: pyarrow.bool_()}
    kinds = {"integer": pyarrow.int64(), "number": pyarrow.float64()}
    table = sampler.codec.decode(points)
    columns = []
    for column in sampler.codec.columns:  # with types that don't depend on which cells of a row group are missing
        if column["kind"] == "date":
            type_ = pyarrow.date32() if column["unit"] == "D" else pyarrow.timestamp("s")
        else:
            type_ = kinds.get(column["kind"]) or types[type(column["values"][0])]
        columns.append(pyarrow.array(table[column["name"]], type_, from_pandas=True))
    return pyarrow.table(columns, names=sampler.codec.names)


def _pictures(images: np.ndarray, sampler: Sampler) -> pyarrow.Table:
    """Return images as `datasets` stores and finds them: a column of PNG files, and the metadata that say so."""
    import pyarrow

    from .runtime.pictures import to_picture

    files = []
    for image in images:
        file = io.BytesIO()
        to_picture(image).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    column = pyarrow.array(files, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    return pyarrow.table({"image": column}).replace_schema_metadata({"huggingface": json.dumps(features)})


def _regroup(batches: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Yield the same rows in arrays of `rows`, whatever the batches; the last may be shorter."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= rows:
            joined = np.concatenate(waiting)
            yield joined[:rows]
            waiting = [joined[rows:]]
    if any(map(len, waiting)):
        yield np.concatenate(waiting)


def _write_scatter(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from .runtime.pictures import draw_points

    draw_points(np.concatenate([batch[:, :2] for batch in batches])).save(path)


def _write_grid(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from .runtime.pictures import image_grid

    image_grid(batches, number).save(path)


def _write_folder(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from .runtime.pictures import to_picture

    images = (image for batch in batches for image in batch)
    for i, image in enumerate(images):
        to_picture(image).save(path / f"{i:0{len(str(number - 1))}}.png")
