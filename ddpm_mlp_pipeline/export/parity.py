"""A bundle against the torch pipeline that it was exported from, on the same noise, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from diffusers import DiffusionPipeline
from tabulate import tabulate

from ..pipeline import DDPMMLPPipeline
from ..runtime.request import Asked
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import Z
from .compile import noise_drawn

BATCH_SIZES = (1, 3, 8)
NUDGE = 0.01  # of the tolerance: rounding's size, where the tolerance is 1e-4
ROUNDING = 0.1  # of the tolerance: the most that rounding may leave of a step, relative to its terms
CANCELLATION = 100  # from here on, a step whose terms are so many times as large as their sum explains the rest
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class ParityReport:
    """Largest differences between pipeline and bundle, in the network's units.

    A bundle samples as its pipeline does if the final samples agree within the tolerance. Where they don't, the steps
    are compared one by one, each from the pipeline's own sample: if every single step agrees up to rounding, both are
    the same sampler, and the difference at the end is rounding that the sampler magnifies. (A network that is hardly
    trained does so, and so does a first step from almost pure noise, which divides by √ᾱ.) An error of a coefficient
    or of a weight shows in its own step, whatever later steps make of it. At last, schedulers themselves can lose the
    digits of float32: then the same is asked of the pipeline with its scheduler in float64.

    Rounding is relative to the terms that a step sums, which may be far larger than their sum.

    Attributes:
        differences: after each step, float64 `[steps]`, for each batch size.
        timesteps: of the steps.
        tolerance: what the last step's may be, unless every single step agrees up to rounding.
        amplifications: for each batch size, how far the pipeline ends from itself when its initial noise is moved
            by a hundredth of the tolerance.
        single_steps: difference of each step, taken from the pipeline's sample, over the size of the step's terms,
            float64 `[steps]`, the largest of all batches.
        cancellations: how many times larger than its outcome a step's terms are, float64 `[steps]`, the largest of all
            batches.
        in_float64: the same with the scheduler in float64, where this report alone does not show parity.
    """

    differences: dict[int, np.ndarray]
    timesteps: np.ndarray
    tolerance: float
    amplifications: dict[int, float]
    single_steps: np.ndarray
    cancellations: np.ndarray
    in_float64: ParityReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the bundle samples as the pipeline does: see above."""
        return self._ends_agree or self._steps_agree or (self.in_float64 is not None and self.in_float64.ok)

    @property
    def _ends_agree(self) -> bool:  # differences on the way may be larger, since later steps can undo them
        return all(difference[-1] <= self.tolerance for difference in self.differences.values())

    @property
    def _steps_agree(self) -> bool:
        return bool((self.single_steps <= ROUNDING * self.tolerance).all())

    @property
    def explanation(self) -> str:
        """One line: why the final samples differ by more than the tolerance, or nothing if they don't."""
        if self._ends_agree:
            return ""
        k = int(self.single_steps.argmax())  # the first NaN, if there is one
        single_step = f"step {k + 1} alone differs by {self.single_steps[k]:.1e} of its terms"
        if not self.ok:
            return f"{single_step}, more than the {ROUNDING * self.tolerance:.0e} that rounding explains"
        if not self._steps_agree and self.in_float64 is not None:
            final = max(difference[-1] for difference in self.in_float64.differences.values())
            why = self.in_float64.explanation
            return (
                f"the pipeline's scheduler loses digits of float32: {single_step}; with it in float64, pipeline and "
                f"bundle end {final:.1e} apart" + (f", since {why}" if why else "")
            )
        k = int(self.cancellations.argmax())
        if self.cancellations[k] >= CANCELLATION:
            return (
                "pipeline and bundle both lose digits of float32: "
                f"the terms of step {k + 1} are {self.cancellations[k]:,.0f} times as large as their sum"
            )
        moved = max(self.amplifications.values())
        return (
            "the network magnifies rounding: "
            f"torch's own samples move by {moved:.1e} when the initial noise moves by {NUDGE * self.tolerance:.0e}"
        )

    def __str__(self) -> str:
        steps = len(self.timesteps)
        shown = range(steps) if steps <= 50 else sorted({round(i) for i in np.linspace(0, steps - 1, 21)})
        differences = self.differences.values()
        table = [(k + 1, f"{self.timesteps[k]:g}", *(difference[k] for difference in differences)) for k in shown]
        table.append((None, "worst", *(difference.max() for difference in differences)))
        headers = ("step", "t", *(f"batch {size}" for size in self.differences))
        rows = [
            f"largest difference between pipeline and bundle (tolerance {self.tolerance:g} at the end)",
            tabulate(table, headers, "plain", floatfmt=".1e", numalign="right", stralign="right"),
        ]
        moved = f"torch, noise ± {NUDGE * self.tolerance:.0e}"
        rows.append(f"{moved}:" + "".join(f" batch {n}: {a:.1e}" for n, a in self.amplifications.items()))
        rows.append(
            f"each step from the pipeline's own sample, relative to its terms: {self.single_steps.max():.1e} at most"
        )
        if self.explanation:
            rows.append(f"more than the tolerance at the end: {self.explanation}")
        return "\n".join(rows)


def compare(
    pipeline: DDPMMLPPipeline,
    bundle: str | os.PathLike[str],
    num_inference_steps: int,
    tolerance: float,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> ParityReport:
    """Run both on the same noise, at batches of 1, 3 and 8, side by side: no step is kept.

    The samples are of several classes and conditions, where the network takes any, and guided as the bundle's table
    says; the pipeline is told so by `guidance_scale` and `guidance_interval`.
    """
    sampler = OnnxSampler(bundle)
    guidance = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
    report = _compare(pipeline, sampler, num_inference_steps, tolerance, guidance)
    if not report.ok:
        with _scheduler_in_float64(pipeline):
            in_float64 = _compare(pipeline, sampler, num_inference_steps, tolerance, guidance)
        report = dataclasses.replace(report, in_float64=in_float64)
    return report


def compare_sampler(bundle: str | os.PathLike[str]) -> float:
    """Largest difference between a bundle's `sampler.onnx` and the runtime, in the network's units."""
    runtime = OnnxSampler(bundle)
    graph = onnxruntime.InferenceSession(Path(bundle) / "sampler.onnx", providers=["CPUExecutionProvider"])
    seed, num_samples = 2**40 + 1, max(BATCH_SIZES)
    asked = _asked(runtime, num_samples)
    feeds: dict[str, Any] = {"seed": np.array(seed), "num_samples": np.array(num_samples)}
    if runtime.class_names:
        feeds["class_labels"] = np.array(asked["class_labels"], dtype=np.int64)
    if runtime.condition_columns:
        feeds["condition"] = np.asarray(asked["condition"], dtype=np.float32)
    names = {value.name for value in graph.get_inputs()}
    if "guidance_scale" in names:
        feeds["guidance_scale"] = np.array(1.5, dtype=np.float32)
        is_guided = runtime.table.is_guided
        at = runtime.table.timesteps[is_guided if is_guided.any() else slice(None)]
        asked |= {"guidance_scale": 1.5, "guidance_interval": (float(at.max()), float(at.min()))}
    if "mask" in names:
        known = runtime.sample(num_samples, seed + 1, **asked)  # what the data are like
        mask = np.zeros(known.shape, dtype=np.float32)
        mask[:, : known.shape[1] // 2] = 1  # the first columns, or rows
        feeds |= {"known": known, "mask": mask}
        asked |= {"known": known, "mask": mask if runtime.is_points else mask[..., 0]}
    (samples,) = graph.run(None, feeds)
    expected = runtime.sample(num_samples, seed, **asked)
    if samples.dtype == np.uint8:
        return 2 / 255 * max(0.0, float(np.abs(samples - 255 * expected).max()) - 0.5)  # but for what was rounded
    return float(
        (np.abs(samples - expected) * (1 / np.array(runtime.info["data_std"]) if runtime.is_points else 2)).max()
    )


def _asked(sampler: OnnxSampler, number: int) -> Asked:
    """Classes one after the other, and conditions as the data have them, for some samples."""
    asked: Asked = {}
    if sampler.class_names:
        asked["class_labels"] = [i % len(sampler.class_names) for i in range(number)]
    if sampler.condition_columns:
        mean, std = (np.array(sampler.info[name]) for name in ("condition_mean", "condition_std"))
        asked["condition"] = mean + std * np.random.default_rng(0).standard_normal((number, len(mean)))
    return asked


def _compare(
    pipeline: DDPMMLPPipeline,
    sampler: OnnxSampler,
    num_inference_steps: int,
    tolerance: float,
    guidance: dict[str, Any],
) -> ParityReport:
    differences, amplifications, single_steps, cancellations = {}, {}, [], []
    for size in BATCH_SIZES:
        asked = _asked(sampler, size)
        run = _SideBySide(pipeline, sampler, size, asked, guidance)
        final = run(num_inference_steps)
        differences[size], *others = np.transpose(run.rows)
        single_steps.append(others[0])
        cancellations.append(others[1])
        moved = final

        def keep_last(
            pipe: DiffusionPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
        ) -> dict[str, Any]:
            nonlocal moved
            moved = tensors["latents"].numpy()
            return {}

        latents, generator = _start(pipeline, size, NUDGE * tolerance)
        call = {"latents": latents, "callback_on_step_end": keep_last, **asked, **guidance}
        pipeline(size, generator, num_inference_steps, **call)
        amplifications[size] = _largest(moved - final)
    return ParityReport(
        differences,
        sampler.table.timesteps,
        tolerance,
        amplifications,
        np.max(single_steps, axis=0),
        np.max(cancellations, axis=0),
    )


def _start(pipeline: DDPMMLPPipeline, batch_size: int, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Generator]:
    """The initial sample, moved by normal noise of that standard deviation, and the generator of all later noise."""
    generator = torch.Generator().manual_seed(batch_size)
    latents = torch.randn((batch_size, *pipeline.sample_shape), generator=generator)
    return latents + nudge * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), generator


@contextlib.contextmanager
def _scheduler_in_float64(pipeline: DDPMMLPPipeline) -> Iterator[None]:
    """Have the scheduler's steps take and give float64; the network's numbers stay float32."""
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    own = vars(scheduler).get("step")  # where it has options

    @functools.wraps(step)
    def step_in_float64(eps: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        return step(eps.double(), t, sample.double(), **options)

    hook = pipeline.unet.register_forward_pre_hook(lambda network, args: (args[0].float(), *args[1:]))
    scheduler.step = step_in_float64
    try:
        yield
    finally:
        hook.remove()
        del scheduler.step
        if own is not None:
            scheduler.step = own


class _SideBySide:
    """A run of the pipeline in which the bundle takes each step as soon as the pipeline has taken it, and twice: from
    its own sample, and from the pipeline's.

    Attributes:
        rows: for each step, the difference of the first to the pipeline's; that of the second, over the size of the
            step's terms; and that size over the outcome's.
    """

    def __init__(
        self,
        pipeline: DDPMMLPPipeline,
        sampler: OnnxSampler,
        batch_size: int,
        asked: Asked,
        guidance: dict[str, Any],
    ):
        self.pipeline, self.table, self.asked = pipeline, sampler.table, {**asked, **guidance}
        self.latents, self.generator = _start(pipeline, batch_size)
        self.state = self.generator.get_state()
        self.x = self.sample = self.latents.numpy()
        self.z = np.full(self.latents.shape, np.nan, dtype=np.float32)  # until there is any
        self.outcomes: tuple[np.ndarray, np.ndarray] | None = None
        noises = (self.z for _ in itertools.count())  # always that of the step which is being taken
        self.alone, self.beside = (
            sampler.steps(batch_size, latents=self.latents.numpy(), noises=noises, **asked) for _ in range(2)
        )
        self.sizes: deque[list[float]] = deque(
            maxlen=self.table.history
        )  # of what the coefficients multiply, the newest call's first
        self.rows: list[tuple[float, float, float]] = []

    def __call__(self, num_inference_steps: int) -> np.ndarray:
        """Run both; return the pipeline's final sample."""
        hook = self.pipeline.unet.register_forward_hook(self._network_called)
        try:
            self.pipeline(
                *(len(self.latents), self.generator, num_inference_steps),
                latents=self.latents,
                callback_on_step_end=self._step_taken,
                **self.asked,
            )
        finally:
            hook.remove()
        self._compare(self.sample)
        return self.sample

    def _network_called(self, network: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # What the network sees is the outcome of the step before: some schedulers scale it.
        # (Of a guided call, the second half of the batch is the same again.)
        x, eps = (values.numpy()[: len(self.latents)] for values in (args[0], output[0]))
        self._compare(x)
        self.x = x
        sizes = _largest(x), _largest(eps[:, : x.shape[1]])
        # The prediction of x_0 has the rounding of the sum that it is, before it is clipped.
        self.sizes.appendleft([*sizes, np.abs(self.table.to_x_0[len(self.rows)]) @ sizes, 0.0])

    def _step_taken(
        self, pipe: DiffusionPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        z = noise_drawn(self.generator, self.state, self.latents.shape)
        self.state = self.generator.get_state()
        if z is not None:
            self.z = z.numpy()
            self.sizes[0][Z] = _largest(self.z)
        self.sample = tensors["latents"].numpy()
        self.outcomes = next(self.alone).sample, self.beside.send(self.x if self.rows else None).sample
        return {}

    def _compare(self, expected: np.ndarray) -> None:
        if self.outcomes is None:
            return  # before the first step
        alone, beside = (_largest(outcome - expected) for outcome in self.outcomes)
        coefficients = np.abs(self.table.to_next[len(self.rows), : len(self.sizes)])
        size = max((coefficients * self.sizes).sum(), SMALLEST)
        self.rows.append((alone, beside / size, size / max(_largest(expected), SMALLEST)))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())
