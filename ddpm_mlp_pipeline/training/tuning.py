"""Tune a network and a step table of few calls together, to lower the distance of their samples to data."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.utils.data import Subset

from ..data.batches import BatchDataset, TensorBatches
from ..pipeline import DDPMMLPPipeline
from .fit_features import FitFeatures
from .fitting import play
from .losses import simple_loss
from .options import TuningArguments
from .processes import this_process
from .run import prepare_run
from .table_parameters import TableParameters, check_num_calls
from .target import Target

DENOISING_SHARE = 3  # one of this many samples of a batch enters the denoising loss


class TunedNetwork(nn.Module):
    """A network with a step table's numbers as a parameter, so that one optimizer and one EMA hold both."""

    def __init__(self, unet: nn.Module, numbers: torch.Tensor):
        super().__init__()
        self.unet = unet.requires_grad_(True)
        self.numbers = nn.Parameter(numbers.clone())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **known: torch.Tensor) -> UNet2DOutput:
        return self.unet(sample, timestep, **known)


def tune(
    pipeline: DDPMMLPPipeline, data: TensorBatches, features: FitFeatures, args: TuningArguments
) -> tuple[list[float], list[int]]:
    """Tune the pipeline's network to a step table of `args.num_calls` calls, and save both.

    The loss is the energy distance between samples and data, with gradients through all calls, plus
    `args.denoising_weight` times the denoising loss, which keeps the network a noise predictor.

    Args:
        pipeline: the pipeline to tune. Afterwards it holds the tuned network and a `StepTableScheduler`.
        data: data in the network's units, with the pipeline's classes and conditions.
        features: the features that samples and data are compared on. Activations must come from a frozen copy of the
            network, on the device of the training.
        args: the options. `args.output_dir` receives the checkpoint, `checkpoint-<step>/` and the tracker's files.

    Returns:
        The distance of each optimizer step, and the indices of the held-out data.

    Raises:
        DatasetError: if there are too few data, or the network takes labels that the data lack.
        OutputExistsError, ConfigurationError, CheckpointError, DivergenceError, StoppedBySignal: see `train`.
    """
    scheduler, T = pipeline.scheduler, pipeline.scheduler.config.num_train_timesteps
    check_num_calls([args.num_calls], T)
    args = args.of_kind(pipeline.is_points)
    weight = cast(float, args.denoising_weight)
    pipeline.to(this_process().device)
    fitting = args.for_target(pipeline.is_points)
    target = Target(pipeline, data, features, fitting)
    start = TableParameters.start(args.num_calls, fitting, scheduler)
    network = TunedNetwork(pipeline.unet, start.numbers)
    fitted = cast(BatchDataset, Subset(data, target.fitted))
    run = prepare_run(pipeline, fitted, args, network=network, learning_rates={"numbers": args.table_learning_rate})
    accelerator, total, rows = run.accelerator, run.total_batch_size, run.rows

    with run.in_progress():
        for batch in run.batches():
            generator = target.generator(args.num_calls, len(run.losses), accelerator.process_index)
            numbers = accelerator.unwrap_model(run.network).get_parameter("numbers")
            parameters = dataclasses.replace(start, numbers=numbers)
            distance = target.distance(parameters, run.network, generator)
            t = torch.randint(T, (total,), device=accelerator.device)[rows]
            eps = torch.randn(total, *batch.x_0.shape[1:], device=accelerator.device)[rows]
            some = slice(max(len(t) // DENOISING_SHARE, 1))
            batch, t, eps = batch.take(some), t[some], eps[some]
            loss = distance
            if weight:
                loss = loss + weight * simple_loss(scheduler, run.network, batch, t, eps).mean()
            run.take_step(loss, distance, batch, t, eps)
    tuned = cast(TunedNetwork, run.result())
    table = dataclasses.replace(start, numbers=tuned.numbers.cpu()).to_table()
    pipeline.unet = tuned.unet
    play(pipeline, [table])
    run.save()
    return run.losses, target.held_out
