"""Estimate how long a draw takes, to choose the largest step table that meets a deadline."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable

from .step_table import StepTable

REMEMBERED = 256  # draws
OUTLIERS = 25  # slowest of these draws, which the estimate leaves out: fewer calls don't help an interrupted draw
MARGIN = 1.25  # of the estimate, for what varies otherwise


class DrawTimes:
    """Times of a sampler's last draws of one batch size: a share for each network evaluation, and the rest.

    The estimate is the slowest of the last `REMEMBERED` draws but `OUTLIERS`, with a margin. Interrupted draws
    therefore don't change it, and a machine that has become slower does.
    """

    def __init__(self) -> None:
        self._draws: deque[tuple[float, float]] = deque()
        self._sorted: tuple[list[float], list[float]] = [], []

    def record(self, table: StepTable, network: float, rest: float) -> None:
        """Remember the seconds that a draw spent in a table's network evaluations, and those before and after."""
        draw = network / table.num_evaluations, rest
        for values, value in zip(self._sorted, draw, strict=True):
            bisect.insort(values, value)
        self._draws.append(draw)
        if len(self._draws) > REMEMBERED:
            for values, value in zip(self._sorted, self._draws.popleft(), strict=True):
                del values[bisect.bisect_left(values, value)]

    def _slowest(self) -> tuple[float, float] | None:
        """Return the slowest share of an evaluation and the slowest rest, but for outliers; `None` before any draw."""
        number = len(self._draws)
        if not number:
            return None
        place = number - 1 - OUTLIERS * number // REMEMBERED
        return MARGIN * self._sorted[0][place], MARGIN * self._sorted[1][place]

    def estimate(self, table: StepTable) -> float | None:
        """Return the seconds that a draw with a table takes, or `None` before the first draw."""
        slowest = self._slowest()
        return None if slowest is None else table.num_evaluations * slowest[0] + slowest[1]

    def choose(self, tables: Iterable[StepTable], seconds: float) -> StepTable:
        """Return the table with the most calls that fits into a time, or the smallest if none does."""
        by_calls, slowest = sorted(tables, key=len), self._slowest()
        if slowest is not None:
            each, rest = slowest
            for table in reversed(by_calls):
                if table.num_evaluations * each + rest <= seconds:
                    return table
        return by_calls[0]
