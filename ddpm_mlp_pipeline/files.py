"""Write outputs atomically, and replace only what the same command wrote.

Every command follows these rules:

- A file that exists is refused before any work, unless `--overwrite` is given.
- A folder that exists and isn't empty is refused, too. With `--overwrite` it is replaced if the command writes
  entries of all the names and types in it. A folder with any other entry is left alone.
- Both checks are repeated after the work, before the output is renamed into place.
- Measurements that can be resumed (`ddpm-compare --output`, `ddpm-bound`'s `.partial.npz`) recognise their own file by
  its content, and refuse any other.
- A training run writes entries of known names into `--output_dir`. Existing ones are refused before any work, unless
  the run resumes from a state in that folder or `--overwrite_output_dir` is given; then the run replaces them. Entries
  with other names are left alone.

Outputs are written under temporary names that begin with `.partial-`, and renamed into place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import OutputExistsError

PARTIAL = ".partial-"  # prefix of unfinished outputs
REPLACED = ".replaced-"  # prefix of the folder that an output replaces

Own = Callable[[str], object]
"""Whether a command writes an entry of this path, relative to its output folder; a folder's path ends with `/`."""


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raise an error if a file can't be written to `path`.

    Raises:
        OutputExistsError: if `path` exists, and `overwrite` is false.
        OSError: if `path` is a folder, or its parent folder doesn't exist.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists: pass --overwrite to replace it")


def check_folder(
    path: str | os.PathLike[str], own: Own, overwrite: bool = False, name: str | os.PathLike[str] | None = None
) -> None:
    """Raise an error if a folder can't be written to `path`. A missing or empty folder always passes.

    Args:
        path: the folder.
        own: tells which entries the command writes. A link is never one of them.
        overwrite: whether a folder that holds only such entries may be replaced.
        name: the path to show in error messages; by default `path`.

    Raises:
        OutputExistsError: if the folder holds other entries, or isn't empty and `overwrite` is false.
        OSError: if `path` is a file.
    """
    folder, name = Path(path), path if name is None else name
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(name))
    if (entry := find_foreign(folder, own)) is not None:
        raise OutputExistsError(f"{name} holds {entry}, which this command does not write: it is left alone")
    if any(folder.iterdir()) and not overwrite:
        raise OutputExistsError(f"{name} exists and isn't empty: pass --overwrite to replace it")


def find_foreign(folder: Path, own: Own, prefix: str = "") -> str | None:
    """Return the path of the first entry, at any depth, that `own` denies; `None` if there is no such entry."""
    for entry in folder.iterdir():
        mode = entry.lstat().st_mode
        name = f"{prefix}{entry.name}{'/' if stat.S_ISDIR(mode) else ''}"
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or not own(name):
            return name
        if stat.S_ISDIR(mode) and (inner := find_foreign(entry, own, name)) is not None:
            return inner
    return None


def check_names(folder: Path, names: Iterable[str], overwrite: bool = False) -> None:
    """Raise an error if a folder already has entries of these names.

    Args:
        folder: the folder, which may be missing.
        names: the names. One with a suffix stands for a file, one without for a folder.
        overwrite: whether entries of the same type may be replaced.

    Raises:
        OutputExistsError: if there is such an entry that may not be replaced, other than an empty folder.
    """
    for path in (folder / name for name in names):
        if not os.path.lexists(path):
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if path.is_dir() if path.suffix else not is_folder:
            raise OutputExistsError(f"{path} is not a {'file' if path.suffix else 'folder'}: it is left alone")
        if not overwrite and not (is_folder and not any(path.iterdir())):
            raise OutputExistsError(f"{path} exists: pass --overwrite_output_dir to replace it")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` if the block succeeds.

    The temporary file has the same suffix. It is created before the block runs, so that an unwritable folder is
    reported before any work.

    Args:
        path: the file.
        overwrite: whether to replace an existing file. If the block fails, that file is unchanged.

    Raises:
        OutputExistsError: if `path` exists, before or after the block, and `overwrite` is false.
        OSError: if the folder of `path` doesn't exist, can't be written to, or is full.
    """
    path = Path(path)
    check_file(path, overwrite)
    temporary = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        with _naming(path, temporary):
            temporary.touch()
            yield temporary
            check_file(path, overwrite)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], own: Own, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` if the block succeeds.

    Args:
        path: the folder. Links are followed.
        own, overwrite: which existing folder may be replaced: see `check_folder`. If the block fails, it is unchanged.

    Raises:
        OutputExistsError: if the folder at `path`, before or after the block, may not be replaced.
        OSError: if the parent folder can't be made, can't be written to or is full; if `path` is a file; or if `path`
            is the current folder or one of its parents.
    """
    name, path = Path(path), Path(path).resolve()
    if Path.cwd().is_relative_to(path):
        raise OSError(errno.EINVAL, "is or holds the current folder: name a folder inside it", str(name))
    check_folder(path, own, overwrite, name)
    token = secrets.token_hex(4)
    temporary, replaced = (path.with_name(f"{prefix}{token}-{path.name}") for prefix in (PARTIAL, REPLACED))
    try:
        with _naming(name):
            temporary.mkdir(parents=True)
        with _naming(name, temporary):
            yield temporary
        with _naming(name):
            if os.path.lexists(path):
                path.replace(replaced)  # before the check, so that nobody adds entries after it
                check_folder(replaced, own, overwrite, name)
            temporary.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.replace(path)


@contextlib.contextmanager
def _naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn errors of writing into ones that name `path`, which the user knows, instead of the temporary one.

    If `temporary` is given, errors that name a file elsewhere pass unchanged: they are errors of reading.
    """
    try:
        yield
    except OSError as error:
        file = error.filename  # None for a full disk
        is_elsewhere = temporary and file and not Path(str(file)).is_relative_to(temporary)
        if error.errno is None or is_elsewhere:
            raise
        raise OSError(error.errno, f"can't be written: {error.strerror or error}", str(path)) from error


def remove_partial(folder: Path) -> None:
    """Delete the unfinished outputs that killed processes have left in the folder."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def rename_durably(source: Path, target: Path) -> None:
    """Rename a folder so that even after a power failure the new name holds all files or doesn't exist."""
    _flush(*source.rglob("*"), source)
    source.rename(target)
    _flush(target.parent)


def _flush(*paths: Path) -> None:
    """Wait until these files and folders are on the disk."""
    if os.name == "nt":
        return  # Windows can't open folders
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into(source: Path, folder: Path, last: str) -> None:
    """Move all files in `source` to the same relative paths in `folder`.

    Args:
        source: the folder of the new files.
        folder: the target. Files of the same names are replaced; other entries are unchanged.
        last: the file that marks the others as complete. It is deleted first and moved last, so that while it exists
            every file it lists comes from the same save.
    """
    _flush(*source.rglob("*"), source)
    (folder / last).unlink(missing_ok=True)
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path == source / last)
    for file in files:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
