"""Read and write `bundle.json`, which describes a bundle's samples and holds the checksums of its other files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError, ConfigurationError
from .columns import TableCodec

FORMAT, VERSION = "ddpm-bundle", 2
READ_VERSIONS = (1, VERSION)  # version 1 has no labels and no conditions
FILES = {"unet.onnx": "network", "step_table.json": "step table"}  # the files that determine the samples
INPUTS = ("sample", "timestep")  # every network takes these
OPTIONAL_INPUTS = ("class_labels", "condition")  # some networks take these after them, in this order
MAX_SIZE = 2**26  # values in a sample
MAX_CALLS = 2**20  # of a nested table


def table_name(num_calls: int) -> str:
    """Return the name of the file of a nested table."""
    return f"step_table_{num_calls}.json"


def is_table_name(name: str) -> bool:
    """Tell whether a file of this name can hold a nested table."""
    number = name.removeprefix("step_table_").removesuffix(".json")
    return number.isascii() and number.isdigit() and name == table_name(int(number))


def read_info(path: Path) -> dict[str, Any]:
    """Read and check a `bundle.json`.

    Raises:
        BundleError: if it can't be read or doesn't describe a bundle of a known version.
    """
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != FORMAT or info["version"] not in READ_VERSIONS:
            raise BundleError(f"{path} does not describe a bundle of version {VERSION}")
        shape = info["sample_shape"]
        if (
            len(shape) not in (1, 3)
            or not all(type(size) is int and size > 0 for size in shape)
            or math.prod(shape) > MAX_SIZE
        ):
            raise BundleError(f"{path}: {shape} is not a shape of points or images")
        if len(shape) == 1:
            _check_columns(info, path, "data", shape[0])
        columns = info.setdefault("columns", None)
        if columns is not None and (len(shape) != 1 or TableCodec(columns).coordinate_names != info["data_columns"]):
            raise BundleError(f"{path}: the coordinates of columns are not the data_columns")
        inputs = info.setdefault("inputs", list(INPUTS))
        further = [name for name in OPTIONAL_INPUTS if name in inputs] if info["version"] == VERSION else []
        if inputs != [*INPUTS, *further]:
            known = ", ".join((*INPUTS, *OPTIONAL_INPUTS))
            raise BundleError(f"{path}: the network takes the inputs {inputs}, but this version knows only {known}")
        if not isinstance(info.setdefault("condition_is_known", False), bool):
            raise BundleError(f"{path}: condition_is_known must be true or false")
        if info["condition_is_known"]:
            if "condition" not in inputs or len(shape) != 1:
                raise BundleError(f"{path}: condition_is_known is for points, and needs the input condition")
        elif "condition" in inputs:
            _check_columns(info, path, "condition", len(info["condition_columns"]))
        if "class_labels" in inputs:
            names, null = info["class_names"], info["null_label"]
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise BundleError(f"{path}: class_names must be a list of names")
            if null is not None and not (type(null) is int and 0 <= null <= len(names)):
                raise BundleError(f"{path}: null_label must be a whole number from 0 to {len(names)}, or null")
            if info.setdefault("class_shares", None) is not None:
                shares = np.asarray(info["class_shares"], dtype=np.float64)
                if shares.shape != (len(names),) or not (shares >= 0).all() or not abs(shares.sum() - 1) < 1e-6:
                    raise BundleError(f"{path}: class_shares must hold {len(names)} numbers that sum to 1, or be null")
                info["class_shares"] = shares.tolist()
        calls = info.setdefault("nested_tables", [])
        if not isinstance(calls, list) or not all(type(number) is int and 0 < number <= MAX_CALLS for number in calls):
            raise BundleError(f"{path}: nested_tables must be a list of numbers of network calls")
        if len(calls) != len(set(calls)):
            raise BundleError(f"{path}: nested_tables holds a number twice")
        if not isinstance(info.get("sha256", {}), dict):
            raise BundleError(f"{path}: sha256 must hold the checksum of each file")
        return info
    except FileNotFoundError:
        folder = path.parent
        raise BundleError(
            f"{folder} is not a bundle: it has no {path.name}" if folder.is_dir() else f"there is no folder {folder}"
        ) from None
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
    except BundleError:
        raise
    except ConfigurationError as error:  # of the table's codec
        raise BundleError(f"{path}: columns: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path} does not describe a bundle: {type(error).__name__}: {error}") from None


def _check_columns(info: dict[str, Any], path: Path, kind: str, number: int) -> None:
    """Check the names, means and standard deviations of the columns of the data or of the condition."""
    for name in (f"{kind}_mean", f"{kind}_std"):
        numbers = np.asarray(info[name], dtype=np.float64)
        if numbers.shape != (number,) or not (np.abs(numbers) < np.finfo(np.float32).max).all():
            raise BundleError(f"{path}: {name} must hold {number} numbers")
    columns = info[f"{kind}_columns"]
    if number == 0 or len(columns) != number or not all(isinstance(column, str) for column in columns):
        raise BundleError(f"{path}: {kind}_columns must hold {number} names")


def seal(bundle: Path) -> None:
    """Write the SHA-256 of a bundle's network and step tables into its `bundle.json`."""
    path = bundle / "bundle.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    names = [*FILES, *map(table_name, info.get("nested_tables", ()))]
    info["sha256"] = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in names}
    path.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_file(bundle: Path, name: str, info: dict[str, Any]) -> bytes:
    """Return the content of one of a bundle's `FILES`, or of a nested table.

    Args:
        bundle: the folder.
        name: name of the file.
        info: content of `bundle.json`, whose checksum for the file, if there is one, is compared.

    Raises:
        BundleError: if the file can't be read, or the checksum differs.
    """
    path = bundle / name
    content = read_bytes(path, FILES.get(name, "nested step table"))
    digest = hashlib.sha256(content).hexdigest()
    if info.get("sha256", {}).get(name, digest) != digest:
        raise BundleError(f"{path} is damaged or from another bundle: its SHA-256 differs from the one in bundle.json")
    return content


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """Return the content of a file; errors call it `what`.

    Raises:
        BundleError: if the file can't be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise BundleError(f"the bundle lacks its {what}, {path}") from None
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
