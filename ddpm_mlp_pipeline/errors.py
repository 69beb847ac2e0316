"""The errors that a user's input can cause. A command prints them as one line; a program can catch them by kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# Which extra of this package brings which third-party module.
_EXTRA_OF_MODULE = {
    "torch": "train",
    "diffusers": "train",
    "accelerate": "train",
    "huggingface_hub": "train",
    "safetensors": "train",
    "datasets": "train",
    "pandas": "train",
    "matplotlib": "train",
    "yaml": "train",
    "tensorboard": "train",
    "psutil": "train",
    "torchmetrics": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "ot": "evaluate",
    "scipy": "evaluate",
    "tabulate": "evaluate",
    "torch_fidelity": "inception",
    "torchvision": "inception",
}


class DDPMPipelineError(Exception):
    """Base of every error that input of the user's can cause; its message is one line."""


class ConfigurationError(DDPMPipelineError, ValueError):
    """An option has a value that can't work, or a preset names an option that doesn't exist."""


class DatasetError(DDPMPipelineError, ValueError):
    """A data set is unknown, empty, or holds something other than finite numbers."""


class CheckpointError(DDPMPipelineError, ValueError):
    """A checkpoint folder lacks a file, or holds one that can't be read."""


class BundleError(DDPMPipelineError, ValueError):
    """A bundle folder lacks a file, or holds one that can't be read or doesn't fit the others."""


class OutputExistsError(DDPMPipelineError, FileExistsError):
    """An output is there already, and isn't to be overwritten, or holds what its command did not write."""


class UnsupportedSchedulerError(DDPMPipelineError, ValueError):
    """A scheduler takes steps that a step table can't express."""


class ParityError(DDPMPipelineError, RuntimeError):
    """An exported bundle doesn't reproduce the pipeline that it was made from. `report` says where they differ."""

    def __init__(self, message: str, report: object = None):
        super().__init__(message)
        self.report = report


class DivergenceError(DDPMPipelineError, ArithmeticError):
    """The loss of a training run is no finite number any more, or a sampler leaves the range of the data."""

    @classmethod
    def at_step(cls, step: int, timestep: float) -> DivergenceError:
        """Of sampling: the first step, from 0, whose outcome is not finite, and what the network was told there."""
        return cls(
            f"sampling leaves the finite numbers in step {step} (from 0), at timestep {timestep:g}: the network's "
            "weights or the scheduler's options are no good"
        )


class StoppedBySignal(KeyboardInterrupt):
    """A training run was asked to end, by Ctrl-C or SIGTERM, and has saved its state; `signum` is the signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class MissingExtraError(DDPMPipelineError, ImportError):
    """A third-party package is missing, which one of this package's extras installs."""


@contextlib.contextmanager
def explain_missing_extra(what: str, extra: str | None = None) -> Iterator[None]:
    """Turn a failed import of an optional dependency into one line that says how to install it.

    Args:
        what: the name that the user asked for, to begin the sentence with.
        extra: the extra to recommend; by default the one that brings the missing module.

    Raises:
        MissingExtraError: if the block fails to import a module that one of the extras brings.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF_MODULE:
            raise
        extra = extra or _EXTRA_OF_MODULE[module]
        raise MissingExtraError(
            f"{what} needs {module}, which is not installed: pip install 'ddpm-mlp-pipeline[{extra}]'"
        ) from None
