"""What a training run can be told: the options of the loop, and those of points and of images."""

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

PRESETS = Path(__file__).parent / "presets"  # the YAML files that go by a bare name
TRACKERS = ["none", *(str(member) for member in LoggerType if member is not LoggerType.ALL)]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "linear_log_snr"]
# diffusers' schedules that need nothing but the numbers of steps
LR_SCHEDULERS = [member.value for member in SchedulerType if member is not SchedulerType.PIECEWISE_CONSTANT]
MAX_LOG_SNR, MIN_LOG_SNR = 13.3, -5.0  # of linear_log_snr


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A dataclass field with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(kw_only=True)
class TrainingArguments:
    """What the training loop can be told. The names are those of diffusers' training scripts.

    Raises:
        ConfigurationError: if a count, a rate or a seed is out of range.
    """

    output_dir: str = option(help="folder for the checkpoint, the figures and the logs")
    overwrite_output_dir: bool = option(False, "replace an earlier run's checkpoint and figures in output_dir")
    ddpm_num_steps: int = option(1000, "timesteps of the forward process, T")
    ddpm_beta_schedule: str = option("squaredcos_cap_v2", "the forward process's β", choices=BETA_SCHEDULES)
    prediction_type: str = option("epsilon", "what the network predicts", choices=PREDICTION_TYPES)
    variance_type: str = option(
        "fixed_small",
        "the reverse steps' variance; the network predicts learned_range beside the rest",
        choices=["fixed_small", "fixed_large", "learned_range"],
    )
    loss_type: str = option(
        "simple", "|ε − ε_θ|², or the variational bound on −log p(x_0)", choices=["simple", "bound"]
    )
    train_batch_size: int = option(128, "batch size of each process")
    num_epochs: int | None = option(None, "passes over the data set")
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs")
    gradient_accumulation_steps: int = option(1, "batches whose gradients make one optimizer step")
    learning_rate: float = option(1e-4, "peak learning rate of Adam")
    lr_scheduler: str = option("cosine", "learning rate's course", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = option(500, "steps of linear warm-up of the learning rate")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    use_ema: bool = option(True, "average the weights; the checkpoint then holds the average")
    ema_max_decay: float = option(0.9999, "decay that the average, which warms up, reaches at most")
    mixed_precision: str = option("no", "precision of the forward pass", choices=["no", "fp16", "bf16"])
    label_dropout: float = option(0.1, "share of samples that are trained without label and condition")
    snr_gamma: float | None = option(None, "γ of Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual")
    save_samples_epochs: int | None = option(None, "draw samples, with raw and with averaged weights, so often")
    seed: int = option(0, "seed of the weights, the order of the data, the timesteps and the noise")
    checkpointing_steps: int | None = option(None, "save the state of the training every so many steps")
    checkpoints_total_limit: int | None = option(None, "keep at most so many of these states")
    resume_from_checkpoint: str | None = option(None, "'latest', or a folder checkpoint-<step>, to go on from")
    figures: bool = option(True, "draw the loss, the data and samples at the end")
    report_to: str = option("tensorboard", "tracker for loss and learning rate", choices=TRACKERS)
    logging_dir: str = option("logs", "folder of the tracker's files, inside output_dir")
    push_to_hub: bool = option(False, "push the checkpoint, its figures and its model card to the hub")
    hub_model_id: str | None = option(None, "repository to push to; by default output_dir's name, in your namespace")
    hub_private_repo: bool = option(False, "make that repository private")

    def __post_init__(self) -> None:
        for name in (
            *("train_batch_size", "num_epochs", "max_train_steps", "gradient_accumulation_steps"),
            *("checkpointing_steps", "checkpoints_total_limit", "save_samples_epochs"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}")
        if self.ddpm_num_steps < 2:
            raise ConfigurationError(f"ddpm_num_steps must be at least 2, got {self.ddpm_num_steps}")
        if self.num_epochs is None and self.max_train_steps is None:
            raise ConfigurationError("give num_epochs or max_train_steps")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be positive, got {value}")
        if self.loss_type == "bound" and self.snr_gamma is not None:
            raise ConfigurationError("snr_gamma weighs the simple loss: leave it out with --loss_type bound")
        if self.loss_type == "simple" and self.variance_type == "learned_range":
            raise ConfigurationError("variance_type learned_range needs --loss_type bound: no other knows it")
        if self.lr_warmup_steps < 0:
            raise ConfigurationError(f"lr_warmup_steps must be at least 0, got {self.lr_warmup_steps}")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if not 0 <= self.label_dropout < 1:
            raise ConfigurationError(f"label_dropout must be at least 0 and below 1, got {self.label_dropout}")
        if not 0 <= self.ema_max_decay < 1:
            raise ConfigurationError(f"ema_max_decay must be at least 0 and below 1, got {self.ema_max_decay}")

    @property
    def num_predictions(self) -> int:
        """How many numbers the network predicts for each of a sample's: ε or the like, and perhaps the variance."""
        return 2 if self.variance_type == "learned_range" else 1

    def num_steps(self, steps_per_epoch: int) -> int:
        """How many optimizer steps the run takes."""
        return self.max_train_steps or (self.num_epochs or 0) * steps_per_epoch  # one of them is given

    def make_scheduler(self, clip_sample_range: float) -> DDPMScheduler:
        """The forward process, for data of at most that magnitude.

        Where hardly any signal is left, x_0's prediction is a small difference, divided by √ᾱ_t, near 0: clipping it
        to the data's range is what keeps every sampler's first steps on track.
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
    """β of a forward process whose log ᾱ_t / (1 − ᾱ_t) falls in equal steps, so that few steps share the bound
    evenly; its range is where Kingma et al. 2021 (https://arxiv.org/abs/2107.00630) begin to learn theirs."""
    alphas_cumprod = torch.linspace(MAX_LOG_SNR, MIN_LOG_SNR, num_timesteps, dtype=torch.float64).sigmoid()
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / previous).tolist()


@dataclasses.dataclass(kw_only=True)
class PointTrainingArguments(TrainingArguments):
    """The training loop's options, with defaults that suit points, and those of data, network and schedule."""

    dataset: str = option("heart", "a point set's name, or a .csv, .parquet or .npy file of numeric columns")
    dataset_size: int | None = option(None, "points to draw (100,000 by default), or to choose from a file (all)")
    dataset_noise: float | None = option(None, "standard deviation of the data's noise; by default each set's own")
    exclude: Sequence[str] | None = option(None, "names of columns to leave out")
    label_column: str | None = option(None, "column of labels, strings or whole numbers, to draw samples by")
    condition_columns: Sequence[str] | None = option(None, "names of numeric columns to draw samples by")
    embedding_dim: int = option(32, "size of the embedding of the timestep and of each coordinate")
    hidden_dim: int = option(64, "width of the network")
    num_hidden_layers: int = option(4, "number of residual blocks")

    train_batch_size: int | None = option(  # type: ignore[assignment]  # None until the data are known
        None, "batch size of each process; by default 2,048, or all of a smaller set"
    )
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs (8,000 if neither is given)")
    learning_rate: float = option(2e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "steps of linear warm-up of the learning rate")
    ema_max_decay: float = option(0.999, "decay that the average, which warms up, reaches at most")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.max_train_steps = 8000
        super().__post_init__()
        if self.mixed_precision != "no":
            raise ConfigurationError("points are trained in float32: lower precision would blur their embedding")


@dataclasses.dataclass(kw_only=True)
class ImageTrainingArguments(TrainingArguments):
    """The training loop's options, and those of data, network and schedule."""

    dataset_name: str = option(help="a data set on the hub, a folder that load_dataset takes, or a folder of images")
    split: str = option("train", "which split of it")
    label_column: str | None = option(None, "column of labels to draw samples by; of a folder of folders, 'label'")
    resolution: int | None = option(
        None, "height and width to bring the images to; by default they are left as they are"
    )
    fit: str = option("resize", "how: scale the images, or centre them on black", choices=["resize", "pad"])
    channels: int | None = option(None, "1 (grey), 3 (RGB) or 4 (RGBA); by default what the first image has")
    skip_corrupt: bool = option(False, "leave out images that can't be read, and list them")
    random_flip: bool = option(False, "mirror half of the images, left to right")
    model: str = option("unet", "the network; stock is diffusers' UNet2DModel", choices=["unet", "mlp", "stock"])
    block_out_channels: str = option("32,64,128", "unet, stock: width at each resolution, separated by commas")
    layers_per_block: int = option(1, "unet, stock: residual blocks at each resolution, down and up")
    attention: bool = option(True, "unet, stock: self-attention at the lowest resolution")
    time_conditioning: str = option("every_block", "unet: where the timestep enters", choices=["every_block", "once"])
    embedding_dim: int = option(100, "mlp: size of the timestep's embedding")
    hidden_dim: int = option(2048, "mlp: width")
    num_hidden_layers: int = option(5, "mlp: number of residual blocks")
    ddpm_num_inference_steps: int | None = option(None, "sampling steps of the figures; by default 50, or T")

    learning_rate: float = option(1e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "steps of linear warm-up of the learning rate")
    ema_max_decay: float = option(0.999, "decay that the average, which warms up, reaches at most")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 20
        super().__post_init__()
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(50, self.ddpm_num_steps)
        if not 1 <= self.ddpm_num_inference_steps <= self.ddpm_num_steps:
            raise ConfigurationError(f"ddpm_num_inference_steps must be from 1 to {self.ddpm_num_steps}")
