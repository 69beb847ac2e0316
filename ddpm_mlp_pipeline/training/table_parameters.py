"""The free numbers of a step table of few calls, and samples that are drawn with them and their gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..data.batches import Batch
from ..errors import ConfigurationError
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler, Terms, next_sample, predict_x_0
from .options import FittingArguments

# One step of the optimiser moves the log SNR and the guidance scale by so much more than the other numbers.
LOG_SNR_SCALE = 10.0
GUIDANCE_UNIT = 4.0


def check_num_calls(num_calls: Sequence[int], num_train_timesteps: int) -> None:
    """Refuse numbers of calls that no table can have.

    Raises:
        ConfigurationError: if one is below 1 or above the number of training timesteps.
    """
    if max(num_calls) > num_train_timesteps or min(num_calls) < 1:
        raise ConfigurationError(
            f"num_calls must be from 1 to {num_train_timesteps}, the number of training timesteps"
        )


@dataclasses.dataclass
class TableParameters:
    r"""
    The free numbers of a table, six for each call k, and w where calls are guided. What the network sees is
    α x_0 + σ ε, α² = 1 − σ² = ᾱ, and

        x̂_0 = clip((x − σ ε_θ(x, t)) / α),   ε̂ = (x − α x̂_0) / σ
        x′  = α′ ((1 + a) x̂_0 + d (x̂_0 − x̂_0 of the call before)) + σ′ (1 + b) (cos(s π/2) ε̂ + sin(s π/2) z)

    With a = b = d = 0 and s = 0 that is DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502, eq. 12) with the
    ε̂ of the clipped x̂_0. Larger s replace more of ε̂ by fresh noise. The last call returns
    (1 + a) x̂_0 + b ε̂ + d (x̂_0 − x̂_0 of the call before); a single call without ε̂, since its x is nothing but noise.
    A guided call has ε_θ = w ε_θ(x, t, c) + (1 − w) ε_θ(x, t, ∅) (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598). The mean of w is given, and how it differs between the calls is free.

    Attributes:
        numbers: `[6 or 7, calls]`: t / T, log(ᾱ / (1 − ᾱ)) / 10, a, b, s, d; and w / 4 up to a constant, where
            calls are guided.
        num_train_timesteps: T.
        prediction_type: of the network, as in the scheduler's configuration.
        clip_range: the largest magnitude of x̂_0, or `None`.
        mean_guidance_scale: the mean of w, or `None` without guidance.
    """

    numbers: torch.Tensor
    num_train_timesteps: int
    prediction_type: str
    clip_range: float | None
    mean_guidance_scale: float | None = None

    @classmethod
    def start(cls, num_calls: int, args: FittingArguments, scheduler: SchedulerMixin) -> TableParameters:
        """Return DDIM with calls at equal distances of the log SNR."""
        trained = torch.logit(scheduler.alphas_cumprod.double()).numpy()  # falls with t
        first = max(args.first_log_snr, trained.min())
        log_snr = np.linspace(first, max(min(args.last_log_snr, trained.max()), first), num_calls)
        t = np.interp(-log_snr, -trained, np.arange(len(trained))) / len(trained)
        numbers = torch.zeros(6 if args.guidance_scale is None else 7, num_calls)
        numbers[0], numbers[1], numbers[4] = torch.tensor(t), torch.tensor(log_snr / LOG_SNR_SCALE), args.noise
        config = scheduler.config
        clip_range = float(config.clip_sample_range) if config.get("clip_sample") else None
        return cls(numbers, config.num_train_timesteps, config.prediction_type, clip_range, args.guidance_scale)

    def resampled(self, num_calls: int) -> TableParameters:
        """Return the start for a table of fewer calls: the curves of these numbers, at as many equidistant places."""
        places = np.linspace(0, self.numbers.shape[1] - 1, num_calls)
        own = np.arange(self.numbers.shape[1])
        numbers = np.stack([np.interp(places, own, row) for row in self.numbers.detach().numpy()])
        numbers[2:4] /= 2  # corrections
        numbers[5, 0] = 0.0
        return dataclasses.replace(self, numbers=torch.tensor(numbers, dtype=torch.float32))

    @property
    def guidance_scale(self) -> torch.Tensor | None:
        """Each call's w, with gradients; `None` without guidance."""
        if self.mean_guidance_scale is None:
            return None
        return self.mean_guidance_scale + GUIDANCE_UNIT * (self.numbers[6] - self.numbers[6].mean())

    def rows(self) -> list[tuple[torch.Tensor, list[Any], list[list[Any]]]]:
        """Return the timestep, `to_x_0` and `to_next` of each call, as tensors with gradients."""
        t, log_snr, a, b, s, d = self.numbers[:6]
        t = t.clamp(0, 1 - 1 / self.num_train_timesteps)
        log_snr = log_snr * LOG_SNR_SCALE
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        angle = s * (math.pi / 2)
        rows: list[tuple[torch.Tensor, list[Any], list[list[Any]]]] = []
        for k in range(len(t)):
            to_x_0 = {
                "epsilon": [1 / alpha[k], -sigma[k] / alpha[k]],
                "v_prediction": [alpha[k], -sigma[k]],
                "sample": [torch.zeros_like(t[k]), torch.ones_like(t[k])],
            }[self.prediction_type]
            if k + 1 == len(t):
                of_x_0, of_eps, of_z, of_change = 1 + a[k], b[k] * (k > 0), 0.0, d[k]
            else:
                signal, noise = alpha[k + 1], sigma[k + 1] * (1 + b[k])
                of_x_0, of_change = signal * (1 + a[k]), signal * d[k]
                of_eps, of_z = noise * angle[k].cos(), noise * angle[k].sin()
            rest = of_eps / sigma[k]  # ε̂'s coefficient of x
            to_next = [self._terms(rest, of_x_0 + of_change * (k > 0) - rest * alpha[k], to_x_0, of_z)]
            if k > 0:
                to_next.append(self._terms(0.0, -of_change, rows[-1][1], 0.0))
            rows.append((t[k] * self.num_train_timesteps, to_x_0, to_next))
        return rows

    def _terms(self, of_x: Any, of_x_0: torch.Tensor, to_x_0: list[Any], of_z: Any) -> list[Any]:
        """Return the coefficients of x, ε, x̂_0 and z. Without clipping, x̂_0 is a sum of x and ε itself."""
        if self.clip_range is None:
            return [of_x + of_x_0 * to_x_0[0], of_x_0 * to_x_0[1], 0.0, of_z]
        return [of_x, 0.0, of_x_0, of_z]

    @torch.no_grad()
    def to_table(self) -> StepTable:
        """Return the table, in float64."""
        rows = dataclasses.replace(self, numbers=self.numbers.double()).rows()
        to_next = np.zeros((len(rows), min(len(rows), 2), 4))
        for k, (_, _, terms) in enumerate(rows):
            to_next[k, : len(terms)] = [[float(value) for value in values] for values in terms]
        to_x_0 = [[float(value) for value in values] for _, values, _ in rows]
        w = self.guidance_scale
        return StepTable(
            scheduler=StepTableScheduler.__name__,
            initial_scale=1.0,
            timesteps=np.array([float(t) for t, _, _ in rows], dtype=np.float32),
            to_x_0=np.array(to_x_0) if self.clip_range is not None else np.zeros((len(rows), 2)),
            to_next=to_next,
            clip_range=self.clip_range,
            alphas_cumprod=torch.sigmoid(self.numbers[1].double() * LOG_SNR_SCALE).numpy(),
            guidance_scale=w if w is None else w.double().numpy(),
        )


def draw(
    parameters: TableParameters,
    network: nn.Module,
    batch: Batch,
    generator: torch.Generator,
    null_label: int | None = None,
) -> torch.Tensor:
    """Draw samples with a table, `[batch, *sample_shape]`, with the labels and conditions of a batch.

    `null_label` is the network's "no label", which guided calls need.
    """
    shape, device = batch.x_0.shape, batch.x_0.device
    parameters = dataclasses.replace(parameters, numbers=parameters.numbers.to(device))
    x, past = torch.randn(shape, generator=generator).to(device), list[Terms]()
    w, known = parameters.guidance_scale, batch.known
    if w is not None:
        nothing = batch.forget(torch.ones(len(x), dtype=torch.bool, device=device), null_label)
        known = {name: torch.cat([value, nothing.known[name]]) for name, value in known.items()}
    for k, (t, to_x_0, to_next) in enumerate(parameters.rows()):
        z = torch.randn(shape, generator=generator).to(device)
        eps = network(x if w is None else torch.cat([x, x]), t, **known).sample[:, : x.shape[1]].to(x.dtype)
        if w is not None:
            of_known, of_nothing = eps.chunk(2)
            eps = w[k] * of_known + (1 - w[k]) * of_nothing
        past = [(x, eps, predict_x_0(x, eps, to_x_0, parameters.clip_range), z), *past][:2]
        x = next_sample(to_next, past)
    return x
