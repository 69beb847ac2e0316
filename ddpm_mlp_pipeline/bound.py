"""The variational bound on −log p(x_0) (Sohl-Dickstein et al. 2015; Ho et al. 2020), as mathematics."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from diffusers import DDPMScheduler

from .errors import ConfigurationError

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
FAR = 1e6  # standard deviations, beyond which there is nothing


class VariationalBound:
    r"""
    The terms of L = L_T + Σ_{t=2}^T L_{t−1} + L_0 ≥ −log p_θ(x_0) (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    eq. 5), for the reverse process that a stock `DDPMScheduler` takes its steps by.

    All terms are in bits, one for each sample, summed over its dimensions. The scheduler's timestep t, from 0, is the
    papers' t + 1.

    The last step of the reverse process, to x_0, has no variance in `fixed_small`, and no density then: as in Ho et
    al.'s own code, it gets that of the step before, β̃_2. (There, `fixed_large` does, too; here it keeps its β_1.)

    Args:
        scheduler: of the network that is to be measured. Its `variance_type` may be `fixed_small`, `fixed_large` or,
            where the network has twice as many channels as the samples, `learned_range` (Nichol & Dhariwal 2021,
            https://arxiv.org/abs/2102.09672, eq. 15).
        discretized: how p(x_0 | x_1) sees the data: for images of 8 bits, scaled to [-1, 1], as the probability of the
            256 levels (Ho et al., eq. 13); else as a Gaussian density.
        clip_sample: whether the prediction of x_0 is clipped, as in sampling; by default what the scheduler says. (In
            training it must not be: what is clipped has no gradient.)

    Raises:
        ConfigurationError: if the scheduler is another, or its steps have no variance that can be written down.
    """

    def __init__(self, scheduler: DDPMScheduler, discretized: bool, clip_sample: bool | None = None):
        if not isinstance(scheduler, DDPMScheduler):
            raise ConfigurationError(
                f"the bound needs the variance of each step, which {type(scheduler).__name__} doesn't have: "
                "take DDPMScheduler.from_config (ddpm-bound: --variance_type)"
            )
        config = scheduler.config
        if config.variance_type not in VARIANCE_TYPES:
            raise ConfigurationError(
                f"the bound takes a variance_type of {', '.join(VARIANCE_TYPES)}, not {config.variance_type}"
            )
        if config.thresholding:
            raise ConfigurationError("the bound can't be taken of a scheduler with thresholding")
        clip_sample = config.clip_sample if clip_sample is None else clip_sample
        self.clip_range = config.clip_sample_range if clip_sample else math.inf
        self.prediction_type, self.variance_type = config.prediction_type, config.variance_type
        self.log_likelihood = discretized_log_likelihood if discretized else gaussian_log_likelihood

        if config.num_train_timesteps < 2:
            raise ConfigurationError("the bound needs at least 2 timesteps")
        # In float64: near t = 0, where most bits are, 1 − ᾱ_t is a small difference.
        betas = scheduler.betas.double()
        self.alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)  # β̃_t, eq. 7
        posterior_variance[0] = posterior_variance[1]
        self.posterior_log_variance, self.log_betas = posterior_variance.log(), betas.log()
        # What x_0 and x_t have a share of in the posterior's mean μ̃_t, eq. 7
        self.share_of_x_0 = previous.sqrt() * betas / (1 - self.alphas_cumprod)
        self.share_of_x_t = (1 - betas).sqrt() * (1 - previous) / (1 - self.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def prior_term(self, x_0: torch.Tensor) -> torch.Tensor:
        """L_T, the divergence of q(x_T | x_0) from a standard Gaussian: `[batch]`, in bits."""
        alpha_cumprod = self.alphas_cumprod[-1]
        variance = 1 - alpha_cumprod
        return _bits(0.5 * (alpha_cumprod * x_0.double() ** 2 + variance - 1 - variance.log()))

    def null(self, x_0: torch.Tensor) -> torch.Tensor:
        """−L_null, the samples' negative log-likelihood under a standard Gaussian (Sohl-Dickstein et al. 2015,
        https://arxiv.org/abs/1503.03585, table 1): `[batch]`, in bits."""
        x_0 = x_0.double()
        zero = torch.zeros_like(x_0)
        return _bits(-self.log_likelihood(x_0, zero, zero))

    def term(self, model_output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the step from x_t has a share of in the bound: at t = 0 L_0, else the divergence of the posterior
        q(x_{t−1} | x_t, x_0) from p_θ(x_{t−1} | x_t).

        Args:
            model_output: the network's, `[batch, *sample_shape]`, with twice the channels for `learned_range`.
            x_0, x_t: `[batch, *sample_shape]`.
            t: the scheduler's timesteps, `[batch]`.

        Returns:
            `[batch]`, in bits.
        """
        predicted_x_0, log_variance = self.predict(model_output, x_t, t)
        x_0 = x_0.double()
        posterior_log_variance = _at(self.posterior_log_variance, t, x_0)
        # Both means hold the same share of x_t, so that they differ by that of x_0.
        difference = _at(self.share_of_x_0, t, x_0) * (x_0 - predicted_x_0)
        divergence = 0.5 * (
            (posterior_log_variance - log_variance).expm1()
            + log_variance
            - posterior_log_variance
            + difference**2 * (-log_variance).exp()
        )
        decoder = -self.log_likelihood(x_0, predicted_x_0, log_variance)  # at t = 0, the mean is the predicted x_0
        is_last = (t == 0).reshape(-1, *[1] * (x_0.ndim - 1))
        return _bits(torch.where(is_last, decoder, divergence))

    def predict(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The network's x_0, and the logarithm of the variance of p_θ(x_{t−1} | x_t): float64, `[batch,
        *sample_shape]`."""
        channels = x_t.shape[1]
        if self.variance_type == "learned_range" and model_output.shape[1] != 2 * channels:
            raise ConfigurationError("learned_range needs a network with twice as many channels as the samples have")
        # A network that predicts the variance has it in further channels, which the fixed types leave out.
        v, model_output, x_t = model_output[:, channels:].double(), model_output[:, :channels].double(), x_t.double()
        log_beta, log_variance = _at(self.log_betas, t, x_t), _at(self.posterior_log_variance, t, x_t)
        if self.variance_type == "learned_range":
            v = (v + 1) / 2  # the network's −1 and 1 are β̃_t and β_t
            log_variance = v * log_beta + (1 - v) * log_variance
        elif self.variance_type == "fixed_large":
            log_variance = log_beta
        alpha_cumprod = _at(self.alphas_cumprod, t, x_t)
        if self.prediction_type == "epsilon":
            x_0 = (x_t - (1 - alpha_cumprod).sqrt() * model_output) / alpha_cumprod.sqrt()
        elif self.prediction_type == "v_prediction":
            x_0 = alpha_cumprod.sqrt() * x_t - (1 - alpha_cumprod).sqrt() * model_output
        else:
            x_0 = model_output
        return x_0.clamp(-self.clip_range, self.clip_range), log_variance.expand_as(x_t)

    def mean(self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """μ_θ(x_t, t), the mean of p_θ(x_{t−1} | x_t) (Ho et al. 2020, eq. 7, with the network's x_0): float64."""
        x_0, _ = self.predict(model_output, x_t, t)
        of_x_0, of_x_t = (_at(share, t, x_t) for share in (self.share_of_x_0, self.share_of_x_t))
        return of_x_0 * x_0 + of_x_t * x_t


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """log of a Gaussian's probability of the level that each value is (Ho et al. 2020, eq. 13).

    Args:
        x_0: one of the 256 levels −1, −1 + 2/255, …, 1 everywhere, float64 `[batch, …]`.
        mean, log_variance: the Gaussian's, of the same shape.

    Returns:
        In nats, of the same shape. It is finite however far the mean is from x_0.
    """
    to_deviations = (-0.5 * log_variance).exp()
    lower = (x_0 - mean - 1 / 255) * to_deviations
    upper = (x_0 - mean + 1 / 255) * to_deviations
    # The outermost levels hold all that is beyond. (An infinity would do, but has no gradient.)
    lower = torch.where(x_0 < -0.999, upper.clamp(max=0) - FAR, lower)
    upper = torch.where(x_0 > 0.999, lower.clamp(min=0) + FAR, upper)
    # Φ(upper) − Φ(lower) in the lower tail, where logarithms of both are exact
    is_upper_tail = lower + upper > 0
    lower, upper = torch.where(is_upper_tail, -upper, lower), torch.where(is_upper_tail, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


def gaussian_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """log of a Gaussian's density at each value of x_0: in nats, of its shape."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean) ** 2 * (-log_variance).exp())


@dataclasses.dataclass
class BoundEstimate:
    """A variational bound, averaged over samples; in bits.

    Attributes:
        terms: float64 `[T + 1]`, L_0, L_1, …, L_T.
        totals: float64 `[number of groups]`, the sum of the terms for each group of samples.
        nulls: float64 `[number of groups]`, each group's mean −L_null.
        dimension: number of a sample's dimensions, D.
    """

    terms: np.ndarray
    totals: np.ndarray
    nulls: np.ndarray
    dimension: int

    @property
    def total(self) -> float:
        """The bound on −log₂ p(x_0), −K in Sohl-Dickstein et al. 2015."""
        return float(self.totals.mean())

    @property
    def standard_error(self) -> float:
        """Of `total`, for the choice of the samples and for the noise."""
        return _standard_error(self.totals)

    @property
    def gain(self) -> float:
        """K − L_null: how many bits it is better than a standard Gaussian."""
        return float((self.nulls - self.totals).mean())

    @property
    def gain_standard_error(self) -> float:
        """Of `gain`."""
        return _standard_error(self.nulls - self.totals)

    @property
    def bits_per_dim(self) -> float:
        """`total` / D."""
        return self.total / self.dimension


def _at(values: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values at t, `[batch]`, in a shape that broadcasts with samples."""
    return values.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))


def _bits(nats: torch.Tensor) -> torch.Tensor:
    return nats.flatten(1).sum(dim=1) / math.log(2)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
