"""Compare a bundle with the torch pipeline that it was exported from, step by step, on the same noise."""

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
# Both relative to the tolerance. A nudge is about as large as float32's rounding if the tolerance is 1e-4.
NUDGE = 0.01
ROUNDING = 0.1  # largest difference of a single step, relative to its terms, that counts as rounding
CANCELLATION = 100  # from this ratio of a step's terms to their sum on, cancellation explains a difference
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class ParityReport:
    """Largest differences between pipeline and bundle, in the network's units.

    Bundle and pipeline are at parity if one of these holds:

    - The final samples agree within the tolerance.
    - Every single step, taken from the pipeline's own sample, agrees up to rounding. Then the sampler magnifies
      rounding, as a hardly trained network does, or a first step from almost pure noise, which divides by √ᾱ. A wrong
      coefficient or weight shows in its own step, independently of later steps.
    - One of the two holds for the pipeline with its scheduler in float64. Some schedulers lose digits in float32.

    Rounding is relative to the terms that a step sums, which may be far larger than their sum.

    Attributes:
        differences: for each batch size, the difference after each step, float64 `[steps]`.
        timesteps: timestep of each step, float32 `[steps]`.
        tolerance: largest allowed difference between final samples.
        amplifications: for each batch size, the change of the pipeline's final samples when normal noise of
            `NUDGE * tolerance` is added to their initial noise.
        single_steps: difference of each step taken from the pipeline's sample, divided by the size of the step's
            terms: float64 `[steps]`, the largest over all batches.
        cancellations: size of each step's terms, divided by the size of their sum: float64 `[steps]`, the largest
            over all batches.
        in_float64: report of the comparison with the scheduler in float64, made only if this one shows no parity.
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
        """Whether bundle and pipeline are at parity."""
        return self._ends_agree or self._steps_agree or (self.in_float64 is not None and self.in_float64.ok)

    @property
    def _ends_agree(self) -> bool:  # later steps can undo larger differences
        return all(difference[-1] <= self.tolerance for difference in self.differences.values())

    @property
    def _steps_agree(self) -> bool:
        return bool((self.single_steps <= ROUNDING * self.tolerance).all())

    @property
    def explanation(self) -> str:
        """Explain in one line why final samples differ by more than the tolerance; empty if they agree."""
        if self._ends_agree:
            return ""
        k = int(self.single_steps.argmax())  # the first NaN, if there is one
        single_step = f"step {k + 1} alone differs by {self.single_steps[k]:.1e} of its terms"
        if not self.ok:
            return f"{single_step}, more than the {ROUNDING * self.tolerance:.0e} that rounding explains"
        if not self._steps_agree and self.in_float64 is not None:
            final = max(difference[-1] for difference in self.in_float64.differences.values())
            reason = self.in_float64.explanation
            return (
                f"the pipeline's scheduler loses digits in float32: {single_step}; in float64, the final samples "
                f"differ by {final:.1e}" + (f": {reason}" if reason else "")
            )
        k = int(self.cancellations.argmax())
        if self.cancellations[k] >= CANCELLATION:
            return (
                "pipeline and bundle both lose digits in float32: "
                f"the terms of step {k + 1} are {self.cancellations[k]:,.0f} times as large as their sum"
            )
        return (
            f"the network magnifies rounding: the pipeline's own samples change by "
            f"{max(self.amplifications.values()):.1e} if the initial noise changes by {NUDGE * self.tolerance:.0e}"
        )

    def __str__(self) -> str:
        steps = len(self.timesteps)
        shown = range(steps) if steps <= 50 else sorted({round(i) for i in np.linspace(0, steps - 1, 21)})
        differences = self.differences.values()
        table = [(k + 1, f"{self.timesteps[k]:g}", *(difference[k] for difference in differences)) for k in shown]
        table.append((None, "max", *(difference.max() for difference in differences)))
        headers = ("step", "t", *(f"batch {size}" for size in self.differences))
        rows = [
            f"largest difference between pipeline and bundle (tolerance of the last step: {self.tolerance:g})",
            tabulate(table, headers, "plain", floatfmt=".1e", numalign="right", stralign="right"),
            f"change of the pipeline's samples if the initial noise changes by {NUDGE * self.tolerance:.0e}: "
            + ", ".join(f"{change:.1e} (batch {size})" for size, change in self.amplifications.items()),
            f"largest difference of a single step, relative to its terms: {self.single_steps.max():.1e}",
        ]
        if self.explanation:
            rows.append(f"final samples differ by more than the tolerance: {self.explanation}")
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
    """Return the largest difference between a bundle's `sampler.onnx` and the runtime, in the network's units."""
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
        return 2 / 255 * max(0.0, _largest(samples - 255 * expected) - 0.5)  # half a level is rounding
    return _largest((samples - expected) * (1 / np.array(runtime.info["data_std"]) if runtime.is_points else 2))


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
    differences, amplifications, rows = {}, {}, []
    nudged: dict[str, torch.Tensor] = {}
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
        vars(scheduler).clear()
        vars(scheduler).update(attributes)


def _run_side_by_side(
    pipeline: DiffusionPipeline, sampler: OnnxSampler, batch_size: int, num_inference_steps: int
) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
    """Run the pipeline, and after each of its steps take the bundle's: from its own sample and from the pipeline's.

    Returns:
        The pipeline's final sample, and for each step: the difference of the bundle's sample; the difference of the
        step taken from the pipeline's sample, divided by the size of the step's terms; and that size divided by the
        sample's.
    """
    table = sampler.table
    latents, generator = _start(pipeline, batch_size)
    state = generator.get_state()
    x = sample = latents.numpy()
    z = np.full(latents.shape, np.nan, dtype=np.float32)  # NaN until noise is drawn
    noises = (z for _ in itertools.count())  # the current step's
    own_steps, single_steps = (sampler.steps(batch_size, latents=sample, noises=noises) for _ in range(2))
    outcomes: list[np.ndarray] = []
    # Largest magnitudes of x, ε, x̂_0 and z in the last steps, the newest first
    sizes: deque[list[float]] = deque(maxlen=table.history)
    rows: list[tuple[float, float, float]] = []

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

    def on_step(pipe: DiffusionPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal state, z, sample
        drawn = noise_drawn(generator, state, latents.shape)
        state = generator.get_state()
        if drawn is not None:
            z = drawn.numpy()
            sizes[0][Z] = _largest(z)
        sample = tensors["latents"].numpy()
        outcomes[:] = next(own_steps).sample, single_steps.send(x if rows else None).sample

    hook = pipeline.unet.register_forward_hook(on_network)
    try:
        pipeline(batch_size, generator, num_inference_steps, latents=latents, callback_on_step_end=on_step)
    finally:
        hook.remove()
    add_row(sample)
    return sample, rows


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())
