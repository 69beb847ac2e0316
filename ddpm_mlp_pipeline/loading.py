"""Loading a checkpoint folder that may not be what it says."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import diffusers
from diffusers import ModelMixin
from safetensors import SafetensorError

from .errors import CheckpointError
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


def load_features(folder: str | os.PathLike) -> FeatureNetwork:
    """Load the folder of a feature network.

    Raises:
        CheckpointError: if the folder or a file in it is missing or can't be read.
    """
    with _explained(f"can't load the feature network {folder}"):
        network = FeatureNetwork.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        _check_weights(network)
    return network.eval()


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
