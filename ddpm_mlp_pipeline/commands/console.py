"""The console commands' entry points. Each imports its module when it runs, so that a missing extra is one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from .parser import command


def _entry_point(module: str) -> Callable[..., None]:
    @command
    def main(argv: Sequence[str] | None = None) -> None:
        importlib.import_module(f"{__package__}.{module}").main(argv)

    return main


benchmark = _entry_point("benchmark")
bound = _entry_point("bound")
compare = _entry_point("compare")
doctor = _entry_point("doctor")
evaluate = _entry_point("evaluate")
export = _entry_point("export")
fit = _entry_point("fit")
plot = _entry_point("plot")
sample = _entry_point("sample")
benchmark_training = _entry_point("benchmark_training")
train_features = _entry_point("train_features")
train_images = _entry_point("train_images")
train_points = _entry_point("train_points")
train_table = _entry_point("train_table")
tune = _entry_point("tune")
