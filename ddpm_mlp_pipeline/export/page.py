"""`write_page`: a bundle to a folder that a browser samples from, served as static files by anything."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import tarfile
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigurationError
from ..files import check_folder, whole_folder
from ..runtime.sampler import OnnxSampler

WEB = Path(__file__).parent / "web"
PAGE_FILES = ("index.html", "page.js", "draw.js", "worker.js", "ddpm.js")
BUNDLE_FILES = ("bundle.json", "step_table.json", "unet.onnx")
REGISTRY = "https://registry.npmjs.org"
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # SHA-512
SCRIPT, WASM = "dist/ort.wasm.bundle.min.mjs", "dist/ort-wasm-simd-threaded.wasm"
NEEDED = ("package.json", SCRIPT, WASM)  # package.json says whose it is, which version, and under which licence
MAX_SIZE = 200 * 2**20  # of the package: a registry that sends more sends something else
TIMEOUT = 60  # seconds without an answer
# Servers know .js to be JavaScript, .mjs not all of them; and few compress, which makes 4 MB of 14.
PAGE_SCRIPT, PAGE_WASM = Path(SCRIPT).with_suffix(".js").name, f"{Path(WASM).name}.gz"
PAGE_ENTRIES = {
    *PAGE_FILES,
    *("bundle/", *(f"bundle/{name}" for name in BUNDLE_FILES)),
    *("onnxruntime/", *(f"onnxruntime/{name}" for name in ("package.json", PAGE_SCRIPT, PAGE_WASM))),
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
        onnxruntime_web: the unpacked npm package. By default it is downloaded from the npm registry, and kept in the
            user's cache folder for the next time.
        overwrite: whether a page that is there already is replaced; a folder of anything else never is.

    Raises:
        BundleError: if the bundle can't be read.
        OutputExistsError: if `folder` exists, and isn't to be overwritten or holds something other than a page.
        ConfigurationError: if `onnxruntime_web` is no such package, or it can't be downloaded.
    """
    bundle, folder = Path(bundle), Path(folder)
    check_folder(folder, PAGE_ENTRIES.__contains__, overwrite)
    OnnxSampler(bundle, num_threads=1)  # a damaged bundle is told apart here, not by the page's visitors
    package = _check_package(Path(onnxruntime_web)) if onnxruntime_web is not None else _cached_package()
    with whole_folder(folder, PAGE_ENTRIES.__contains__, overwrite) as page:
        for name in PAGE_FILES:
            shutil.copyfile(WEB / name, page / name)
        (page / "bundle").mkdir()
        for name in BUNDLE_FILES:
            shutil.copyfile(bundle / name, page / "bundle" / name)
        (page / "onnxruntime").mkdir()
        shutil.copyfile(package / "package.json", page / "onnxruntime" / "package.json")
        shutil.copyfile(package / SCRIPT, page / "onnxruntime" / PAGE_SCRIPT)
        wasm = gzip.compress((package / WASM).read_bytes(), mtime=0)
        (page / "onnxruntime" / PAGE_WASM).write_bytes(wasm)


def _check_package(package: Path) -> Path:
    """The folder itself, if it is an unpacked onnxruntime-web."""
    try:
        is_it = json.loads((package / "package.json").read_text(encoding="utf-8"))["name"] == PACKAGE
    except (OSError, ValueError, KeyError, TypeError):
        is_it = False
    if not is_it:
        raise ConfigurationError(f"{package} is no unpacked npm package {PACKAGE}: its package.json does not say so")
    for name in NEEDED:
        if not (package / name).is_file():
            raise ConfigurationError(f"{package} lacks {name}, which {PACKAGE} {VERSION} has: is it another version?")
    return package


def _cached_package() -> Path:
    """The pinned package, out of the user's cache, or else out of the registry and into the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-mlp-pipeline"
    package = cache / f"{PACKAGE}-{VERSION}"
    if all((package / name).is_file() for name in NEEDED):
        return package
    with whole_folder(package, {*NEEDED, "dist/"}.__contains__, overwrite=True) as folder:
        with open(folder / "package.tgz", "w+b") as archive:
            _download(archive)
            _extract(archive, folder)
        (folder / "package.tgz").unlink()
    return package


def _registry() -> str:
    """The npm registry that this machine is set up to use."""
    registry = next((value for name, value in os.environ.items() if name.lower() == "npm_config_registry"), None)
    if not registry and (npm := shutil.which("npm")):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            result = subprocess.run(
                [npm, "config", "get", "registry"], capture_output=True, text=True, timeout=TIMEOUT
            )
            registry = result.stdout.strip() if result.returncode == 0 else None
    return (registry or REGISTRY).rstrip("/")


def _download(archive: BinaryIO) -> None:
    host = "of this machine"  # never the address itself, which may hold a password
    try:
        parts = urllib.parse.urlsplit(_registry())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("its address must begin with https://")
        host = parts.hostname
        login, _, place = parts.netloc.rpartition("@")
        request = urllib.request.Request(f"{parts.scheme}://{place}{parts.path}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz")
        if login:
            token = base64.b64encode(urllib.parse.unquote(login).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        sha, size = hashlib.sha512(), 0
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            while chunk := response.read(2**20):
                sha.update(chunk)
                archive.write(chunk)
                if (size := size + len(chunk)) > MAX_SIZE:
                    raise ValueError("it sends too much")
        if base64.b64encode(sha.digest()).decode() != INTEGRITY:
            raise ValueError("what it sends has another SHA-512 than the published package")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = "its address is not valid" if isinstance(error, http.client.InvalidURL) else error
        raise ConfigurationError(
            f"can't download {PACKAGE} {VERSION} from the npm registry {host}: {reason}; "
            "without a network, name an unpacked package by --onnxruntime_web"
        ) from None


def _extract(archive: BinaryIO, folder: Path) -> None:
    """Take the needed files out of the package's archive, whose integrity has been checked."""
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive, mode="r:gz") as tar:
            for name in NEEDED:
                (folder / name).parent.mkdir(exist_ok=True)
                file = tar.extractfile(f"package/{name}")
                assert file is not None  # no folder, in the published package
                (folder / name).write_bytes(file.read())
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"the archive of {PACKAGE} {VERSION} can't be unpacked: {error}") from None
