"""Training losses: the simple loss (Ho et al. 2020, eq. 14) and the variational bound."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import compute_snr

from ..bound import VariationalBound
from ..data.batches import Batch
from ..pipeline import DDPMMLPPipeline

Network = Callable[..., UNet2DOutput]
Loss = Callable[[Network, Batch, torch.Tensor, torch.Tensor], torch.Tensor]
"""`loss(unet, batch, t, eps)` returns the loss of each sample, `[batch]`, for timesteps t, `[batch]`, and noise ε of
x_0's shape."""


def make_loss(pipeline: DDPMMLPPipeline, loss_type: str) -> Loss:
    """Return the loss of a type, `"simple"` or `"bound"`, for a pipeline's forward process."""
    scheduler = pipeline.scheduler
    if loss_type == "simple":
        return functools.partial(loss_of_unknown if pipeline.takes_known else simple_loss, scheduler)
    # Clipping x̂_0 would stop its gradient.
    bound = VariationalBound(scheduler, discretized=not pipeline.is_points, clip_sample=False)
    return functools.partial(bound_loss, scheduler, bound)


def simple_loss(
    scheduler: DDPMScheduler, unet: Network, batch: Batch, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Return the prediction's mean squared error, `[batch]`: for ε, L_simple (Ho et al. 2020, eq. 14)."""
    return _squared_errors(scheduler, unet, batch, t, eps).mean(dim=1)


def loss_of_unknown(
    scheduler: DDPMScheduler, unet: Network, batch: Batch, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Return `simple_loss` of the coordinates that the condition, `[batch, D]`, leaves unknown (NaN)."""
    errors = _squared_errors(scheduler, unet, batch, t, eps)
    if batch.condition is None:
        return errors.mean(dim=1)
    is_unknown = batch.condition.isnan()
    return (errors * is_unknown).sum(dim=1) / is_unknown.sum(dim=1).clamp(min=1)


def _squared_errors(
    scheduler: DDPMScheduler, unet: Network, batch: Batch, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Return the squared errors of the prediction, `[batch, values of a sample]`."""
    x_t = scheduler.add_noise(batch.x_0, eps, t)  # √ᾱ_t x_0 + √(1 − ᾱ_t) ε
    prediction = _predict(unet, x_t, t, batch)[:, : x_t.shape[1]]  # without a learned variance
    target = training_target(scheduler, batch.x_0, eps, t)
    return F.mse_loss(prediction, target, reduction="none").flatten(1)


def bound_loss(
    scheduler: DDPMScheduler,
    bound: VariationalBound,
    unet: Network,
    batch: Batch,
    t: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """Return an unbiased estimate of the variational bound without L_T, in bits/dim, from its term at t: `[batch]`."""
    x_t = scheduler.add_noise(batch.x_0, eps, t)
    terms = bound.term(_predict(unet, x_t, t, batch), batch.x_0, x_t, t)
    return bound.num_timesteps * terms / batch.x_0[0].numel()


def _predict(unet: Network, x_t: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
    return unet(x_t, t, **batch.known).sample.float()


def training_target(scheduler: DDPMScheduler, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the target of the prediction: ε, x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, section 4)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x_0, eps, t)
    return eps if scheduler.config.prediction_type == "epsilon" else x_0


def min_snr_weights(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the weights of the simple loss, `[batch]` (Hang et al. 2023, section 3.4).

    The weight of x_0's squared error is min(SNR, γ). That error is ε's divided by SNR, or v's divided by SNR + 1.
    """
    snr = compute_snr(scheduler, t)
    divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / divisors[scheduler.config.prediction_type]
