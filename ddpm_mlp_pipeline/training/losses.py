"""The losses of a batch: the simple one (Ho et al. 2020, eq. 14), and the variational bound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ..bound import VariationalBound


def simple_loss(
    scheduler: DDPMScheduler,
    model_output: torch.Tensor,
    x_0: torch.Tensor,
    eps: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """L_simple (Ho et al. 2020, eq. 14), or the same of another target than ε: each sample's mean squared error,
    `[batch]`."""
    target = training_target(scheduler, x_0, eps, t)
    return F.mse_loss(model_output, target, reduction="none").flatten(1).mean(dim=1)


def bound_loss(
    bound: VariationalBound,
    model_output: torch.Tensor,
    x_0: torch.Tensor,
    eps: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """What the term at t says of the variational bound without its last, L_T, in bits/dim: `[batch]`."""
    return bound.num_timesteps * bound.term(model_output, x_0, x_t, t) / x_0[0].numel()


def training_target(scheduler: DDPMScheduler, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is to predict: ε, x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, section 4)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x_0, eps, t)
    return eps if scheduler.config.prediction_type == "epsilon" else x_0


def min_snr_weights(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) is the weight of x_0's squared error (Hang et al. 2023, section 3.4), which is 1 / SNR times ε's,
    and 1 / (SNR + 1) times v's."""
    snr = compute_snr(scheduler, t)
    of_x_0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / of_x_0[scheduler.config.prediction_type]
