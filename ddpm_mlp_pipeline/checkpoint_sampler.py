"""Sample from a checkpoint with torch, with the interface of the runtime's `OnnxSampler`."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object

from .errors import ConfigurationError, DivergenceError
from .export.compile import check_num_inference_steps, make_scheduler
from .loading import load_checkpoint
from .pipeline import DDPMMLPPipeline, default_num_inference_steps
from .runtime.request import Asked
from .runtime.sampler import Sampler
from .training.processes import this_process

if TYPE_CHECKING:
    from typing import Unpack


class CheckpointSampler(Sampler):
    """A sampler of points or images that divides its batches among the processes.

    Every sample has its own generator, so that it is the same in any batch. A bundle's samples differ for the same
    seed, because the runtime has another noise generator.

    Args:
        checkpoint: the checkpoint folder.
        scheduler: a key of `SCHEDULERS`; by default the checkpoint's own.
        num_inference_steps: number of denoising steps; by default the number of training timesteps, or of calls of a
            fitted table.

    Raises:
        CheckpointError: if the checkpoint can't be loaded.
        ConfigurationError: if there are more steps than training timesteps.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], scheduler: str | None = None, num_inference_steps: int | None = None
    ):
        self.pipeline = load_checkpoint(checkpoint)
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

    @property
    def scheduler(self) -> str:
        return type(self.pipeline.scheduler).__name__

    def __len__(self) -> int:
        self.pipeline.scheduler.set_timesteps(self.num_inference_steps)
        return len(self.pipeline.scheduler.timesteps)

    def batches(
        self,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[np.ndarray, None, None]:
        """Like [`OnnxSampler.batches`]; every process yields all batches in the same order."""
        process = this_process()
        batches = [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]
        for i in range(0, len(batches), process.num_processes):
            together = batches[i : i + process.num_processes]  # at most one per process
            number = sum(map(len, together))

            def step_done(
                pipe: DDPMMLPPipeline, step: int, t: torch.Tensor, state: dict[str, Any], number: int = number
            ) -> dict[str, Any]:
                if not state["latents"].isfinite().all():
                    raise DivergenceError.at_step(step, float(t))
                if on_step is not None:
                    on_step(number)
                return {}

            own = together[process.process_index :][:1]
            yield from gather_object(
                [self._draw(batch, seed, step_done, self._part(asked, batch, num_samples)) for batch in own]
            )

    def _part(self, asked: Asked, batch: range, num_samples: int) -> dict[str, Any]:
        """Return what is asked of the samples of a batch: the rows of what has one for each of `num_samples`."""
        of_all = {"class_labels": 0, "condition": 1, "known": len(self.sample_shape), "mask": len(self.sample_shape)}
        if not self.pipeline.is_points:
            of_all["mask"] = 2  # dimensions of what is asked of all samples together
        part: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        for name, dimensions in of_all.items():
            values = part.get(name)
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
                continue  # by name, or a picture: for all
            values = np.asarray(values)
            if values.ndim <= dimensions or len(values) == 1:
                continue
            if len(values) != num_samples:
                raise ConfigurationError(f"{name} must be one, or {num_samples}, got {len(values)}")
            values = values[batch.start : batch.stop]
            part[name] = values.tolist() if name == "class_labels" else values
        return part

    def _draw(
        self, batch: range, seed: int, step_done: Callable[..., dict[str, Any]], asked: dict[str, Any]
    ) -> np.ndarray:
        seeds = (np.random.SeedSequence([seed, i]).generate_state(1, np.uint64) for i in batch)
        generators = [torch.Generator().manual_seed(int(state[0] >> np.uint64(1))) for state in seeds]
        try:
            return self.pipeline(
                *(len(batch), generators, self.num_inference_steps, "np"),
                return_dict=False,
                callback_on_step_end=step_done,
                **asked,
            )[0]
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
