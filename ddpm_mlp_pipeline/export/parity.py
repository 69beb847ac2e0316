"""Compare a bundle with the torch pipeline it was exported from, on the same noise, step by step."""

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
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import Z
from .compile import noise_drawn

BATCH_SIZES = (1, 3, 8)
NUDGE = 0.01  # of the tolerance: about float32's rounding where the tolerance is 1e-4
ROUNDING = 0.1  # of the tolerance: the largest rounding error of one step, relative to its terms
CANCELLATION = 100  # a step whose terms are this many times larger than their sum loses two digits
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class ParityReport:
    """Largest differences between pipeline and bundle, in the network's units.

    There is parity if the final samples agree within the tolerance, or if each step, taken from the pipeline's own
    sample, agrees up to rounding. In the second case both are the same sampler, which magnifies rounding: a hardly
    trained network does, and so does a first step from almost pure noise, which divides by √ᾱ. A wrong coefficient or
    weight shows in its own step, even where later steps hide it. If neither holds, the comparison is repeated with the
    pipeline's scheduler in float64, since some schedulers lose the digits of float32.

    The rounding of a step is relative to the terms that it sums, which may be far larger than their sum.

    Attributes:
        differences: for each batch size, the difference after each step, float64 `[steps]`.
        timesteps: the timesteps of the steps.
        tolerance: largest difference of the final samples.
        amplifications: for each batch size, how far the pipeline's final sample moves when its initial noise moves by
            a hundredth of the tolerance.
        single_steps: difference of each step, taken from the pipeline's sample, divided by the size of the step's
            terms, float64 `[steps]`, the largest of all batches.
        cancellations: size of each step's terms divided by that of their sum, float64 `[steps]`, the largest of all
            batches.
        in_float64: the report with the scheduler in float64, if this one alone does not show parity.
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
        """Whether there is parity."""
        return self._ends_agree or self._steps_agree or (self.in_float64 is not None and self.in_float64.ok)

    @property
    def final_difference(self) -> float:
        """Largest difference of the final samples. Differences before may be larger, since later steps undo them."""
        return float(np.max([difference[-1] for difference in self.differences.values()]))  # NaN if one is

    @property
    def _ends_agree(self) -> bool:
        return self.final_difference <= self.tolerance

    @property
    def _steps_agree(self) -> bool:
        return bool((self.single_steps <= ROUNDING * self.tolerance).all())

    @property
    def explanation(self) -> str:
        """Why the final samples differ by more than the tolerance, in one line, or `""` if they don't."""
        if self._ends_agree:
            return ""
        k = int(self.single_steps.argmax())  # the first NaN, if there is one
        single_step = f"step {k + 1} alone differs by {self.single_steps[k]:.1e} of its terms"
        if not self.ok:
            return f"{single_step}, more than the {ROUNDING * self.tolerance:.0e} that rounding explains"
        if not self._steps_agree and self.in_float64 is not None:
            why = self.in_float64.explanation
            return (
                f"the pipeline's scheduler loses digits of float32: {single_step}; with it in float64, pipeline and "
                f"bundle end {self.in_float64.final_difference:.1e} apart" + (f", since {why}" if why else "")
            )
        k = int(self.cancellations.argmax())
        if self.cancellations[k] >= CANCELLATION:
            return (
                "pipeline and bundle both lose digits of float32: "
                f"the terms of step {k + 1} are {self.cancellations[k]:,.0f} times as large as their sum"
            )
        moved = max(self.amplifications.values())
        return (
            f"the network magnifies rounding: torch's own samples move by {moved:.1e} when the initial noise moves by "
            f"{NUDGE * self.tolerance:.0e}"
        )

    def __str__(self) -> str:
        steps = len(self.timesteps)
        shown = range(steps) if steps <= 50 else sorted({round(i) for i in np.linspace(0, steps - 1, 21)})
        differences = self.differences.values()
        table = [(k + 1, f"{self.timesteps[k]:g}", *(difference[k] for difference in differences)) for k in shown]
        table.append((None, "worst", *(difference.max() for difference in differences)))
        headers = ("step", "t", *(f"batch {size}" for size in self.differences))
        moved = "".join(f" batch {size}: {distance:.1e}" for size, distance in self.amplifications.items())
        rows = [
            f"largest difference between pipeline and bundle (tolerance {self.tolerance:g} at the end)",
            tabulate(table, headers, "plain", floatfmt=".1e", numalign="right", stralign="right"),
            f"torch, noise ± {NUDGE * self.tolerance:.0e}:{moved}",
            f"each step from the pipeline's own sample, relative to its terms: {self.single_steps.max():.1e} at most",
        ]
        if self.explanation:
            rows.append(f"more than the tolerance at the end: {self.explanation}")
        return "\n".join(rows)


def compare(
    pipeline: DDPMMLPPipeline,
    bundle: str | os.PathLike[str],
    num_inference_steps: int,
    tolerance: float,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
) -> ParityReport:
    """Run pipeline and bundle side by side on the same noise, in batches of 1, 3 and 8. No step is kept in memory.

    The bundle plays its table of that number of calls, if it has one, or its default. (A stock scheduler may call the
    network more often than it has steps.) The samples are of several classes and conditions, where the network takes
    any. `guidance_scale` and `guidance_interval` tell the pipeline how the bundle's table is guided.
    """
    guidance: dict[str, Any] = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
    runtime = OnnxSampler(bundle)
    runtime.table = runtime.tables.get(num_inference_steps, runtime.table)
    run = functools.partial(_compare, pipeline, runtime, num_inference_steps, tolerance, guidance)
    report = run()
    if not report.ok:
        with _scheduler_in_float64(pipeline):
            report = dataclasses.replace(report, in_float64=run())
    return report


def compare_sampler(bundle: str | os.PathLike[str]) -> float:
    """Return the largest difference between a bundle's `sampler.onnx` and the runtime, in the network's units."""
    runtime = OnnxSampler(bundle)
    graph = onnxruntime.InferenceSession(Path(bundle) / "sampler.onnx", providers=["CPUExecutionProvider"])
    seed, num_samples = 2**40 + 1, max(BATCH_SIZES)
    asked = _asked(runtime, num_samples)
    feeds: dict[str, Any] = {"seed": np.array(seed), "num_samples": np.array(num_samples), **asked}
    names = {value.name for value in graph.get_inputs()}
    if "guidance_scale" in names:
        feeds["guidance_scale"] = np.array(1.5, dtype=np.float32)
        is_guided = runtime.table.is_guided
        guided = runtime.table.timesteps[is_guided if is_guided.any() else slice(None)]
        asked |= {"guidance_scale": 1.5, "guidance_interval": (float(guided.max()), float(guided.min()))}
    if "mask" in names:
        known = runtime.sample(num_samples, seed + 1, **asked)  # values as the data have them
        mask = np.zeros(known.shape, dtype=np.float32)
        mask[:, : known.shape[1] // 2] = 1  # the first columns, or rows
        feeds |= {"known": known, "mask": mask}
        asked |= {"known": known, "mask": mask if runtime.is_points else mask[..., 0]}
    (samples,) = graph.run(None, feeds)
    expected = runtime.sample(num_samples, seed, **asked)
    if samples.dtype == np.uint8:
        return 2 / 255 * max(0.0, _largest(samples - 255 * expected) - 0.5)  # half a level is rounding
    scale = 1 / np.array(runtime.info["data_std"]) if runtime.is_points else 2
    return _largest(scale * (samples - expected))


def _asked(sampler: OnnxSampler, number: int) -> dict[str, Any]:
    """Return classes in turn, and conditions distributed as the data's, for some samples."""
    asked: dict[str, Any] = {}
    if sampler.class_names:
        asked["class_labels"] = np.arange(number) % len(sampler.class_names)
    if sampler.condition_columns:
        mean, std = (np.array(sampler.info[name]) for name in ("condition_mean", "condition_std"))
        condition = mean + std * np.random.default_rng(0).standard_normal((number, len(mean)))
        asked["condition"] = condition.astype(np.float32)
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
        final, rows = _run_side_by_side(pipeline, sampler, num_inference_steps, size, asked, guidance)
        differences[size], single_step, cancellation = np.transpose(rows)
        single_steps.append(single_step)
        cancellations.append(cancellation)

        latents, generator = _start(pipeline, size, NUDGE * tolerance)
        ends: deque[torch.Tensor] = deque(maxlen=1)
        keep_last = functools.partial(_keep_latents, ends)
        call: dict[str, Any] = {"latents": latents, "callback_on_step_end": keep_last, **asked, **guidance}
        pipeline(size, generator, num_inference_steps, **call)
        amplifications[size] = _largest(ends[0].numpy() - final)
    return ParityReport(
        differences,
        sampler.table.timesteps,
        tolerance,
        amplifications,
        np.max(single_steps, axis=0),
        np.max(cancellations, axis=0),
    )


def _keep_latents(kept: deque[torch.Tensor], pipe: Any, step: int, t: torch.Tensor, state: dict[str, Any]) -> None:
    kept.append(state["latents"])


def _start(pipeline: DDPMMLPPipeline, batch_size: int, nudge: float = 0.0) -> tuple[torch.Tensor, torch.Generator]:
    """Return x_T, moved by normal noise of standard deviation `nudge`, and the generator of all later noise."""
    generator = torch.Generator().manual_seed(batch_size)
    latents = torch.randn((batch_size, *pipeline.sample_shape), generator=generator)
    return latents + nudge * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), generator


@contextlib.contextmanager
def _scheduler_in_float64(pipeline: DDPMMLPPipeline) -> Iterator[None]:
    """Make the scheduler's steps take and return float64, while the network stays in float32."""
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step
    own = vars(scheduler).get("step")  # set on the object if the steps have options

    @functools.wraps(step)
    def step_in_float64(eps: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        return step(eps.double(), t, sample.double(), **options)

    scheduler.step = step_in_float64
    try:
        with pipeline.unet.register_forward_pre_hook(lambda network, args: (args[0].float(), *args[1:])):
            yield
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own


def _run_side_by_side(
    pipeline: DDPMMLPPipeline,
    sampler: OnnxSampler,
    num_inference_steps: int,
    batch_size: int,
    asked: dict[str, Any],
    guidance: dict[str, Any],
) -> tuple[np.ndarray, list[tuple[float, float, float]]]:
    """Run the pipeline, and let the bundle take each step twice: from its own sample, and from the pipeline's.

    Returns:
        The pipeline's final sample; and for each step, how far the bundle's own sample is from the pipeline's, how far
        the step from the pipeline's sample is, over the size of its terms, and that size over the sum's.
    """
    table, (latents, generator) = sampler.table, _start(pipeline, batch_size)
    state = generator.get_state()
    x = final = latents.numpy()
    z = np.full(x.shape, np.nan, dtype=np.float32)  # the current step's noise; NaN until the first
    noises = (z for _ in itertools.count())
    own, single = (sampler.steps(batch_size, latents=x, noises=noises, **asked) for _ in range(2))
    outcomes: list[np.ndarray] = []
    sizes: deque[list[float]] = deque(maxlen=table.history)  # of the terms, the newest call's first
    rows: list[tuple[float, float, float]] = []

    def compare_step(expected: np.ndarray) -> None:
        own_difference, single_difference = (_largest(outcome - expected) for outcome in outcomes)
        size = max((np.abs(table.to_next[len(rows), : len(sizes)]) * sizes).sum(), SMALLEST)
        rows.append((own_difference, single_difference / size, size / max(_largest(expected), SMALLEST)))

    def network_called(network: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal x
        # Some schedulers scale the sample, so that a step's outcome is what the network sees next. The second half of
        # a guided call's batch repeats the first.
        x, eps = (values.numpy()[:batch_size] for values in (args[0], output[0]))
        if outcomes:
            compare_step(x)
        newest = [_largest(x), _largest(eps[:, : x.shape[1]])]
        # x̂_0 has the rounding of its sum before it is clipped. z is not drawn yet.
        sizes.appendleft([*newest, np.abs(table.to_x_0[len(rows)]) @ newest, 0.0])

    def step_taken(
        pipe: DiffusionPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        nonlocal state, z, final
        drawn = noise_drawn(generator, state, latents.shape)
        state = generator.get_state()
        if drawn is not None:
            z = drawn.numpy()
            sizes[0][Z] = _largest(z)
        final = tensors["latents"].numpy()
        outcomes[:] = next(own).sample, single.send(x if rows else None).sample
        return {}

    with pipeline.unet.register_forward_hook(network_called):
        call: dict[str, Any] = {"latents": latents, "callback_on_step_end": step_taken}
        pipeline(batch_size, generator, num_inference_steps, **call, **asked, **guidance)
    compare_step(final)
    return final, rows


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())
