"""`open_sampler`: whatever draws samples from a folder, without torch if it is a bundle, with it if a checkpoint."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigurationError, explain_missing_extra
from .runtime.sampler import OnnxSampler, Sampler


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
