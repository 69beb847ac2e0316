"""The training loop (Ho et al. 2020, algorithm 1), on Accelerate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..data.batches import Batch, BatchDataset, Draw
from ..pipeline import DDPMMLPPipeline
from .losses import make_loss, min_snr_weights
from .options import TrainingArguments
from .run import DrawSamples, prepare_run


def train(
    pipeline: DDPMMLPPipeline,
    dataset: BatchDataset,
    args: TrainingArguments,
    draw_samples: DrawSamples | None = None,
    augment: Callable[[Batch, Draw], Batch] | None = None,
) -> list[float]:
    """Train the pipeline's network with the scheduler's forward process, and save the pipeline.

    Args:
        pipeline: the untrained network and a stock `DDPMScheduler`. Afterwards it holds the trained weights, or their
            average with `use_ema`, in the main process.
        dataset: the training data in the network's units: normalised points, or images in [-1, 1]. Its
            `__getitems__(indices)` returns a `Batch`.
        args: the options. `args.output_dir` receives the checkpoint, `checkpoint-<step>/` and the tracker's files.
        draw_samples: called as `draw_samples(pipeline, ema, epoch)` after every `args.save_samples_epochs` epochs,
            and at the end.
        augment: called as `augment(batch, draw)`; returns the batch to train on. `draw(*shape)` returns random numbers
            in [0, 1), `[batch, *shape]`. A data set should not draw random numbers itself: batches are fetched ahead,
            so a resumed run could not repeat them.

    Returns:
        The loss of each optimizer step.

    Raises:
        OutputExistsError: if `args.output_dir` holds another run's checkpoint: see `check_output_dir`.
        ConfigurationError: if the batch size exceeds the number of samples.
        CheckpointError: if the state to resume from doesn't exist, is broken, or belongs to another model.
        DivergenceError: if the loss or its gradient is no longer finite. The step is not taken.
        StoppedBySignal: after Ctrl-C or SIGTERM, once the current step is done and its state is saved.
    """
    run = prepare_run(pipeline, dataset, args, draw_samples, args.save_samples_epochs, any_processes=True)
    unet, scheduler, device = run.network, pipeline.scheduler, run.accelerator.device
    loss_function = make_loss(pipeline, args.loss_type)
    T = scheduler.config.num_train_timesteps
    # Each process draws the random numbers of all processes and uses its own rows, so that several processes train as
    # one process with the whole batch does.
    total, rows = run.total_batch_size, run.rows

    with run.in_progress():
        for batch in run.batches():
            if augment is not None:
                batch = augment(batch, lambda *shape: torch.rand(total, *shape, device=device)[rows])
            if batch.known and args.label_dropout:
                is_forgotten = torch.rand(total, device=device)[rows] < args.label_dropout
                batch = batch.forget(is_forgotten, pipeline.null_label)
            # Algorithm 1: draw t and ε, and take a step on |ε − ε_θ(x_t, t)|², x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε.
            # losses.py has the other losses.
            t = torch.randint(T, (total,), device=device)[rows]
            eps = torch.randn(total, *batch.x_0.shape[1:], device=device)[rows]
            errors = loss_function(unet, batch, t, eps)
            weights = 1.0 if args.snr_gamma is None else min_snr_weights(scheduler, t, args.snr_gamma)
            run.take_step((weights * errors).mean(), errors.mean(), batch, t, eps)
    pipeline.unet = run.result()
    run.save()
    return run.losses
