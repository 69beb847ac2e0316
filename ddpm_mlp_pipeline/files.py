"""Outputs appear whole or not at all, and replace nothing that their command did not write.

One rule holds for every command:

- A file that exists is refused before any work, unless `--overwrite` is given.
- A folder that exists and isn't empty is refused, too. With `--overwrite` it is replaced if it holds nothing but what
  the command writes, told by names and kinds of all entries; anything else in it is left alone, and so is the folder.
- What has appeared at an output's place during the work is treated in the same way at its end.
- Measurements that go on where they were (`ddpm-compare --output`, `ddpm-bound`'s `.partial.npz`) recognise their own
  file by its content, and refuse any other.
- A training run writes entries of known names into `--output_dir`. Those that exist are refused before any work,
  unless the run goes on from a state in that folder or `--overwrite_output_dir` is given. From then on these names
  are the run's; entries of other names stay as they are.

Outputs are written aside, under names that begin with `.partial-`, and renamed into place.
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

PARTIAL = ".partial-"  # how the names of what is not whole yet begin
REPLACED = ".replaced-"  # and those of what makes room for it

Own = Callable[[str], object]
"""Whether a command writes entries of that path, relative to its output folder; a folder's ends with `/`."""


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a place for a file that is taken, or doesn't exist.

    Raises:
        OutputExistsError: if there is something at `path` already, and it isn't to be overwritten.
        OSError: if `path` is a folder, or its folder doesn't exist.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if os.path.lexists(path) and not overwrite:
        raise OutputExistsError(f"{path} exists: pass --overwrite to replace it")


def check_folder(path: str | os.PathLike[str], own: Own, overwrite: bool = False) -> None:
    """Refuse a place for a folder that is taken.

    Args:
        path: of the folder; one that is empty is as good as none.
        own: tells what the command writes. A link is never its own.
        overwrite: whether a folder that holds nothing else is to be replaced.

    Raises:
        OutputExistsError: if the folder holds something else, or isn't to be overwritten.
        OSError: if `path` is a file.
    """
    _check_entries(Path(path), Path(path), own, overwrite)


def _check_entries(folder: Path, name: Path, own: Own, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(name))
    if (entry := find_foreign(folder, own)) is not None:
        raise OutputExistsError(f"{name} holds {entry}, which this command does not write: it is left alone")
    if any(folder.iterdir()) and not overwrite:
        raise OutputExistsError(f"{name} exists and isn't empty: pass --overwrite to replace it")


def find_foreign(folder: Path, own: Own, prefix: str = "") -> str | None:
    """Find an entry of a folder, at any depth, that is not its command's own; `None` if there is none."""
    for entry in folder.iterdir():
        mode = entry.lstat().st_mode
        name = f"{prefix}{entry.name}{'/' if stat.S_ISDIR(mode) else ''}"
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)) or not own(name):
            return name
        if stat.S_ISDIR(mode) and (inner := find_foreign(entry, own, name)) is not None:
            return inner
    return None


def check_names(folder: Path, names: Iterable[str], overwrite: bool = False) -> None:
    """Refuse to write into a folder that has entries of these names already.

    Args:
        folder: it need not exist.
        names: of files if they have an ending, else of folders.
        overwrite: whether entries of the same kind may be written over.

    Raises:
        OutputExistsError: if there is such an entry, other than an empty folder.
    """
    for path in (folder / name for name in names):
        if not os.path.lexists(path):
            continue
        is_folder = path.is_dir() and not path.is_symlink()
        if path.is_dir() if path.suffix else not is_folder:
            raise OutputExistsError(f"{path} is no {'file' if path.suffix else 'folder'}: it is left alone")
        if not overwrite and not (is_folder and not any(path.iterdir())):
            raise OutputExistsError(f"{path} exists: pass --overwrite_output_dir to replace it")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its ending; it becomes `path` if the block ends without an error.

    Entering the block creates the temporary file, so a place that can't be written to is found before the work.

    Args:
        path: of the file.
        overwrite: whether a file that is there already is replaced. It stays as it is if the block fails.

    Raises:
        OutputExistsError: if `path` exists, before or after the block, and isn't to be overwritten.
        OSError: if the folder of `path` doesn't exist, can't be written to, or is full.
    """
    path = Path(path)
    check_file(path, overwrite)
    temporary = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        with _naming(path):
            temporary.touch()
        with _naming(path, temporary):
            yield temporary
        check_file(path, overwrite)
        with _naming(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], own: Own, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` if the block ends without an error.

    Args:
        path: of the folder; a link to one stands for that one.
        own, overwrite: what may be replaced: see `check_folder`. It stays as it is if the block fails.

    Raises:
        OutputExistsError: if what is at `path`, before or after the block, may not be replaced.
        OSError: if the parent folder can't be made, can't be written to or is full, or `path` is a file, or is or
            holds the current folder.
    """
    name, path = Path(path), Path(path).resolve()
    if Path.cwd().is_relative_to(path):
        raise OSError(errno.EINVAL, "can't be replaced: name a folder inside it", str(name))
    _check_entries(path, name, own, overwrite)
    token = secrets.token_hex(4)
    temporary, replaced = (path.with_name(f"{prefix}{token}-{path.name}") for prefix in (PARTIAL, REPLACED))
    try:
        with _naming(name):
            temporary.mkdir(parents=True)
        with _naming(name, temporary):
            yield temporary
        with _naming(name):
            if os.path.lexists(path):
                path.replace(replaced)  # so that nothing is added to it between look and act
                _check_entries(replaced, name, own, overwrite)
            temporary.replace(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.lexists(replaced) and not os.path.lexists(path):
            replaced.replace(path)


@contextlib.contextmanager
def _naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Have errors of writing name the path that the user knows, and say that it is not written.

    If `temporary` is given, they are the errors at or below it and those that name no file, such as a full disk's. All
    others pass unchanged: what can't be read names itself.
    """
    try:
        yield
    except OSError as error:
        file = error.filename
        is_of_another = not (temporary is None or file is None or Path(str(file)).is_relative_to(temporary))
        if error.errno is None or is_of_another:
            raise
        raise OSError(error.errno, f"can't be written: {error.strerror or error}", str(path)) from error


def remove_partial(folder: Path) -> None:
    """Remove what killed processes have left in the folder of outputs not whole yet."""
    for path in folder.glob(f"{PARTIAL}*"):
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


def move_into(source: Path, folder: Path, last: str) -> None:
    """Move all files that `source` holds to the same places in `folder`. Other entries stay as they are.

    Args:
        source: the folder of the new files.
        folder: where they replace files of the same names.
        last: the file that says that the others are complete. It is removed first and comes last, so that it is there
            only while all files that it lists are of one making.
    """
    _flush(source)
    (folder / last).unlink(missing_ok=True)
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path == source / last)
    for file in files:
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
