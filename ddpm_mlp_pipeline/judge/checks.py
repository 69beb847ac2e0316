"""The doctor's checks: what goes wrong again and again in training and sampling, and what helps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDPMScheduler

from ..data.batches import Batch
from ..data.images import image_shapes
from ..data.points import check_columns
from ..pipeline import DDPMMLPPipeline
from ..training.losses import simple_loss
from ..training.options import PREDICTION_TYPES, TrainingArguments

NUM_POINTS, NUM_IMAGES = 10_000, 500  # to take losses on
NUM_BINS = 10  # of timesteps
MAX_TERMINAL_SNR = 0.01
MIN_TIMESTEPS = 100  # where the variance isn't learned
SIGNIFICANT = 4  # standard errors: there are ten bins to look at
CLEARLY_LESS = 0.7  # times the loss
IN_UNIT_INTERVAL = "images in [0, 1]"
BATCH_SIZE = 100
MIN_SAMPLES = 10 * NUM_BINS
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: what was looked at.
        message: what was seen.
        remedy: what helps; `None` if all is well.
        is_open: whether that is no fault, or there was nothing to check it on.
    """

    check: str
    message: str
    remedy: str | None = None
    is_open: bool = False


@dataclasses.dataclass
class Patient:
    """What is examined.

    Attributes:
        pipeline: a checkpoint's, or a preset's untrained one.
        x_0: some of the training data as the network sees them, `[number, *sample_shape]`.
        held_out: as many that it was not trained on, if there are any.
        raw: the network before averaging, where a checkpoint's folder holds a state to resume from.
        options: a preset's; `None` for a checkpoint.
        dataset_size: number of all training data, for a preset.
    """

    pipeline: DDPMMLPPipeline
    x_0: torch.Tensor
    held_out: torch.Tensor | None = None
    raw: torch.nn.Module | None = None
    options: TrainingArguments | None = None
    dataset_size: int | None = None

    @property
    def scheduler(self) -> DDPMScheduler:
        """The forward process, whatever scheduler samples."""
        scheduler = self.pipeline.scheduler
        return scheduler if isinstance(scheduler, DDPMScheduler) else DDPMScheduler.from_config(scheduler.config)


def examine(patient: Patient) -> Iterator[Finding]:
    """Make all checks, one after the other; those that need a trained network are left out for a preset."""
    yield from check_data(patient)
    yield check_terminal_snr(patient.scheduler, patient.x_0)
    yield check_timesteps(patient.scheduler)
    yield check_precision(patient)
    if patient.options is None:
        yield check_conventions(patient)
        yield check_fit(patient)
        yield check_generalisation(patient)
    yield check_ema(patient)


def check_data(patient: Patient) -> Iterator[Finding]:
    """Whether the data have the range that the network and the sampler expect."""
    x_0, config = patient.x_0, patient.scheduler.config
    spread = x_0.std(dim=0)
    constant = int((spread == 0).sum())
    if constant == spread.numel():
        yield Finding("data", "all samples are equal", "look at how they are read: there is nothing to learn")
        return
    if patient.pipeline.is_points:
        shift = x_0.mean(dim=0).abs().max().item()
        widest, narrowest = spread.max().item(), spread.min().item()
        if shift > 0.2 or widest > 1.25 or narrowest < 0.8:
            message = (
                f"normalised as in training, their means are off by up to {shift:.2g}, and their deviations are "
                f"{narrowest:.2g} to {widest:.2g}"
            )
            yield Finding("data", message, "give the data that it was trained on, in the same units, or train again")
            return
    elif x_0.max() - x_0.min() < 1:
        message = f"the images use levels {_level(x_0.min())} to {_level(x_0.max())} of 0 to 255 only"
        yield Finding("data", message, "scale them to all levels before they are saved")
        return
    outside = (x_0.abs() > 1.01 * config.clip_sample_range).float().mean().item() if config.clip_sample else 0
    if outside > 1e-3:
        message = f"{outside:.1%} of the values are beyond ±{config.clip_sample_range:.3g}, where sampling clips them"
        remedy = (
            "give the data, and --dataset_noise, that it was trained on; if these are, set the scheduler's "
            f"clip_sample_range to {x_0.abs().max():.3g}"
        )
        yield Finding("data", message, remedy)
        return
    yield Finding("data", f"from {x_0.min():.2f} to {x_0.max():.2f} as the network sees them")


def check_shape(name: str, split: str, pipeline: DDPMMLPPipeline) -> Finding:
    """Whether the images come in the network's size and number of channels."""
    expected = pipeline.sample_shape
    shapes = image_shapes(name, split, NUM_IMAGES)
    if not shapes:
        return Finding("shape", "none of the images can be read", "remove what is no image")
    brought = f"and are brought to the network's {_shape(expected)}"
    if len({shape[1:] for shape in shapes}) > 1:
        low, high = (tuple(extreme(shape[i] for shape in shapes) for i in (1, 2)) for extreme in (min, max))
        message = (
            f"the images' sizes differ, with widths from {low[1]} to {high[1]} and heights from {low[0]} to "
            f"{high[0]}, {brought}"
        )
        return Finding("shape", message)
    ((found, _),) = shapes.most_common(1)
    if set(shapes) == {expected}:
        return Finding("shape", _shape(found))
    message = f"the images are {_shape(found)}, {brought}"
    return Finding("shape", message, f"if that isn't meant, train with --resolution {found[1]} --channels {found[0]}")


def check_point_columns(name: str, columns: Sequence[str] | None) -> Iterator[Finding]:
    """Whether the columns of a file have heavy tails, or whole numbers, which are no fault."""
    for warning in check_columns(name, columns):
        yield Finding(warning.check, warning.message, warning.remedy, is_open=warning.check == "whole numbers")


def check_terminal_snr(scheduler: DDPMScheduler, x_0: torch.Tensor) -> Finding:
    """Whether x_T is noise, which is what sampling starts from (Lin et al. 2023, https://arxiv.org/abs/2305.08891)."""
    alpha_cumprod = scheduler.alphas_cumprod[-1].double().item()
    if alpha_cumprod == 0:
        if scheduler.config.prediction_type == "epsilon":
            remedy = "take v_prediction: at a signal-to-noise ratio of 0, ε says nothing of x_0"
            return Finding("terminal SNR", "0, with ε-prediction", remedy)
        return Finding("terminal SNR", "0")
    snr = alpha_cumprod / (1 - alpha_cumprod) * x_0.double().square().mean().item()
    if snr <= MAX_TERMINAL_SNR:
        return Finding("terminal SNR", f"{snr:.1e}")
    return Finding(
        "terminal SNR",
        f"{snr:.2g}: x_T still shows the data, but sampling starts from pure noise",
        "take more timesteps, --ddpm_beta_schedule squaredcos_cap_v2, or a larger beta_end",
    )


def check_timesteps(scheduler: DDPMScheduler) -> Finding:
    """Whether the steps are small enough for a reverse step of fixed variance to be right."""
    T, variance_type = scheduler.config.num_train_timesteps, scheduler.config.variance_type
    if T >= MIN_TIMESTEPS or variance_type == "learned_range":
        return Finding("timesteps", f"{T}, variance {variance_type}")
    message = f"only {T}, each with a variance that is fixed, though steps so large have another"
    remedy = "take 1,000 (samplers may skip most), or --variance_type learned_range --loss_type bound"
    return Finding("timesteps", message, remedy)


@torch.no_grad()
def check_precision(patient: Patient) -> Finding:
    """Whether the network's numbers fit into 16 bits."""
    unet = patient.pipeline.unet
    x_t, _, t = _noised(patient.scheduler, patient.x_0[:64])
    exact = unet(x_t, t).sample
    if not exact.isfinite().all():
        remedy = "go back to an earlier state, and lower the learning rate"
        return Finding("precision", "the network's output isn't finite, even in float32", remedy)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.autocast(x_t.device.type, dtype):
            output = unet(x_t, t).sample.float()
        error = ((output - exact).square().mean() / exact.square().mean().clamp(min=1e-12)).sqrt().item()
        if not error < 0.1:  # NaN is not
            what = "overflows" if not math.isfinite(error) else f"is off by {error:.0%}"
            return Finding("precision", f"in {name} the network's output {what}", "train and sample it in float32")
    return Finding("precision", "float32, bf16 and fp16 agree")


def check_conventions(patient: Patient) -> Finding:
    """Whether schedule, prediction type and range of the data are those of training, which should give the least loss
    of all."""
    unet, config, x_0 = patient.pipeline.unet, patient.scheduler.config, patient.x_0
    said = loss_share(unet, patient.scheduler, x_0)
    shares = {
        f"a {schedule} β and {prediction_type}-prediction": loss_share(
            unet,
            DDPMScheduler.from_config(
                config, beta_schedule=schedule, trained_betas=None, prediction_type=prediction_type
            ),
            x_0,
        )
        for schedule in SCHEDULES
        for prediction_type in PREDICTION_TYPES
    }
    if not patient.pipeline.is_points:
        shares[IN_UNIT_INTERVAL] = loss_share(unet, patient.scheduler, (x_0 + 1) / 2)
    best = min(shares, key=shares.__getitem__)
    if shares[best] < CLEARLY_LESS * said:
        message = f"the loss would be {shares[best] / said:.1g} times as large with {best}"
        if best == IN_UNIT_INTERVAL:
            return Finding(
                "conventions", message, "train it on images in [-1, 1], as diffusers' pipelines sample them"
            )
        return Finding("conventions", message, "say in scheduler_config.json what it was trained with")
    return Finding("conventions", f"{config.prediction_type} as the prediction; no other type or schedule fits better")


def check_fit(patient: Patient) -> Finding:
    """Whether the network has learned more than a Gaussian's mean and variances."""
    share = loss_share(patient.pipeline.unet, patient.scheduler, patient.x_0)
    message = f"its loss is {share:.2f} of what a Gaussian's mean and variances would give"
    if share > 0.95:
        remedy = "if these are the data that it was trained on, train longer or with another learning rate"
        return Finding("underfitting", message, remedy)
    return Finding("underfitting", message)


def check_generalisation(patient: Patient) -> Finding:
    """Whether the loss on data that it was not trained on is larger, at some timesteps."""
    if patient.held_out is None:
        return Finding("overfitting", "there are no held-out data to check it on", is_open=True)
    means, errors = [], []
    for x_0 in (patient.x_0, patient.held_out):
        bins = losses(patient.pipeline.unet, patient.scheduler, x_0).tensor_split(NUM_BINS)
        means.append(torch.stack([values.mean() for values in bins]))
        errors.append(torch.stack([values.std() / len(values) ** 0.5 for values in bins]))
    table = "loss by tenth of t, training {}, held-out {}".format(*(_row(values) for values in means))
    excess = (means[1] - means[0]) / torch.hypot(*errors)
    worst = int(excess.argmax())
    if excess[worst] > SIGNIFICANT and means[1][worst] > 1.05 * means[0][worst]:
        remedy = "stop earlier, take a smaller network, or more data (--random_flip)"
        return Finding("overfitting", f"held-out data have a larger loss; {table}", remedy)
    return Finding("overfitting", table)


def check_ema(patient: Patient) -> Finding:
    """Whether the averaged weights have caught up with the raw ones."""
    if patient.options is not None and patient.dataset_size is not None:
        return _check_planned_ema(patient.options, patient.dataset_size)
    if patient.raw is None:
        return Finding("EMA", "the folder holds no checkpoint-<step> with raw weights to compare", is_open=True)
    averaged, raw = (loss_share(unet, patient.scheduler, patient.x_0) for unet in (patient.pipeline.unet, patient.raw))
    message = f"the averaged weights' loss is {averaged / raw:.2f} times that of the raw ones"
    if averaged > 1.05 * raw:
        return Finding("EMA", message, "it is too young: train longer, or lower --ema_max_decay")
    return Finding("EMA", message)


def _check_planned_ema(options: TrainingArguments, dataset_size: int) -> Finding:
    if options.train_batch_size > dataset_size:
        message = (
            f"there are no steps: a batch of {options.train_batch_size} is larger than the {dataset_size} samples"
        )
        return Finding("EMA", message, "lower --train_batch_size")
    if not options.use_ema:
        return Finding("EMA", "none")
    steps_per_epoch = math.ceil(dataset_size // options.train_batch_size / options.gradient_accumulation_steps)
    steps = options.num_steps(steps_per_epoch)
    window = 1 / (1 - options.ema_max_decay)
    message = f"averages over {window:,.0f} of {steps:,} steps"
    if steps < 5 * window:
        return Finding("EMA", message, f"lower --ema_max_decay to {max(0, 1 - 10 / steps):.4g}, or train longer")
    return Finding("EMA", message)


@torch.no_grad()
def losses(unet: torch.nn.Module, scheduler: DDPMScheduler, x_0: torch.Tensor) -> torch.Tensor:
    """The simple loss of each sample, `[number]`, at timesteps that rise evenly from 0 to T − 1."""
    _, eps, t = _noised(scheduler, x_0)
    parts = zip(*(values.split(BATCH_SIZE) for values in (x_0, t, eps)), strict=True)
    return torch.cat([simple_loss(scheduler, unet, Batch(x_0), t, eps) for x_0, t, eps in parts])


def loss_share(unet: torch.nn.Module, scheduler: DDPMScheduler, x_0: torch.Tensor) -> float:
    """The network's loss over the best that can be had knowing no more than each dimension's mean and variance, which
    is that of Gaussian data: comparable between schedules and prediction types."""
    alpha_cumprod = scheduler.alphas_cumprod.double()[_timesteps(scheduler, len(x_0))][:, None]
    variance = x_0.double().flatten(1).var(dim=0)
    of_x_t = alpha_cumprod * variance + 1 - alpha_cumprod
    gaussian = {  # the variance of the target given x_t
        "epsilon": alpha_cumprod * variance / of_x_t,
        "sample": (1 - alpha_cumprod) * variance / of_x_t,
        "v_prediction": variance / of_x_t,
    }[scheduler.config.prediction_type]
    return (losses(unet, scheduler, x_0).mean() / gaussian.mean()).item()


def _noised(scheduler: DDPMScheduler, x_0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t, ε and t: always the same for the same data, so that losses can be compared."""
    t = _timesteps(scheduler, len(x_0))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    return scheduler.add_noise(x_0, eps, t), eps, t


def _timesteps(scheduler: DDPMScheduler, number: int) -> torch.Tensor:
    return torch.arange(number) * scheduler.config.num_train_timesteps // number


def _row(values: torch.Tensor) -> str:
    return " ".join(f"{value:.2g}" for value in values)


def _level(value: torch.Tensor) -> int:
    return round((float(value) + 1) * 127.5)


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}×{height} of {channels} channel{'s' if channels > 1 else ''}"
