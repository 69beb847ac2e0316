"""The options of runs: of training a DDPM on points or images, and of fitting and tuning samplers of few calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import LoggerType
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType

from ..errors import ConfigurationError

PRESETS = Path(__file__).parent / "presets"  # the YAML files that `--config` finds by name
TRACKERS = ["none", *(str(member) for member in LoggerType if member is not LoggerType.ALL)]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range"]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "linear_log_snr"]
# The schedules of diffusers that take only numbers of steps
LR_SCHEDULERS = [member.value for member in SchedulerType if member is not SchedulerType.PIECEWISE_CONSTANT]
MAX_LOG_SNR, MIN_LOG_SNR = 13.3, -5.0  # of linear_log_snr


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """Return a dataclass field with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def widths_of(block_out_channels: str) -> tuple[int, ...]:
    """Return the widths in a list such as `"32,64,128"`.

    Raises:
        ConfigurationError: if they are not positive whole numbers.
    """
    try:
        widths = tuple(int(width) for width in block_out_channels.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise ConfigurationError(f"block_out_channels must be widths such as 32,64,128, got {block_out_channels!r}")
    return widths


def default_widths(channels: int, height: int, width: int) -> tuple[int, ...]:
    """Return the U-Net's widths for images of a size: as many resolutions as lead to 4×4 with a `patch_size` of 2."""
    widths = (16, 32, 64, 128) if channels == 1 else (48, 96, 160, 192)
    levels = round(math.log2(max(height, width) / 4))
    return widths[-min(max(levels, 1), len(widths)) :]


@dataclasses.dataclass(kw_only=True)
class RunArguments:
    """Options of any run of the optimizer, named as in diffusers' training scripts.

    Raises:
        ConfigurationError: if a value is out of range.
    """

    output_dir: str = option(help="folder for the checkpoint, the figures and the logs")
    overwrite_output_dir: bool = option(False, "replace an earlier run's checkpoint and figures in output_dir")
    train_batch_size: int = option(128, "batch size of each process")
    num_epochs: int | None = option(None, "passes over the data set")
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs")
    gradient_accumulation_steps: int = option(1, "batches whose gradients make one optimizer step")
    learning_rate: float = option(1e-4, "peak learning rate of Adam")
    lr_scheduler: str = option("cosine", "learning rate schedule", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(500, "optimizer steps of linear learning rate warm-up")
    max_grad_norm: float = option(1.0, "maximum norm of the gradients, which are clipped to it")
    use_ema: bool = option(True, "save the exponential moving average (EMA) of the weights as the checkpoint")
    ema_max_decay: float = option(0.9999, "maximum decay of the EMA, after its warm-up")
    mixed_precision: str = option("no", "precision of the forward pass", choices=["no", "fp16", "bf16"])
    seed: int = option(0, "seed of the weights, data order, timesteps and noise")
    checkpointing_steps: int | None = option(None, "save the training state every this many optimizer steps")
    checkpoints_total_limit: int | None = option(None, "maximum number of training states to keep")
    resume_from_checkpoint: str | None = option(None, "state to resume from: 'latest' or a folder checkpoint-<step>")
    report_to: str = option("tensorboard", "tracker of the loss and the learning rate", choices=TRACKERS)
    logging_dir: str = option("logs", "folder of the tracker's files, inside output_dir")

    def __post_init__(self) -> None:
        counts = ["train_batch_size", "num_epochs", "max_train_steps", "gradient_accumulation_steps"]
        counts += ["checkpointing_steps", "checkpoints_total_limit"]
        self._check_least({**dict.fromkeys(counts, 1), "lr_warmup_steps": 0})
        self._check_positive("learning_rate", "max_grad_norm")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if not 0 <= self.ema_max_decay < 1:
            raise ConfigurationError(f"ema_max_decay must be at least 0 and below 1, got {self.ema_max_decay}")

    def _check_least(self, least: dict[str, int]) -> None:
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise ConfigurationError(f"{name} must be at least {number}, got {value}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be positive, got {value}")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the run."""
        return self.max_train_steps or (self.num_epochs or 0) * steps_per_epoch  # one of them is given


@dataclasses.dataclass(kw_only=True)
class TrainingArguments(RunArguments):
    """Options of training a DDPM: of the optimizer, the forward process, the loss and what is written at the end.

    Raises:
        ConfigurationError: if a value is out of range, or two options contradict each other.
    """

    ddpm_num_steps: int = option(1000, "number of timesteps of the forward process, T")
    ddpm_beta_schedule: str = option("squaredcos_cap_v2", "schedule of β", choices=BETA_SCHEDULES)
    prediction_type: str = option("epsilon", "target that the network predicts", choices=PREDICTION_TYPES)
    variance_type: str = option("fixed_small", "variance of the denoising steps", choices=VARIANCES)
    loss_type: str = option("simple", "|ε − ε_θ|², or the variational bound", choices=["simple", "bound"])
    snr_gamma: float | None = option(None, "γ of Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual")
    label_dropout: float = option(0.1, "share of samples that are trained without label and condition")
    save_samples_epochs: int | None = option(None, "draw samples with raw and EMA weights every this many epochs")
    num_calls: Sequence[int] | None = option(
        None, "at the end, fit tables of so few network calls to the data, as ddpm-fit does; the first is the default"
    )
    figures: bool = option(True, "draw the loss, the data and samples at the end")
    push_to_hub: bool = option(False, "push the checkpoint, figures and model card to the hub")
    hub_model_id: str | None = option(None, "repository to push to; by default output_dir's name, in your namespace")
    hub_private_repo: bool = option(False, "make that repository private")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs is None and self.max_train_steps is None:
            raise ConfigurationError("set num_epochs or max_train_steps")
        self._check_least({"ddpm_num_steps": 2, "save_samples_epochs": 1})
        self._check_positive("snr_gamma")
        if self.loss_type == "bound" and self.snr_gamma is not None:
            raise ConfigurationError("snr_gamma weights the simple loss: remove it, or use --loss_type simple")
        if self.loss_type == "simple" and self.variance_type == "learned_range":
            raise ConfigurationError("the simple loss can't train variance_type learned_range: use --loss_type bound")
        for calls in self.num_calls or ():
            if not 1 <= calls <= self.ddpm_num_steps:
                raise ConfigurationError(f"num_calls must be from 1 to ddpm_num_steps, {self.ddpm_num_steps}")
        if not 0 <= self.label_dropout < 1:
            raise ConfigurationError(f"label_dropout must be at least 0 and below 1, got {self.label_dropout}")

    @property
    def num_predictions(self) -> int:
        """Number of predictions per value of a sample: the target and, if it is learned, the variance."""
        return 2 if self.variance_type == "learned_range" else 1

    def make_scheduler(self, clip_sample_range: float) -> DDPMScheduler:
        """Return the scheduler of the forward process, which clips predictions of x_0 to ± `clip_sample_range`.

        At large t, the predicted x_0 is a small difference divided by √ᾱ_t, which is near 0. Clipping it to the data's
        range keeps the first denoising steps of every sampler accurate.
        """
        log_snr = self.ddpm_beta_schedule == "linear_log_snr"
        return DDPMScheduler(
            num_train_timesteps=self.ddpm_num_steps,
            beta_schedule="linear" if log_snr else self.ddpm_beta_schedule,
            trained_betas=linear_log_snr(self.ddpm_num_steps) if log_snr else None,
            prediction_type=self.prediction_type,
            variance_type=self.variance_type,
            clip_sample=True,
            clip_sample_range=clip_sample_range,
        )


def linear_log_snr(num_timesteps: int) -> list[float]:
    """Return β_t of a forward process whose log SNR, log ᾱ_t / (1 − ᾱ_t), falls in equal steps.

    Few timesteps then share the bound evenly. The range is the initial one of Kingma et al. 2021
    (https://arxiv.org/abs/2107.00630), who learn theirs.
    """
    alphas_cumprod = torch.linspace(MAX_LOG_SNR, MIN_LOG_SNR, num_timesteps, dtype=torch.float64).sigmoid()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / previous).tolist()


@dataclasses.dataclass(kw_only=True)
class PointTrainingArguments(TrainingArguments):
    """Options of training on points: data, network, and other defaults for the training loop."""

    dataset: str = option("heart", "a point set's name, or a .csv, .parquet or .npy file of numeric columns")
    dataset_size: int | None = option(None, "points to draw (default: 100,000) or choose from a file (all)")
    dataset_noise: float | None = option(None, "standard deviation of added noise; by default the point set's own")
    exclude: Sequence[str] | None = option(None, "names of columns to exclude")
    label_column: str | None = option(None, "column of labels, strings or whole numbers, to draw samples by")
    condition_columns: Sequence[str] | None = option(None, "names of numeric columns to draw samples by")
    embedding_dim: int = option(32, "size of the embedding of the timestep and of each coordinate")
    hidden_dim: int = option(64, "width of the network")
    num_hidden_layers: int = option(4, "number of residual blocks")

    train_batch_size: int | None = option(  # type: ignore[assignment]  # None until the data are known
        None, "batch size of each process; by default 2,048, or all of a smaller set"
    )
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs (default of both: 8,000)")
    learning_rate: float = option(2e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "optimizer steps of linear learning rate warm-up")
    ema_max_decay: float = option(0.999, "maximum decay of the EMA, after its warm-up")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.max_train_steps = 8000
        super().__post_init__()
        if self.mixed_precision != "no":
            raise ConfigurationError("points need --mixed_precision no: lower precision makes their embedding inexact")


@dataclasses.dataclass(kw_only=True)
class TableTrainingArguments(TrainingArguments):
    """Options of training on a table: data, network, and other defaults for the training loop."""

    dataset: str = option(help="a .csv or .parquet file with columns of any kind")
    dataset_size: int | None = option(None, "rows to choose from the file (default: all)")
    exclude: Sequence[str] | None = option(None, "names of columns to exclude")
    column_kinds: Sequence[str] | None = option(
        None, "NAME=KIND, where a column's kind is found wrong: number, integer, category, boolean or date"
    )
    embedding_dim: int = option(16, "size of the embedding of the timestep and of each number")
    hidden_dim: int = option(128, "width of the network")
    num_hidden_layers: int = option(4, "number of residual blocks")

    prediction_type: str = option("v_prediction", "target that the network predicts", choices=PREDICTION_TYPES)
    label_dropout: float = option(0.5, "share of rows of which the network is told no column; of others, some")
    train_batch_size: int = option(1024, "batch size of each process")
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs (default of both: 10,000)")
    learning_rate: float = option(2e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "optimizer steps of linear learning rate warm-up")
    ema_max_decay: float = option(0.999, "maximum decay of the EMA, after its warm-up")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.max_train_steps = 10_000
        super().__post_init__()
        if self.loss_type == "bound":
            raise ConfigurationError("a table is trained by the simple loss: known cells have no noise to bound")

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds given by `column_kinds`, by the columns' names.

        Raises:
            ConfigurationError: if one is not of the form NAME=KIND.
        """
        pairs = [pair for word in self.column_kinds or () for pair in word.split(",")]
        kinds = {}
        for pair in pairs:
            name, equals, kind = pair.rpartition("=")
            if not equals or not name:
                raise ConfigurationError(f"column_kinds takes NAME=KIND, got {pair!r}")
            kinds[name] = kind
        return kinds


@dataclasses.dataclass(kw_only=True)
class ImageTrainingArguments(TrainingArguments):
    """Options of training on images: data, network, and other defaults for the training loop."""

    dataset_name: str = option(help="a data set on the hub, a folder that load_dataset reads, or a folder of images")
    split: str = option("train", "split of the data set")
    label_column: str | None = option(
        None, "column of labels to draw samples by; of a folder of folders, 'label'; '' undoes a preset's"
    )
    resolution: int | None = option(None, "target height and width of the images; by default they keep their size")
    max_resolution: int | None = option(
        None, "without resolution: images that differ in size, or are larger, get their median size, at most this"
    )
    fit: str = option("resize", "how to reach it: scale, or centre on black", choices=["resize", "pad"])
    channels: int | None = option(None, "1 (grey), 3 (RGB) or 4 (RGBA); by default as the first image")
    skip_corrupt: bool = option(False, "skip images that can't be read, and list them")
    streaming: bool = option(False, "decode images of Parquet files while training: for those that fit nowhere")
    random_flip: bool = option(False, "mirror half of the images, left to right")
    model: str = option("unet", "network; stock is diffusers' UNet2DModel", choices=["unet", "mlp", "stock"])
    block_out_channels: str | None = option(
        None,
        "unet, stock: width at each resolution, separated by commas (default of unet: by size and channels)",
    )
    layers_per_block: int = option(1, "unet, stock: residual blocks at each resolution, down and up")
    patch_size: int = option(2, "unet: stride of the first and the last convolution")
    attention: bool = option(True, "unet, stock: self-attention at the lowest resolution")
    time_conditioning: str = option("every_block", "unet: where the timestep enters", choices=["every_block", "once"])
    skip_connections: str = option("add", "unet: how up blocks take those from down blocks", choices=["add", "concat"])
    embedding_dim: int = option(100, "mlp: size of the timestep's embedding")
    hidden_dim: int = option(2048, "mlp: width")
    num_hidden_layers: int = option(5, "mlp: number of residual blocks")
    ddpm_num_inference_steps: int | None = option(None, "denoising steps of the figures; by default 50, at most T")

    learning_rate: float = option(1e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "optimizer steps of linear learning rate warm-up")
    ema_max_decay: float = option(0.999, "maximum decay of the EMA, after its warm-up")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 20
        self.label_column = self.label_column or None
        super().__post_init__()
        self._check_least({"resolution": 1, "max_resolution": 4})
        if self.streaming and (self.skip_corrupt or self.max_resolution is not None):
            raise ConfigurationError("streaming decodes each image late: give --resolution, and no --skip_corrupt")
        if self.streaming and self.num_calls:
            raise ConfigurationError("a fit needs images in any order: use ddpm-fit after --streaming")
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(50, self.ddpm_num_steps)
        if not 1 <= self.ddpm_num_inference_steps <= self.ddpm_num_steps:
            raise ConfigurationError(f"ddpm_num_inference_steps must be from 1 to {self.ddpm_num_steps}")


@dataclasses.dataclass(frozen=True)
class FittingArguments:
    """Options of a fit. The defaults for points and images are [`FittingArguments.of_points`] and `of_images`.

    Attributes:
        steps: optimiser steps for each table.
        batch_size: samples of each step, `num_references` the data that they are compared with.
        num_held_out: data that the best table is chosen by, and `num_drawn` samples for that.
        check_steps: how often that is measured.
        learning_rate: of Adam.
        first_log_snr, last_log_snr: between which the calls are spread at first.
        noise: share of fresh noise at first, as an angle: 0 is none, 1 is all.
        seed: of everything random.
        guidance_scale: the mean of the calls' w, which is that of all at first; `None` for no guidance.
        mixed_precision: of the network, `"no"` or `"bf16"`.
    """

    steps: int
    batch_size: int
    num_references: int
    num_held_out: int
    num_drawn: int
    check_steps: int
    learning_rate: float
    first_log_snr: float
    last_log_snr: float
    noise: float
    seed: int = 0
    guidance_scale: float | None = None
    mixed_precision: str = "no"

    @classmethod
    def of_points(cls, **options: Any) -> FittingArguments:
        return cls(**(_OF_POINTS | options))

    @classmethod
    def of_images(cls, **options: Any) -> FittingArguments:
        return cls(**(_OF_IMAGES | options))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "seed" and value < 1:
                raise ConfigurationError(f"{field.name} must be at least 1, got {value}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ConfigurationError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ConfigurationError(f"guidance_scale must be finite, got {self.guidance_scale}")


_OF_POINTS: dict[str, Any] = {
    **{"steps": 400, "batch_size": 1024, "num_references": 2048, "num_held_out": 8192, "num_drawn": 4096},
    **{"check_steps": 50, "learning_rate": 0.01, "first_log_snr": -5.0, "last_log_snr": 6.0, "noise": 0.0},
}
_OF_IMAGES: dict[str, Any] = {
    **{"steps": 100, "batch_size": 96, "num_references": 2048, "num_held_out": 1024, "num_drawn": 512},
    **{"check_steps": 20, "learning_rate": 0.02, "first_log_snr": -5.0, "last_log_snr": 4.5, "noise": 0.5},
}


@dataclasses.dataclass(kw_only=True)
class TuningArguments(RunArguments):
    """Options of tuning a network to a sampler of few calls. `of_kind` sets those left `None` by the kind of data.

    Raises:
        ConfigurationError: if a value is out of range.
    """

    num_calls: int = option(1, "network calls of the sampler")
    denoising_weight: float | None = option(
        None, "weight of the denoising loss beside the distance to the data; by default 0 for points, 0.1 for images"
    )
    table_learning_rate: float = option(0.01, "peak learning rate of the step table's numbers")

    train_batch_size: int | None = option(  # type: ignore[assignment]  # None until the kind of data is known
        None, "samples of each step and process; by default 1,024 points or 96 images"
    )
    max_train_steps: int | None = option(
        None, "optimizer steps; overrides num_epochs (default of both: 2,000 for points, 1,500 for images)"
    )
    learning_rate: float | None = option(  # type: ignore[assignment]
        None, "peak learning rate of Adam for the weights; by default 2e-3 for points, 6e-4 for images"
    )
    lr_warmup_steps: int = option(20, "optimizer steps of linear learning rate warm-up")
    ema_max_decay: float = option(0.99, "maximum decay of the EMA, after its warm-up")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least({"num_calls": 1})
        self._check_positive("table_learning_rate")
        if self.denoising_weight is not None and not 0 <= self.denoising_weight < math.inf:
            raise ConfigurationError(f"denoising_weight must be at least 0, got {self.denoising_weight}")

    def of_kind(self, is_points: bool) -> TuningArguments:
        """Return the options with the defaults for points or for images."""
        names = ("train_batch_size", "learning_rate", "denoising_weight", "max_train_steps")
        values = (1024, 2e-3, 0.0, 2000) if is_points else (96, 6e-4, 0.1, 1500)
        defaults: dict[str, Any] = dict(zip(names, values, strict=True))
        if self.num_epochs is not None:
            del defaults["max_train_steps"]
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def for_target(self, is_points: bool) -> FittingArguments:
        """Return the options of the comparison with data."""
        common: dict[str, Any] = {"batch_size": self.train_batch_size, "seed": self.seed}
        if is_points:
            return FittingArguments.of_points(**common, num_references=2 * common["batch_size"])
        return FittingArguments.of_images(**common)


@dataclasses.dataclass(kw_only=True)
class CheckpointTuningArguments(TuningArguments):
    """Options of tuning a checkpoint folder: what to tune, the data, and what to compare samples on."""

    checkpoint: str = option(help="the checkpoint folder to begin from, or a shipped one's name")
    dataset: str = option(help="a point set's name, a file of points, or an image data set")
    num_samples: int | None = option(None, "number of samples to tune to (default: 100,000 points, all images)")
    dataset_noise: float | None = option(None, "noise of a point set, as in training; by default the set's own")
    split: str | None = option(None, "split of an image data set; by default train")
    fit: str = option("resize", "how images are fitted, as in training", choices=["resize", "pad"])
    skip_corrupt: bool = option(False, "skip images that can't be read, and list them")
    label_column: str | None = option(None, "the data's column of labels; by default the one of training")
    features: str | None = option(
        None, "a feature network's folder to compare on; by default coordinates, or the network's own activations"
    )
    judge: str | None = option(None, "features that the report compares images on")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_least({"num_samples": 1})
