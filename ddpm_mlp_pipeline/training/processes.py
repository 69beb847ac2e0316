"""The processes that `accelerate launch` has started."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from ..errors import ConfigurationError, DDPMPipelineError

Part = TypeVar("Part")
Result = TypeVar("Result")


def this_process() -> PartialState:
    """Return Accelerate's state of this process; the first call connects it with the others.

    A `PartialState()` without `cpu` would not connect processes that run on CPUs.

    Raises:
        ConfigurationError: if they were launched with DeepSpeed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigurationError("DeepSpeed is not supported: launch with --multi_gpu or --use_fsdp instead")
    atexit.register(_leave)  # repeated calls are harmless
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def share_out(
    parts: Sequence[Part], work: Callable[[Part, Sequence[Part]], Result]
) -> Iterator[tuple[Sequence[Part], list[Result]]]:
    """Do the work of some parts in all processes together, each process a part at a time.

    Args:
        parts: the parts.
        work: called as `work(part, together)` with a part and those that the processes do at the same time.

    Yields:
        The parts that were done together, and their results, in every process the same.

    Raises:
        DDPMPipelineError: that of the work of one process, in all of them: the others wait for its result.
    """
    process = this_process()
    for i in range(0, len(parts), process.num_processes):
        together = parts[i : i + process.num_processes]
        own: list[Result | DDPMPipelineError] = []
        for part in together[process.process_index :][:1]:
            try:
                own.append(work(part, together))
            except DDPMPipelineError as error:
                own.append(error)
        results = gather_object(own)
        for result in results:
            if isinstance(result, DDPMPipelineError):
                raise result
        yield together, results


def choose_device(name: str | None = None, dtype: torch.dtype = torch.float32) -> torch.device:
    """Return the device of a name, or this process's accelerator, or the CPU if there is none that knows the type.

    Raises:
        ConfigurationError: if there is no such device, or if it doesn't know the type.
    """
    try:
        device = this_process().device if name is None else torch.device(name)
        torch.empty(1, dtype=dtype, device=device)
        if device.type == "cpu":
            device = torch.device("cpu")  # to "cpu:0", weights would be copied, and be summed in another order
    except TypeError:
        if name is None:
            return torch.device("cpu")
        raise ConfigurationError(f"the device {name!r} has no {str(dtype).removeprefix('torch.')}") from None
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(f"there is no device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _leave() -> None:
    """Disconnect from the others: a process that exits while connected may crash."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
