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

import torch

from ..data.batches import KnownBatches
from ..errors import CheckpointError, ConfigurationError, DivergenceError
from ..files import whole_file
from ..loading import fingerprint
from ..pipeline import DDPMMLPPipeline
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler
from .fit_features import FitFeatures
from .options import FittingArguments
from .table_parameters import TableParameters, check_num_calls
from .target import Target

AVERAGING = 0.9  # decay of the average of the parameters over the optimiser's steps


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


def play(pipeline: DDPMMLPPipeline, tables: Sequence[StepTable]) -> None:
    """Give a pipeline a scheduler that plays some tables of different numbers of calls; the first is the default."""
    in_order = {len(table): table.to_dict() for table in tables}
    pipeline.scheduler = StepTableScheduler.from_config(pipeline.scheduler.config, tables=list(in_order.values()))


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
        data: KnownBatches,
        features: FitFeatures,
        args: FittingArguments,
        state_path: Path | None = None,
    ):
        self.pipeline, self.args, self.path = pipeline, args, state_path
        self.network = pipeline.unet.eval().requires_grad_(False)
        self.target = Target(pipeline, data, features, args)
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
        check_num_calls(num_calls, self.pipeline.scheduler.config.num_train_timesteps)
        previous: TableParameters | None = None
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
            loss = self.target.distance(parameters, self.network, self.target.generator(number, state.step + 1))
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

    @torch.no_grad()
    def _check(self, state: _Fit, parameters: TableParameters) -> None:
        """Keep the averaged numbers if their samples are closest to the held-out data so far."""
        number = parameters.numbers.shape[1]
        average = dataclasses.replace(parameters, numbers=state.average)
        distance = self.target.held_out_distance(average, self.network)
        self.log.append({"num_calls": number, "step": state.step, "distance": distance})
        if not math.isfinite(distance):
            raise DivergenceError(f"the samples of {number} calls are not finite: train the network for longer")
        if distance < state.best_distance:
            state.best, state.best_distance = state.average.clone(), distance

    def _identify(self) -> str:
        """Return a hash of all that the result depends on."""
        target = self.target
        some = target.data.__getitems__(target.held_out[:64] + target.fitted[:64])
        sha, config = fingerprint(self.pipeline, data=some.x_0)
        what = [sha, config, dataclasses.asdict(self.args), len(target.data), type(target.features).__name__]
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
