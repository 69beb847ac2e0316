"""The processes that `accelerate launch` has started, of which this one is one."""

from __future__ import annotations

import atexit
import functools

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """Accelerate's state of this process, which joins the others on the first call. (A bare `PartialState()` would not
    know that they run on CPUs, and would so stay alone.)"""
    _leave_at_exit()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


@functools.cache
def _leave_at_exit() -> None:
    atexit.register(_leave)


def _leave() -> None:
    """Part from the others: a process that ends with its connections open may crash in doing so."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
