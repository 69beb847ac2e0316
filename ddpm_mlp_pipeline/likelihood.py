"""The variational bound on the negative log-likelihood (Sohl-Dickstein et al. 2015; Ho et al. 2020), term by term."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.utils.data import Dataset

from .errors import ConfigurationError, DatasetError, DivergenceError
from .files import whole_file
from .loading import fingerprint
from .pipeline import DDPMMLPPipeline
from .progress import progress_bar

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
SECONDS_BETWEEN_SAVES = 10
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


def variational_bound(
    pipeline: DDPMMLPPipeline,
    dataset: Dataset,
    *,
    batch_size: int = 100,
    timestep_stride: int = 1,
    seed: int = 0,
    state_path: Path | None = None,
) -> BoundEstimate:
    """Estimate the variational bound of a pipeline on a data set.

    Each term of each sample is estimated with one draw of x_t. With a `timestep_stride` of n, samples share the work
    in groups of n, one after the other: the i-th of a group gets the timesteps i, i + n, i + 2n and so on, so that
    the group has every timestep once, in T / n calls of the network for each sample instead of T.

    Args:
        pipeline: with a stock `DDPMScheduler`.
        dataset: as `train` takes it: the data as the network is to see them. Images must be of 8 bits, and are
            measured as such (in bits for their levels); points have a density (in bits for the network's unit, the
            data's standard deviation).
        batch_size: how many go through the network at once.
        timestep_stride: a divisor of T and of the number of samples.
        seed: of the noise.
        state_path: a file for what has been done so far, and what it was done with. If it holds that of an earlier
            call with the same arguments, this one goes on from there.

    Raises:
        ConfigurationError: if the scheduler has no variance, or a number doesn't fit.
        DatasetError: if the data have another shape, aren't finite, or aren't levels of 8 bits.
        DivergenceError: if the network's output isn't finite.
    """
    bound = VariationalBound(pipeline.scheduler, discretized=not pipeline.is_points)
    T, number = bound.num_timesteps, len(dataset)
    if timestep_stride < 1 or T % timestep_stride or number % timestep_stride or number == 0:
        raise ConfigurationError(
            f"timestep_stride must divide the numbers of timesteps, {T}, and samples, {number}; got {timestep_stride}"
        )
    if batch_size < timestep_stride:
        raise ConfigurationError(f"batch_size must be at least timestep_stride, {timestep_stride}; got {batch_size}")
    batch_size -= batch_size % timestep_stride
    identity = _identity(pipeline, dataset, number, batch_size, timestep_stride, seed)
    is_begun = state_path is not None and state_path.exists()
    state = _State.load(state_path, identity) if is_begun else _State()
    done, last_save = len(state.totals) * timestep_stride, time.monotonic()
    with progress_bar(total=number, initial=done, desc="bound", leave=False) as progress:
        for start in range(done, number, batch_size):
            x_0 = dataset.__getitems__(list(range(start, min(start + batch_size, number))))
            _check_data(x_0, pipeline.sample_shape, start, discretized=not pipeline.is_points)
            noise_seed = np.random.SeedSequence([seed, start]).generate_state(1)[0]
            state.add(*_groups(bound, pipeline, x_0, timestep_stride, torch.Generator().manual_seed(int(noise_seed))))
            progress.update(len(x_0))
            is_last = start + len(x_0) == number
            if state_path is not None and (is_last or time.monotonic() > last_save + SECONDS_BETWEEN_SAVES):
                state.save(state_path, identity, overwrite=is_begun)
                is_begun = True
                last_save = time.monotonic()
    totals, nulls = np.array(state.totals), np.array(state.nulls)
    return BoundEstimate(state.term_sums / len(totals), totals, nulls, math.prod(pipeline.sample_shape))


class _State:
    """What has been estimated so far, which another call can go on from."""

    def __init__(self, term_sums: np.ndarray | float = 0.0, totals: Iterable[float] = (), nulls: Iterable[float] = ()):
        self.term_sums, self.totals, self.nulls = term_sums, list(totals), list(nulls)

    def add(self, terms: np.ndarray, nulls: np.ndarray) -> None:
        """Add groups: their terms, `[number, T + 1]`, and their −L_null, `[number]`."""
        self.term_sums = self.term_sums + terms.sum(axis=0)
        self.totals += terms.sum(axis=1).tolist()
        self.nulls += nulls.tolist()

    def save(self, path: Path, identity: str, overwrite: bool) -> None:
        with whole_file(path, overwrite) as temporary, temporary.open("wb") as file:
            np.savez(file, identity=identity, term_sums=self.term_sums, totals=self.totals, nulls=self.nulls)

    @classmethod
    def load(cls, path: Path, identity: str) -> _State:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = arrays["identity"].item()
                state = cls(arrays["term_sums"], arrays["totals"].tolist(), arrays["nulls"].tolist())
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigurationError(f"{path} is not the state of an estimate: {error}") from None
        if found != identity:
            raise ConfigurationError(f"{path} is of another estimate: remove it, or name another file")
        return state


@torch.no_grad()
def _groups(
    bound: VariationalBound, pipeline: DDPMMLPPipeline, x_0: torch.Tensor, stride: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The terms L_0, …, L_T of each group of a batch, `[number of groups, T + 1]`, and its −L_null."""
    x_0 = x_0.to(pipeline.device)
    place = torch.arange(len(x_0), device=x_0.device) % stride
    terms = []
    for first in range(0, bound.num_timesteps, stride):
        t = first + place
        eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        x_t = pipeline.scheduler.add_noise(x_0, eps, t)
        model_output = pipeline.unet(x_t, t).sample
        if not model_output.isfinite().all():
            raise DivergenceError(f"the network's output is not finite, at timestep {first} or soon after")
        terms.append(bound.term(model_output, x_0, x_t, t).reshape(-1, stride))
    prior, nulls = (values.reshape(-1, stride).mean(dim=1) for values in (bound.prior_term(x_0), bound.null(x_0)))
    return torch.cat([*terms, prior[:, None]], dim=1).cpu().numpy(), nulls.cpu().numpy()


def _check_data(x_0: torch.Tensor, sample_shape: tuple[int, ...], start: int, discretized: bool) -> None:
    if x_0.shape[1:] != sample_shape:
        raise DatasetError(f"the data are of the shape {tuple(x_0.shape[1:])}, but the network takes {sample_shape}")
    finite = x_0.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise DatasetError(f"sample {start + int(finite.int().argmin())} of the data is not finite")
    if discretized:
        levels = (x_0.double() + 1) * 127.5
        if levels.min() < -0.01 or levels.max() > 255.01 or (levels - levels.round()).abs().max() > 0.01:
            raise DatasetError(
                "images must be of 8 bits, scaled to [-1, 1]: the bound counts the bits of their levels"
            )


def _identity(pipeline: DDPMMLPPipeline, dataset: Dataset, number: int, *options: int) -> str:
    """What makes two estimates the same. (Of the data, the first and the last sample stand for all.)"""
    ends = dataset.__getitems__([0, number - 1])
    return json.dumps([*fingerprint(pipeline, data=ends), number, options], default=list)


def _at(values: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The values at t, `[batch]`, in a shape that broadcasts with samples."""
    return values.to(like.device)[t].reshape(-1, *[1] * (like.ndim - 1))


def _bits(nats: torch.Tensor) -> torch.Tensor:
    return nats.flatten(1).sum(dim=1) / math.log(2)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan
