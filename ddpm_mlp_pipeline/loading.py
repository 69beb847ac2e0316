"""Load checkpoint folders from untrusted sources."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import CheckpointError, ConfigurationError, DDPMPipelineError
from .pipeline import DDPMMLPPipeline
from .runtime.columns import TableCodec
from .table_scheduler import StepTableScheduler

MAX_TIMESTEPS, MAX_SIZE = 10**6, 2**26  # limits of a scheduler's integers, and of the numbers in one sample


def load_checkpoint(folder: str | os.PathLike[str]) -> DDPMMLPPipeline:
    """Load a checkpoint folder without running code from it.

    Raises:
        CheckpointError: if the folder or a file in it is missing or can't be read, if the files don't match, or if
            sampling with them fails.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        what = "is not a checkpoint: it has no model_index.json" if folder.is_dir() else "doesn't exist"
        raise CheckpointError(f"{folder} {what}")
    with explain_loading(f"can't load the checkpoint {folder}"):
        index = DDPMMLPPipeline.load_config(folder)
        components = (index[name] for name in ("unet", "scheduler"))  # load_config has checked that they are harmless
        unet, scheduler = (getattr(importlib.import_module(module), cls) for module, cls in components)
        network = empty_network(unet, folder / "unet")
        for name, value in scheduler.load_config(folder / "scheduler").items():  # integers are lengths of arrays
            if isinstance(value, int) and abs(value) > MAX_TIMESTEPS:
                raise ValueError(f"its scheduler's {name} is {value}, beyond the limit of {MAX_TIMESTEPS}")
        pipeline = DDPMMLPPipeline.from_pretrained(folder, local_files_only=True)
        check_weights(pipeline.unet)
        _check_sampling(pipeline, network)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_tables(pipeline: DDPMMLPPipeline) -> DDPMMLPPipeline:
    """Give a pipeline with fitted tables the `DDPMScheduler` of their options: that of the training."""
    if isinstance(pipeline.scheduler, StepTableScheduler):
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def fingerprint(pipeline: DDPMMLPPipeline, **tensors: torch.Tensor) -> tuple[str, dict[str, Any]]:
    """Return the SHA-256 of the network's weights, of step tables and of further named tensors, and the scheduler's
    configuration.

    They tell two pipelines apart that were saved into the same folder.
    """
    sha = hashlib.sha256()
    for name, value in (*pipeline.unet.state_dict().items(), *tensors.items()):
        sha.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    sha.update(json.dumps(getattr(pipeline.scheduler, "tables", None)).encode())
    return sha.hexdigest(), {key: v for key, v in pipeline.scheduler.config.items() if not key.startswith("_")}


@contextlib.contextmanager
def explain_loading(what: str) -> Iterator[None]:
    """Turn any error of loading into a `CheckpointError` that begins with `what`."""
    try:
        with quiet():
            yield
    except DDPMPipelineError:
        raise
    except Exception as error:  # diffusers has no common base class for errors of loading
        raise CheckpointError(f"{what}: {str(error) or type(error).__name__}") from None


def empty_network(cls: type[ModelMixin], folder: Path) -> ModelMixin:
    """Return the network that a folder's configuration describes, on the device "meta".

    Neither the network nor the weights take memory yet, whatever sizes they claim.

    Raises:
        ValueError: if the configuration and the weights have different shapes.
    """
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dictionary)
    found = sorted((tensor.get_shape(), "F" in tensor.get_dtype()) for tensor in slices)
    numbers = itertools.count(1)

    def check_number(*parameter: Any) -> None:
        if next(numbers) > len(found):
            raise ValueError("its weights lack tensors that its configuration describes")

    hook = register_module_parameter_registration_hook(check_number)  # stops before billions of layers
    try:
        with torch.device("meta"):
            network, unused = cls.from_config(cls.load_config(folder), return_unused_kwargs=True)
    finally:
        hook.remove()
    if unknown := [name for name in unused if not name.startswith("_")]:
        raise ValueError(f"its configuration sets {unknown[0]!r}, which {cls.__name__} does not know")
    if sorted((list(tensor.shape), tensor.is_floating_point()) for tensor in network.state_dict().values()) != found:
        raise ValueError("its weights lack tensors that its configuration describes, or have others or other shapes")
    return network


def check_weights(network: ModelMixin) -> None:
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("its weights lack tensors of the network")
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise ValueError("its weights are not finite")


def _check_sampling(pipeline: DDPMMLPPipeline, network: ModelMixin) -> None:
    """Take a few denoising steps, with the network on the device "meta", to find errors of the configuration."""
    shape, scheduler = pipeline.sample_shape, pipeline.scheduler
    if math.prod(shape) > MAX_SIZE:
        raise ValueError(f"its samples have the shape {shape}, beyond the limit of {MAX_SIZE} numbers")
    labels = {"class_labels": torch.zeros(1, dtype=torch.int64, device="meta")} if pipeline.num_classes else {}
    predicted = network(torch.zeros(1, *shape, device="meta"), 0, **labels).sample.shape[1]
    has_tables = isinstance(scheduler, StepTableScheduler)
    scheduler.set_timesteps(None if has_tables else min(10, scheduler.config.num_train_timesteps))
    x = torch.zeros(1, shape[0])
    model_output = torch.zeros(1, predicted if pipeline.learns_variance else shape[0])
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # some schedulers require this call
            x = scheduler.step(model_output, t, x).prev_sample
    if not x.isfinite().all():
        raise ValueError("its scheduler gives samples that are not finite")
    for name in ("data_columns", "class_names", "condition_columns"):
        values = pipeline.config[name]
        if values is not None and not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise ValueError(f"its {name} must be a list of names")
    if (shares := pipeline.config.class_shares) is not None:
        number, shares = len(pipeline.class_names), torch.tensor(shares, dtype=torch.float64)
        if shares.shape != (number,) or not (shares >= 0).all() or not abs(shares.sum() - 1) < 1e-6:
            raise ValueError(f"its class_shares must hold {number} numbers that sum to 1")
    if (columns := pipeline.config.columns) is not None:
        try:
            names = TableCodec(columns).coordinate_names
        except ConfigurationError as error:
            raise ValueError(f"its columns: {error}") from None
        if not pipeline.is_points or names != pipeline.data_columns:
            raise ValueError("the coordinates of its columns are not its data_columns")
    mean, std = pipeline.config.data_mean, pipeline.config.data_std
    if pipeline.is_points and (mean, std) != (None, None):
        std = torch.tensor(std, dtype=torch.float32)
        if not (torch.tensor(mean).shape == std.shape == shape and (std > 0).all()):
            raise ValueError(f"its data_mean and data_std must hold {shape[0]} numbers each")
        if not pipeline.to_data_units(torch.ones(1, *shape)).isfinite().all():
            raise ValueError("its data_mean and data_std must be finite")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of loading and exporting, which need no action by the user."""
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
