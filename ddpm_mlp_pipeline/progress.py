"""Progress bars: in a terminal as tqdm draws them; in a log, a line every ten seconds."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm  # and not tqdm.auto, which takes twice as long to import

SECONDS_BETWEEN_LINES = 10


def progress_bar(**options: Any) -> tqdm[Any]:
    """Return a tqdm bar on stderr.

    Where stderr is neither a terminal nor a notebook's, the bar writes lines, at least ten seconds apart.

    Args:
        options: tqdm's, but `file`, `mininterval` and `miniters`.
    """
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm as auto_tqdm  # a widget where there are ipywidgets, else text

        return auto_tqdm(**options)
    if sys.stderr.isatty():
        return tqdm(**options)
    # With miniters=1, every update looks at the clock; else tqdm learns how many updates to pass over, and a slow
    # stretch after a fast one goes unseen.
    return tqdm(**options, file=_Lines(sys.stderr), mininterval=SECONDS_BETWEEN_LINES, miniters=1)


class _Lines:
    """Turns what tqdm writes to move the cursor into lines."""

    def __init__(self, stream: TextIO):
        self.stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()
        if text:
            self.stream.write(f"{text}\n")

    def flush(self) -> None:
        self.stream.flush()
