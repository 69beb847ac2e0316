"""The processes that `accelerate launch` has started, of which this one is one."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """Accelerate's state of this process, which joins the others on the first call. (A bare `PartialState()` would not
    know that they run on CPUs, and would so stay alone.)"""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
