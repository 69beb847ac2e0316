"""Keep a long draw's samples in files, part by part, so that a draw that was interrupted can go on."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import OutputExistsError
from .files import remove_partial, whole_file

PART_BYTES = 2**24  # a part is written when it is so large,
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
        draw: what is drawn, in JSON's types. Parts of another draw are refused.
        overwrite: whether to delete these instead.

    Raises:
        OutputExistsError: if the folder holds parts of another draw or other files, or is open in another process.
    """

    def __init__(self, folder: Path, samples: range, draw: dict[str, Any], overwrite: bool = False):
        self.folder, self.samples = folder, samples
        self._draw = json.loads(json.dumps(draw))
        self._lock: IO[bytes] | None = None
        self._found: list[range] = []
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

    def __len__(self) -> int:
        """Number of samples that are drawn."""
        return sum(map(len, self._known()))

    def gaps(self) -> list[range]:
        """Return the numbers of the samples that are still to be drawn."""
        ends = [self.samples.start, *(part.stop for part in self._known())]
        starts = [*(part.start for part in self._known()), self.samples.stop]
        return [range(a, b) for a, b in zip(ends, starts, strict=True) if a < b]

    def add(self, drawn: Iterable[Drawn]) -> None:
        """Keep samples, and write parts now and then. If drawing fails or is interrupted, write what there is.

        Raises:
            OSError: if a part can't be written; parts that are written stay.
        """
        try:
            for numbers, values in drawn:
                self._in_memory.append((numbers, values))
                self._bytes += values.nbytes
                if self._bytes >= PART_BYTES or time.monotonic() - self._oldest >= PART_SECONDS:
                    self._write()
        except (KeyboardInterrupt, Exception):
            if self._lock is not None or self._in_memory:
                with contextlib.suppress(OSError):
                    self._write()
            raise

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
        return sorted([*self._found, *(numbers for numbers, _ in self._in_memory)], key=lambda part: part.start)

    def _path(self, part: range) -> Path:
        return self.folder / f"{part.start}-{part.stop}.npy"

    def _write(self) -> None:
        if self._lock is None:
            self.folder.mkdir(exist_ok=True)
            self._open(overwrite=False)
        for run in _runs(self._in_memory):
            numbers = range(run[0][0].start, run[-1][0].stop)
            with whole_file(self._path(numbers)) as path:
                np.save(path, np.concatenate([values for _, values in run]))
            self._found.append(numbers)
        self._in_memory.clear()
        self._bytes = 0
        self._oldest = time.monotonic()

    def _open(self, overwrite: bool) -> None:
        self._lock = (self.folder / LOCK).open("ab")
        try:
            _lock_file(self._lock)
        except OSError:
            self._lock.close()
            raise OutputExistsError(f"{self.folder} is being written by another process") from None
        remove_partial(self.folder)
        names = {path.name for path in self.folder.iterdir()}
        if foreign := sorted(name for name in names - {DRAW, LOCK} if not is_part(name)):
            raise OutputExistsError(f"{self.folder} holds {foreign[0]}, which this command does not write")
        path = self.folder / DRAW
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:
            before = {}
        if before is not None and before != self._draw:
            if not overwrite:
                different = [name for name in self._draw if before.get(name) != self._draw[name]]
                raise OutputExistsError(
                    f"{self.folder} holds parts of another draw (other {', '.join(different)}): finish that one, "
                    "delete the folder, or pass --overwrite to begin again"
                )
            before = None
        if before is None:
            for name in names - {LOCK}:
                (self.folder / name).unlink()
            path.write_text(json.dumps(self._draw, indent=1) + "\n", encoding="utf-8")
        else:
            self._found = [range(int(m[1]), int(m[2])) for m in map(is_part, names) if m]


def _runs(drawn: list[Drawn]) -> Iterator[list[Drawn]]:
    """Yield the runs of arrays whose numbers follow one another."""
    run: list[Drawn] = []
    for numbers, values in sorted(drawn, key=lambda item: item[0].start):
        if run and run[-1][0].stop != numbers.start:
            yield run
            run = []
        run.append((numbers, values))
    if run:
        yield run


def _lock_file(file: IO[bytes]) -> None:
    """Lock a file until it is closed or the process ends, however it ends.

    Raises:
        OSError: if another process has locked it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
