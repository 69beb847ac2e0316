"""Loading a checkpoint folder that may not be what it says."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import CheckpointError, DDPMPipelineError
from .pipeline import DDPMMLPPipeline

MAX_TIMESTEPS, MAX_SIZE = 10**6, 2**26  # of a scheduler; of a sample, in numbers


def load_checkpoint(folder: str | os.PathLike[str]) -> DDPMMLPPipeline:
    """Load a checkpoint folder, running no code that it carries.

    Raises:
        CheckpointError: if the folder or a file in it is missing or can't be read, if the files don't fit each other,
            or if they can't be sampled from.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        what = "is no checkpoint: it has no model_index.json" if folder.is_dir() else "doesn't exist"
        raise CheckpointError(f"{folder} {what}")
    with explain_loading(f"can't load the checkpoint {folder}"):
        index = DDPMMLPPipeline.load_config(folder)
        unet, scheduler = (_named_class(index[name]) for name in ("unet", "scheduler"))
        network = empty_network(unet, folder / "unet")
        _check_sizes(scheduler.load_config(folder / "scheduler"))
        pipeline = DDPMMLPPipeline.from_pretrained(folder, local_files_only=True)
        check_weights(pipeline.unet)
        _check_sampling(pipeline, network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fingerprint(pipeline: DDPMMLPPipeline, **tensors: torch.Tensor) -> tuple[str, dict[str, Any]]:
    """Return what tells a pipeline from another that was saved into the same folder: the SHA-256 of its network's
    weights, and of further tensors by name, and its scheduler's configuration."""
    sha = hashlib.sha256()
    for name, value in (*pipeline.unet.state_dict().items(), *tensors.items()):
        sha.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest(), {key: v for key, v in pipeline.scheduler.config.items() if not key.startswith("_")}


@contextlib.contextmanager
def explain_loading(what: str) -> Iterator[None]:
    """diffusers has no error of its own for a folder that it can't make sense of."""
    try:
        with quiet():
            yield
    except DDPMPipelineError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {str(error) or type(error).__name__}") from None


def _named_class(entry: list[str]) -> Any:
    """The class that an entry of `model_index.json` names, which the pipeline has found harmless."""
    module, name = entry
    return getattr(importlib.import_module(module), name)


def empty_network(cls: type[ModelMixin], folder: Path) -> ModelMixin:
    """The network that a configuration describes, on the device "meta", if it has weights of the shapes in the folder.

    Neither takes memory here, whatever the sizes they claim: only where they agree may they be loaded.
    """
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (it is no dictionary)
    found = sorted((tensor.get_shape(), "F" in tensor.get_dtype()) for tensor in slices)
    numbers = itertools.count(1)

    def check_number(*parameter: Any) -> None:
        if next(numbers) > len(found):
            raise ValueError("its weights lack some that its configuration asks for")

    hook = register_module_parameter_registration_hook(check_number)  # before billions of layers are made
    try:
        with torch.device("meta"):
            network, unused = cls.from_config(cls.load_config(folder), return_unused_kwargs=True)
    finally:
        hook.remove()
    if unknown := [name for name in unused if not name.startswith("_")]:
        raise ValueError(f"its configuration sets {unknown[0]!r}, which {cls.__name__} does not know")
    if sorted((list(tensor.shape), tensor.is_floating_point()) for tensor in network.state_dict().values()) != found:
        raise ValueError("its configuration asks for weights that it lacks, or of other shapes than they have")
    return network


def _check_sizes(scheduler_config: dict[str, Any]) -> None:
    """A scheduler makes arrays as long as its numbers say."""
    for name, value in scheduler_config.items():
        if isinstance(value, int) and abs(value) > MAX_TIMESTEPS:
            raise ValueError(f"its scheduler's {name} is {value}, which is beyond all reason")


def check_weights(network: ModelMixin) -> None:
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("its weights lack some of the network's")
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise ValueError("its weights are not finite")


def _check_sampling(pipeline: DDPMMLPPipeline, network: ModelMixin) -> None:
    """Take some steps, the network's on the device "meta": much of what is wrong with a configuration shows there."""
    shape, scheduler = pipeline.sample_shape, pipeline.scheduler
    if math.prod(shape) > MAX_SIZE:
        raise ValueError(f"its samples have the shape {shape}, which is beyond all reason")
    predicted = network(torch.zeros(1, *shape, device="meta"), 0).sample.shape[1]
    scheduler.set_timesteps(min(10, scheduler.config.num_train_timesteps))
    x = torch.zeros(1, shape[0])
    model_output = torch.zeros(1, predicted if pipeline.learns_variance else shape[0])
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # which some schedulers count on
            x = scheduler.step(model_output, t, x).prev_sample
    if not x.isfinite().all():
        raise ValueError("its scheduler's numbers make no finite samples")
    mean, std = pipeline.config.data_mean, pipeline.config.data_std
    if pipeline.is_points and (mean, std) != (None, None):
        std = torch.tensor(std, dtype=torch.float32)
        if not (torch.tensor(mean).shape == std.shape == shape and (std > 0).all()):
            raise ValueError(f"its data_mean and data_std must hold {shape[0]} numbers each")
        if not pipeline.to_data_units(torch.ones(1, *shape)).isfinite().all():
            raise ValueError("its data_mean and data_std must be finite")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of loading and exporting, about which users can do nothing."""
    had_progress_bars = diffusers.utils.logging.is_progress_bar_enabled()
    level, disabled = diffusers.utils.logging.get_verbosity(), logging.root.manager.disable
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if had_progress_bars:
            diffusers.utils.logging.enable_progress_bar()
        diffusers.utils.logging.set_verbosity(level)
