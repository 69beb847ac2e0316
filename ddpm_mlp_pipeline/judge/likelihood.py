"""Estimate the variational bound of a pipeline on a data set, term by term."""

from __future__ import annotations

import json
import math
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list

from ..bound import BoundEstimate, VariationalBound
from ..data.batches import Batch, BatchDataset
from ..errors import ConfigurationError, DatasetError, DivergenceError
from ..files import whole_file
from ..loading import fingerprint
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from ..training.processes import share_out, this_process

SECONDS_BETWEEN_SAVES = 10


def variational_bound(
    pipeline: DDPMMLPPipeline,
    dataset: BatchDataset,
    *,
    batch_size: int = 100,
    timestep_stride: int = 1,
    seed: int = 0,
    state_path: Path | None = None,
) -> BoundEstimate:
    """Estimate the variational bound of a pipeline on a data set: of −log p(x_0), or of −log p(x_0 | c).

    Each term of each sample is estimated with one draw of x_t. A `timestep_stride` of n splits the timesteps among
    groups of n consecutive samples: the i-th sample of a group gets the timesteps i, i + n, i + 2n and so on. A group
    covers every timestep once, with T / n network evaluations for each sample instead of T.

    Processes that `accelerate launch` has started share the batches; each returns the same estimate as one process.

    Args:
        pipeline: a pipeline with a stock `DDPMScheduler`.
        dataset: the data as the network sees them, as in `train`. Images must have 8 bits, and the bound is that of
            their levels. For points, it is that of a density in the network's unit, the data's standard deviation.
        batch_size: number of samples that go through the network at once.
        timestep_stride: a divisor of T and of the number of samples.
        seed: seed of the noise.
        state_path: a file for the progress of the estimate. If it holds the progress of an earlier call with the same
            arguments, the estimate continues from there.

    Raises:
        ConfigurationError: if the scheduler has no variance, a number doesn't fit, or the state file is unusable.
        DatasetError: if the data have the wrong shape, aren't finite, or aren't 8-bit levels.
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
    ends = dataset.__getitems__([0, number - 1]).x_0  # stand for all data: comparing all would take too long
    options = (batch_size, timestep_stride, seed)
    identity = json.dumps([*fingerprint(pipeline, data=ends), number, options], default=list)
    is_begun = state_path is not None and state_path.exists()
    process = this_process()
    state = _State()
    if state_path is not None and is_begun and process.is_main_process:
        state = _State.load(state_path, identity)
    (state,) = broadcast_object_list([state])  # other machines may not have the file
    done, last_save = len(state.totals) * timestep_stride, time.monotonic()

    def measure(rows: range, _: Sequence[range]) -> tuple[np.ndarray, np.ndarray]:
        batch = dataset.__getitems__([*rows])
        _check_data(pipeline, batch.x_0, rows.start)
        noise_seed = np.random.SeedSequence([seed, rows.start]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(noise_seed))
        return _groups(bound, pipeline, batch, timestep_stride, generator)

    with progress_bar(total=number, initial=done, desc="bound", leave=False) as progress:
        samples = range(done, number)
        batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        for together, found in share_out(batches, measure):
            for terms, nulls in found:
                state.add(terms, nulls)
            progress.update(sum(map(len, together)))
            if state_path is None or not process.is_main_process:
                continue
            if together[-1].stop == number or time.monotonic() > last_save + SECONDS_BETWEEN_SAVES:
                state.save(state_path, identity, overwrite=is_begun)
                is_begun = True
                last_save = time.monotonic()
    totals, nulls = np.array(state.totals), np.array(state.nulls)
    return BoundEstimate(state.term_sums / len(totals), totals, nulls, math.prod(pipeline.sample_shape))


class _State:
    """The progress of an estimate, from which another call can continue."""

    def __init__(self, term_sums: np.ndarray | float = 0.0, totals: Iterable[float] = (), nulls: Iterable[float] = ()):
        self.term_sums, self.totals, self.nulls = np.asarray(term_sums), list(totals), list(nulls)

    def add(self, terms: np.ndarray, nulls: np.ndarray) -> None:
        """Add groups, with their terms, `[number, T + 1]`, and −L_null, `[number]`."""
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
            raise ConfigurationError(f"{path} is the state of another estimate: remove it, or name another file")
        return state


@torch.no_grad()
def _groups(
    bound: VariationalBound, pipeline: DDPMMLPPipeline, batch: Batch, stride: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the terms L_0, …, L_T of each group of a batch, `[number of groups, T + 1]`, and its −L_null."""
    x_0, known = batch.x_0.to(pipeline.device), {name: all_.to(pipeline.device) for name, all_ in batch.known.items()}
    place = torch.arange(len(x_0), device=x_0.device) % stride
    terms = []
    for first in range(0, bound.num_timesteps, stride):
        t = first + place
        eps = torch.randn(x_0.shape, generator=generator).to(x_0.device)
        x_t = pipeline.scheduler.add_noise(x_0, eps, t)
        model_output = pipeline.unet(x_t, t, **known).sample
        if not model_output.isfinite().all():
            raise DivergenceError(f"the network's output is not finite, at timestep {first} or soon after")
        terms.append(bound.term(model_output, x_0, x_t, t).reshape(-1, stride))
    prior, nulls = (values.reshape(-1, stride).mean(dim=1) for values in (bound.prior_term(x_0), bound.null(x_0)))
    return torch.cat([*terms, prior[:, None]], dim=1).cpu().numpy(), nulls.cpu().numpy()


def _check_data(pipeline: DDPMMLPPipeline, x_0: torch.Tensor, start: int) -> None:
    shape, expected = tuple(x_0.shape[1:]), pipeline.sample_shape
    if shape != expected:
        raise DatasetError(f"the data have the shape {shape}, but the network takes {expected}")
    finite = x_0.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise DatasetError(f"sample {start + int(finite.int().argmin())} of the data is not finite")
    if not pipeline.is_points:
        levels = (x_0.double() + 1) * 127.5
        if levels.min() < -0.01 or levels.max() > 255.01 or (levels - levels.round()).abs().max() > 0.01:
            raise DatasetError("images must have 8 bits, scaled to [-1, 1]: the bound counts the bits of their levels")
