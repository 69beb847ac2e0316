"""Read untrusted files: arrays of numbers, and what a Parquet file holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import DatasetError, explain_missing_extra


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """Map the numbers of a `.npy` file into memory, so that a false shape in its header takes no memory.

    Raises:
        DatasetError: if the file can't be read, is empty, or holds other types than numbers. (Objects are refused,
            because unpickling them can run code.)
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy parses the header as Python, which raises many types of errors
        raise DatasetError(f"can't read {path}: {error}") from None
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise DatasetError(f"can't read {path}: it holds {array.dtype} of the shape {array.shape}, not numbers")
    return array


def holds_pictures(path: Path) -> bool:
    """Return whether a file is a Parquet file with a column of pictures, as `datasets` stores them."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    with explain_missing_extra("a .parquet file"):
        import pyarrow
        import pyarrow.parquet
    try:
        types = pyarrow.parquet.read_schema(path).types
    except (OSError, pyarrow.ArrowException):
        return False  # the loader of points says what is wrong
    return any(pyarrow.types.is_struct(type_) for type_ in types)
