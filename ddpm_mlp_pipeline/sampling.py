"""Open a bundle or a checkpoint for sampling. Only a checkpoint needs torch."""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigurationError, explain_missing_extra
from .runtime.sampler import OnnxSampler, Sampler


def open_sampler(
    source: Path,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    num_threads: int | None = None,
) -> Sampler:
    """Return the sampler for a bundle folder or a checkpoint folder.

    Args:
        source: the folder.
        scheduler, num_inference_steps: for a checkpoint, see `CheckpointSampler`.
        num_threads: number of CPU threads; by default one for each core.

    Raises:
        ConfigurationError: if a scheduler or a number of steps is given for a bundle.
        BundleError, CheckpointError, MissingExtraError: if the folder can't be loaded.
    """
    if (source / "model_index.json").is_file():
        with explain_missing_extra("sampling from a checkpoint", "train"):
            from .checkpoint_sampler import CheckpointSampler
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        return CheckpointSampler(source, scheduler, num_inference_steps)
    if scheduler is not None or num_inference_steps is not None:
        raise ConfigurationError("a bundle's step table fixes its scheduler and steps: export again to change them")
    return OnnxSampler(source, num_threads)
