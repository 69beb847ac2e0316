"""Errors that a user's input can cause. A command prints them as one line; a program can catch them by class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# The extra of this package that installs each third-party module
_EXTRA_OF_MODULE = {
    **dict.fromkeys(["torch", "diffusers", "accelerate", "huggingface_hub", "safetensors", "datasets"], "train"),
    **dict.fromkeys(["pandas", "matplotlib", "yaml", "tensorboard", "psutil", "torchmetrics", "fsspec"], "train"),
    **dict.fromkeys(["onnx", "onnx_ir", "onnxscript"], "export"),
    **dict.fromkeys(["ot", "scipy", "tabulate"], "evaluate"),
    **dict.fromkeys(["pyarrow"], "parquet"),
    **dict.fromkeys(["ray"], "ray"),
    **dict.fromkeys(["sdmetrics", "sklearn"], "tables"),
    **dict.fromkeys(["torch_fidelity", "torchvision"], "inception"),
}


class DDPMPipelineError(Exception):
    """Base class of all errors that a user's input can cause. The message is one line."""


class ConfigurationError(DDPMPipelineError, ValueError):
    """An option has an invalid value, or a preset names an unknown option."""


class DatasetError(DDPMPipelineError, ValueError):
    """A data set is unknown, empty, unreadable, or holds values that are not finite numbers."""


class CheckpointError(DDPMPipelineError, ValueError):
    """A file of a checkpoint folder is missing or can't be read."""


class BundleError(DDPMPipelineError, ValueError):
    """A file of a bundle folder is missing, can't be read, or doesn't match the others."""


class OutputExistsError(DDPMPipelineError, FileExistsError):
    """An output exists and may not be overwritten, or holds files that its command did not write."""


class UnsupportedSchedulerError(DDPMPipelineError, ValueError):
    """A step table can't express the scheduler's steps."""


class ParityError(DDPMPipelineError, RuntimeError):
    """An exported bundle doesn't reproduce its pipeline. `report` says where they differ."""

    def __init__(self, message: str, report: object = None):
        super().__init__(message)
        self.report = report


class DivergenceError(DDPMPipelineError, ArithmeticError):
    """The loss of a training run or a sampler's samples are no longer finite."""

    @classmethod
    def at_step(cls, step: int, timestep: float) -> DivergenceError:
        """Return the error for the first denoising step, counted from 0, whose samples are not finite."""
        return cls(
            f"the samples are not finite after step {step} (from 0), at timestep {timestep:g}: check the network's "
            "weights and the scheduler's options"
        )


class StoppedBySignal(KeyboardInterrupt):
    """A training run was stopped by Ctrl-C or SIGTERM and has saved its state. `signum` is the signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class MissingExtraError(DDPMPipelineError, ImportError):
    """A third-party package is missing that one of this package's extras installs."""


@contextlib.contextmanager
def explain_missing_extra(what: str, extra: str | None = None) -> Iterator[None]:
    """Turn a failed import of an optional dependency into a one-line error that says how to install it.

    Args:
        what: the command or name that needs the import; the message begins with it.
        extra: the extra to recommend; by default the one that installs the missing module.

    Raises:
        MissingExtraError: if the block fails to import a module that one of the extras installs.
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
