"""Figures and animations of data, of the forward and reverse process, and of training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .bound import BoundEstimate, VariationalBound
from .errors import ConfigurationError, DivergenceError
from .files import whole_file
from .pipeline import DDPMMLPPipeline
from .progress import progress_bar
from .runtime.pictures import image_grid
from .runtime.step_table import TERMS, StepTable

# Enough to show a density of points or a variety of images; few enough to see single ones
NUM_POINTS, NUM_IMAGES = 3000, 25
DATA_COLOR, SAMPLE_COLOR = "tab:blue", "tab:orange"
# x_t by t, as it is shown: points [n, 2] in the data's units, or images [n, height, width, channels] in [0, 1]
Frames = dict[int, np.ndarray]
FIGURES = ("loss.png", "forward_process.png", "samples.png", "process.gif")  # of a training run


def draw_training_run(
    pipeline: DDPMMLPPipeline,
    x_0: torch.Tensor,
    losses: Sequence[float],
    folder: Path,
    seed: int = 0,
    num_inference_steps: int | None = 100,
) -> list[str]:
    """Draw all that a training run leaves behind.

    Args:
        pipeline: the trained pipeline.
        x_0: some of the data as the network sees them, `[number, *pipeline.sample_shape]`.
        losses: the loss of every optimizer step.
        folder: where `FIGURES` go. Those that are there already are replaced: `check_output_dir` has allowed it.
        seed: of the noise.
        num_inference_steps: sampling steps of the reverse process, or T if that is less.

    Returns:
        The files' names. (Of points in one dimension, only the loss is drawn; of those in more than two, the
        first two coordinates.)
    """
    figures = {"loss.png": plot_losses(losses)}
    frames: list[tuple[str, Frames]] = []
    if not pipeline.is_points or pipeline.sample_shape[0] >= 2:
        number = NUM_POINTS if pipeline.is_points else NUM_IMAGES
        forward = forward_process(pipeline, x_0[:number], seed)
        steps = min(num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
        with progress_bar(total=steps, desc="drawing samples") as progress:
            reverse = reverse_process(pipeline, number, seed, num_inference_steps=steps, on_step=progress.update)
        figures["forward_process.png"] = plot_process(some_frames(forward), DATA_COLOR)
        figures["samples.png"] = plot_samples(forward[0], reverse[0])
        frames = [("forward", forward), ("reverse", reverse)]
    for name, figure in figures.items():
        save(figure, folder / name, overwrite=True)
    if frames:
        animate_process(frames, folder / "process.gif", overwrite=True)
    return [*figures, *(["process.gif"] if frames else [])]


def forward_process(
    pipeline: DDPMMLPPipeline, x_0: torch.Tensor, seed: int = 0, timesteps: Iterable[int] | None = None
) -> Frames:
    """x_t at several t (Ho et al. 2020, eq. 4), with one ε for each sample, which so moves along a smooth path.

    Args:
        pipeline: whose scheduler is the forward process.
        x_0: data as the network sees them, `[number, *pipeline.sample_shape]`.
        seed: of ε.
        timesteps: which t; by default about forty of them, from 0, the data, to T.

    Returns:
        x_t by t. (The scheduler counts its timesteps from 0: its t - 1 is the papers' t.)
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    x = {
        t: scheduler.add_noise(x_0, eps, torch.tensor([t - 1])) if t else x_0
        for t in timesteps or _timesteps_to_show(scheduler.config.num_train_timesteps)
    }
    return {t: _to_show(pipeline, x_t) for t, x_t in x.items()}


def reverse_process(
    pipeline: DDPMMLPPipeline,
    number: int,
    seed: int = 0,
    timesteps: Iterable[int] | None = None,
    num_inference_steps: int | None = None,
    on_step: Callable[[], Any] | None = None,
) -> Frames:
    """x_t at several t, drawn by the pipeline with its own scheduler.

    Args:
        pipeline: what draws.
        number: of samples.
        seed: of the noise.
        timesteps: which t, or rather the nearest that the sampling steps lead to; by default about forty of them.
        num_inference_steps: of sampling; by default T.
        on_step: called after each of them.

    Returns:
        x_t by t, from T, the noise, to t = 0, the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((number, *pipeline.sample_shape), generator=generator)
    T = pipeline.scheduler.config.num_train_timesteps
    pipeline.scheduler.set_timesteps(num_inference_steps or T)
    # A step leads to the next one's t, or to 0. (The scheduler counts from 0: its t is the papers' t - 1.)
    after_step = [int(t) + 1 for t in pipeline.scheduler.timesteps[1:]] + [0]
    shown = _timesteps_to_show(T) if timesteps is None else timesteps
    wanted = {min([T, *after_step], key=lambda t: abs(t - t_shown)) for t_shown in shown}
    frames = {T: _to_show(pipeline, latents)} if T in wanted else {}

    def keep(pipe: DDPMMLPPipeline, step: int, t: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        if not state["latents"].isfinite().all():
            raise DivergenceError.at_step(step, float(t))
        if on_step is not None:
            on_step()
        if after_step[step] in wanted:
            frames[after_step[step]] = _to_show(pipeline, state["latents"].float().cpu())
        return {}

    pipeline(number, generator, num_inference_steps, latents=latents, callback_on_step_end=keep)
    return frames


def draw_samples(
    pipeline: DDPMMLPPipeline, num_inference_steps: int | None, seed: int, number: int = 36
) -> np.ndarray:
    """Samples as they are shown, from the pipeline's scheduler with some of its steps."""
    return pipeline(number, torch.Generator().manual_seed(seed), num_inference_steps, "np")[0]


def _timesteps_to_show(T: int, number: int = 41) -> list[int]:
    """From 0 to T, closer together near 0, where most of what can be seen happens."""
    return sorted({round(T * u**2) for u in np.linspace(0, 1, number)})


def some_frames(frames: Frames, number: int = 6) -> Frames:
    """A few of them, evenly spaced, the first and the last among them."""
    timesteps = list(frames)
    return {timesteps[round(i)]: frames[timesteps[round(i)]] for i in np.linspace(0, len(timesteps) - 1, number)}


def _to_show(pipeline: DDPMMLPPipeline, x_t: torch.Tensor) -> np.ndarray:
    if x_t.ndim == 2:
        return pipeline.to_data_units(x_t).numpy()[:, :2]
    return (x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_losses(losses: Sequence[float]) -> Figure:
    """The loss over training, each step's and smoothed over 1 % of them."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=DATA_COLOR, alpha=0.25, linewidth=0.5, label="each step")
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=DATA_COLOR, label=f"mean of {window}")
    finite = [loss for loss in losses if math.isfinite(loss)]  # those of steps that fp16 skipped may not be
    low, high, usual = min(finite), max(finite), 4 * np.median(np.abs(finite))
    if high > 10 * usual > 0:
        # The bound's first losses are thousands of times its last, which may be negative: what is beyond the usual is
        # on a logarithmic scale.
        axes.set_yscale("symlog", linthresh=usual, linscale=3)
    axes.set_ylim(1.05 * min(0, low), 1.05 * max(0, high))
    axes.legend()
    return figure


def plot_table(table: StepTable) -> Figure:
    """A step table's coefficients, call by call."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(table.summary)
    axes = figure.add_subplot(xlabel="network call", ylabel="coefficient in the next x")
    calls = np.arange(1, len(table) + 1)
    for i, term in table.terms:
        color = f"C{term}"
        label = TERMS[term] + (f", {i} call{'s' if i > 1 else ''} before" if i else "")
        axes.plot(
            calls,
            table.to_next[:, i, term],
            color=color,
            alpha=0.85**i,
            linestyle="-" if i == 0 else "--",
            label=label,
        )
    axes.axhline(0, color="gray", linewidth=0.5)
    figure.legend(loc="outside right center", fontsize="small", ncols=1 + len(table.terms) // 16)
    return figure


def plot_bound(estimate: BoundEstimate) -> Figure:
    """The bound's terms by timestep (as in Nichol & Dhariwal 2021, figure 2); those of both ends are in the title."""
    T = len(estimate.terms) - 1
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="$t$", ylabel="$L_{t-1}$, bits/dim", xscale="log", yscale="log")
    axes.plot(np.arange(2, T + 1), estimate.terms[1:T] / estimate.dimension, color=DATA_COLOR)
    axes.grid(which="both", alpha=0.3)
    first, rest, last = (terms.sum() / estimate.dimension for terms in np.split(estimate.terms, [1, T]))
    names = ("$L_0$", f"$L_1 + … + L_{{{T - 1}}}$", f"$L_{{{T}}}$")
    sums = (f"{name} = {value:.3g}" for name, value in zip(names, (first, rest, last), strict=True))
    axes.set_title(",   ".join(sums), size="medium")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


@torch.no_grad()
def plot_drift(pipeline: DDPMMLPPipeline, x_0: torch.Tensor, seed: int = 0) -> Figure:
    """Forward process, reverse process, and what drives the latter, the drift μ_θ(x_t, t) − x_t: at the data, halfway,
    and at the noise (as in Sohl-Dickstein et al. 2015, figure 1). The drift is that of x_0 before it is clipped.

    Args:
        pipeline: for points of two coordinates, with a stock `DDPMScheduler`.
        x_0: data as the network sees them, `[number, 2]`.
        seed: of the noise.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    timesteps = [0, T // 2, T]
    forward = forward_process(pipeline, x_0, seed, timesteps)
    reverse = reverse_process(pipeline, len(x_0), seed, timesteps)
    limits = _limits([*forward.values(), *reverse.values()])
    assert limits is not None  # which are those of points
    columns = (np.linspace(low, high, 25)[1:-1] for low, high in zip(*limits, strict=True))
    grid = torch.tensor(np.stack(np.meshgrid(*columns), axis=-1).reshape(-1, 2), dtype=torch.float32)
    mean = pipeline.to_data_units(torch.zeros(1, 2))
    std = pipeline.to_data_units(torch.ones(1, 2)) - mean
    x_t = (grid - mean) / std
    bound = VariationalBound(pipeline.scheduler, discretized=False, clip_sample=False)

    figure = Figure(figsize=(8, 8), layout="constrained")
    rows = figure.subplots(3, 3)
    for (above, middle, below), t in zip(rows.T, timesteps, strict=True):
        _panel(above, forward[t], limits, DATA_COLOR, f"t = {t}")
        _panel(middle, reverse[t], limits, SAMPLE_COLOR, "")
        step = max(t, 1)  # the drift is a step's, from x_t to x_{t-1}
        timestep = torch.full((len(grid),), step - 1)
        drift = bound.mean(pipeline.unet(x_t, timestep).sample, x_t, timestep).float() - x_t
        _panel(below, np.empty((0, 2)), limits, DATA_COLOR, f"t = {step}")
        directions = torch.nn.functional.normalize(drift * std)
        lengths = drift.norm(dim=1)  # which differ by orders of magnitude: colours show them, and no arrow is lost
        below.quiver(
            *grid.T.numpy(),
            *directions.T.numpy(),
            lengths.numpy(),
            norm=LogNorm(),
            cmap="viridis_r",
            scale=28,
            width=0.005,
        )
    for (first, *_), name in zip(rows, ("forward process", "reverse process", "drift"), strict=True):
        first.set_ylabel(name)
    return figure


def plot_process(frames: Frames, color: str = SAMPLE_COLOR) -> Figure:
    """x_t at several t, side by side."""
    figure = Figure(figsize=(2.4 * len(frames), 2.7), layout="constrained")
    limits = _limits(frames.values())
    for axes, (t, x_t) in zip(figure.subplots(1, len(frames), squeeze=False)[0], frames.items(), strict=True):
        _panel(axes, x_t, limits, color, f"t = {t}")
    return figure


def plot_samples(data: np.ndarray, samples: np.ndarray, titles: tuple[str, str] = ("data", "samples")) -> Figure:
    """Data and samples, side by side."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    limits = _limits([data, samples])
    for axes, x, color, title in zip(
        figure.subplots(1, 2), (data, samples), (DATA_COLOR, SAMPLE_COLOR), titles, strict=True
    ):
        _panel(axes, x, limits, color, title)
    return figure


def animate_process(processes: Sequence[tuple[str, Frames]], path: Path, overwrite: bool = False) -> None:
    """Write an animation, as GIF or, with ffmpeg, MP4.

    Args:
        processes: one after the other, `"forward"` or `"reverse"` and its frames.
        path: a `.gif` or `.mp4` file.
        overwrite: whether a file that is there already is replaced.

    Raises:
        OutputExistsError: if there is one, and it isn't to be replaced.
        ConfigurationError: for a `.mp4` where there is no ffmpeg.
    """
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ConfigurationError("an .mp4 needs ffmpeg, which is not installed: use .gif")
    figure = Figure(figsize=(4, 4.3), layout="constrained")
    axes = figure.add_subplot()
    limits = _limits([x_t for _, frames in processes for x_t in frames.values()])
    shots = [(name, t, x_t) for name, frames in processes for t, x_t in frames.items()]
    shots = shots[:1] * 10 + shots + shots[-1:] * 15  # what is at the ends stands still for a while

    def draw(shot: tuple[str, int, np.ndarray]) -> None:
        name, t, x_t = shot
        axes.clear()
        _panel(axes, x_t, limits, DATA_COLOR if name == "forward" else SAMPLE_COLOR, f"{name} process, t = {t}")

    writer = FFMpegWriter(fps=15) if path.suffix == ".mp4" else PillowWriter(fps=15)
    with whole_file(path, overwrite) as temporary, progress_bar(total=len(shots), desc="drawing the film") as progress:
        FuncAnimation(figure, draw, shots).save(
            temporary, writer, dpi=80, progress_callback=lambda *_: progress.update()
        )


def save(figure: Figure, path: Path, overwrite: bool = False) -> None:
    """Write a figure, whole or not at all.

    Raises:
        OutputExistsError: if `path` exists, and isn't to be overwritten.
    """
    with whole_file(path, overwrite) as temporary:
        figure.savefig(temporary, dpi=100)


Limits = tuple[np.ndarray, np.ndarray] | None


def _limits(clouds: Iterable[np.ndarray]) -> Limits:
    """For points, the box that holds all but the outermost 0.1 % on each side, and a margin."""
    clouds = list(clouds)
    if clouds[0].ndim != 2:
        return None
    low, high = np.percentile(np.concatenate(clouds), [0.1, 99.9], axis=0)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _panel(axes: Axes, x: np.ndarray, limits: Limits, color: str, title: str) -> None:
    if limits is None:
        axes.imshow(image_grid([x], len(x), gap=1, background="white"), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    else:
        axes.scatter(*x.T, s=2, color=color, linewidths=0)
        (x_low, y_low), (x_high, y_high) = limits
        axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high), xticks=[], yticks=[])
        # The axes' units may differ (height and weight, say): a square box rather than an equal scale.
        axes.set_box_aspect(1)
    axes.set_title(title)
