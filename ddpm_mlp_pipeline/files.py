"""Outputs that appear whole or not at all: written aside, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


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
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
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
    temporary, replaced = (path.with_name(f".{path.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
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


def move_into(source: Path, folder: Path) -> None:
    """Move all that `source` holds into `folder`, in place of entries of the same names.

    Folders go first and files last, so that a checkpoint's `model_index.json`, which says that it is complete,
    comes after what it lists.
    """
    for entry in sorted(source.iterdir(), key=Path.is_file):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
