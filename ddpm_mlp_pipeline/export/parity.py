"""A bundle against the torch pipeline that it was exported from, on the same noise, step by step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from diffusers import DiffusionPipeline

from ..runtime.sampler import OnnxSampler

BATCH_SIZES = (1, 3, 8)
NUDGE = 0.01  # of the tolerance: rounding's size, where the tolerance is 1e-4


@dataclass(frozen=True, eq=False)
class ParityReport:
    """Largest differences between pipeline and bundle, in the network's units.

    Attributes:
        differences: after each step, float64 `[steps]`, for each batch size.
        timesteps: of the steps.
        tolerance: what the last step's may be, unless rounding explains more.
        amplifications: for each batch size, how far the pipeline ends from itself when its initial noise is moved
            by a hundredth of the tolerance. Some samples stand between two outcomes, and make much of any rounding.
    """

    differences: dict[int, np.ndarray]
    timesteps: np.ndarray
    tolerance: float
    amplifications: dict[int, float]

    @property
    def ok(self) -> bool:
        """Whether the final samples agree; differences on the way may be larger, since later steps can undo them."""
        return all(
            difference[-1] <= max(self.tolerance, self.amplifications[size])
            for size, difference in self.differences.items()
        )

    def __str__(self) -> str:
        steps = len(self.timesteps)
        shown = range(steps) if steps <= 50 else sorted({round(i) for i in np.linspace(0, steps - 1, 21)})
        rows = [
            f"largest difference between pipeline and bundle (tolerance {self.tolerance:g} at the end)",
            f"{'step':>6} {'t':>6}" + "".join(f"{f'batch {size}':>11}" for size in self.differences),
        ]
        for k in shown:
            cells = "".join(f"{difference[k]:>11.1e}" for difference in self.differences.values())
            rows.append(f"{k + 1:>6} {self.timesteps[k]:>6g}{cells}")
        rows.append(
            f"{'worst':>13}" + "".join(f"{difference.max():>11.1e}" for difference in self.differences.values())
        )
        moved = f"torch, noise ± {NUDGE * self.tolerance:.0e}"
        rows.append(f"{moved}:" + "".join(f" batch {n}: {a:.1e}" for n, a in self.amplifications.items()))
        return "\n".join(rows)


def compare(
    pipeline: DiffusionPipeline, bundle: str | os.PathLike, num_inference_steps: int, tolerance: float
) -> ParityReport:
    """Run both on the same noise, at batches of 1, 3 and 8."""
    sampler = OnnxSampler(bundle)
    differences, amplifications = {}, {}
    for batch_size in BATCH_SIZES:
        latents, noises, expected = _record(pipeline, batch_size, num_inference_steps)
        moved = _record(pipeline, batch_size, num_inference_steps, NUDGE * tolerance)[2]
        amplifications[batch_size] = float(np.abs(moved[-1] - expected[-1]).max())
        noises = iter([noise for noise, used in zip(noises, sampler.table.is_stochastic, strict=True) if used])
        differences[batch_size] = np.array(
            [
                np.abs(step.sample - expected[step.index]).max()
                for step in sampler.steps(batch_size, latents=latents, noises=noises)
            ]
        )
    return ParityReport(differences, sampler.table.timesteps, tolerance, amplifications)


def compare_sampler(bundle: str | os.PathLike) -> float:
    """Largest difference between a bundle's `sampler.onnx` and the runtime, in the network's units."""
    runtime = OnnxSampler(bundle)
    graph = onnxruntime.InferenceSession(Path(bundle) / "sampler.onnx", providers=["CPUExecutionProvider"])
    seed, num_samples = 2**40 + 1, max(BATCH_SIZES)
    (samples,) = graph.run(None, {"seed": np.array(seed), "num_samples": np.array(num_samples)})
    expected = runtime.sample(num_samples, seed)
    if samples.dtype == np.uint8:
        return 2 / 255 * max(0.0, float(np.abs(samples - 255 * expected).max()) - 0.5)  # but for what was rounded
    return float(
        (np.abs(samples - expected) * (1 / np.array(runtime.info["data_std"]) if runtime.is_points else 2)).max()
    )


def _record(
    pipeline: DiffusionPipeline, batch_size: int, num_inference_steps: int, nudge: float = 0.0
) -> tuple[np.ndarray, list[np.ndarray | None], list[np.ndarray]]:
    """The pipeline's initial sample, the noise that it drew in each step (`None`: none), and each step's outcome.

    That is what the network sees next, and at last the sample. With a `nudge`, the initial sample is moved by normal
    noise of that standard deviation.
    """
    generator = torch.Generator().manual_seed(batch_size)
    latents = torch.randn((batch_size, *pipeline.sample_shape), generator=generator)
    latents += nudge * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    again = torch.Generator()
    state = generator.get_state()
    noises, inputs, samples = [], [], []

    def record(pipe: DiffusionPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        nonlocal state
        drew = not torch.equal(state, generator.get_state())
        noises.append(torch.randn(latents.shape, generator=again.set_state(state)).numpy() if drew else None)
        samples.append(tensors["latents"].numpy())
        state = generator.get_state()
        return {}

    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0].numpy()))
    try:
        pipeline(batch_size, generator, num_inference_steps, latents=latents, callback_on_step_end=record)
    finally:
        hook.remove()
    return latents.numpy(), noises, [*inputs[1:], samples[-1]]
