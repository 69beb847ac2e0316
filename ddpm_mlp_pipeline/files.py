"""Outputs that appear whole or not at all: written aside, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"  # how the names of what is not whole yet begin


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its ending; it becomes `path` if the block ends without an error.

    Entering the block creates the temporary file, so a place that can't be written to is found before the work.

    Raises:
        OSError: if the folder of `path` doesn't exist, can't be written to, or is full.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with _naming(path):
            temporary.touch()
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` if the block ends without an error.

    A folder that was at `path` before is replaced, and stays as it is if the block fails.

    Raises:
        OSError: if the parent folder can't be made, can't be written to or is full, or `path` is a file.
    """
    path = Path(path)
    if not path.name:
        raise OSError(errno.EINVAL, "can't be replaced: name a folder inside it", str(path))
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(path))
    temporary, replaced = (path.with_name(f"{PARTIAL}{os.getpid()}-{kind}-{path.name}") for kind in ("new", "old"))
    try:
        with _naming(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.replace(replaced)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have errors of the file system name the path that the user knows, and say that it is not written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"can't be written: {error.strerror or error}", str(path)) from error


def remove_partial(folder: Path) -> None:
    """Remove what killed processes have left, in the folder and in those inside it, of outputs not whole yet."""
    for path in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"*/{PARTIAL}*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def rename_durably(source: Path, target: Path) -> None:
    """Rename a folder, so that not even a loss of power leaves less than all of it at its new place."""
    _flush(source)
    source.rename(target)
    _fsync(target.parent)


def _flush(folder: Path) -> None:
    """Wait until the disk itself holds all that is in the folder."""
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)


def _fsync(path: Path) -> None:
    if os.name == "nt":
        return  # where a folder can't be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into(source: Path, folder: Path) -> None:
    """Move all that `source` holds into `folder`, in place of entries of the same names.

    Files of those names are removed first and come last, so that a checkpoint's `model_index.json`, which says that it
    is complete, is there only while all that it lists is of one making.
    """
    _flush(source)
    entries = sorted(source.iterdir(), key=Path.is_file)
    for entry in entries:
        if entry.is_file():
            (folder / entry.name).unlink(missing_ok=True)
    for entry in entries:
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
