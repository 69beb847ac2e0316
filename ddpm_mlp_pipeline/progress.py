"""Progress bars: tqdm's in a terminal or notebook, a line every ten seconds in a log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm  # tqdm.auto takes twice as long to import

SECONDS_BETWEEN_LINES = 10


def progress_bar(**options: Any) -> tqdm[Any]:
    """Return a tqdm bar on stderr.

    Outside a terminal and a notebook, the bar writes one line every ten seconds at most.

    Args:
        options: keyword arguments of tqdm, except `file`, `mininterval` and `miniters`.
    """
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm as auto_tqdm  # a widget if ipywidgets is installed

        return auto_tqdm(**options)
    if sys.stderr.isatty():
        return tqdm(**options)
    # miniters=1 makes every update check the clock. By default tqdm adapts the number of updates to skip, and then
    # stays silent when a slow phase follows a fast one.
    return tqdm(**options, file=_Lines(sys.stderr), mininterval=SECONDS_BETWEEN_LINES, miniters=1)


def sampling_bar(total: int, initial: int = 0) -> tqdm[Any]:
    """Return a `progress_bar` of sampling. It counts denoising steps of samples, of which `initial` are done."""
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}"
    return progress_bar(total=total, initial=initial, desc="sampling", bar_format=bar_format)


class _Lines:
    """A stream that replaces tqdm's cursor movements by line breaks."""

    def __init__(self, stream: TextIO):
        self.stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()
        if text:
            self.stream.write(f"{text}\n")

    def flush(self) -> None:
        self.stream.flush()
