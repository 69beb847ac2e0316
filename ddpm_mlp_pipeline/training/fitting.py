r"""
Fit step tables of few network calls to a checkpoint: the numbers of a sampler, by the distance of its samples to data.

A solver approximates an equation, whatever the data are, and needs many calls to do so well. A table of few calls has
a few dozen numbers that can be fitted as weights are: by gradients, through all calls, of a distance between samples
and data (Watson et al. 2022, https://arxiv.org/abs/2202.05830, with a kernel distance on Inception's features).
Here it is the energy distance on the network's own activations, which any checkpoint has. The weights don't change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..data.batches import Batch, TensorBatches
from ..errors import CheckpointError, ConfigurationError, DatasetError, DivergenceError
from ..files import whole_file
from ..loading import fingerprint
from ..pipeline import DDPMMLPPipeline
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler, Terms, next_sample, predict_x_0
from .fit_features import FitFeatures, PointFeatures, energy_distance, mean_distance

CHUNK = 256  # samples at once, where no gradient is needed
LOG_SNR_SCALE = 10.0  # one step of the optimiser moves the log SNR by so much more than the other numbers
AVERAGING = 0.9  # decay of the average of the parameters over the optimiser's steps


@dataclasses.dataclass(frozen=True)
class FittingArguments:
    """Options of a fit. The defaults for points and images are [`FittingArguments.of_points`] and `of_images`.

    Attributes:
        steps: optimiser steps for each table.
        batch_size: samples of each step, `num_references` the data that they are compared with.
        num_held_out: data that the best table is chosen by, and `num_drawn` samples for that.
        check_steps: how often that is measured.
        learning_rate: of Adam.
        first_log_snr, last_log_snr: between which the calls are spread at first.
        noise: share of fresh noise at first, as an angle: 0 is none, 1 is all.
        seed: of everything random.
    """

    steps: int
    batch_size: int
    num_references: int
    num_held_out: int
    num_drawn: int
    check_steps: int
    learning_rate: float
    first_log_snr: float
    last_log_snr: float
    noise: float
    seed: int = 0

    @classmethod
    def of_points(cls, **options: Any) -> FittingArguments:
        return cls(**(_OF_POINTS | options))

    @classmethod
    def of_images(cls, **options: Any) -> FittingArguments:
        return cls(**(_OF_IMAGES | options))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "seed" and value < 1:
                raise ConfigurationError(f"{field.name} must be at least 1, got {value}")


_OF_POINTS: dict[str, Any] = {
    **{"steps": 400, "batch_size": 512, "num_references": 1024, "num_held_out": 8192, "num_drawn": 4096},
    **{"check_steps": 50, "learning_rate": 0.01, "first_log_snr": -5.0, "last_log_snr": 6.0, "noise": 0.0},
}
_OF_IMAGES: dict[str, Any] = {
    **{"steps": 100, "batch_size": 96, "num_references": 2048, "num_held_out": 1024, "num_drawn": 512},
    **{"check_steps": 20, "learning_rate": 0.02, "first_log_snr": -5.0, "last_log_snr": 4.5, "noise": 0.5},
}


@dataclasses.dataclass
class TableParameters:
    r"""
    The free numbers of a table, six for each call k. What the network sees is α x_0 + σ ε, α² = 1 − σ² = ᾱ, and

        x̂_0 = clip((x − σ ε_θ(x, t)) / α),   ε̂ = (x − α x̂_0) / σ
        x′  = α′ ((1 + a) x̂_0 + d (x̂_0 − x̂_0 of the call before)) + σ′ (1 + b) (cos(s π/2) ε̂ + sin(s π/2) z)

    With a = b = d = 0 and s = 0 that is DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502, eq. 12) with the
    ε̂ of the clipped x̂_0. Larger s replace more of ε̂ by fresh noise. The last call returns
    (1 + a) x̂_0 + b ε̂ + d (x̂_0 − x̂_0 of the call before).

    Attributes:
        numbers: `[6, calls]`: t / T, log(ᾱ / (1 − ᾱ)) / 10, a, b, s, d.
        num_train_timesteps: T.
        prediction_type: of the network, as in the scheduler's configuration.
        clip_range: the largest magnitude of x̂_0, or `None`.
    """

    numbers: torch.Tensor
    num_train_timesteps: int
    prediction_type: str
    clip_range: float | None

    @classmethod
    def start(cls, num_calls: int, args: FittingArguments, scheduler: SchedulerMixin) -> TableParameters:
        """Return DDIM with calls at equal distances of the log SNR."""
        trained = torch.logit(scheduler.alphas_cumprod.double()).numpy()  # falls with t
        first = max(args.first_log_snr, trained.min())
        log_snr = np.linspace(first, max(min(args.last_log_snr, trained.max()), first), num_calls)
        t = np.interp(-log_snr, -trained, np.arange(len(trained))) / len(trained)
        numbers = torch.zeros(6, num_calls)
        numbers[0], numbers[1], numbers[4] = torch.tensor(t), torch.tensor(log_snr / LOG_SNR_SCALE), args.noise
        config = scheduler.config
        clip_range = float(config.clip_sample_range) if config.get("clip_sample") else None
        return cls(numbers, config.num_train_timesteps, config.prediction_type, clip_range)

    def resampled(self, num_calls: int) -> TableParameters:
        """Return the start for a table of fewer calls: the curves of these numbers, at as many equidistant places."""
        places = np.linspace(0, self.numbers.shape[1] - 1, num_calls)
        own = np.arange(self.numbers.shape[1])
        numbers = np.stack([np.interp(places, own, row) for row in self.numbers.detach().numpy()])
        numbers[2:4] /= 2  # corrections
        numbers[5, 0] = 0.0
        return dataclasses.replace(self, numbers=torch.tensor(numbers, dtype=torch.float32))

    def rows(self) -> list[tuple[torch.Tensor, list[Any], list[list[Any]]]]:
        """Return the timestep, `to_x_0` and `to_next` of each call, as tensors with gradients."""
        t, log_snr, a, b, s, d = self.numbers
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
                of_x_0, of_eps, of_z, of_change = 1 + a[k], b[k], 0.0, d[k]
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
        return StepTable(
            scheduler=StepTableScheduler.__name__,
            initial_scale=1.0,
            timesteps=np.array([float(t) for t, _, _ in rows], dtype=np.float32),
            to_x_0=np.array(to_x_0) if self.clip_range is not None else np.zeros((len(rows), 2)),
            to_next=to_next,
            clip_range=self.clip_range,
            alphas_cumprod=torch.sigmoid(self.numbers[1].double() * LOG_SNR_SCALE).numpy(),
        )


def draw(parameters: TableParameters, network: nn.Module, batch: Batch, generator: torch.Generator) -> torch.Tensor:
    """Draw samples with a table, `[batch, *sample_shape]`, with the labels and conditions of a batch."""
    x, past = torch.randn(batch.x_0.shape, generator=generator), list[Terms]()
    for t, to_x_0, to_next in parameters.rows():
        z = torch.randn(batch.x_0.shape, generator=generator)
        eps = network(x, t, **batch.known).sample[:, : x.shape[1]]
        past = [(x, eps, predict_x_0(x, eps, to_x_0, parameters.clip_range), z), *past][:2]
        x = next_sample(to_next, past)
    return x


@dataclasses.dataclass
class _Fit:
    """The state of the fit of one table, between two steps."""

    start: torch.Tensor
    numbers: torch.Tensor
    optimizer: dict[str, Any]
    average: torch.Tensor
    step: int = 0
    best: torch.Tensor | None = None
    best_distance: float = math.inf


class TableFitter:
    """
    Fits tables of several numbers of calls, from the largest to the smallest, each begun from the one before.

    Every step draws its randomness from the seed and its own number, so that a resumed fit goes on exactly.

    Args:
        pipeline: the pipeline, whose weights are not changed. Its scheduler is the one that it was trained with, or
            has that one's options.
        data: data in the network's units, in the pipeline's classes and conditions.
        features: what samples and data are compared on.
        args: the options.
        state_path: a .json file of the state, which is written at each check, and from which an earlier fit with the
            same options goes on.

    Raises:
        ConfigurationError: if `state_path` is of another fit.
        DatasetError: if there are too few data, or they lack the labels that the network takes.
    """

    def __init__(
        self,
        pipeline: DDPMMLPPipeline,
        data: TensorBatches,
        features: FitFeatures,
        args: FittingArguments,
        state_path: Path | None = None,
    ):
        self.pipeline, self.data, self.features, self.args, self.path = pipeline, data, features, args, state_path
        self.network = pipeline.unet.eval().requires_grad_(False)
        order = torch.randperm(len(data), generator=self._generator(0, 0)).tolist()
        needed = args.num_held_out + args.num_references
        if pipeline.num_classes and data.class_labels is None:
            raise DatasetError(
                "the network takes labels, but the data have none: name their column with --label_column"
            )
        if len(data) < 2 * args.batch_size:
            raise DatasetError(f"{len(data)} samples are too few for a fit: it needs {2 * args.batch_size}")
        held_out = min(args.num_held_out, len(data) // 2) if len(data) < needed else args.num_held_out
        self.held_out, self.fitted = order[:held_out], order[held_out:]
        if data.class_labels is not None:
            for indices in (self.held_out, self.fitted):
                indices.sort(key=data.class_labels.tolist().__getitem__)  # stable
        number = min(args.num_references, len(self.fitted))
        self.references = self._features_of(self._some(number, self._generator(0, 3)))
        self.held_out_references = self._features_of(data.__getitems__(self.held_out))
        self.log: list[dict[str, Any]] = []  # the distance to the held-out data at each check
        self.tables: dict[int, StepTable] = {}
        self._identity = self._identify()
        self._resumed = self._load()

    def fit(self, num_calls: Sequence[int], on_step: Callable[[], Any] | None = None) -> dict[int, StepTable]:
        """Return the best table by the held-out data for each number of calls.

        Raises:
            ConfigurationError: if there are more calls than training timesteps.
            DivergenceError: if the distance is not finite.
        """
        T, previous = self.pipeline.scheduler.config.num_train_timesteps, None
        if max(num_calls) > T or min(num_calls) < 1:
            raise ConfigurationError(f"the numbers of calls must be from 1 to {T}, the number of training timesteps")
        for number in sorted(set(num_calls), reverse=True):
            if previous is None:
                start = TableParameters.start(number, self.args, self.pipeline.scheduler)
            else:
                start = previous.resampled(number)
            previous = self._fit_one(start, on_step)
            self.tables[number] = previous.to_table()
        return self.tables

    def _fit_one(self, start: TableParameters, on_step: Callable[[], Any] | None) -> TableParameters:
        number, args = start.numbers.shape[1], self.args
        numbers = start.numbers.clone().requires_grad_()
        parameters = dataclasses.replace(start, numbers=numbers)
        optimizer = torch.optim.Adam([numbers], lr=args.learning_rate, betas=(0.9, 0.99))
        state = self._resumed.pop(number, None)
        if state is None or not torch.equal(state.start, start.numbers):  # none, or begun from another table
            self.log = [row for row in self.log if row["num_calls"] != number]
            state = _Fit(start.numbers, start.numbers.clone(), optimizer.state_dict(), start.numbers.clone())
        with torch.no_grad():
            numbers.copy_(state.numbers)
        optimizer.load_state_dict(state.optimizer)
        if state.step == 0:
            self._check(state, parameters)
        while state.step < args.steps:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * (1 - state.step / args.steps)
            loss = self._loss(parameters, state.step)
            optimizer.zero_grad()
            loss.backward()
            if numbers.grad is None or not (loss.isfinite() and numbers.grad.isfinite().all()):
                raise DivergenceError(f"the distance of {number} calls is not finite at step {state.step}")
            optimizer.step()
            state.step += 1
            decay = min(AVERAGING, state.step / (state.step + 9))
            state.average.lerp_(numbers.detach(), 1 - decay)
            if on_step is not None:
                on_step()
            if state.step % args.check_steps == 0 or state.step == args.steps:
                self._check(state, parameters)
                state.numbers, state.optimizer = numbers.detach(), optimizer.state_dict()
                self._save(number, state)
        assert state.best is not None
        return dataclasses.replace(start, numbers=state.best)

    def _loss(self, parameters: TableParameters, step: int) -> torch.Tensor:
        """The distance between fresh samples and data, which share their labels and conditions' distribution."""
        generator, args = self._generator(parameters.numbers.shape[1], step + 1), self.args
        batch = self._some(args.batch_size, generator)
        samples = batch._replace(x_0=draw(parameters, self.network, batch, generator))
        references, scales = self.references
        if len(self.fitted) > args.num_references and isinstance(self.features, PointFeatures):  # cheap: take others
            references = self.features(self._some(args.num_references, generator), generator)
        return energy_distance(self.features(samples, generator), references, scales)

    @torch.no_grad()
    def _check(self, state: _Fit, parameters: TableParameters) -> None:
        """Keep the averaged numbers if their samples are closest to the held-out data so far."""
        number = parameters.numbers.shape[1]
        distance = self.distance(dataclasses.replace(parameters, numbers=state.average))
        self.log.append({"num_calls": number, "step": state.step, "distance": distance})
        if not math.isfinite(distance):
            raise DivergenceError(f"the samples of {number} calls are not finite: train the network for longer")
        if distance < state.best_distance:
            state.best, state.best_distance = state.average.clone(), distance

    @torch.no_grad()
    def distance(self, parameters: TableParameters) -> float:
        """Return the distance between samples, always of the same noise, and the held-out data."""
        generator = self._generator(0, 1)
        labels = self._some(self.args.num_drawn, generator, self.held_out)
        groups: list[list[torch.Tensor]] = []
        for batch in _split(labels):
            samples = batch._replace(x_0=draw(parameters, self.network, batch, generator))
            groups.append(self.features(samples, generator))
        features = [torch.cat(some) for some in zip(*groups, strict=True)]
        return float(energy_distance(features, *self.held_out_references))

    @torch.no_grad()
    def _features_of(self, data: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the features of data, and their mean distances."""
        generator = self._generator(0, 2)
        batches = _split(data)
        groups = [self.features(batch, generator) for batch in batches]
        features = [torch.cat(some) for some in zip(*groups, strict=True)]
        return features, [mean_distance(x) for x in features]

    def _some(self, number: int, generator: torch.Generator, indices: list[int] | None = None) -> Batch:
        """Choose some of the data, by default of those that the table is fitted to.

        Each class has its share of them, up to one: chance in the labels would move the distance more than a step.
        """
        indices = self.fitted if indices is None else indices  # in the order of their labels
        places = (torch.arange(number) + torch.rand(number, generator=generator)) * (len(indices) / number)
        return self.data.__getitems__([indices[int(place)] for place in places.clamp(max=len(indices) - 1)])

    def _generator(self, number: int, step: int) -> torch.Generator:
        (seed,) = np.random.SeedSequence([self.args.seed, number, step]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def _identify(self) -> str:
        """Return a hash of all that the result depends on."""
        some = self.data.__getitems__(self.held_out[:64] + self.fitted[:64])
        sha, config = fingerprint(self.pipeline, data=some.x_0)
        what = [sha, config, dataclasses.asdict(self.args), len(self.data), type(self.features).__name__]
        return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()

    def _save(self, number: int, state: _Fit) -> None:
        if self.path is None:
            return
        self._states[number] = {
            "step": state.step,
            "start": state.start.tolist(),
            "numbers": state.numbers.tolist(),
            "average": state.average.tolist(),
            "best": state.best.tolist() if state.best is not None else None,
            "best_distance": state.best_distance,
            "optimizer": {name: value.tolist() for name, value in state.optimizer["state"][0].items()},
        }
        content = {"identity": self._identity, "fits": self._states, "log": self.log}
        with whole_file(self.path, overwrite=True) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def _load(self) -> dict[int, _Fit]:
        self._states: dict[int, dict[str, Any]] = {}
        if self.path is None or not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["identity"] != self._identity:
                raise ConfigurationError(f"{self.path} is of a fit with other options, weights or data: delete it")
            self._states = {int(number): state for number, state in content["fits"].items()}
            self.log = content["log"]
            return {number: self._restore(state) for number, state in self._states.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise CheckpointError(f"{self.path} is not the state of a fit: delete it") from None

    def _restore(self, state: dict[str, Any]) -> _Fit:
        names = ("start", "numbers", "average", "best")
        start, numbers, average, best = (torch.tensor(state[name]) for name in names)
        moments = {name: torch.tensor(value) for name, value in state["optimizer"].items()}
        optimizer = torch.optim.Adam([numbers.clone().requires_grad_()], lr=self.args.learning_rate, betas=(0.9, 0.99))
        groups = optimizer.state_dict()["param_groups"]
        optimizer_state = {"state": {0: moments}, "param_groups": groups}
        return _Fit(start, numbers, optimizer_state, average, state["step"], best, state["best_distance"])


def _split(batch: Batch) -> list[Batch]:
    """Split a batch into some of at most `CHUNK` samples."""
    return [batch.take(slice(i, i + CHUNK)) for i in range(0, len(batch.x_0), CHUNK)]
