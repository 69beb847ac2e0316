"""A bundle's `bundle.json`: what it says of the samples, and the checksums of the other files."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError

FORMAT, VERSION = "ddpm-bundle", 1
FILES = {"unet.onnx": "network", "step_table.json": "step table"}  # which samples come out depends on these
INPUTS = ("sample", "timestep")  # of the network
MAX_SIZE = 2**26  # of a sample, in numbers


def read_info(path: Path) -> dict[str, Any]:
    """Read what a `bundle.json` says of the samples.

    Raises:
        BundleError: if it can't be read, or describes no bundle of this version.
    """
    try:
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (info["format"], info["version"]) != (FORMAT, VERSION):
            raise BundleError(f"{path} does not describe a bundle of version {VERSION}")
        shape = info["sample_shape"]
        if (
            len(shape) not in (1, 3)
            or not all(type(size) is int and size > 0 for size in shape)
            or math.prod(shape) > MAX_SIZE
        ):
            raise BundleError(f"{path}: {shape} is no shape of points or images")
        if len(shape) == 1:
            for name in ("data_mean", "data_std"):
                numbers = np.asarray(info[name], dtype=np.float64)
                if numbers.shape != tuple(shape) or not (np.abs(numbers) < np.finfo(np.float32).max).all():
                    raise BundleError(f"{path}: {name} must hold {shape[0]} numbers")
            columns = info["data_columns"]
            if len(columns) != shape[0] or not all(isinstance(column, str) for column in columns):
                raise BundleError(f"{path}: data_columns must hold {shape[0]} names")
        if (inputs := info.get("inputs", list(INPUTS))) != list(INPUTS):
            raise BundleError(f"{path}: the network needs the inputs {inputs}, of which this version knows {INPUTS}")
        if not isinstance(info.get("sha256", {}), dict):
            raise BundleError(f"{path}: sha256 must hold the checksum of each file")
        return info
    except FileNotFoundError:
        folder = path.parent
        raise BundleError(
            f"{folder} is no bundle: it has no {path.name}" if folder.is_dir() else f"there is no folder {folder}"
        ) from None
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path} does not describe a bundle: {type(error).__name__}: {error}") from None


def seal(bundle: Path) -> None:
    """Write the SHA-256 of a bundle's network and table into its `bundle.json`, when they are as they should be."""
    path = bundle / "bundle.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["sha256"] = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in FILES}
    path.write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_file(bundle: Path, name: str, info: dict[str, Any]) -> bytes:
    """What a file of a bundle holds.

    Args:
        bundle: the folder.
        name: of the file.
        info: what `bundle.json` says. If it has no checksum for the file, none is compared.

    Raises:
        BundleError: if the file can't be read, or has another checksum.
    """
    path = bundle / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"the bundle lacks its {FILES[name]}, {path}") from None
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    if info.get("sha256", {}).get(name, digest) != digest:
        raise BundleError(f"{path} is damaged, or another bundle's: bundle.json has another SHA-256 for it")
    return content
