"""`compile_scheduler`: a stock diffusers scheduler to a step table."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ddpm_mlp_pipeline.errors import ConfigurationError, UnsupportedSchedulerError

from .step_table import StepTable

SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}  # by the names that the commands take
NUM_PROBES = 64  # equations for each step's four unknowns
TOLERANCE = 1e-9


def compile_scheduler(scheduler: SchedulerMixin, num_inference_steps: int) -> StepTable:
    """Find the coefficients of a scheduler's steps by taking the steps.

    Each step of DDPM and DDIM is linear in the sample, the network's output, the clipped prediction of x_0 and the
    noise. So the real scheduler takes every step, in float64, on random numbers in place of these, and least squares
    finds the coefficients; that the fit is exact shows that the step was of this form.

    Args:
        scheduler: a stock scheduler; it is left as it is.
        num_inference_steps: number of sampling steps.

    Raises:
        ConfigurationError: if the scheduler can't take so many steps.
        UnsupportedSchedulerError: if the scheduler's steps are not of this form.
    """
    name, config = type(scheduler).__name__, scheduler.config
    check_num_inference_steps(scheduler, num_inference_steps)
    if config.get("thresholding"):
        raise UnsupportedSchedulerError(f"{name} with thresholding can't be compiled: it depends on whole samples")
    if str(config.get("variance_type")).startswith("learned"):
        raise UnsupportedSchedulerError(f"{name} with a learned variance can't be compiled: it needs another network")
    clip_range = float(config.clip_sample_range) if config.get("clip_sample") else None

    scheduler = type(scheduler).from_config(config)
    scheduler.set_timesteps(num_inference_steps)
    unclipped = type(scheduler).from_config(config, clip_sample=False)
    unclipped.set_timesteps(num_inference_steps)

    generator = torch.Generator().manual_seed(0)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": generator} if takes_generator else {}
    rows_x_0, rows_next = [], []
    for t in scheduler.timesteps:
        x, eps = torch.randn(2, 1, NUM_PROBES, generator=generator, dtype=torch.float64)
        x_0_row = np.zeros(2)
        columns = [x, eps]
        if clip_range is not None:
            x_0 = unclipped.step(eps, t, x, **step_kwargs).pred_original_sample
            x_0_row = _fit(name, [x, eps], x_0)
            # Scaled so that about half of the predictions are clipped: only then can the share of x̂_0 in the next
            # sample be told from those of x and ε, of which it is a sum where it is not clipped.
            scale = 1.5 * clip_range / x_0.std()
            x, eps = scale * x, scale * eps
            columns = [x, eps, (scale * x_0).clamp(-clip_range, clip_range)]
        # The scheduler draws its own noise: the same generator, set back, gives it again.
        state = generator.get_state()
        x_next = scheduler.step(eps, t, x, **step_kwargs).prev_sample
        z = torch.randn(x.shape, generator=generator.set_state(state), dtype=torch.float64)
        row = _fit(name, [*columns, z], x_next)
        rows_x_0.append(x_0_row)
        rows_next.append(row if clip_range is not None else np.insert(row, 2, 0.0))
    return StepTable(
        scheduler=name,
        timesteps=scheduler.timesteps.numpy().astype(np.float32),
        to_x_0=np.array(rows_x_0),
        to_next=np.array(rows_next),
        clip_range=clip_range,
    )


def check_num_inference_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raise a `ConfigurationError` unless the scheduler, as it was trained with, has so many steps."""
    trained = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= trained:
        raise ConfigurationError(
            f"the number of steps must be from 1 to {trained}, which the model was trained with; "
            f"got {num_inference_steps}"
        )


def _fit(name: str, columns: list[torch.Tensor], target: torch.Tensor) -> np.ndarray:
    """The coefficients with which the columns sum to the target."""
    A = np.stack([column.numpy().ravel() for column in columns], axis=1)
    b = target.numpy().ravel()
    size = np.abs(A).max(axis=0)
    coefficients = np.linalg.lstsq(A / size, b, rcond=None)[0]
    if not np.abs(A / size @ coefficients - b).max() <= TOLERANCE * np.abs(b).max():
        raise UnsupportedSchedulerError(
            f"{name} can't be compiled: its steps are not sums of the sample, the network's output and noise"
        )
    coefficients[np.abs(coefficients) < TOLERANCE * np.abs(coefficients).max()] = 0.0  # rounding, where none is
    return coefficients / size
