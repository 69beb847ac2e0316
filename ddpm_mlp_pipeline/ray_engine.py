"""Draw samples in Ray's workers, on one machine or many. A sample's noise depends on its seed and number alone."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigurationError, DDPMPipelineError, explain_missing_extra
from .parts import Drawn
from .runtime.request import Asked
from .sampling import open_sampler

with explain_missing_extra("--engine ray"):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util import ActorPool

TASK_SECONDS, TASK_VALUES = 5.0, 2**20  # how long a task takes, and how many values it returns at most
RETRIES = 3  # of a task whose worker dies
ENDING_SECONDS = 5.0  # to wait for workers to end
Source = tuple[Path, str | None, int | None]
"""A bundle or a checkpoint, and for a checkpoint the scheduler and the number of steps."""


class DrawBatch:
    """Draw the samples of a batch of numbers, for `ray.data`'s `map_batches`.

    ```python
    numbers = ray.data.range(1_000_000)
    samples = numbers.map_batches(DrawBatch, fn_constructor_args=("heart-onnx",), concurrency=2, num_cpus=1)
    samples.write_parquet("heart")
    ```

    A batch is a dictionary of columns. Those that are named like the network's coordinates are known values, NaN where
    they are to be drawn; those named like its condition are the condition; a column of labels may be named.

    Args:
        source: a bundle's or a checkpoint's folder.
        seed: in [0, 2⁶³).
        number: the column of the samples' numbers, below 2³².
        label: the column of the classes, by name or number.
        asked: `guidance_scale` and what else all samples have in common, as for [`OnnxSampler.sample`][].
    """

    def __init__(self, source: str | Path, seed: int = 0, number: str = "id", label: str | None = None, **asked: Any):
        self.sampler = open_sampler(Path(source), num_threads=1)
        self.seed, self.number, self.label, self.asked = seed, number, label, asked

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch with the samples' columns, those of points or `"image"`."""
        numbers = batch[self.number].astype(np.int64)
        ends = np.flatnonzero(np.diff(numbers) != 1) + 1  # where a run of consecutive numbers ends
        samples = np.concatenate([self._draw(batch, rows) for rows in np.split(np.arange(len(numbers)), ends)])
        if self.sampler.is_points:
            return batch | dict(zip(self.sampler.data_columns, samples.T, strict=True))
        return batch | {"image": samples}

    def _draw(self, batch: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        asked: dict[str, Any] = {**self.asked}
        first = int(batch[self.number][rows[0]])
        for argument, columns in (("known", self.sampler.data_columns), ("condition", self.sampler.condition_columns)):
            if found := [name for name in columns if name in batch]:
                values = [batch[name][rows] if name in found else np.full(len(rows), np.nan) for name in columns]
                asked[argument] = np.stack(values, axis=1)
        if self.label is not None:
            asked["class_labels"] = batch[self.label][rows].tolist()
        return np.concatenate([*self.sampler.batches(range(first, first + len(rows)), self.seed, **asked)])


def draw_with_ray(
    source: Source,
    address: str | None,
    steps: int,
    ask: Callable[[range], Asked],
    seed: int,
    batch_size: int,
    gaps: Sequence[range],
    on_step: Callable[[int], Any] | None = None,
) -> Generator[Drawn, None, None]:
    """Draw samples in as many workers as the cluster has processors, and yield them as they are done.

    Ray repeats the task of a worker that dies.

    Args:
        source: what to draw from. Every machine must have it at this path.
        address: of a running cluster; by default, one is started here, and stopped at the end.
        steps: number of denoising steps of a sample.
        ask: returns what is asked of some of the samples.
        seed: in [0, 2⁶³).
        batch_size: largest number of samples in a network evaluation.
        gaps: the numbers of the samples.
        on_step: called with the number of samples, `steps` times for each, for a progress bar.

    Raises:
        ConfigurationError: if there is no cluster at the address, or if a worker can't draw.
    """
    path, *options = source
    with ExitStack() as stack:
        stack.enter_context(connected(address))
        pool = stack.enter_context(_workers(path.resolve(), *options))
        rest, size = list(gaps), batch_size
        while rest or pool.has_next():
            while rest and pool.has_free():
                part, rest[0] = rest[0][:size], rest[0][size:]
                if not rest[0]:
                    rest.pop(0)
                task = (part, seed, batch_size, ask(part))
                pool.submit(lambda actor, task: actor.draw.remote(*task), task)
            try:
                part, samples, seconds = pool.get_next_unordered()
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, DDPMPipelineError):
                    raise cause from None
                last_line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
                raise ConfigurationError(f"a worker of Ray can't draw: {last_line}") from None
            # Tasks grow until each takes some seconds, beside which the scheduling takes nothing.
            per_batch = max(seconds, 1e-6) / len(part) * batch_size
            most = max(1, TASK_VALUES // samples[0].size // batch_size)
            size = batch_size * min(max(1, int(TASK_SECONDS / per_batch)), most)
            if on_step is not None:
                on_step(steps * len(part))
            yield part, np.array(samples)  # Ray's own array is of a memory that it shares, and takes back at the end


def batches_with_ray(
    source: Source,
    steps: int,
    number: int,
    seed: int,
    batch_size: int,
    on_step: Callable[[int], Any] | None = None,
    **asked: Any,
) -> Iterator[np.ndarray]:
    """Draw samples as `draw_with_ray` does, in order. Of what is asked, `class_labels` has a label for each sample."""
    labels = asked.pop("class_labels", None)

    def ask(part: range) -> Asked:
        of_part = {} if labels is None else {"class_labels": labels[part.start : part.stop]}
        return Asked(**asked, **of_part)  # type: ignore[typeddict-item]

    drawn = draw_with_ray(source, None, steps, ask, seed, batch_size, [range(number)], on_step)
    for _, samples in sorted(drawn, key=lambda part: part[0].start):
        yield samples


@contextmanager
def _workers(*opening: Any) -> Iterator[ActorPool]:
    """Start a worker for each free processor, and end them, so that a draw that follows finds the processors free."""
    free = int(ray.available_resources().get("CPU", 1))  # others may hold the rest of the cluster
    worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=RETRIES)(_Worker)
    actors = [worker.remote(*opening) for _ in range(max(1, free))]
    try:
        yield ActorPool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)
        end = time.monotonic() + ENDING_SECONDS
        while ray.available_resources().get("CPU", 0) < free and time.monotonic() < end:
            time.sleep(0.05)


class _Worker:
    """Ray's actor: a sampler in a process of its own, with one thread."""

    def __init__(self, source: Path, scheduler: str | None, num_inference_steps: int | None):
        self.sampler = open_sampler(source, scheduler, num_inference_steps, num_threads=1)

    def draw(self, part: range, seed: int, batch_size: int, asked: Asked) -> tuple[range, np.ndarray, float]:
        """Return the samples, and how many seconds they took."""
        start = time.perf_counter()
        samples = np.concatenate([*self.sampler.batches(part, seed, batch_size, **asked)])
        return part, samples, time.perf_counter() - start


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, or start one, for the time of the block. A connection is kept."""
    if ray.is_initialized():
        yield
        return
    where = "Ray can't be started" if address is None else f"there is no Ray cluster at {address}"
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None and address != "auto":  # Ray itself tries for minutes
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{where}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()  # it stops only a cluster that was started here
