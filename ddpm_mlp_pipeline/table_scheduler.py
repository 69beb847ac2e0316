"""`StepTableScheduler`, a diffusers scheduler that plays step tables, such as those fitted to a checkpoint.

This file needs torch, numpy and diffusers only, because a checkpoint carries a copy of it.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

# x, ε, x̂_0 and z of a call: what a step is a sum of. z is `None` where no step uses it.
Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
Number = float | torch.Tensor


def predict_x_0(
    x: torch.Tensor, eps: torch.Tensor, to_x_0: Sequence[Number], clip_range: float | None
) -> torch.Tensor:
    """Return a call's prediction of x_0 (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 15), clipped."""
    x_0 = to_x_0[0] * x + to_x_0[1] * eps
    return x_0 if clip_range is None else x_0.clamp(-clip_range, clip_range)


def next_sample(to_next: Sequence[Sequence[Number]], past: Sequence[Terms]) -> torch.Tensor:
    """Return what the network sees next: the sum of the terms of the last calls, the newest first."""
    products = [
        coefficient * term
        for coefficients, terms in zip(to_next, past, strict=False)
        for coefficient, term in zip(coefficients, terms, strict=True)
        if term is not None
    ]
    return torch.stack(products).sum(dim=0)


@dataclass
class _Table:
    """A step table as plain numbers; the runtime's `StepTable` says what they mean."""

    initial_scale: float
    clip_range: float | None
    timesteps: list[float]
    to_x_0: list[list[float]]
    to_next: list[list[list[float]]]
    alphas_cumprod: list[float | None]
    guidance_scale: list[float]

    @classmethod
    def of(cls, table: dict[str, Any]) -> "_Table":
        steps = table["steps"]
        if any("log_variance" in step for step in steps):
            raise ValueError("a scheduler's table can have no learned variance")
        rows = cls(
            table["initial_scale"],
            table["clip_range"],
            [float(np.float32(step["timestep"])) for step in steps],
            [step["to_x_0"] for step in steps],
            [step["to_next"] for step in steps],
            [step.get("alpha_cumprod") for step in steps],
            [step.get("guidance_scale", 1.0) for step in steps],
        )
        shapes = all(
            len(to_x_0) == 2 and 1 <= len(to_next) <= k + 1 and all(len(row) == 4 for row in to_next)
            for k, (to_x_0, to_next) in enumerate(zip(rows.to_x_0, rows.to_next, strict=True))
        )
        lists = [
            rows.timesteps,
            rows.guidance_scale,
            *rows.to_x_0,
            *(row for to_next in rows.to_next for row in to_next),
        ]
        numbers = itertools.chain([rows.initial_scale, rows.clip_range or 1.0], *lists)
        if not steps or not shapes or not all(math.isfinite(number) for number in numbers):
            raise ValueError("a step table must have at least one step, of finite numbers in the shapes of its format")
        return rows

    @functools.cached_property
    def history(self) -> int:
        """The number of calls that a step looks back over, including its own."""
        return max(map(len, self.to_next))

    @functools.cached_property
    def is_noise_used(self) -> list[bool]:
        """Whether a call's noise is used, by its own step or a later one."""
        used = [False] * len(self.to_next)
        for k, to_next in enumerate(self.to_next):
            for i, (*_, of_z) in enumerate(to_next):
                used[k - i] |= of_z != 0
        return used


class StepTableScheduler(SchedulerMixin, ConfigMixin):
    r"""
    A scheduler whose steps are rows of numbers: of a step table, as `ddpm-fit` finds them for a checkpoint.

    Each call of the network turns x_k and the network's output ε_k into x_k+1 by

        x̂_0,k  = clip(to_x_0[k] · (x_k, ε_k), −clip_range, clip_range)
        x_k+1  = Σ_i to_next[k, i] · (x_k−i, ε_k−i, x̂_0,k−i, z_k−i)

    with standard normal noise z_k. The first x is `initial_scale` times standard normal noise, and the last one is
    the sample.

    Parameters:
        tables (`list[dict]`):
            The tables, each as `step_table.json` holds one (see `export/FORMAT.md`), without a learned variance. The
            first is the default. `num_inference_steps`, the number of calls, chooses one.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type, clip_sample,
        clip_sample_range, rescale_betas_zero_snr:
            Options of the `DDPMScheduler` that the network was trained with. The tables' numbers already account for
            them; they are kept for other schedulers, `X.from_config(pipe.scheduler.config)`.

    Raises:
        ValueError: if there is no table, or one isn't valid.
    """

    _compatibles: ClassVar = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config
    def __init__(
        self,
        tables: list[dict[str, Any]] = (),  # type: ignore[assignment]  # diffusers wants a default for every option
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        rescale_betas_zero_snr: bool = False,
    ):
        self.trained_with = DDPMScheduler(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            trained_betas,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self.betas, self.alphas_cumprod = self.trained_with.betas, self.trained_with.alphas_cumprod
        if not tables:
            raise ValueError("a StepTableScheduler needs at least one table")
        try:
            self.tables = {len(table["steps"]): table for table in tables}
            self._tables = {number: _Table.of(table) for number, table in self.tables.items()}
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not a step table: {type(error).__name__}: {error}") from None
        self.default_num_inference_steps = len(tables[0]["steps"])
        self.num_inference_steps: int | None = None
        self._choose(self.default_num_inference_steps)

    @property
    def config(self) -> FrozenDict:
        """The options, without the tables, which no other scheduler's `from_config` expects."""
        return FrozenDict({key: value for key, value in self._internal_dict.items() if key != "tables"})

    def _choose(self, num_inference_steps: int) -> None:
        self.table = self._tables[num_inference_steps]
        self.init_noise_sigma = self.table.initial_scale
        self.timesteps = torch.tensor(self.table.timesteps, dtype=torch.float32)
        self.step_index = 0
        self.past: list[Terms] = []  # of the last calls, the newest first

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """
        Choose a table and begin it.

        Args:
            num_inference_steps (`int`, *optional*): the table's number of calls; by default that of the first table.
            device (`str` or `torch.device`, *optional*): where to move the timesteps.

        Raises:
            ValueError: if no table has that number of calls.
        """
        if num_inference_steps is None:
            num_inference_steps = self.default_num_inference_steps
        if num_inference_steps not in self.tables:
            numbers = ", ".join(map(str, sorted(self.tables)))
            raise ValueError(
                f"there is no table of {num_inference_steps} calls, only of {numbers}: choose one of these, or "
                "another scheduler, such as DDPMScheduler.from_config(pipeline.scheduler.config)"
            )
        self._choose(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = self.timesteps.to(device)

    @property
    def guidance_scales(self) -> list[float]:
        """w of each call of the chosen table, which a pipeline guides with unless it is asked for another."""
        return self.table.guidance_scale

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample as it is: the tables' samples are what the network sees."""
        return sample

    def alphas_cumprod_at(self, timesteps: Sequence[float]) -> torch.Tensor:
        """
        Return ᾱ of what the network sees when it is told these timesteps of the table, float64 `[timesteps]`.

        A fitted table may tell the network another timestep than the one whose ᾱ the sample has in training.

        Raises:
            ValueError: if the table doesn't say.
        """
        known = dict(zip(self.table.timesteps, self.table.alphas_cumprod, strict=True))
        values = [known[float(t)] for t in timesteps]
        if None in values:
            raise ValueError("the step table has no alpha_cumprod, so that it takes no known values")
        return torch.tensor(values, dtype=torch.float64)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """
        Take the table's next step.

        Args:
            model_output (`torch.Tensor`): the network's output for `sample`, of the same shape.
            timestep (`float` or `torch.Tensor`): what the network was told. The steps are taken in order, whatever it
                is.
            sample (`torch.Tensor`): x_k.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): of the noise.
            return_dict (`bool`, defaults to `True`): whether to return a `SchedulerOutput` rather than a tuple.

        Returns:
            `SchedulerOutput` or `tuple`: its `prev_sample` is x_k+1.

        Raises:
            ValueError: if all steps of the table have been taken.
        """
        if self.step_index >= len(self.timesteps):
            raise ValueError("all steps of the table have been taken: call set_timesteps first")
        table, k = self.table, self.step_index
        x_0 = predict_x_0(sample, model_output, table.to_x_0[k], table.clip_range)
        z = None
        if table.is_noise_used[k]:
            z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        self.past = [(sample, model_output, x_0, z), *self.past][: table.history]
        prev_sample = next_sample(table.to_next[k], self.past)
        self.step_index += 1
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Add noise as in training (Ho et al. 2020, eq. 4)."""
        return self.trained_with.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return v, as in training (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, section 4)."""
        return self.trained_with.get_velocity(sample, noise, timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
