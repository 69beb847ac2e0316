"""A training run of eleven steps, for the tests of the loop and of resuming."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, TrainingArguments, train
from ddpm_mlp_pipeline.data.batches import TensorBatches


def training_options(folder: Path, **changes: object) -> TrainingArguments:
    """Return options for eleven steps, four in each epoch of `train_small`'s data."""
    values = {"train_batch_size": 32, "max_train_steps": 11, "lr_warmup_steps": 2, "report_to": "none"}
    return TrainingArguments(output_dir=str(folder), **values | changes)


def small_pipeline(network: type[MLPModel] = MLPModel, hidden_dim: int = 8) -> DDPMMLPPipeline:
    """Return a pipeline with the same initial weights each time."""
    torch.manual_seed(0)
    return DDPMMLPPipeline(network(2, hidden_dim=hidden_dim, embedding_dim=4), DDPMScheduler())


def train_small(folder: Path, augment: Callable | None = None, **changes: object) -> tuple[bytes, list[float]]:
    """Train a tiny network on points, and return the bytes of its weights file and the losses."""
    pipeline = small_pipeline()
    losses = train(pipeline, TensorBatches(torch.randn(150, 2)), training_options(folder, **changes), augment=augment)
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes(), losses
