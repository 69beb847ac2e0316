"""`write_page`: write a static web page that samples from a bundle in the browser."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import shutil
import subprocess
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

from ..errors import ConfigurationError
from ..files import check_folder, whole_folder
from ..runtime.bundle import seal
from ..runtime.sampler import OnnxSampler

WEB = Path(__file__).parent / "web"
PAGE_FILES = ("index.html", "page.js", "draw.js", "table.js", "worker.js", "load.js", "ddpm.js", "columns.js")
BUNDLE_FILES = ("bundle.json", "step_table.json", "unet.onnx")
REGISTRY = "https://registry.npmjs.org"
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
# For CPUs, and for WebGPU, which browsers fetch only if they have it and the CPU is slow.
SCRIPTS = ("dist/ort.wasm.bundle.min.mjs", "dist/ort.webgpu.bundle.min.mjs")
BINARIES = ("dist/ort-wasm-simd-threaded.wasm", "dist/ort-wasm-simd-threaded.asyncify.wasm")
NEEDED = ("package.json", *SCRIPTS, *BINARIES)  # package.json names author, version and licence
MAX_SIZE = 200 * 2**20  # bytes of the package's archive
TIMEOUT = 60  # seconds


def _page_name(name: str) -> str:
    """Return the name that the page has for one of the package's files.

    Some servers don't serve .mjs as JavaScript. Few compress files: gzip reduces the .wasm files to a quarter.
    """
    file = Path(name)
    return f"{file.name}.gz" if name in BINARIES else file.with_suffix(".js").name if name in SCRIPTS else file.name


PAGE_ENTRIES = {
    *PAGE_FILES,
    *("bundle/", *(f"bundle/{name}" for name in BUNDLE_FILES)),
    *("onnxruntime/", *(f"onnxruntime/{_page_name(name)}" for name in NEEDED)),
}


def write_page(
    bundle: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    onnxruntime_web: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a static page that draws a bundle's samples in the browser.

    Args:
        bundle: a folder that `export_bundle` wrote.
        folder: the folder to write.
        onnxruntime_web: folder of the unpacked npm package onnxruntime-web. By default it is downloaded from the npm
            registry, and kept in the user's cache folder.
        overwrite: whether to replace an existing page. A folder with anything else is never replaced.

    Raises:
        BundleError: if the bundle can't be read.
        OutputExistsError: if `folder` exists and `overwrite` is false, or if it holds anything but a page.
        ConfigurationError: if `onnxruntime_web` is not that package, or if it can't be downloaded.
    """
    bundle, folder = Path(bundle), Path(folder)
    check_folder(folder, PAGE_ENTRIES.__contains__, overwrite)
    OnnxSampler(bundle, num_threads=1)  # refuse a damaged bundle here rather than in the browser
    package = _check_package(Path(onnxruntime_web)) if onnxruntime_web is not None else _cached_package()
    with whole_folder(folder, PAGE_ENTRIES.__contains__, overwrite) as page:
        for name in PAGE_FILES:
            shutil.copyfile(WEB / name, page / name)
        (page / "bundle").mkdir()
        for name in BUNDLE_FILES:
            shutil.copyfile(bundle / name, page / "bundle" / name)
        _leave_out_nested_tables(page / "bundle")
        (page / "onnxruntime").mkdir()
        for name in NEEDED:
            content = (package / name).read_bytes()
            content = gzip.compress(content, compresslevel=6, mtime=0) if name in BINARIES else content
            (page / "onnxruntime" / _page_name(name)).write_bytes(content)


def _leave_out_nested_tables(bundle: Path) -> None:
    """Take the nested tables, which the page doesn't play, out of its bundle's description."""
    path = bundle / "bundle.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    if info.pop("nested_tables", None):
        path.write_text(json.dumps(info), encoding="utf-8")
        seal(bundle)


def _check_package(package: Path) -> Path:
    """Return the folder if it is an unpacked onnxruntime-web."""
    try:
        name = json.loads((package / "package.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if name != PACKAGE:
        raise ConfigurationError(
            f"{package} is not the npm package {PACKAGE}: unpack that package and name its folder"
        )
    for name in NEEDED:
        if not (package / name).is_file():
            raise ConfigurationError(f"{package} lacks {name}: unpack {PACKAGE} {VERSION} and name its folder")
    return package


def _cached_package() -> Path:
    """Return the pinned package's folder in the user's cache; download the package if it is missing there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-mlp-pipeline"
    package = cache / f"{PACKAGE}-{VERSION}"
    if all((package / name).is_file() for name in NEEDED):
        return package
    with (
        whole_folder(package, {*NEEDED, "dist/"}.__contains__, overwrite=True) as folder,
        tarfile.open(fileobj=io.BytesIO(_download()), mode="r:gz") as tar,
    ):
        for name in NEEDED:
            (folder / name).parent.mkdir(exist_ok=True)
            file = tar.extractfile(f"package/{name}")
            assert file is not None  # the archive's SHA-512 is the published package's
            (folder / name).write_bytes(file.read())
    return package


def _registry() -> str:
    """Return the address of the npm registry that this machine is configured to use."""
    registry = next((value for name, value in os.environ.items() if name.lower() == "npm_config_registry"), None)
    if not registry and (npm := shutil.which("npm")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(
                [npm, "config", "get", "registry"], capture_output=True, text=True, timeout=TIMEOUT
            )
            registry = result.stdout.strip() if result.returncode == 0 else None
    return (registry or REGISTRY).rstrip("/")


def _download() -> bytes:
    host = "of this machine"  # the whole address may contain a password
    try:
        parts = urllib.parse.urlsplit(_registry())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("its address must start with https://")
        host = parts.hostname
        login, _, place = parts.netloc.rpartition("@")
        request = urllib.request.Request(f"{parts.scheme}://{place}{parts.path}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz")
        if login:
            token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            archive: bytes = response.read(MAX_SIZE)
        if base64.b64encode(hashlib.sha512(archive).digest()).decode() != INTEGRITY:
            raise ValueError("the SHA-512 of the archive differs from the published package's")
        return archive
    except (OSError, ValueError, http.client.HTTPException) as error:  # OSError includes URLError and timeouts
        reason = "its address is not valid" if isinstance(error, http.client.InvalidURL) else error
        raise ConfigurationError(
            f"can't download {PACKAGE} {VERSION} from the npm registry {host}: {reason}; "
            "without a network, pass an unpacked package as --onnxruntime_web"
        ) from None
