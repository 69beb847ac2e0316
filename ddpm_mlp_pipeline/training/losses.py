"""The losses of a network on a batch: the simple one (Ho et al. 2020, eq. 14), and the variational bound."""

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
"""`loss(unet, batch, t, eps)` is each sample's loss, `[batch]`, at the timesteps t, `[batch]`, with the noise ε, of
x_0's shape."""


def make_loss(pipeline: DDPMMLPPipeline, loss_type: str) -> Loss:
    """Return the loss of a pipeline's forward process: `"simple"`, or `"bound"`, the variational bound."""
    scheduler = pipeline.scheduler
    if loss_type == "simple":
        return functools.partial(simple_loss, scheduler)
    # What is clipped has no gradient.
    bound = VariationalBound(scheduler, discretized=not pipeline.is_points, clip_sample=False)
    return functools.partial(bound_loss, scheduler, bound)


def simple_loss(
    scheduler: DDPMScheduler, unet: Network, batch: Batch, t: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """L_simple (Ho et al. 2020, eq. 14), or the same of another target than ε: the mean squared error of each sample,
    `[batch]`."""
    x_t = scheduler.add_noise(batch.x_0, eps, t)  # √ᾱ_t x_0 + √(1 − ᾱ_t) ε
    prediction = _predict(unet, x_t, t, batch)[:, : x_t.shape[1]]  # without the variance that may stand beside it
    target = training_target(scheduler, batch.x_0, eps, t)
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)


def bound_loss(
    scheduler: DDPMScheduler,
    bound: VariationalBound,
    unet: Network,
    batch: Batch,
    t: torch.Tensor,
    eps: torch.Tensor,
) -> torch.Tensor:
    """What the term at t says of the variational bound without its last, L_T, in bits/dim: `[batch]`."""
    x_t = scheduler.add_noise(batch.x_0, eps, t)
    terms = bound.term(_predict(unet, x_t, t, batch), batch.x_0, x_t, t)
    return bound.num_timesteps * terms / batch.x_0[0].numel()


def _predict(unet: Network, x_t: torch.Tensor, t: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Call the network: no other place in training does."""
    return unet(x_t, t, **batch.known).sample.float()


def training_target(scheduler: DDPMScheduler, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is to predict: ε, x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, section 4)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x_0, eps, t)
    return eps if scheduler.config.prediction_type == "epsilon" else x_0


def min_snr_weights(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of the simple loss, `[batch]` (Hang et al. 2023, section 3.4).

    min(SNR, γ) is the weight of x_0's squared error, which is 1 / SNR times ε's, and 1 / (SNR + 1) times v's.
    """
    snr = compute_snr(scheduler, t)
    of_x_0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / of_x_0[scheduler.config.prediction_type]
