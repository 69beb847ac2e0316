"""Read arrays of numbers from untrusted `.npy` files."""

from __future__ import annotations

import os

import numpy as np

from ..errors import DatasetError


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
