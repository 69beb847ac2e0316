"""The training loop (Ho et al. 2020, algorithm 1), on Accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, LoggerType, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .errors import CheckpointError, ConfigurationError, DivergenceError
from .files import move_into
from .likelihood import VariationalBound
from .pipeline import DDPMMLPPipeline

# diffusers' schedules that need nothing but the numbers of steps
TRACKERS = ["none", *(str(member) for member in LoggerType if member is not LoggerType.ALL)]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "linear_log_snr"]
MAX_LOG_SNR, MIN_LOG_SNR = 13.3, -5.0
LR_SCHEDULERS = [member.value for member in SchedulerType if member is not SchedulerType.PIECEWISE_CONSTANT]


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
    snr_gamma: float | None = option(None, "γ of Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); 5 is usual")
    save_samples_epochs: int | None = option(None, "draw samples, with raw and with averaged weights, so often")
    seed: int = option(0, "seed of the weights, the order of the data, the timesteps and the noise")
    checkpointing_steps: int | None = option(None, "save the state of the training every so many steps")
    checkpoints_total_limit: int | None = option(None, "keep at most so many of these states")
    resume_from_checkpoint: str | None = option(None, "'latest', or a folder checkpoint-<step>, to go on from")
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
            raise ConfigurationError("the simple loss knows no variance: learned_range needs --loss_type bound")
        if self.lr_warmup_steps < 0:
            raise ConfigurationError(f"lr_warmup_steps must be at least 0, got {self.lr_warmup_steps}")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if not 0 <= self.ema_max_decay < 1:
            raise ConfigurationError(f"ema_max_decay must be at least 0 and below 1, got {self.ema_max_decay}")

    @property
    def num_predictions(self) -> int:
        """How many numbers the network predicts for each of a sample's: ε or the like, and perhaps the variance."""
        return 2 if self.variance_type == "learned_range" else 1

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


class LossHistory:
    """The loss of every optimizer step so far, which a resumed run goes on with."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = state["losses"]


def train(
    pipeline: DDPMMLPPipeline,
    dataset: Dataset,
    args: TrainingArguments,
    draw_samples: Callable[[DDPMMLPPipeline, EMAModel | None, int], None] | None = None,
) -> list[float]:
    """Train the pipeline's ε-network, with the pipeline's scheduler as the forward process, and save the pipeline.

    Args:
        pipeline: the untrained network and the stock `DDPMScheduler` to train it with; afterwards it holds the
            trained weights (their average, with `use_ema`).
        dataset: the training data as the network is to see it, normalised points or images in [-1, 1], whose
            `__getitems__(indices)` is a batch, `[len(indices), *pipeline.sample_shape]`.
        args: the options; `args.output_dir` receives the checkpoint, `checkpoint-<step>/` and the tracker's files.
        draw_samples: called as `draw_samples(pipeline, ema, epoch)` after every `args.save_samples_epochs` epochs,
            and at the end.

    Returns:
        The loss of every optimizer step.

    Raises:
        ConfigurationError: if the batch size exceeds the number of samples.
        CheckpointError: if the state to resume from doesn't exist, or is another model's.
        DivergenceError: if the loss is no finite number any more.
        KeyboardInterrupt: after Ctrl-C, once the step under way is done and its state is saved.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"output_dir must be a folder, but {output_dir} is a file")
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
            # The order of the data follows from seed and epoch alone, so that a resumed run finds its place in it.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
    except ValueError as error:  # such as fp16 on a CPU
        raise ConfigurationError(str(error)) from None
    if args.report_to != "none" and not accelerator.log_with:
        raise ConfigurationError(f"report_to: {args.report_to} is not installed")
    if args.train_batch_size * accelerator.num_processes > len(dataset):
        raise ConfigurationError(
            f"a batch of {args.train_batch_size} on each of {accelerator.num_processes} processes is larger than the "
            f"data set, which holds {len(dataset)} samples: lower --train_batch_size"
        )
    set_seed(args.seed, device_specific=True)

    unet, noise_scheduler = pipeline.unet, pipeline.scheduler
    bound = VariationalBound(noise_scheduler, discretized=not pipeline.is_points, clip_sample=False)
    optimizer = torch.optim.Adam(unet.parameters(), lr=args.learning_rate, fused=True)
    dataloader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=_identity,
        # Its own generator: from the global one, a resumed run would draw once more than one that never stopped.
        generator=torch.Generator(),
    )
    unet, optimizer, dataloader = accelerator.prepare(unet, optimizer, dataloader)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_epochs * steps_per_epoch
    lr_scheduler = accelerator.prepare(
        get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=max_train_steps * accelerator.num_processes,
        )
    )
    history = LossHistory()
    accelerator.register_for_checkpointing(history)
    ema = None
    if args.use_ema:
        ema = EMAModel(unet.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(ema)
    if args.report_to != "none":
        accelerator.init_trackers("train", {k: v for k, v in vars(args).items() if v is not None})

    if args.resume_from_checkpoint is not None:
        _load_checkpoint(accelerator, pipeline, _find_checkpoint(output_dir, args.resume_from_checkpoint))
    step = len(history.losses)
    if step > 0:
        accelerator.print(f"resuming at step {step}")
    progress_bar = tqdm(
        total=max_train_steps, initial=step, desc="training", disable=not accelerator.is_local_main_process
    )

    batch_losses: list[float] = []
    with progress_bar, _deferred_interrupt() as interrupt:
        while step < max_train_steps:
            epoch, steps_done = divmod(step, steps_per_epoch)
            dataloader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(dataloader, steps_done * args.gradient_accumulation_steps)
            for x_0 in batches:
                with accelerator.accumulate(unet):
                    # Algorithm 1: draw t and ε, and take a step on |ε − ε_θ(x_t, t)|², x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε
                    # (or on the same of another target than ε: see training_target; or on the term of the bound at t).
                    t = torch.randint(noise_scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device)
                    eps = torch.randn_like(x_0)
                    x_t = noise_scheduler.add_noise(x_0, eps, t)
                    model_output = unet(x_t, t).sample.float()
                    if args.loss_type == "bound":
                        errors = bound.num_timesteps * bound.term(model_output, x_0, x_t, t) / x_0[0].numel()
                    else:
                        target = training_target(noise_scheduler, x_0, eps, t)
                        errors = F.mse_loss(model_output, target, reduction="none").flatten(1).mean(dim=1)
                    loss = errors.mean()
                    if args.snr_gamma is None:
                        accelerator.backward(loss)
                    else:
                        accelerator.backward((_min_snr_weights(noise_scheduler, t, args.snr_gamma) * errors).mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                batch_losses.append(loss.item())
                if not accelerator.sync_gradients:
                    continue

                step += 1
                mean_loss, batch_losses = sum(batch_losses) / len(batch_losses), []
                if not math.isfinite(mean_loss):
                    lr = lr_scheduler.get_last_lr()[0]
                    raise DivergenceError(f"the loss is {mean_loss} at step {step}, with a learning rate of {lr:.2g}")
                if ema is not None:
                    ema.step(unet.parameters())
                history.losses.append(mean_loss)
                logs = {"loss": mean_loss, "lr": lr_scheduler.get_last_lr()[0]}
                progress_bar.set_postfix(logs, refresh=False)
                progress_bar.update()
                accelerator.log(logs, step=step)
                wants_checkpoint = args.checkpointing_steps is not None and step % args.checkpointing_steps == 0
                if wants_checkpoint or interrupt.is_set():
                    folder = output_dir / f"checkpoint-{step}"
                    _save_checkpoint(accelerator, pipeline, folder, args.checkpoints_total_limit)
                if interrupt.is_set():
                    raise KeyboardInterrupt(f"stopped at step {step}; go on with --resume_from_checkpoint latest")
                if step == max_train_steps:
                    break
            if draw_samples is not None and args.save_samples_epochs is not None and accelerator.is_main_process:
                epoch_is_whole = step % steps_per_epoch == 0
                if (epoch_is_whole and (epoch + 1) % args.save_samples_epochs == 0) or step == max_train_steps:
                    draw_samples(pipeline, ema, epoch + 1)

    accelerator.end_training()
    pipeline.unet = accelerator.unwrap_model(unet)
    if ema is not None:
        ema.copy_to(pipeline.unet.parameters())
    pipeline.unet.eval()
    if accelerator.is_main_process:
        with _writing(output_dir), tempfile.TemporaryDirectory(prefix=".saving-", dir=output_dir) as folder:
            pipeline.save_pretrained(folder)
            for weights in Path(folder).glob("*/*.safetensors"):  # which safetensors keeps private
                shutil.copymode(Path(folder) / pipeline.config_name, weights)
            move_into(Path(folder), output_dir)
    accelerator.wait_for_everyone()
    return history.losses


def training_target(scheduler: DDPMScheduler, x_0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What the network is to predict: ε, x_0, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, section 4)."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(x_0, eps, t)
    return eps if scheduler.config.prediction_type == "epsilon" else x_0


def _min_snr_weights(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, γ) is the weight of x_0's squared error (Hang et al. 2023, section 3.4), which is 1 / SNR times ε's,
    and 1 / (SNR + 1) times v's."""
    snr = compute_snr(scheduler, t)
    of_x_0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / of_x_0[scheduler.config.prediction_type]


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C sets the event instead of stopping the program in the middle of a step."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals are the main thread's
        return
    previous = signal.signal(signal.SIGINT, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _identity(batch: torch.Tensor) -> torch.Tensor:
    return batch


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, oldest first."""
    folders = (path for path in output_dir.glob("checkpoint-*") if path.name.partition("-")[2].isdigit())
    return sorted(folders, key=lambda path: int(path.name.partition("-")[2]))


def _save_checkpoint(accelerator: Accelerator, pipeline: DDPMMLPPipeline, folder: Path, limit: int | None) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _writing(folder):
            accelerator.save_state(partial)
            if accelerator.is_main_process:  # what the state belongs to
                pipeline.unet.save_config(partial / "unet")
                pipeline.scheduler.save_config(partial / "scheduler")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        if limit is not None:
            for old in _checkpoints(folder.parent)[:-limit]:
                shutil.rmtree(old)


def _load_checkpoint(accelerator: Accelerator, pipeline: DDPMMLPPipeline, folder: str) -> None:
    for name in ("unet", "scheduler"):
        component = getattr(pipeline, name)
        try:
            saved = component.load_config(Path(folder) / name)
        except OSError as error:
            raise CheckpointError(f"can't resume from {folder}: {error}") from None
        changed = [key for key in saved if not key.startswith("_") and _plain(component.config.get(key)) != saved[key]]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"can't resume from {folder}: its {name} has {key} {saved[key]}, not {component.config.get(key)}"
            )
    try:
        accelerator.load_state(folder)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        raise CheckpointError(f"can't resume from {folder}: {error}") from None


def _plain(value: object) -> object:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Safetensors and torch have errors of their own for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"can't write {folder}: {error}") from None


def _find_checkpoint(output_dir: Path, name: str) -> str:
    if name == "latest":
        checkpoints = _checkpoints(output_dir)
        if not checkpoints:
            raise CheckpointError(f"{output_dir} holds no checkpoint-<step> to resume from")
        return str(checkpoints[-1])
    for folder in (Path(name), output_dir / name):
        if folder.is_dir():
            return str(folder)
    raise CheckpointError(f"there is no folder {name} to resume from")
