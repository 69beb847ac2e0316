"""`open_sampler`: whatever draws samples from a folder, without torch if it is a bundle, with it if a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import ConfigurationError, explain_missing_extra
from .runtime.sampler import OnnxSampler


class Sampler(Protocol):
    """What `OnnxSampler` and `CheckpointSampler` have in common."""

    @property
    def sample_shape(self) -> tuple[int, ...]: ...

    @property
    def is_points(self) -> bool: ...

    @property
    def data_columns(self) -> list[str]: ...

    @property
    def scheduler_name(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(
        self, num_samples: int, seed: int = 0, batch_size: int = 512, on_step: Callable[[int], Any] | None = None
    ) -> Generator[np.ndarray, None, None]: ...


def open_sampler(source: Path, scheduler: str | None = None, num_inference_steps: int | None = None) -> Sampler:
    """What draws from a bundle, or in the same way from a checkpoint, with torch.

    Raises:
        ConfigurationError: if a scheduler or a number of steps is asked of a bundle, which has its own.
        BundleError, CheckpointError, MissingExtraError: if it can't be loaded.
    """
    if (source / "model_index.json").is_file():
        with explain_missing_extra("sampling from a checkpoint", "train"):
            from .checkpoint_sampler import CheckpointSampler
        return CheckpointSampler(source, scheduler, num_inference_steps)
    if scheduler is not None or num_inference_steps is not None:
        raise ConfigurationError("a bundle's scheduler and steps are its step table's: export it again to change them")
    return OnnxSampler(source)
