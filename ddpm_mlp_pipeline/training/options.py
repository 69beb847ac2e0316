"""The options of training runs: of the training loop, of points and of images."""

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


@dataclasses.dataclass(kw_only=True)
class TrainingArguments:
    """Options of the training loop, named as in diffusers' training scripts.

    Raises:
        ConfigurationError: if a value is out of range, or two options contradict each other.
    """

    output_dir: str = option(help="folder for the checkpoint, the figures and the logs")
    overwrite_output_dir: bool = option(False, "replace an earlier run's checkpoint and figures in output_dir")
    ddpm_num_steps: int = option(1000, "number of timesteps of the forward process, T")
    ddpm_beta_schedule: str = option("squaredcos_cap_v2", "schedule of β", choices=BETA_SCHEDULES)
    prediction_type: str = option("epsilon", "target that the network predicts", choices=PREDICTION_TYPES)
    variance_type: str = option("fixed_small", "variance of the denoising steps", choices=VARIANCES)
    loss_type: str = option("simple", "|ε − ε_θ|², or the variational bound", choices=["simple", "bound"])
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
    label_dropout: float = option(0.1, "share of samples that are trained without label and condition")
    snr_gamma: float | None = option(None, "γ of Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual")
    save_samples_epochs: int | None = option(None, "draw samples with raw and EMA weights every this many epochs")
    seed: int = option(0, "seed of the weights, data order, timesteps and noise")
    checkpointing_steps: int | None = option(None, "save the training state every this many optimizer steps")
    checkpoints_total_limit: int | None = option(None, "maximum number of training states to keep")
    resume_from_checkpoint: str | None = option(None, "state to resume from: 'latest' or a folder checkpoint-<step>")
    figures: bool = option(True, "draw the loss, the data and samples at the end")
    report_to: str = option("tensorboard", "tracker of the loss and the learning rate", choices=TRACKERS)
    logging_dir: str = option("logs", "folder of the tracker's files, inside output_dir")
    push_to_hub: bool = option(False, "push the checkpoint, figures and model card to the hub")
    hub_model_id: str | None = option(None, "repository to push to; by default output_dir's name, in your namespace")
    hub_private_repo: bool = option(False, "make that repository private")

    def __post_init__(self) -> None:
        counts = ["train_batch_size", "num_epochs", "max_train_steps", "gradient_accumulation_steps"]
        counts += ["checkpointing_steps", "checkpoints_total_limit", "save_samples_epochs"]
        for name, least in {**dict.fromkeys(counts, 1), "ddpm_num_steps": 2, "lr_warmup_steps": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name} must be at least {least}, got {value}")
        if self.num_epochs is None and self.max_train_steps is None:
            raise ConfigurationError("set num_epochs or max_train_steps")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be positive, got {value}")
        if self.loss_type == "bound" and self.snr_gamma is not None:
            raise ConfigurationError("snr_gamma weights the simple loss: remove it, or use --loss_type simple")
        if self.loss_type == "simple" and self.variance_type == "learned_range":
            raise ConfigurationError("the simple loss can't train variance_type learned_range: use --loss_type bound")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if not 0 <= self.label_dropout < 1:
            raise ConfigurationError(f"label_dropout must be at least 0 and below 1, got {self.label_dropout}")
        if not 0 <= self.ema_max_decay < 1:
            raise ConfigurationError(f"ema_max_decay must be at least 0 and below 1, got {self.ema_max_decay}")

    @property
    def num_predictions(self) -> int:
        """Number of predictions per value of a sample: the target and, if it is learned, the variance."""
        return 2 if self.variance_type == "learned_range" else 1

    def num_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the run."""
        return self.max_train_steps or (self.num_epochs or 0) * steps_per_epoch  # one of them is given

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
class ImageTrainingArguments(TrainingArguments):
    """Options of training on images: data, network, and other defaults for the training loop."""

    dataset_name: str = option(help="a data set on the hub, a folder that load_dataset reads, or a folder of images")
    split: str = option("train", "split of the data set")
    label_column: str | None = option(
        None, "column of labels to draw samples by; of a folder of folders, 'label'; '' undoes a preset's"
    )
    resolution: int | None = option(None, "target height and width of the images; by default they keep their size")
    fit: str = option("resize", "how to reach it: scale, or centre on black", choices=["resize", "pad"])
    channels: int | None = option(None, "1 (grey), 3 (RGB) or 4 (RGBA); by default as the first image")
    skip_corrupt: bool = option(False, "skip images that can't be read, and list them")
    random_flip: bool = option(False, "mirror half of the images, left to right")
    model: str = option("unet", "network; stock is diffusers' UNet2DModel", choices=["unet", "mlp", "stock"])
    block_out_channels: str = option("32,64,128", "unet, stock: width at each resolution, separated by commas")
    layers_per_block: int = option(1, "unet, stock: residual blocks at each resolution, down and up")
    attention: bool = option(True, "unet, stock: self-attention at the lowest resolution")
    time_conditioning: str = option("every_block", "unet: where the timestep enters", choices=["every_block", "once"])
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
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(50, self.ddpm_num_steps)
        if not 1 <= self.ddpm_num_inference_steps <= self.ddpm_num_steps:
            raise ConfigurationError(f"ddpm_num_inference_steps must be from 1 to {self.ddpm_num_steps}")
