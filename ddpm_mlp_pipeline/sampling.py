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
    device: str | None = None,
    provider: str | None = None,
) -> Sampler:
    """Return the sampler for a bundle folder or a checkpoint folder.

    Args:
        source: the folder.
        scheduler, num_inference_steps: for a checkpoint, see `CheckpointSampler`.
        num_threads: number of CPU threads; by default one for each core.
        device: for a checkpoint, what torch runs it on; by default the accelerator that is there.
        provider: for a bundle, what ONNX Runtime runs it on; by default the CPU.

    Raises:
        ConfigurationError: if an option of a checkpoint is given for a bundle, or the other way around; if there is no
            such device or provider.
        BundleError, CheckpointError, MissingExtraError: if the folder can't be loaded.
    """
    if (source / "model_index.json").is_file():
        if provider is not None:
            raise ConfigurationError("a provider is for a bundle: give a checkpoint's --device")
        with explain_missing_extra("sampling from a checkpoint", "train"):
            from .checkpoint_sampler import CheckpointSampler
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        return CheckpointSampler(source, scheduler, num_inference_steps, device)
    if scheduler is not None or num_inference_steps is not None:
        raise ConfigurationError("a bundle's step table fixes its scheduler and steps: export again to change them")
    if device is not None:
        raise ConfigurationError("a device is for a checkpoint: give a bundle's --provider")
    return OnnxSampler(source, num_threads, provider or "cpu")


def is_first_process(source: Path) -> bool:
    """Return whether this process writes the results, as the first of those that sample a checkpoint together."""
    if not (source / "model_index.json").is_file():
        return True
    with explain_missing_extra("sampling from a checkpoint", "train"):
        from .training.processes import this_process
    return this_process().is_main_process
