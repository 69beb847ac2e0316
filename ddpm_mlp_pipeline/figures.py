"""Figures and animations of data, the forward and reverse process, and training."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from matplotlib.animation import FFMpegWriter, FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .bound import BoundEstimate, VariationalBound
from .data.batches import Batch
from .errors import ConfigurationError, DivergenceError
from .files import whole_file
from .pipeline import DDPMMLPPipeline, default_num_inference_steps
from .progress import progress_bar
from .runtime.pictures import image_grid
from .runtime.step_table import TERMS, StepTable, Z

# Enough to show a density of points or the variety of images, few enough to see single ones
NUM_POINTS, NUM_IMAGES = 3000, 25
DATA_COLOR, SAMPLE_COLOR = "tab:blue", "tab:orange"
# x_t by t: points [n, 2] in the data's units, or images [n, height, width, channels] in [0, 1]
Frames = dict[int, np.ndarray]
FIGURES = ("loss.png", "forward_process.png", "samples.png", "process.gif")  # of a training run


def draw_training_run(
    pipeline: DDPMMLPPipeline,
    x_0: torch.Tensor,
    losses: Sequence[float],
    folder: Path,
    seed: int = 0,
    num_inference_steps: int = 100,
) -> list[str]:
    """Draw the figures of a training run.

    For points of one dimension, only the loss is drawn; for points of more than two, the first two coordinates.

    Args:
        pipeline: the trained pipeline.
        x_0: some of the data in the network's units, `[number, *pipeline.sample_shape]`.
        losses: the loss of every optimizer step.
        folder: the folder for `FIGURES`. Existing ones are replaced, which `check_output_dir` has allowed.
        seed: the seed of the noise.
        num_inference_steps: number of denoising steps, at most T.

    Returns:
        The files' names.
    """
    save(plot_losses(losses), folder / "loss.png", overwrite=True)
    if pipeline.is_points and pipeline.sample_shape[0] < 2:
        return ["loss.png"]
    number = NUM_POINTS if pipeline.is_points else NUM_IMAGES
    forward = forward_process(pipeline, x_0[:number], seed)
    steps = min(num_inference_steps, pipeline.scheduler.config.num_train_timesteps)
    with progress_bar(total=steps, desc="drawing samples") as progress:
        reverse = reverse_process(pipeline, number, seed, num_inference_steps=steps, on_step=progress.update)
    save(plot_process(some_frames(forward), DATA_COLOR), folder / "forward_process.png", overwrite=True)
    save(plot_samples(forward[0], reverse[0]), folder / "samples.png", overwrite=True)
    animate_process([("forward", forward), ("reverse", reverse)], folder / "process.gif", overwrite=True)
    return list(FIGURES)


def forward_process(
    pipeline: DDPMMLPPipeline, x_0: torch.Tensor, seed: int = 0, timesteps: Iterable[int] | None = None
) -> Frames:
    """Return x_t at several t (Ho et al. 2020, eq. 4), with the same ε at all t, so that each path is smooth.

    Args:
        pipeline: the pipeline whose scheduler defines the forward process.
        x_0: data in the network's units, `[number, *pipeline.sample_shape]`.
        seed: the seed of ε.
        timesteps: values of t; by default about forty, from 0, the data, to T. The scheduler's timestep is t - 1.

    Returns:
        x_t by t.
    """
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    return {
        t: to_show(pipeline, scheduler.add_noise(x_0, eps, torch.tensor([t - 1])) if t else x_0)
        for t in timesteps or _timesteps_to_show(scheduler.config.num_train_timesteps)
    }


def reverse_process(
    pipeline: DDPMMLPPipeline,
    number: int,
    seed: int = 0,
    timesteps: Iterable[int] | None = None,
    num_inference_steps: int | None = None,
    on_step: Callable[[], Any] | None = None,
) -> Frames:
    """Sample with the pipeline and its scheduler, and return x_t at several t.

    Args:
        pipeline: the pipeline.
        number: number of samples.
        seed: the seed of the noise.
        timesteps: values of t; by default about forty. Each becomes the nearest t that a denoising step reaches.
        num_inference_steps: number of denoising steps; by default the scheduler's.
        on_step: called after each step.

    Returns:
        x_t by t, from T, the noise, to 0, the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((number, *pipeline.sample_shape), generator=generator)
    T = pipeline.scheduler.config.num_train_timesteps
    num_inference_steps = num_inference_steps or default_num_inference_steps(pipeline.scheduler)
    pipeline.scheduler.set_timesteps(num_inference_steps)
    # A step leads to the next step's t, and the last to 0. The scheduler's timestep is t - 1.
    after_step = [int(t) + 1 for t in pipeline.scheduler.timesteps[1:]] + [0]
    shown = _timesteps_to_show(T) if timesteps is None else timesteps
    wanted = {min([T, *after_step], key=lambda t: abs(t - t_shown)) for t_shown in shown}
    frames = {T: to_show(pipeline, latents)} if T in wanted else {}

    def keep(pipe: DDPMMLPPipeline, step: int, t: torch.Tensor, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        if not state["latents"].isfinite().all():
            raise DivergenceError.at_step(step, float(t))
        if on_step is not None:
            on_step()
        if after_step[step] in wanted:
            frames[after_step[step]] = to_show(pipeline, state["latents"].float().cpu())
        return {}

    pipeline(number, generator, num_inference_steps, latents=latents, callback_on_step_end=keep)
    return frames


def draw_samples(pipeline: DDPMMLPPipeline, num_inference_steps: int | None, seed: int) -> np.ndarray:
    """Return 36 samples of the pipeline: float `[36, height, width, channels]` in [0, 1]."""
    return pipeline(36, torch.Generator().manual_seed(seed), num_inference_steps, "np")[0]


def _timesteps_to_show(T: int) -> list[int]:
    """Return timesteps from 0 to T, closer together near 0, where most of the visible change happens."""
    return sorted({round(T * u**2) for u in np.linspace(0, 1, 41)})


def some_frames(frames: Frames) -> Frames:
    """Return six evenly spaced frames, including the first and the last."""
    items = list(frames.items())
    return dict(items[round(i)] for i in np.linspace(0, len(items) - 1, 6))


def to_show(pipeline: DDPMMLPPipeline, x_t: torch.Tensor) -> np.ndarray:
    """Return what a figure shows of x_t: two coordinates in the data's units, or images in [0, 1], channels last."""
    if x_t.ndim == 2:
        return pipeline.to_data_units(x_t).numpy()[:, :2]
    return (x_t / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_losses(losses: Sequence[float]) -> Figure:
    """Plot the loss by optimizer step, with a moving average over 1 % of the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=DATA_COLOR, alpha=0.25, linewidth=0.5, label="each step")
    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=DATA_COLOR, label=f"mean of {window}")
    finite = [loss for loss in losses if math.isfinite(loss)]  # steps that fp16 skipped may have other losses
    low, high, usual = min(finite), max(finite), 4 * np.median(np.abs(finite))
    if high > 10 * usual > 0:
        # The bound's first losses are thousands of times its last, which may be negative: show large ones on a
        # logarithmic scale.
        axes.set_yscale("symlog", linthresh=usual, linscale=3)
    axes.set_ylim(1.05 * min(0, low), 1.05 * max(0, high))
    axes.legend()
    return figure


def plot_table(table: StepTable) -> Figure:
    """Plot a step table's coefficients by network call."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    figure.suptitle(table.summary)
    axes = figure.add_subplot(xlabel="network call", ylabel="coefficient in the next x")
    calls = np.arange(1, len(table) + 1)
    for i, term in table.terms:
        label = TERMS[term] + (f", {i} call{'s' if i > 1 else ''} before" if i else "")
        style = {"color": f"C{term}", "alpha": 0.85**i, "linestyle": "--" if i else "-"}
        axes.plot(calls, table.to_next[:, i, term], **style, label=label)
    axes.axhline(0, color="gray", linewidth=0.5)
    figure.legend(loc="outside right center", fontsize="small", ncols=1 + len(table.terms) // 16)
    return figure


def plot_fits(tables: Sequence[StepTable], scheduler: SchedulerMixin) -> Figure:
    """Plot where each of some tables steps, what timestep it tells the network, and how much noise its steps add.

    Args:
        tables: tables with `alphas_cumprod`.
        scheduler: the scheduler that the network was trained with.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    log_snr = torch.logit(scheduler.alphas_cumprod.double()).numpy()
    for i, table in enumerate(tables):
        calls = np.arange(1, len(table) + 1)
        seen = np.asarray(table.alphas_cumprod)
        style = {"color": f"C{i}", "marker": "o", "markersize": 4}
        left.plot(calls, np.log(seen / (1 - seen)), **style, label=f"{len(table)} calls")
        told = np.interp(table.timesteps, np.arange(len(log_snr)), log_snr)
        left.plot(calls, told, color=f"C{i}", linestyle=":", linewidth=1)
        sigma = np.sqrt(1 - seen[1:])  # of the noise in what the network sees next
        right.plot(calls[:-1], np.abs(table.to_next[:-1, 0, Z]) / sigma, **style)
    left.set(xlabel="network call", ylabel="log SNR", title="what the network sees; dotted: what it is told")
    right.set(xlabel="network call", ylabel="z's coefficient ÷ σ", title="fresh noise in the next x", ylim=(0, None))
    left.legend(fontsize="small")
    if any(table.is_guided.any() for table in tables):
        axes = right.twinx()
        axes.set(ylabel="dashed: guidance w")
        for i, table in enumerate(tables):
            axes.plot(np.arange(1, len(table) + 1), table.guidance_scales, color=f"C{i}", linestyle="--", linewidth=1)
    return figure


def plot_panels(panels: Mapping[str, np.ndarray], columns: int = 3) -> Figure:
    """Plot sets of points or of images side by side, by their titles."""
    limits = _limits(panels.values())
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * min(columns, len(panels)), 3.5 * rows), layout="constrained")
    grid = figure.subplots(rows, min(columns, len(panels)), squeeze=False).ravel()
    for axes, (title, x) in zip(grid, panels.items(), strict=False):
        _panel(axes, x, limits, DATA_COLOR if title == "data" else SAMPLE_COLOR, title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def plot_bound(estimate: BoundEstimate) -> Figure:
    """Plot the bound's terms by timestep (Nichol & Dhariwal 2021, figure 2), with the first and last in the title."""
    T = len(estimate.terms) - 1
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="$t$", ylabel="$L_{t-1}$, bits/dim", xscale="log", yscale="log")
    axes.plot(np.arange(2, T + 1), estimate.terms[1:T] / estimate.dimension, color=DATA_COLOR)
    axes.grid(which="both", alpha=0.3)
    first, rest, last = (terms.sum() / estimate.dimension for terms in np.split(estimate.terms, [1, T]))
    title = f"$L_0$ = {first:.3g},   $L_1 + … + L_{{{T - 1}}}$ = {rest:.3g},   $L_{{{T}}}$ = {last:.3g}"
    axes.set_title(title, size="medium")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


@torch.no_grad()
def plot_drift(pipeline: DDPMMLPPipeline, x_0: torch.Tensor, seed: int = 0) -> Figure:
    """Plot the forward process, the reverse process and its drift at t = 0, T/2 and T (Sohl-Dickstein et al. 2015,
    figure 1).

    The drift is μ_θ(x_t, t) − x_t, with x_0 before it is clipped.

    Args:
        pipeline: a pipeline for points of two coordinates, with a stock `DDPMScheduler`.
        x_0: data in the network's units, `[number, 2]`.
        seed: the seed of the noise.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    timesteps = [0, T // 2, T]
    forward = forward_process(pipeline, x_0, seed, timesteps)
    reverse = reverse_process(pipeline, len(x_0), seed, timesteps)
    limits = _limits([*forward.values(), *reverse.values()])
    assert limits is not None  # these are points
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
        step = max(t, 1)  # a step from x_t to x_{t-1} needs t of at least 1
        timestep = torch.full((len(grid),), step - 1)
        drift = bound.mean(pipeline.unet(x_t, timestep).sample, x_t, timestep).float() - x_t
        _panel(below, np.empty((0, 2)), limits, DATA_COLOR, f"t = {step}")
        directions = torch.nn.functional.normalize(drift * std)
        # Lengths differ by orders of magnitude: colours show them, and all arrows have the same length
        arrows = (*grid.T.numpy(), *directions.T.numpy(), drift.norm(dim=1).numpy())
        below.quiver(*arrows, norm=LogNorm(), cmap="viridis_r", scale=28, width=0.005)
    for (first, *_), name in zip(rows, ("forward process", "reverse process", "drift"), strict=True):
        first.set_ylabel(name)
    return figure


def plot_process(frames: Frames, color: str = SAMPLE_COLOR) -> Figure:
    """Plot x_t at several t side by side."""
    figure = Figure(figsize=(2.4 * len(frames), 2.7), layout="constrained")
    limits = _limits(frames.values())
    for axes, (t, x_t) in zip(figure.subplots(1, len(frames), squeeze=False)[0], frames.items(), strict=True):
        _panel(axes, x_t, limits, color, f"t = {t}")
    return figure


def plot_samples(
    data: np.ndarray,
    samples: np.ndarray,
    titles: tuple[str, str] = ("data", "samples"),
    values: np.ndarray | None = None,
) -> Figure:
    """Plot data and samples side by side, coloured by the values of both, if there are any."""
    figure = Figure(figsize=(8, 4.3), layout="constrained")
    limits = _limits([data, samples])
    left, right = figure.subplots(1, 2)
    _panel(left, data, limits, DATA_COLOR if values is None else values, titles[0])
    _panel(right, samples, limits, SAMPLE_COLOR if values is None else values, titles[1])
    return figure


def plot_what_was_asked(pipeline: DDPMMLPPipeline, data: Batch, seed: int = 0) -> Figure:
    """Plot data and samples with the same labels and conditions, in colours by class, or by the first condition."""
    asked: dict[str, Any] = dict(data.known)
    values = None
    if "condition" in asked:
        config, condition = pipeline.config, asked["condition"].numpy()
        if config.condition_mean is not None:
            condition = condition * np.asarray(config.condition_std) + np.asarray(config.condition_mean)
        asked["condition"], values = condition, condition[:, 0]
    if "class_labels" in asked:
        values = asked["class_labels"] = asked["class_labels"].numpy()
    generator = torch.Generator().manual_seed(seed)
    samples = pipeline(len(data.x_0), generator, None, "np", return_dict=False, **asked)[0]
    return plot_samples(to_show(pipeline, data.x_0), samples[:, :2], values=values)


def animate_process(processes: Sequence[tuple[str, Frames]], path: Path, overwrite: bool = False) -> None:
    """Write an animation as a GIF or, with ffmpeg, an MP4 file.

    Args:
        processes: pairs of `"forward"` or `"reverse"` and the frames, in the order of the animation.
        path: a `.gif` or `.mp4` file.
        overwrite: whether to replace an existing file.

    Raises:
        OutputExistsError: if the file exists, and `overwrite` is false.
        ConfigurationError: if `path` is a `.mp4` file and ffmpeg is not installed.
    """
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ConfigurationError("an .mp4 needs ffmpeg, which is not installed: use .gif")
    figure = Figure(figsize=(4, 4.3), layout="constrained")
    axes = figure.add_subplot()
    limits = _limits([x_t for _, frames in processes for x_t in frames.values()])
    shots = [(name, t, x_t) for name, frames in processes for t, x_t in frames.items()]
    shots = shots[:1] * 10 + shots + shots[-1:] * 15  # hold the first and last frame

    def draw(shot: tuple[str, int, np.ndarray]) -> None:
        name, t, x_t = shot
        axes.clear()
        _panel(axes, x_t, limits, DATA_COLOR if name == "forward" else SAMPLE_COLOR, f"{name} process, t = {t}")

    writer = FFMpegWriter(fps=15) if path.suffix == ".mp4" else PillowWriter(fps=15)
    with whole_file(path, overwrite) as temporary, progress_bar(total=len(shots), desc="animating") as progress:
        FuncAnimation(figure, draw, shots).save(
            temporary, writer, dpi=80, progress_callback=lambda *_: progress.update()
        )


def save(figure: Figure, path: Path, overwrite: bool = False) -> None:
    """Write a figure atomically.

    Raises:
        OutputExistsError: if `path` exists, and `overwrite` is false.
    """
    with whole_file(path, overwrite) as temporary:
        figure.savefig(temporary, dpi=100)


Limits = tuple[np.ndarray, np.ndarray] | None


def _limits(clouds: Iterable[np.ndarray]) -> Limits:
    """Return the box of all but the outermost 0.1 % of points on each side, with a margin; `None` for images."""
    clouds = list(clouds)
    if clouds[0].ndim != 2:
        return None
    low, high = np.percentile(np.concatenate(clouds), [0.1, 99.9], axis=0)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _panel(axes: Axes, x: np.ndarray, limits: Limits, color: str | np.ndarray, title: str) -> None:
    if limits is None:
        axes.imshow(image_grid([x], len(x), gap=1, background="white"), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
    elif x.shape[1] == 1:
        (low,), (high,) = limits
        axes.hist(
            x[:, 0], bins=60, range=(low, max(high, low + 1e-9)), color=color if isinstance(color, str) else None
        )
        axes.set(yticks=[])
    else:
        axes.scatter(*x.T, s=2, c=color, linewidths=0)
        (x_low, y_low), (x_high, y_high) = limits
        axes.set(xlim=(x_low, x_high), ylim=(y_low, y_high), xticks=[], yticks=[])
        # A square box instead of equal scales, because the units of the axes may differ
        axes.set_box_aspect(1)
    axes.set_title(title)
