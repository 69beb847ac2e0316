"""Keep a long draw's samples in files, part by part, so that a draw that was interrupted can go on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import OutputExistsError
from .files import remove_partial, whole_file

PART_BYTES = 2**22  # a part is written when it is so large,
PART_SECONDS = 10.0  # or so old: what is lost if the process is killed
DRAW, LOCK = "draw.json", "lock"
is_part = re.compile(r"([0-9]+)-([0-9]+)\.npy").fullmatch

Drawn = tuple[range, np.ndarray]
"""Consecutive samples: their numbers, and an array of as many rows."""


class Parts:
    """The samples of a draw, in a folder of `.npy` files once there are many. One process has it open at a time.

    Args:
        folder: the folder. It is made when the first part is written.
        samples: the numbers of all samples of the draw.
        describe: returns what is drawn, in JSON's types; called when there is a folder. Parts of another draw are
            refused.
        overwrite: whether to delete these instead.

    Raises:
        OutputExistsError: if the folder holds parts of another draw or other files, or is open in another process.
    """

    def __init__(self, folder: Path, samples: range, describe: Callable[[], dict[str, Any]], overwrite: bool = False):
        self.folder, self.samples = folder, samples
        self._describe = describe
        self._lock: IO[bytes] | None = None
        self._saved: list[range] = []
        self._in_memory: list[Drawn] = []
        self._bytes = 0  # of what is in memory
        self._oldest = time.monotonic()
        if folder.exists():
            self._open(overwrite)

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def num_saved(self) -> int:
        """Number of samples that are in files."""
        return sum(map(len, self._saved))

    def gaps(self) -> list[range]:
        """Return the numbers of the samples that are still to be drawn."""
        known = self._known()
        ends, starts = [part.stop for part in known], [part.start for part in known]
        gaps = zip([self.samples.start, *ends], [*starts, self.samples.stop], strict=True)
        return [range(a, b) for a, b in gaps if a < b]

    def add(self, drawn: Iterable[Drawn]) -> None:
        """Keep samples, and write parts now and then. If drawing fails or is interrupted after some, write the rest.

        Raises:
            OSError: if a part can't be written; parts that are written stay.
            OutputExistsError: if another process has begun to write the same output.
        """
        samples = iter(drawn)
        while True:
            try:
                item = next(samples, None)
            except (KeyboardInterrupt, Exception):
                if self._lock is not None:
                    with contextlib.suppress(OSError):
                        self._write()
                raise
            if item is None:
                return
            self._in_memory.append(item)
            self._bytes += item[1].nbytes
            if self._bytes >= PART_BYTES or time.monotonic() - self._oldest >= PART_SECONDS:
                self._write()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield all samples in the order of their numbers, an array at a time."""
        in_memory = {numbers.start: values for numbers, values in self._in_memory}
        for part in self._known():
            if part.start in in_memory:
                yield in_memory[part.start]
            else:
                yield np.load(self._path(part), allow_pickle=False)

    def delete(self) -> None:
        """Delete the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
            shutil.rmtree(self.folder)

    def _known(self) -> list[range]:
        return sorted([*self._saved, *(numbers for numbers, _ in self._in_memory)], key=lambda part: part.start)

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start}-{part.stop}.npy"

    def _write(self) -> None:
        """Write what is in memory: a file for each run of numbers that follow one another."""
        if self._lock is None:
            try:
                self.folder.mkdir()
            except FileExistsError:  # it was not there when this draw began
                raise _in_use(self.folder) from None
            self._open(overwrite=False)
        rest = sorted(self._in_memory, key=lambda item: item[0].start)
        while rest:
            ends = (i for i in range(1, len(rest)) if rest[i][0].start != rest[i - 1][0].stop)
            end = next(ends, len(rest))
            run, rest = rest[:end], rest[end:]
            numbers = range(run[0][0].start, run[-1][0].stop)
            with whole_file(self._path(numbers)) as path:
                content = io.BytesIO()  # of a full disk, np.save itself says only how many numbers it has written
                np.save(content, np.concatenate([values for _, values in run]))
                path.write_bytes(content.getbuffer())
            self._saved.append(numbers)
            self._in_memory = rest
        self._bytes = 0
        self._oldest = time.monotonic()

    def _open(self, overwrite: bool) -> None:
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context((self.folder / LOCK).open("ab"))
            try:
                _lock_file(lock)
            except BlockingIOError:
                raise _in_use(self.folder) from None
            except OSError:
                pass  # a file system without locks
            remove_partial(self.folder)
            names = {path.name for path in self.folder.iterdir()} - {LOCK}
            if foreign := sorted(name for name in names - {DRAW} if not is_part(name)):
                raise OutputExistsError(f"{self.folder} holds {foreign[0]}, which this command does not write")
            before, draw = _read(self.folder / DRAW), json.loads(json.dumps(self._describe()))
            if before != draw:
                if names - {DRAW} and not overwrite:
                    different = [name for name in draw if before.get(name) != draw[name]]
                    raise OutputExistsError(
                        f"{self.folder} holds parts of another draw (other {', '.join(different)}): finish that one, "
                        "delete the folder, or pass --overwrite to begin again"
                    )
                for name in names:
                    (self.folder / name).unlink()
                with whole_file(self.folder / DRAW) as path:
                    path.write_text(json.dumps(draw, indent=1) + "\n", encoding="utf-8")
            else:
                self._saved = self._check(names)
            stack.pop_all()
            self._lock = lock

    def _check(self, names: Iterable[str]) -> list[range]:
        """Return the numbers of the parts that are whole, and delete those that are not, as after a power failure."""
        found = (range(int(match[1]), int(match[2])) for match in map(is_part, names) if match)
        good: list[range] = []
        for part in sorted(found, key=lambda part: part.start):
            first = good[-1].stop if good else self.samples.start
            try:
                is_good = first <= part.start and part.stop <= self.samples.stop
                is_good = is_good and len(np.load(self._path(part), mmap_mode="r")) == len(part)
            except (ValueError, OSError, EOFError):
                is_good = False
            if is_good:
                good.append(part)
            else:
                self._path(part).unlink()
        return good


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds; nothing if there is no such file, or if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_use(folder: Path) -> OutputExistsError:
    return OutputExistsError(f"{folder} is being written by another process")


def _lock_file(file: IO[bytes]) -> None:
    """Lock a file until it is closed or the process ends, however it ends.

    Raises:
        BlockingIOError: if another process has locked it.
        OSError: if the file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(*error.args) from None
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
