"""The variational bound on −log p(x_0) (Sohl-Dickstein et al. 2015; Ho et al. 2020)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from diffusers import DDPMScheduler

from .errors import ConfigurationError

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
FAR = 1e6  # standard deviations; stands for infinity


class VariationalBound:
    r"""
    The terms of L = L_T + Σ_{t=2}^T L_{t−1} + L_0 ≥ −log p_θ(x_0) (Ho et al. 2020, https://arxiv.org/abs/2006.11239,
    eq. 5), for the reverse process of a stock `DDPMScheduler`.

    Terms are in bits per sample, summed over its dimensions. The scheduler's timestep t is the papers' t + 1.

    With `fixed_small`, the last denoising step, to x_0, has variance 0 and thus no density. As in Ho et al.'s code, it
    gets the variance of the step before, β̃_2. (Their code does so for `fixed_large`, too; here that keeps β_1.)

    Args:
        scheduler: the network's scheduler, with the `variance_type` `fixed_small`, `fixed_large` or `learned_range`
            (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15). The last needs a network that predicts
            twice as many channels as the samples have.
        discretized: whether p(x_0 | x_1) is the probability of the 256 levels of 8-bit images scaled to [-1, 1]
            (Ho et al., eq. 13), instead of a Gaussian density.
        clip_sample: whether to clip the predicted x_0, as in sampling; by default as the scheduler does. Training
            needs `False`, because clipped values have no gradient.

    Raises:
        ConfigurationError: if it is another scheduler, or the variance of its steps has no closed form.
    """

    def __init__(self, scheduler: DDPMScheduler, discretized: bool, clip_sample: bool | None = None):
        if not isinstance(scheduler, DDPMScheduler):
            raise ConfigurationError(
                f"the bound needs each step's variance, which {type(scheduler).__name__} doesn't define: "
                "use DDPMScheduler.from_config (ddpm-bound: --variance_type)"
            )
        config = scheduler.config
        if config.variance_type not in VARIANCE_TYPES:
            raise ConfigurationError(
                f"the bound takes a variance_type of {', '.join(VARIANCE_TYPES)}, not {config.variance_type}"
            )
        if config.thresholding:
            raise ConfigurationError("the bound is undefined with thresholding: set the scheduler's to False")
        clip_sample = config.clip_sample if clip_sample is None else clip_sample
        self.clip_range = config.clip_sample_range if clip_sample else math.inf
        self.prediction_type, self.variance_type = config.prediction_type, config.variance_type
        self.num_timesteps = config.num_train_timesteps  # T
        self.log_likelihood = discretized_log_likelihood if discretized else gaussian_log_likelihood
        if self.num_timesteps < 2:
            raise ConfigurationError("the bound needs at least 2 timesteps")
        # float64, because 1 − ᾱ_t cancels near t = 0, where most of the bits are
        betas = scheduler.betas.double()
        self.alphas_cumprod = (1 - betas).cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - self.alphas_cumprod)  # β̃_t, eq. 7
        posterior_variance[0] = posterior_variance[1]
        self.posterior_log_variance, self.log_betas = posterior_variance.log(), betas.log()
        # The coefficients of x_0 and x_t in the posterior mean μ̃_t, eq. 7
        self.share_of_x_0 = previous.sqrt() * betas / (1 - self.alphas_cumprod)
        self.share_of_x_t = (1 - betas).sqrt() * (1 - previous) / (1 - self.alphas_cumprod)

    def prior_term(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return L_T, the divergence of q(x_T | x_0) from a standard Gaussian: `[batch]`, in bits."""
        alpha_cumprod = self.alphas_cumprod[-1]
        variance = 1 - alpha_cumprod
        return _bits(0.5 * (alpha_cumprod * x_0.double() ** 2 + variance - 1 - variance.log()))

    def null(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return −L_null, the negative log-likelihood under a standard Gaussian (Sohl-Dickstein et al. 2015,
        https://arxiv.org/abs/1503.03585, table 1): `[batch]`, in bits."""
        zero = torch.zeros_like(x_0, dtype=torch.float64)
        return _bits(-self.log_likelihood(x_0.double(), zero, zero))

    def term(self, model_output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the bound's term for the denoising step from x_t.

        It is L_0 at t = 0, else the divergence of the posterior q(x_{t−1} | x_t, x_0) from p_θ(x_{t−1} | x_t).

        Args:
            model_output: the network's output, `[batch, *sample_shape]`, with twice the channels for `learned_range`.
            x_0, x_t: `[batch, *sample_shape]`.
            t: the scheduler's timesteps, `[batch]`.

        Returns:
            `[batch]`, in bits.
        """
        predicted_x_0, log_variance = self.predict(model_output, x_t, t)
        x_0 = x_0.double()
        posterior_log_variance = _at(self.posterior_log_variance, t, x_0)
        # Both means have the same term in x_t, which cancels.
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
        """Return the predicted x_0 and the logarithm of the variance of p_θ(x_{t−1} | x_t).

        Both are float64, `[batch, *sample_shape]`.
        """
        channels = x_t.shape[1]
        if self.variance_type == "learned_range" and model_output.shape[1] != 2 * channels:
            raise ConfigurationError("learned_range needs a network that predicts twice as many channels as it takes")
        # The further channels hold the learned variance, which the fixed types ignore.
        v, model_output, x_t = model_output[:, channels:].double(), model_output[:, :channels].double(), x_t.double()
        log_beta, log_variance = _at(self.log_betas, t, x_t), _at(self.posterior_log_variance, t, x_t)
        if self.variance_type == "learned_range":
            v = (v + 1) / 2  # −1 stands for β̃_t, 1 for β_t
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
        """Return μ_θ(x_t, t), the mean of p_θ(x_{t−1} | x_t): float64 (Ho et al. 2020, eq. 7, predicted x_0)."""
        x_0, _ = self.predict(model_output, x_t, t)
        return _at(self.share_of_x_0, t, x_t) * x_0 + _at(self.share_of_x_t, t, x_t) * x_t


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the probability that a Gaussian gives to each value's level (Ho et al. 2020, eq. 13).

    Args:
        x_0: values among the 256 levels −1, −1 + 2/255, …, 1, float64 `[batch, …]`.
        mean, log_variance: the Gaussian's parameters, of the same shape.

    Returns:
        Nats, of the same shape; finite for any distance between mean and x_0.
    """
    to_deviations = (-0.5 * log_variance).exp()
    lower = (x_0 - mean - 1 / 255) * to_deviations
    upper = (x_0 - mean + 1 / 255) * to_deviations
    # The outermost levels include the tails. (Infinite limits would give NaN gradients.)
    lower = torch.where(x_0 < -0.999, upper.clamp(max=0) - FAR, lower)
    upper = torch.where(x_0 > 0.999, lower.clamp(min=0) + FAR, upper)
    # Mirror to the lower tail, where log Φ of both limits is accurate
    is_upper_tail = lower + upper > 0
    lower, upper = torch.where(is_upper_tail, -upper, lower), torch.where(is_upper_tail, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


def gaussian_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of a Gaussian's density at each value of x_0: in nats, of the same shape."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x_0 - mean) ** 2 * (-log_variance).exp())


@dataclasses.dataclass
class BoundEstimate:
    """A variational bound in bits, averaged over samples.

    Attributes:
        terms: L_0, L_1, …, L_T, float64 `[T + 1]`.
        totals: each sample group's sum of the terms, float64 `[number of groups]`.
        nulls: each sample group's mean −L_null, float64 `[number of groups]`.
        dimension: D, the number of dimensions of a sample.
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
        """The standard error of `total`, due to the choice of samples and to the noise."""
        return _standard_error(self.totals)

    @property
    def gain(self) -> float:
        """K − L_null, the gain over a standard Gaussian."""
        return float((self.nulls - self.totals).mean())

    @property
    def gain_standard_error(self) -> float:
        """The standard error of `gain`."""
        return _standard_error(self.nulls - self.totals)

    @property
    def bits_per_dim(self) -> float:
        """`total` / D."""
        return self.total / self.dimension


def _at(values: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the values at t, `[batch]`, in a shape that broadcasts with `like`."""
    return values.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))


def _bits(nats: torch.Tensor) -> torch.Tensor:
    return nats.flatten(1).sum(dim=1) / math.log(2)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
