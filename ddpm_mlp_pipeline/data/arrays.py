"""Arrays of numbers from `.npy` files, which may be anyone's."""

from __future__ import annotations

import os

import numpy as np

from ..errors import DatasetError


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers of a `.npy` file, as a view of it: no memory is taken for what its header says but it does not hold.

    Raises:
        DatasetError: if the file can't be read, or holds something other than numbers. (Objects are pickled, and a
            pickle is a program: they are refused.)
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header is Python's syntax, and numpy's reader raises errors of many kinds
        raise DatasetError(f"can't read {path}: {error}") from None
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise DatasetError(f"can't read {path}: it holds {array.dtype} of the shape {array.shape}, no numbers")
    return array
