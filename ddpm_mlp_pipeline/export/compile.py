"""`compile_scheduler`: compile a stock diffusers scheduler to a step table."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..errors import ConfigurationError, UnsupportedSchedulerError
from ..pipeline import alphas_cumprod_at
from ..runtime.step_table import EPS, X_0, StepTable, X, Z
from ..table_scheduler import StepTableScheduler
from .schedulers import SCHEDULERS

NUM_PROBES = 128  # equations for each step, with at most 4 · MAX_HISTORY unknowns
MAX_HISTORY = 16  # network evaluations: multistep solvers use up to four outputs, in PNDM's first steps four apart
# diffusers' exceptions for invalid values of options
WRONG_OPTION = (
    *(ValueError, TypeError, IndexError, AttributeError, ArithmeticError, NotImplementedError, AssertionError),
)
# Rounding allowed in a step and in a trajectory, relative to the outcome: in float64, and for the schedulers that
# always compute in float32
TOLERANCES = ((1e-9, 1e-6), (1e-6, 1e-4))


def make_scheduler(name: str, like: SchedulerMixin, **options: Any) -> SchedulerMixin:
    """Return a stock scheduler with the configuration of the one that a network was trained with.

    Args:
        name: a key of `SCHEDULERS`.
        like: the scheduler that the network was trained with.
        options: options of the new scheduler that differ from `like`.

    Raises:
        ConfigurationError: if there is no such scheduler, or it doesn't take these options.
    """
    cls = _class_of(name)
    unknown = set(options) - set(inspect.signature(cls).parameters)
    if unknown:
        raise ConfigurationError(f"{cls.__name__} has no option {', '.join(sorted(unknown))}")
    try:
        return cls.from_config(_whole_config(like), **options)
    except WRONG_OPTION as error:
        raise ConfigurationError(f"{cls.__name__}: {error}") from None


def split_options(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those of the scheduler's class and those of its `step`, such as DDIM's `eta`."""
    of_step = _step_options(_class_of(name))
    own = {key: value for key, value in options.items() if key not in of_step}
    return own, {key: value for key, value in options.items() if key in of_step}


def _step_options(cls: type[SchedulerMixin]) -> set[str]:
    given = {"self", "model_output", "timestep", "sample", "generator", "variance_noise", "return_dict"}
    return set(inspect.signature(cls.step).parameters) - set(inspect.signature(cls).parameters) - given


def _class_of(name: str) -> type[SchedulerMixin]:
    if name not in SCHEDULERS:
        raise ConfigurationError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    return getattr(diffusers, SCHEDULERS[name])


def _whole_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return a configuration whose default values another class keeps, instead of taking its own defaults."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


def compile_by_name(
    name: str, like: SchedulerMixin, num_inference_steps: int, options: dict[str, Any] | None = None
) -> StepTable:
    """Compile the stock scheduler of a name, with options of its class and of its `step` together.

    Args:
        name, like: as in `make_scheduler`.
        num_inference_steps: number of sampling steps.
        options: that differ from `like`.

    Raises:
        ConfigurationError, UnsupportedSchedulerError: as `make_scheduler` and `compile_scheduler` do.
    """
    own, of_step = split_options(name, options or {})
    return compile_scheduler(make_scheduler(name, like, **own), num_inference_steps, **of_step)


def compile_scheduler(scheduler: SchedulerMixin, num_inference_steps: int, **step_options: Any) -> StepTable:
    """Compile a stock scheduler to a step table.

    The steps of every stock scheduler for an ε-, v- or x_0-network are linear in the samples, the network's outputs,
    the clipped predictions of x_0 and the noise, of the same step and a few before. The compiler takes the real
    scheduler's steps in float64, on random numbers instead of the network's outputs. For each step, least squares
    finds the shortest sum of these terms that gives the network's next input. Each sum is checked by having more
    equations than terms. Finally the table is compared with the scheduler over a whole trajectory of a nonlinear
    network.

    Args:
        scheduler: a stock scheduler, which is not changed, or a `StepTableScheduler`, whose table is returned.
        num_inference_steps: number of sampling steps. (Second-order schedulers evaluate the network twice in most.)
        step_options: keyword arguments of the scheduler's `step`, such as `eta`.

    Raises:
        ConfigurationError: if the number of steps or an option is not valid.
        UnsupportedSchedulerError: if the scheduler's steps are not such sums.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(scheduler, StepTableScheduler):  # it holds tables already
        check_num_inference_steps(scheduler, num_inference_steps)
        content = json.dumps(scheduler.tables[num_inference_steps])
        return StepTable.parse(content.encode(), f"the checkpoint's table of {num_inference_steps} calls")
    if "trained_betas" not in config:
        raise UnsupportedSchedulerError(f"{name} can't be compiled: it is not for DDPM networks; choose another one")
    check_num_inference_steps(scheduler, num_inference_steps)
    # A configuration also keeps options of other schedulers.
    options = {key: config[key] for key in inspect.signature(type(scheduler)).parameters if key in config}
    if options.get("thresholding"):
        raise UnsupportedSchedulerError(f"{name} with thresholding can't be compiled: it depends on whole samples")
    if options.get("variance_type") == "learned_range" and isinstance(scheduler, DDPMScheduler):
        return _compile_learned_range(scheduler, num_inference_steps)
    if str(options.get("variance_type")).startswith("learned"):
        raise UnsupportedSchedulerError(
            f"{name} with a learned variance can't be compiled: set variance_type=fixed_large, or use ddim"
        )
    unknown = set(step_options) - _step_options(type(scheduler))
    if unknown:
        raise ConfigurationError(f"{name}.step has no option {', '.join(sorted(unknown))}")

    try:
        clip_range = float(options["clip_sample_range"]) if options.get("clip_sample") else None
        if clip_range is not None and not 0 < clip_range < np.inf:
            raise ValueError(f"clip_sample_range must be positive, got {clip_range}")
    except WRONG_OPTION as error:
        raise _wrong_options(name, num_inference_steps, error) from None
    # Where rounding hides the sum on replaced samples, it may still be found on the scheduler's own: see `_steps`.
    for is_replaced in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):  # some of the steps draw from the global generator
                probes = _Probes(scheduler, num_inference_steps, clip_range)
                steps = list(_steps(scheduler, num_inference_steps, probes, step_options, is_replaced))
        except UnsupportedSchedulerError:
            raise
        except WRONG_OPTION as error:
            raise _wrong_options(name, num_inference_steps, error) from None
        fits = ((_to_next(steps, probes.x_0, tolerance), replay) for tolerance, replay in TOLERANCES)
        to_next, replay_tolerance = next((fit for fit in fits if fit[0] is not None), (None, 0.0))
        if to_next is not None:
            break
    else:
        raise UnsupportedSchedulerError(
            f"{name} can't be compiled: its steps are not linear in samples, network outputs and noise"
        )
    timesteps = [step.timestep for step in steps]
    takes_known = is_replaced and hasattr(scheduler, "alphas_cumprod")
    table = StepTable(
        scheduler=name,
        initial_scale=steps[0].initial_scale,
        timesteps=np.array(timesteps, dtype=np.float32),
        to_x_0=np.array(probes.to_x_0) if clip_range is not None else np.zeros((len(steps), 2)),
        to_next=to_next,
        clip_range=clip_range,
        alphas_cumprod=alphas_cumprod_at(scheduler, timesteps).numpy() if takes_known else None,
    )
    _check_by_replay(table, scheduler, num_inference_steps, step_options, replay_tolerance)
    return table


def _wrong_options(name: str, num_inference_steps: int, error: Exception) -> ConfigurationError:
    reason = str(error) or "it breaks its own assertions"
    return ConfigurationError(f"{name} can't take {num_inference_steps} steps with these options: {reason}")


def _compile_learned_range(scheduler: DDPMScheduler, num_inference_steps: int) -> StepTable:
    """Compile DDPM with a variance that the network predicts between those of `fixed_small` and `fixed_large`.

    With v in [−1, 1] of the network's output, log σ² = ½ (1 + v) log β_t + ½ (1 − v) log β̃_t (Nichol & Dhariwal 2021,
    https://arxiv.org/abs/2102.09672, eq. 15): a v + b with the numbers of both tables.
    """
    large, small = (
        compile_scheduler(type(scheduler).from_config(scheduler.config, variance_type=kind), num_inference_steps)
        for kind in ("fixed_large", "fixed_small")
    )
    to_next = large.to_next.copy()
    is_noisy = to_next[:, 0, Z] != 0
    log_beta, log_posterior = (2 * np.log(np.where(is_noisy, t.to_next[:, 0, Z], 1)) for t in (large, small))
    to_next[:, 0, Z] = is_noisy
    log_variance = np.stack([(log_beta - log_posterior) / 2, (log_beta + log_posterior) / 2], axis=1)
    table = dataclasses.replace(large, to_next=to_next, log_variance=log_variance)
    _check_by_replay(table, scheduler, num_inference_steps, {}, TOLERANCES[0][1])
    return table


def check_num_inference_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raise a `ConfigurationError` unless the number of steps is from 1 to the number of training timesteps; or that
    of a table, where the scheduler has tables."""
    if isinstance(scheduler, StepTableScheduler):
        if num_inference_steps not in scheduler.tables:
            numbers = ", ".join(map(str, sorted(scheduler.tables)))
            raise ConfigurationError(
                f"the checkpoint has no table of {num_inference_steps} calls, only of {numbers}: name one of these, "
                "or another scheduler"
            )
        return
    trained = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= trained:
        raise ConfigurationError(
            f"the number of steps must be from 1 to {trained}, the number of training timesteps, "
            f"got {num_inference_steps}"
        )


@dataclass
class _Step:
    """Inputs and outcome of a step: float64 `[NUM_PROBES]`."""

    timestep: float
    x: np.ndarray  # the network's input
    eps: np.ndarray  # its output: ε, v or x_0
    z: np.ndarray | None  # the noise drawn
    x_next: np.ndarray  # the network's next input; after the last step, the sample
    initial_scale: float


def _steps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    network: Callable[[SchedulerMixin, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    step_options: dict[str, Any],
    is_replaced: bool = False,
) -> Iterator[_Step]:
    """Take a scheduler's steps as the pipeline does, on numbers that no step mixes.

    With `is_replaced`, random numbers of the same size take each outcome's place before the next step. Only then do
    two steps share no terms, and what a multistep scheduler remembers can be told from what it has just been given:
    known values replace parts of the sample, too.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    generator, replacement = (torch.Generator().manual_seed(seed) for seed in (0, 2))
    options = dict(step_options)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    latents = torch.randn(1, NUM_PROBES, generator=generator, dtype=torch.float64)
    sample = latents * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps
    # Other classes keep the option in their configurations, but take no variance.
    learns_variance = isinstance(scheduler, DDPMScheduler) and "learned" in scheduler.config.variance_type
    x = scheduler.scale_model_input(sample, timesteps[0])
    initial_scale = float((x / latents).median())
    for k, t in enumerate(timesteps):
        eps = network(scheduler, t, sample, x)
        output = torch.cat([eps, _v(x)], dim=1) if learns_variance else eps
        state = generator.get_state()
        sample = scheduler.step(output, t, sample, **options).prev_sample
        z = noise_drawn(generator, state, sample.shape)
        x_next = scheduler.scale_model_input(sample, timesteps[k + 1]) if k + 1 < len(timesteps) else sample
        _check_finite(scheduler, t, x_next)
        z_drawn = None if z is None else _numbers(z)
        yield _Step(float(t), _numbers(x), _numbers(eps), z_drawn, _numbers(x_next), initial_scale)
        if is_replaced and k + 1 < len(timesteps):
            sample = torch.randn(sample.shape, generator=replacement, dtype=sample.dtype) * sample.std()
            x_next = scheduler.scale_model_input(sample, timesteps[k + 1])
        x = x_next


def _v(x: torch.Tensor) -> torch.Tensor:
    """What stands in for the variance that a network predicts."""
    return torch.sin(3 * x)


def _numbers(values: torch.Tensor) -> np.ndarray:
    return values.double().numpy().ravel()


def _check_finite(scheduler: SchedulerMixin, t: torch.Tensor, values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} can't be compiled: its step at t = {float(t):g} divides by zero"
        )


def noise_drawn(generator: torch.Generator, state: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """Return the noise drawn from a generator since it was in `state`, or `None` if none was drawn.

    Raises:
        ValueError: if it is not one draw of float64 or float32 normals of this shape.
    """
    if torch.equal(state, generator.get_state()):
        return None
    for dtype in (torch.float64, torch.float32):
        again = torch.Generator().set_state(state)
        z = torch.randn(shape, generator=again, dtype=dtype)
        if torch.equal(again.get_state(), generator.get_state()):
            return z
    raise ValueError("its steps draw noise of another shape or type than the sample's")


class _Probes:
    """Return random numbers as a network's outputs, chosen so that clipping changes about half of x̂_0's values.

    Without clipping, x̂_0 is a sum of x and ε, and its coefficient can't be separated from theirs. Its coefficients of
    x and ε come from a scheduler without clipping: of the same class, or DDIM if that class doesn't return its x̂_0.

    Attributes:
        to_x_0: for each step, x̂_0's coefficients of x and ε, before clipping.
        x_0: for each step, x̂_0 after clipping.
    """

    def __init__(self, scheduler: SchedulerMixin, num_inference_steps: int, clip_range: float | None):
        self.generator = torch.Generator().manual_seed(1)
        self.clip_range = clip_range
        self.to_x_0: list[np.ndarray] = []
        self.x_0: list[np.ndarray] = []
        if clip_range is not None:
            for cls in (type(scheduler), DDIMScheduler):
                self.unclipped = cls.from_config(_whole_config(scheduler), clip_sample=False)
                self.unclipped.set_timesteps(num_inference_steps)
                zeros = torch.zeros(1, 1, dtype=torch.float64)
                output = copy.deepcopy(self.unclipped).step(zeros, self.unclipped.timesteps[0], zeros)
                if getattr(output, "pred_original_sample", None) is not None:
                    break

    def __call__(
        self, scheduler: SchedulerMixin, t: torch.Tensor, sample: torch.Tensor, x: torch.Tensor
    ) -> torch.Tensor:
        eps = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        if self.clip_range is None:
            return eps
        x_0 = copy.deepcopy(self.unclipped).step(eps, t, sample).pred_original_sample
        _check_finite(scheduler, t, x_0)
        row = _least_squares(np.stack([_numbers(x), _numbers(eps)], axis=1), _numbers(x_0))
        if row[1] != 0:  # at the first step of inverse DDIM, x_0 is x
            x_0 = 1.5 * self.clip_range * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            eps = (x_0 - row[0] * x) / row[1]
        self.unclipped.step(eps, t, sample)
        self.to_x_0.append(row)
        self.x_0.append(_numbers(x_0.clamp(-self.clip_range, self.clip_range)))
        return eps


def _to_next(steps: list[_Step], x_0: list[np.ndarray], tolerance: float) -> np.ndarray | None:
    """Return the coefficients of each step's shortest sum, `[steps, history, 4]`, or `None` if a step has no sum."""
    to_next = np.zeros((len(steps), MAX_HISTORY, 4))
    for k, step in enumerate(steps):
        for history in range(1, min(k + 1, MAX_HISTORY) + 1):
            columns: dict[tuple[int, int], np.ndarray] = {}
            for i in reversed(range(history)):  # `_shortest_sum` drops the oldest first
                past = steps[k - i]
                if past.z is not None:
                    columns[i, Z] = past.z
                columns[i, X], columns[i, EPS] = past.x, past.eps
                if x_0:
                    columns[i, X_0] = x_0[k - i]
            coefficients = _shortest_sum(columns, step.x_next, tolerance)
            if coefficients is not None:
                break
        else:
            return None
        for place, coefficient in coefficients.items():
            to_next[(k, *place)] = coefficient
    history = max([1, *(np.flatnonzero(to_next.any(axis=(0, 2))) + 1)])
    return to_next[:, :history]


def _shortest_sum(
    columns: dict[tuple[int, int], np.ndarray], target: np.ndarray, tolerance: float
) -> dict[tuple[int, int], float] | None:
    """Return coefficients of the fewest and newest columns that sum to the target, or `None`."""

    def fit(places: list[tuple[int, int]]) -> np.ndarray | None:
        A = np.stack([columns[place] for place in places], axis=1)
        coefficients = _least_squares(A, target)
        error = np.abs(A @ coefficients - target).max()
        return coefficients if error <= tolerance * max(np.abs(target).max(), 1e-30) else None

    places, coefficients = list(columns), fit(list(columns))
    if coefficients is None:
        return None
    for place in columns:
        fewer = [other for other in places if other != place]
        if fewer and (shorter := fit(fewer)) is not None:
            places, coefficients = fewer, shorter
    return dict(zip(places, coefficients.tolist(), strict=True))


def _least_squares(A: np.ndarray, target: np.ndarray) -> np.ndarray:
    size = np.abs(A).max(axis=0)
    coefficients = np.linalg.lstsq(A / size, target, rcond=None)[0]
    coefficients[np.abs(coefficients) < 1e-12 * np.abs(coefficients).max()] = 0.0  # rounding
    return coefficients / size


def _check_by_replay(
    table: StepTable,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    step_options: dict[str, Any],
    tolerance: float,
) -> None:
    """Compare the table with the scheduler over a trajectory of a nonlinear network."""

    def network(scheduler: SchedulerMixin, t: torch.Tensor, sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + float(t) / scheduler.config.num_train_timesteps)

    steps = list(_steps(scheduler, num_inference_steps, network, step_options))
    rows = np.zeros((len(steps), 4, NUM_PROBES))
    x = steps[0].x
    for k, step in enumerate(steps):
        rows[k, X] = x
        rows[k, EPS] = np.tanh(x + step.timestep / scheduler.config.num_train_timesteps)
        if table.clip_range is not None:
            rows[k, X_0] = (table.to_x_0[k] @ rows[k, [X, EPS]]).clip(-table.clip_range, table.clip_range)
        if step.z is not None:
            rows[k, Z] = step.z
            if table.log_variance is not None:
                rows[k, Z] *= np.exp(
                    (table.log_variance[k, 0] * _v(torch.tensor(x)).numpy() + table.log_variance[k, 1]) / 2
                )
        past = rows[max(0, k + 1 - table.history) : k + 1][::-1]
        x = np.einsum("ij,ijn->n", table.to_next[k, : len(past)], past)
        error = np.abs(x - step.x_next).max() / max(np.abs(step.x_next).max(), 1e-30)
        if not error <= tolerance:
            raise UnsupportedSchedulerError(
                f"{table.scheduler} can't be compiled: its table differs from the scheduler by {error:.1e} "
                f"after step {k + 1}"
            )
