"""Loading a checkpoint folder that may not be what it says."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from .errors import CheckpointError, explain_missing_extra
from .models.features import FeatureNetwork
from .pipeline import DDPMMLPPipeline


def load_checkpoint(folder: str | os.PathLike) -> DDPMMLPPipeline:
    """Load a checkpoint folder, running no code that it carries.

    Raises:
        CheckpointError: if the folder or a file in it is missing or can't be read.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        what = "is no checkpoint: it has no model_index.json" if folder.is_dir() else "doesn't exist"
        raise CheckpointError(f"{folder} {what}")
    with _explained(f"can't load the checkpoint {folder}"):
        pipeline = DDPMMLPPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        _check_weights(pipeline.unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_features(path: str | os.PathLike) -> nn.Module:
    """Load a network that turns uint8 images, `[batch, channels, height, width]`, into `[batch, num_features]`.

    Args:
        path: the folder of a [`FeatureNetwork`], or torch-fidelity's file of Inception's weights.

    Returns:
        The network, which says in `channels` how many an image may have.

    Raises:
        CheckpointError: if a file is missing, can't be read, or holds anything but the network's weights.
        MissingExtraError: if Inception is asked for, and torch-fidelity is not installed.
    """
    with _explained(f"can't load the feature network {path}"):
        if Path(path).is_file():
            return _load_inception(path)
        network = FeatureNetwork.from_pretrained(path, local_files_only=True, use_safetensors=True)
        _check_weights(network)
    return network.eval()


def _load_inception(weights: str | os.PathLike) -> nn.Module:
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
    except (pickle.UnpicklingError, EOFError):
        raise ValueError("it is no PyTorch file of tensors alone") from None
    with explain_missing_extra("Inception"):
        from .models.inception import InceptionNetwork
    try:
        return InceptionNetwork(weights)
    except RuntimeError:  # whose message lists hundreds of names
        raise ValueError("its tensors are not those of torch-fidelity's Inception") from None


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """diffusers has no error of its own for a folder that it can't make sense of."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{what}: {error}") from None


def _check_weights(network: ModelMixin) -> None:
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError("its weights lack some of the network's")


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
