"""The checksums in a bundle's `bundle.json`, by which a damaged file, or another bundle's, is told apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ddpm_mlp_pipeline.errors import BundleError

FILES = {"unet.onnx": "network", "step_table.json": "step table"}  # which samples come out depends on these


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
