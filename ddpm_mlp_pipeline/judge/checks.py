"""The checks of `ddpm-doctor`: common faults of training and sampling, each with a remedy."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

from ..bound import VariationalBound
from ..data.batches import Batch
from ..data.images import image_shapes
from ..data.points import check_columns
from ..pipeline import DDPMMLPPipeline
from ..training.losses import simple_loss
from ..training.options import PREDICTION_TYPES, TrainingArguments

NUM_POINTS, NUM_IMAGES = 10_000, 500  # default numbers of samples to compute losses on
NUM_BINS = 10  # of timesteps
MIN_SAMPLES = 10 * NUM_BINS
MAX_TERMINAL_SNR = 0.01
MIN_TIMESTEPS = 100  # for a fixed variance
SIGNIFICANT = 4  # standard errors: the largest difference of ten bins is tested
CLEARLY_LESS = 0.7  # ratio of losses
IN_UNIT_INTERVAL = "images in [0, 1]"
BATCH_SIZE = 100
MAX_FOR_LABELS, NUM_OTHERS = 2_000, 8  # samples for the checks of labels, and the labels to average over
MAX_SATURATED = 0.1  # share of the values of x̂_0
NULL_STATE_REMEDY = "always ask for a label or condition, without guidance; or train with --label_dropout 0.1"
SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check.
        message: the observation.
        remedy: advice; `None` if all is well.
        is_open: whether the check could not be made, or the observation is only a hint.
    """

    check: str
    message: str
    remedy: str | None = None
    is_open: bool = False


@dataclasses.dataclass
class Patient:
    """A checkpoint or a preset, with data to examine it on.

    Attributes:
        pipeline: the checkpoint's pipeline, or a preset's untrained one.
        data: training data as the network sees them, in random order, with their labels and conditions.
        held_out: data of the same kind that the network was not trained on, if there are any.
        raw: the network before averaging, if the checkpoint folder holds a state to resume from.
        options: a preset's options; `None` for a checkpoint.
        dataset_size: size of the whole training set, for a preset.
        guidance_scale: guidance to examine samples with; 1 is none.
    """

    pipeline: DDPMMLPPipeline
    data: Batch
    held_out: Batch | None = None
    raw: torch.nn.Module | None = None
    options: TrainingArguments | None = None
    dataset_size: int = 0
    guidance_scale: float = 1.0

    @property
    def x_0(self) -> torch.Tensor:
        """The training data without labels and conditions, `[number, *sample_shape]`."""
        return self.data.x_0

    @property
    def unet(self) -> Callable[..., UNet2DOutput]:
        """The network, as a function of x_t, t and, where they are known, labels and conditions."""
        return called_on_cpu(self.pipeline, self.pipeline.unet)

    @property
    def scheduler(self) -> DDPMScheduler:
        """The forward process, whichever scheduler the pipeline samples with."""
        scheduler = self.pipeline.scheduler
        return scheduler if isinstance(scheduler, DDPMScheduler) else DDPMScheduler.from_config(scheduler.config)


def examine(patient: Patient) -> Iterator[Finding]:
    """Make all checks in turn. Skip those that need a trained network if the patient is a preset."""
    yield check_data(patient)
    yield check_terminal_snr(patient.scheduler, patient.x_0)
    yield check_timesteps(patient.scheduler)
    yield check_precision(patient)
    if patient.options is None:
        yield check_conventions(patient)
        yield check_fit(patient)
        yield check_generalisation(patient)
        yield check_ema(patient)
        if patient.data.known:
            yield check_labels(patient)
            yield check_null_state(patient)
        if patient.guidance_scale != 1:
            yield check_guidance(patient)
    else:
        yield check_planned_ema(patient.options, patient.dataset_size)
        if patient.data.known:
            yield check_planned_null_state(patient.options)


def check_data(patient: Patient) -> Finding:
    """Check that the data have the range that the network and the sampler expect."""
    x_0, config = patient.x_0, patient.scheduler.config
    spread = x_0.std(dim=0)
    if (spread == 0).all():
        return Finding("data", "all samples are equal", "check how they are read: there is nothing to learn")
    if patient.pipeline.is_points:
        shift = x_0.mean(dim=0).abs().max().item()
        widest, narrowest = spread.max().item(), spread.min().item()
        if shift > 0.2 or widest > 1.25 or narrowest < 0.8:
            message = (
                f"normalised as in training, the columns' means are up to {shift:.2g} away from 0, and their standard "
                f"deviations range from {narrowest:.2g} to {widest:.2g}"
            )
            return Finding("data", message, "give the training data, in the same units, or train again")
    elif x_0.max() - x_0.min() < 1:
        message = f"the images use only the levels {_level(x_0.min())} to {_level(x_0.max())} of 0 to 255"
        return Finding("data", message, "rescale them to the full range before saving them")
    outside = (x_0.abs() > 1.01 * config.clip_sample_range).float().mean().item() if config.clip_sample else 0
    if outside > 1e-3:
        message = f"{outside:.1%} of the values are beyond ±{config.clip_sample_range:.3g}, where sampling clips them"
        remedy = (
            "give the training data, with their --dataset_noise; if these are the training data, set the scheduler's "
            f"clip_sample_range to {x_0.abs().max():.3g}"
        )
        return Finding("data", message, remedy)
    return Finding("data", f"from {x_0.min():.2f} to {x_0.max():.2f} as the network sees them")


def check_shape(name: str, split: str, pipeline: DDPMMLPPipeline) -> Finding:
    """Check whether the images have the network's size and number of channels."""
    expected = pipeline.sample_shape
    shapes = image_shapes(name, split, NUM_IMAGES)
    if not shapes:
        return Finding("shape", "none of the images can be read", "remove the files that are not images")
    brought = f"and are brought to the network's {_shape(expected)}"
    if len({shape[1:] for shape in shapes}) > 1:
        _, heights, widths = zip(*shapes, strict=True)
        message = (
            f"the images' sizes differ, with widths from {min(widths)} to {max(widths)} and heights from "
            f"{min(heights)} to {max(heights)}, {brought}"
        )
        return Finding("shape", message)
    ((found, _),) = shapes.most_common(1)
    if set(shapes) == {expected}:
        return Finding("shape", _shape(found))
    remedy = f"if that isn't intended, train with --resolution {found[1]} --channels {found[0]}"
    return Finding("shape", f"the images are {_shape(found)}, {brought}", remedy)


def check_point_columns(name: str, columns: Sequence[str] | None) -> Iterator[Finding]:
    """Report the columns of a file that have heavy tails, or whole numbers (only a hint)."""
    for warning in check_columns(name, columns):
        yield Finding(warning.check, warning.message, warning.remedy, is_open=warning.check == "whole numbers")


def check_terminal_snr(scheduler: DDPMScheduler, x_0: torch.Tensor) -> Finding:
    """Check that x_T is nearly pure noise, as sampling assumes (Lin et al. 2023, https://arxiv.org/abs/2305.08891)."""
    alpha_cumprod = scheduler.alphas_cumprod[-1].double().item()
    if alpha_cumprod == 0 and scheduler.config.prediction_type == "epsilon":
        remedy = "use v_prediction: at a signal-to-noise ratio of 0, ε holds no information about x_0"
        return Finding("terminal SNR", "0, with noise prediction", remedy)
    snr = alpha_cumprod / (1 - alpha_cumprod) * x_0.double().square().mean().item()
    if snr <= MAX_TERMINAL_SNR:
        return Finding("terminal SNR", f"{snr:.1e}" if snr else "0")
    return Finding(
        "terminal SNR",
        f"{snr:.2g}: x_T still contains signal, but sampling starts from pure noise",
        "use more timesteps, --ddpm_beta_schedule squaredcos_cap_v2, or a larger beta_end",
    )


def check_timesteps(scheduler: DDPMScheduler) -> Finding:
    """Check that a fixed variance fits the size of the steps."""
    T, variance_type = scheduler.config.num_train_timesteps, scheduler.config.variance_type
    if T >= MIN_TIMESTEPS or variance_type == "learned_range":
        return Finding("timesteps", f"{T}, variance {variance_type}")
    message = f"only {T} with a fixed variance, which is accurate for small steps only"
    remedy = "use 1,000 (samplers can skip most), or --variance_type learned_range --loss_type bound"
    return Finding("timesteps", message, remedy)


@torch.no_grad()
def check_precision(patient: Patient) -> Finding:
    """Compare the network's output in fp16 and bf16 with that in float32."""
    data, scheduler = patient.data.take(slice(64)), patient.scheduler
    unet, x_0 = functools.partial(patient.unet, **data.known), data.x_0
    t = _timesteps(scheduler, len(x_0))
    x_t = scheduler.add_noise(x_0, _noise(x_0), t)
    exact = unet(x_t, t).sample
    if not exact.isfinite().all():
        remedy = "go back to an earlier state, and lower the learning rate"
        return Finding("precision", "the network's output isn't finite, even in float32", remedy)
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.autocast(patient.pipeline.device.type, dtype):
            output = unet(x_t, t).sample.float()
        error = ((output - exact).square().mean() / exact.square().mean().clamp(min=1e-12)).sqrt().item()
        if not error < 0.1:  # also if it is NaN
            what = "overflows" if not math.isfinite(error) else f"is off by {error:.0%}"
            return Finding("precision", f"in {name} the network's output {what}", "train and sample it in float32")
    return Finding("precision", "float32, bf16 and fp16 agree")


def check_conventions(patient: Patient) -> Finding:
    """Check that no other schedule, prediction type or range of the data gives a clearly lower loss.

    Those that the network was trained with should give the lowest.
    """
    unet, scheduler, data = patient.unet, patient.scheduler, patient.data
    declared = loss_share(unet, scheduler, data)
    shares = {}
    for schedule, prediction_type in itertools.product(SCHEDULES, PREDICTION_TYPES):
        changes = {"beta_schedule": schedule, "trained_betas": None, "prediction_type": prediction_type}
        other = DDPMScheduler.from_config(scheduler.config, **changes)
        shares[f"a {schedule} β and {prediction_type}-prediction"] = loss_share(unet, other, data)
    if not patient.pipeline.is_points:
        shares[IN_UNIT_INTERVAL] = loss_share(unet, scheduler, data._replace(x_0=(data.x_0 + 1) / 2))
    best = min(shares, key=shares.__getitem__)
    if shares[best] < CLEARLY_LESS * declared:
        remedy = "say in scheduler_config.json what it was trained with"
        if best == IN_UNIT_INTERVAL:
            remedy = "train it on images in [-1, 1], the range that diffusers' pipelines sample in"
        message = f"the loss would be {shares[best] / declared:.1g} times as large with {best}"
        return Finding("conventions", message, remedy)
    message = f"prediction_type {scheduler.config.prediction_type}; no other type or schedule has a clearly lower loss"
    return Finding("conventions", message)


def check_fit(patient: Patient) -> Finding:
    """Check that the network has learned more than the data's mean and variances."""
    share = loss_share(patient.unet, patient.scheduler, patient.data)
    message = f"the loss is {share:.2f} times that of a Gaussian with the data's mean and variances"
    remedy = "if these are the training data, train longer or change the learning rate"
    return Finding("underfitting", message, remedy if share > 0.95 else None)


def check_generalisation(patient: Patient) -> Finding:
    """Check whether held-out data have a larger loss than training data at some timesteps."""
    if patient.held_out is None:
        return Finding("overfitting", "there are no held-out data to compare with", is_open=True)
    means, errors = [], []
    for data in (patient.data, patient.held_out):
        bins = losses(patient.unet, patient.scheduler, data).tensor_split(NUM_BINS)
        means.append(torch.stack([values.mean() for values in bins]))
        errors.append(torch.stack([values.std() / len(values) ** 0.5 for values in bins]))
    rows = (" ".join(f"{value:.2g}" for value in values) for values in means)
    table = "loss by tenth of the timesteps, training {}, held-out {}".format(*rows)
    excess = (means[1] - means[0]) / torch.hypot(*errors)
    worst = int(excess.argmax())
    if excess[worst] > SIGNIFICANT and means[1][worst] > 1.05 * means[0][worst]:
        remedy = "stop earlier, use a smaller network, or add data (--random_flip)"
        return Finding("overfitting", f"held-out data have a larger loss; {table}", remedy)
    return Finding("overfitting", table)


def check_ema(patient: Patient) -> Finding:
    """Check that the averaged weights are about as good as the raw ones."""
    if patient.raw is None:
        return Finding("EMA", "the folder holds no checkpoint-<step> with raw weights to compare", is_open=True)
    averaged, raw = (
        loss_share(unet, patient.scheduler, patient.data)
        for unet in (patient.unet, called_on_cpu(patient.pipeline, patient.raw))
    )
    message = f"the loss of the averaged weights is {averaged / raw:.2f} times that of the raw ones"
    remedy = "the average lags behind: train longer, or lower --ema_max_decay"
    return Finding("EMA", message, remedy if averaged > 1.05 * raw else None)


def check_planned_ema(options: TrainingArguments, dataset_size: int) -> Finding:
    """Check that a planned training is long enough for its moving average."""
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
    remedy = f"lower --ema_max_decay to {max(0, 1 - 10 / steps):.4g}, or train longer"
    return Finding("EMA", f"averages over {window:,.0f} of {steps:,} steps", remedy if steps < 5 * window else None)


def check_labels(patient: Patient) -> Finding:
    """Check that each sample's own label and condition give a lower loss than those of other samples."""
    data = patient.data.take(slice(MAX_FOR_LABELS))
    order = _random(len(data.x_0), len(data.x_0))
    others = data._replace(**{name: values[order] for name, values in data.known.items()})
    own, other = (losses(patient.unet, patient.scheduler, each) for each in (data, others))
    what = " and ".join(name.replace("_", " ") for name in data.known)
    message = f"with the data's {what}, the loss is {own.mean() / other.mean():.2f} times that with another sample's"
    remedy = "see that they are the samples' own, and the same as in training; else, the network has not learned them"
    return Finding("labels", message, None if _excess(other - own) > SIGNIFICANT else remedy)


def check_null_state(patient: Patient) -> Finding:
    """Check that the network has learned to do without labels and conditions, which guidance needs.

    If it has, it beats every prediction that uses x_t and t alone: that for Gaussian data of the same mean and
    variances, and the mean of its own predictions with labels of other samples. A condition's null embedding starts
    at 0, and stays there if it is never trained.
    """
    pipeline, data = patient.pipeline, patient.data.take(slice(MAX_FOR_LABELS))
    if pipeline.num_classes and pipeline.null_label is None:
        return Finding("null state", "the network has none: guidance, and samples without a label, need one")
    null_data = data.forget(torch.ones(len(data.x_0), dtype=torch.bool), pipeline.null_label)
    own, null = (losses(patient.unet, patient.scheduler, each) for each in (data, null_data))
    mixed = losses(_mean_over_labels(patient.unet, data), patient.scheduler, Batch(data.x_0))
    embedding = getattr(pipeline.unet, "condition_embedding", None)
    is_initial = embedding is not None and not embedding.null.any()
    is_useless = null.mean() > 0.95 * _gaussian_loss(patient.scheduler, data.x_0)
    message = f"without label and condition, the loss is {null.mean() / own.mean():.2f} times that with them"
    if not (is_initial or is_useless or _excess(null - mixed) > SIGNIFICANT):
        return Finding("null state", message)
    return Finding("null state", f"{message}: the network was not trained without", NULL_STATE_REMEDY)


def check_planned_null_state(options: TrainingArguments) -> Finding:
    """Check that a planned training drops some labels and conditions."""
    message = f"--label_dropout {options.label_dropout:g}"
    return Finding("null state", message, None if options.label_dropout else NULL_STATE_REMEDY)


@torch.no_grad()
def check_guidance(patient: Patient) -> Finding:
    """Check that guidance leaves most predictions of x_0 within the data's range, beyond which they saturate."""
    scheduler, data = patient.scheduler, patient.data.take(slice(MAX_FOR_LABELS))
    t = _timesteps(scheduler, len(data.x_0))
    x_t = scheduler.add_noise(data.x_0, _noise(data.x_0), t)
    null = data.forget(torch.ones(len(data.x_0), dtype=torch.bool), patient.pipeline.null_label)
    conditional, other = (patient.unet(x_t, t, **each.known).sample for each in (data, null))
    # The bound's prediction of x_0 doesn't depend on the variance; with thresholding there is no bound.
    plain = DDPMScheduler.from_config(scheduler.config, variance_type="fixed_large", thresholding=False)
    bound = VariationalBound(plain, discretized=False, clip_sample=False)
    limit = scheduler.config.clip_sample_range if scheduler.config.clip_sample else data.x_0.abs().max().item()
    shares = []
    for w in (1.0, patient.guidance_scale):
        x_0, _ = bound.predict(w * conditional + (1 - w) * other, x_t, t)
        shares.append((x_0.abs() > 1.05 * limit).float().mean().item())
    message = (
        f"with scale {patient.guidance_scale:g}, {shares[1]:.1%} of the values of x̂_0 are beyond ±{limit:.3g}, where "
        f"they saturate; without guidance {shares[0]:.1%}"
    )
    remedy = "lower the scale, or guide in an interval only (--guidance_interval)"
    return Finding("guidance", message, remedy if shares[1] > max(MAX_SATURATED, 2 * shares[0]) else None)


def _mean_over_labels(unet: Callable[..., UNet2DOutput], data: Batch) -> Callable[..., UNet2DOutput]:
    """Return the mean of a network's predictions with the labels and conditions of some random samples."""

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> UNet2DOutput:
        rows = _random(NUM_OTHERS * len(x_t), len(data.x_0)).reshape(NUM_OTHERS, -1)
        outputs = [unet(x_t, t, **data.take(chosen).known).sample for chosen in rows]
        return UNet2DOutput(sample=torch.stack(outputs).mean(dim=0))

    return predict


def _excess(differences: torch.Tensor) -> float:
    """Return the mean in standard errors."""
    return (differences.mean() / (differences.std() / len(differences) ** 0.5)).item()


def _random(number: int, limit: int) -> torch.Tensor:
    """Return whole numbers below a limit, always the same."""
    return torch.randint(limit, (number,), generator=torch.Generator().manual_seed(0))


def called_on_cpu(pipeline: DDPMMLPPipeline, unet: torch.nn.Module) -> Callable[..., UNet2DOutput]:
    """Return a network of a pipeline that needs no label, and takes and returns tensors of the CPU."""
    predict = without_label(pipeline, unet)
    if pipeline.device.type == "cpu":
        return predict

    def predict_there(x_t: torch.Tensor, t: torch.Tensor, **known: torch.Tensor) -> UNet2DOutput:
        there = {name: values.to(pipeline.device) for name, values in known.items()}
        output = predict(x_t.to(pipeline.device), t.to(pipeline.device), **there)
        return UNet2DOutput(sample=output.sample.float().cpu())

    return predict_there


@torch.no_grad()
def without_label(pipeline: DDPMMLPPipeline, unet: torch.nn.Module) -> Callable[..., UNet2DOutput]:
    """Return a network of a pipeline that needs no label: the default is none, or the first where it must have one."""
    if not pipeline.num_classes:
        return unet
    label = 0 if pipeline.null_label is None else pipeline.null_label
    return functools.partial(unet, class_labels=torch.tensor([label], device=pipeline.device))


@torch.no_grad()
def losses(unet: Callable[..., UNet2DOutput], scheduler: DDPMScheduler, data: Batch) -> torch.Tensor:
    """Return the simple loss of each sample, `[number]`, at timesteps that rise evenly from 0 to T − 1."""
    t, eps = _timesteps(scheduler, len(data.x_0)), _noise(data.x_0)
    parts = [slice(i, i + BATCH_SIZE) for i in range(0, len(t), BATCH_SIZE)]
    return torch.cat([simple_loss(scheduler, unet, data.take(part), t[part], eps[part]) for part in parts])


def loss_share(unet: Callable[..., UNet2DOutput], scheduler: DDPMScheduler, data: Batch) -> float:
    """Return the ratio of the network's loss to the lowest loss for Gaussian data of the same mean and variances.

    The ratio is comparable between schedules and prediction types.
    """
    return (losses(unet, scheduler, data).mean() / _gaussian_loss(scheduler, data.x_0)).item()


def _gaussian_loss(scheduler: DDPMScheduler, x_0: torch.Tensor) -> torch.Tensor:
    """Return the lowest loss for Gaussian data with the mean and variances of x_0."""
    alpha_cumprod = scheduler.alphas_cumprod.double()[_timesteps(scheduler, len(x_0))][:, None]
    variance = x_0.double().flatten(1).var(dim=0)
    variance_of_x_t = alpha_cumprod * variance + 1 - alpha_cumprod
    of_target = {  # its variance given x_t
        "epsilon": alpha_cumprod * variance / variance_of_x_t,
        "sample": (1 - alpha_cumprod) * variance / variance_of_x_t,
        "v_prediction": variance / variance_of_x_t,
    }[scheduler.config.prediction_type]
    return of_target.mean()


def _timesteps(scheduler: DDPMScheduler, number: int) -> torch.Tensor:
    return torch.arange(number) * scheduler.config.num_train_timesteps // number


def _noise(x_0: torch.Tensor) -> torch.Tensor:
    """ε, always the same for a shape, so that losses are comparable."""
    return torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))


def _level(value: torch.Tensor) -> int:
    return round((float(value) + 1) * 127.5)


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}×{height} of {channels} channel{'s' if channels > 1 else ''}"
