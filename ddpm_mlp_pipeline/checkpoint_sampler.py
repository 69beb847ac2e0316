"""Sample from a checkpoint with torch, with the interface of the runtime's `OnnxSampler`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import ConfigurationError, DivergenceError
from .export.compile import check_num_inference_steps, make_scheduler
from .loading import load_checkpoint
from .pipeline import DDPMMLPPipeline, default_num_inference_steps
from .runtime.columns import TableCodec
from .runtime.request import Asked, numbered
from .runtime.sampler import Sampler
from .sample_noise import SampleNoise
from .training.processes import choose_device, share_out

if TYPE_CHECKING:
    from typing import Unpack


class CheckpointSampler(Sampler):
    """A sampler of points or images that divides its batches among the processes.

    Its noise is the runtime's, so that checkpoint and bundle draw the same samples, up to rounding, from the same seed
    (except with `resample`: see [`SampleNoise`][]).

    Args:
        checkpoint: the checkpoint folder.
        scheduler: a key of `SCHEDULERS`; by default the checkpoint's own.
        num_inference_steps: number of denoising steps; by default the number of training timesteps, or of calls of a
            fitted table.
        device: what torch runs the network on, such as `"cuda"`; by default the accelerator that is there, if any.

    Raises:
        CheckpointError: if the checkpoint can't be loaded.
        ConfigurationError: if there are more steps than training timesteps, or no such device.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        device: str | None = None,
    ):
        self.pipeline = load_checkpoint(checkpoint).to(choose_device(device))
        if scheduler is not None:
            self.pipeline.scheduler = make_scheduler(scheduler, self.pipeline.scheduler)
        self.num_inference_steps = num_inference_steps or default_num_inference_steps(self.pipeline.scheduler)
        check_num_inference_steps(self.pipeline.scheduler, self.num_inference_steps)
        self.sample_shape = self.pipeline.sample_shape

    @property
    def data_columns(self) -> list[str]:
        return self.pipeline.data_columns

    @property
    def class_names(self) -> list[str]:
        return self.pipeline.class_names

    @property
    def condition_columns(self) -> list[str]:
        return self.pipeline.condition_columns

    @functools.cached_property
    def codec(self) -> TableCodec | None:
        columns = self.pipeline.config.columns
        return None if columns is None else TableCodec(columns)

    @property
    def scheduler(self) -> str:
        return type(self.pipeline.scheduler).__name__

    def __len__(self) -> int:
        self.pipeline.scheduler.set_timesteps(self.num_inference_steps)
        return len(self.pipeline.scheduler.timesteps)

    def batches(
        self,
        samples: int | range,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[np.ndarray, None, None]:
        """Like [`OnnxSampler.batches`]; every process yields all batches in the same order."""
        numbers = numbered(samples)

        def draw(batch: range, together: Sequence[range]) -> np.ndarray:
            count = functools.partial(on_step, sum(map(len, together))) if on_step is not None else None
            return self._draw(batch, seed, count, self._part(asked, batch, numbers))

        for _, drawn in share_out([numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)], draw):
            yield from drawn

    def _part(self, asked: Asked, batch: range, numbers: range) -> dict[str, Any]:
        """Return what is asked of the samples of a batch: its rows of what has one for each of `numbers`."""
        of_all = {"class_labels": 0, "condition": 1, "known": len(self.sample_shape), "mask": len(self.sample_shape)}
        if not self.pipeline.is_points:
            of_all["mask"] = 2  # dimensions of what is asked of all samples together
        part: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        for name, dimensions in of_all.items():
            values = part.get(name)
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
                continue  # by name, or a picture: for all
            if name != "class_labels":  # whose names and numbers may be mixed
                values = np.asarray(values)
                if values.ndim <= dimensions:
                    continue
            if len(values) not in (1, len(numbers)):
                raise ConfigurationError(f"{name} must be one, or {len(numbers)}, got {len(values)}")
            rows = slice(batch.start - numbers.start, batch.stop - numbers.start)
            part[name] = values[0] if len(values) == 1 else values[rows]
        return part

    def _draw(self, batch: range, seed: int, count: Callable[[], Any] | None, asked: dict[str, Any]) -> np.ndarray:
        noise = SampleNoise(seed, batch)

        def step_done(pipe: DDPMMLPPipeline, step: int, t: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
            if not state["latents"].isfinite().all():
                raise DivergenceError.at_step(step, float(t))
            if count is not None:
                for _ in range(asked.get("resample", 1)):
                    count()
            return noise.next_step(pipe, step, t, state)

        call = {"latents": noise.latents((len(batch), *self.sample_shape)), "callback_on_step_end": step_done, **asked}
        try:
            with noise:
                return self.pipeline(len(batch), noise, self.num_inference_steps, "np", return_dict=False, **call)[0]
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
