"""Figures and animations of data, of the forward and reverse process, and of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import DDPMScheduler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import whole_file
from .pipeline import DDPMMLPPipeline

NUM_POINTS = 3000  # enough to show a density, few enough to see single points
NUM_FRAMES = 41
DATA_COLOR, SAMPLE_COLOR = "tab:blue", "tab:orange"


def draw_training_run(
    pipeline: DDPMMLPPipeline, x_0: torch.Tensor, losses: Sequence[float], folder: Path, seed: int = 0
) -> list[str]:
    """Draw all that a training run on points leaves behind.

    Args:
        pipeline: the trained pipeline.
        x_0: normalised points of the data set, `[number of points, dimension]`.
        losses: the loss of every optimizer step.
        folder: where `loss.png`, `forward_process.png`, `samples.png` and `process.gif` go.
        seed: of the noise.

    Returns:
        The files' names. (Of points in one dimension, only the loss is drawn; of those in more than two, the
        first two coordinates.)
    """
    files = {"loss.png": lambda path: plot_losses(losses).savefig(path)}
    if x_0.shape[1] >= 2:
        x_0 = x_0[:NUM_POINTS]
        forward = forward_process(x_0, pipeline.scheduler, seed)
        reverse = reverse_process(pipeline, len(x_0), seed)
        data_units = [pipeline.to_data_units(x_t).numpy()[:, :2] for x_t in (*forward.values(), *reverse.values())]
        forward = dict(zip(forward, data_units, strict=False))
        reverse = dict(zip(reverse, data_units[len(forward) :], strict=True))
        files |= {
            "forward_process.png": lambda path: plot_forward_process(forward).savefig(path),
            "samples.png": lambda path: plot_samples(forward[0], [*reverse.values()][-1]).savefig(path),
            "process.gif": lambda path: animate_process(forward, reverse, path),
        }
    with matplotlib.rc_context({"savefig.dpi": 100, "figure.constrained_layout.use": True}):
        for name, draw in files.items():
            with whole_file(folder / name) as path:
                draw(path)
    return [*files]


def forward_process(x_0: torch.Tensor, scheduler: DDPMScheduler, seed: int = 0) -> dict[int, torch.Tensor]:
    """x_t at several t (Ho et al. 2020, eq. 4), with one ε for each sample, which so moves along a smooth path.

    Returns:
        x_t by t, from t = 0, the data, to T. (The scheduler counts its timesteps from 0: its t - 1 is the papers' t.)
    """
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = _timesteps_to_show(scheduler.config.num_train_timesteps)
    return {t: scheduler.add_noise(x_0, eps, torch.tensor([t - 1])) if t else x_0 for t in timesteps}


def reverse_process(pipeline: DDPMMLPPipeline, num_samples: int, seed: int = 0) -> dict[int, torch.Tensor]:
    """x_t at several t, drawn by the pipeline with its own scheduler and all of its steps.

    Returns:
        x_t by t, from T, the noise, to t = 0, the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((num_samples, *pipeline.sample_shape), generator=generator)
    T = pipeline.scheduler.config.num_train_timesteps
    wanted = _timesteps_to_show(T)
    frames = {T: latents}

    def keep(pipe: DDPMMLPPipeline, step: int, t: torch.Tensor, state: dict[str, torch.Tensor]) -> dict:
        if int(t) in wanted:  # the step at the scheduler's t gives the papers' x_t
            frames[int(t)] = state["latents"].float().cpu()
        return {}

    pipeline(num_samples, generator, latents=latents, callback_on_step_end=keep)
    return frames


def _timesteps_to_show(T: int) -> list[int]:
    """From 0 to T, closer together near 0, where most of what can be seen happens."""
    return sorted({round(T * u**2) for u in np.linspace(0, 1, NUM_FRAMES)})


def plot_losses(losses: Sequence[float]) -> Figure:
    """The loss over training, each step's and smoothed over 1 % of them."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss, |ε − ε_θ|² per coordinate")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=DATA_COLOR, alpha=0.25, linewidth=0.5, label="each step")
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=DATA_COLOR, label=f"mean of {window}")
    axes.set_ylim(0, 1.5 * np.percentile(losses, 99))
    axes.legend()
    return figure


def plot_forward_process(forward: dict[int, np.ndarray], num_panels: int = 6) -> Figure:
    """The data turning into noise: x_t, `[number of points, 2]`, at several t."""
    figure = Figure(figsize=(2.4 * num_panels, 2.7))
    timesteps = list(forward)
    chosen = [timesteps[round(i)] for i in np.linspace(0, len(timesteps) - 1, num_panels)]
    for axes, t in zip(figure.subplots(1, num_panels), chosen, strict=True):
        _scatter(axes, forward[t], _limits(forward.values()), DATA_COLOR, f"t = {t}")
    return figure


def plot_samples(data: np.ndarray, samples: np.ndarray) -> Figure:
    """Data and samples, `[number of points, 2]` each, side by side."""
    figure = Figure(figsize=(8, 4.3))
    limits = _limits([data, samples])
    for axes, points, color, title in zip(
        figure.subplots(1, 2), (data, samples), (DATA_COLOR, SAMPLE_COLOR), ("data", "samples"), strict=True
    ):
        _scatter(axes, points, limits, color, title)
    return figure


def animate_process(forward: dict[int, np.ndarray], reverse: dict[int, np.ndarray], path: Path) -> None:
    """Write a GIF: the data turning into noise, then noise turning into samples."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure = Figure(figsize=(4, 4.3))
    axes = figure.add_subplot()
    limits = _limits([*forward.values(), *reverse.values()])
    frames = [(t, x_t, DATA_COLOR, "forward") for t, x_t in forward.items()]
    frames += [(t, x_t, SAMPLE_COLOR, "reverse") for t, x_t in reverse.items()]
    frames = frames[:1] * 10 + frames + frames[-1:] * 15  # data and samples stand still for a while

    def draw(frame: tuple[int, np.ndarray, str, str]) -> None:
        t, x_t, color, process = frame
        axes.clear()
        _scatter(axes, x_t, limits, color, f"{process} process, t = {t}")

    FuncAnimation(figure, draw, frames).save(path, PillowWriter(fps=15), dpi=80)


def _limits(clouds: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The box that holds all points but the outermost 0.1 % on each side, and a margin."""
    points = np.concatenate([*clouds])
    low, high = np.percentile(points, [0.1, 99.9], axis=0)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _scatter(axes: Axes, points: np.ndarray, limits: tuple[np.ndarray, np.ndarray], color: str, title: str) -> None:
    axes.scatter(*points.T, s=2, color=color, linewidths=0)
    (x_low, y_low), (x_high, y_high) = limits
    axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high), title=title, xticks=[], yticks=[])
    # The axes' units may differ (height and weight, say): a square box rather than an equal scale.
    axes.set_box_aspect(1)
