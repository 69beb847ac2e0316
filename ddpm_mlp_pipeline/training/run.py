"""A training run on Accelerate: data order, optimizer steps, weight averaging, resuming and saving."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    ProjectConfiguration,
    is_compiled_module,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..data.batches import Batch, BatchDataset
from ..errors import ConfigurationError, DivergenceError, StoppedBySignal
from ..files import PARTIAL, check_names, move_into
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from .options import RunArguments, TrainingArguments
from .processes import this_process
from .state import Checkpoints, deferred_signals, explain_writing, resumes_in

DrawSamples = Callable[[DDPMMLPPipeline, EMAModel | None, int], None]
FIRST_STEPS, TIMED_STEPS = 5, 25  # left out, and done, when the time that remains is estimated
CHECKPOINT = ("model_index.json", "pipeline.py", "unet", "scheduler")  # entries of output_dir


def check_output_dir(args: RunArguments, *others: str) -> None:
    """Refuse to replace another run's output in `args.output_dir`, unless this run resumes from a state there.

    Args:
        args: the run's options.
        others: names of the files that the run writes there in addition to the checkpoint's.

    Raises:
        OutputExistsError: if such an entry exists, and `args.overwrite_output_dir` isn't set.
        ConfigurationError: if `args.output_dir` is a file.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"output_dir must be a folder, but {output_dir} is a file")
    overwrite = args.overwrite_output_dir or resumes_in(output_dir, args.resume_from_checkpoint)
    check_names(output_dir, (*CHECKPOINT, *others), overwrite)
    if isinstance(args, TrainingArguments) and args.save_samples_epochs is not None:
        # A run that was killed before it saved a state may have left samples.
        check_names(output_dir, ["samples"], overwrite or args.resume_from_checkpoint == "latest")


def save_pipeline(pipeline: DDPMMLPPipeline, output_dir: Path) -> None:
    """Save a pipeline into a run's folder, whole or not at all. An earlier one is replaced."""
    with explain_writing(output_dir), tempfile.TemporaryDirectory(prefix=PARTIAL, dir=output_dir) as folder:
        pipeline.save_pretrained(folder)
        for file in Path(folder).glob("*/*.safetensors"):  # which safetensors makes private
            shutil.copymode(Path(folder) / pipeline.config_name, file)
        move_into(Path(folder), output_dir, last=pipeline.config_name)


@dataclasses.dataclass
class Run:
    """A training run in progress, made by `prepare_run`.

    Attributes:
        network: the trained network, as Accelerate has prepared it.
        whole: a copy of the network that receives the result, because FSDP shards the trained one.
        steps_per_epoch, max_train_steps: in optimizer steps.
        losses: loss of each optimizer step so far.
        batch_losses: losses of the batches accumulated for the next step.
        lr: learning rate of the current step.
        progress: the progress bar.
        first_step: the number of steps that were done when this process began.
        started: when this process's first steps were done, which take longer.
        signals: signals received since the loop began.
    """

    args: RunArguments
    pipeline: DDPMMLPPipeline
    accelerator: Accelerator
    network: torch.nn.Module
    whole: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    dataloader: Any
    ema: EMAModel | None
    checkpoints: Checkpoints
    steps_per_epoch: int
    max_train_steps: int
    draw_samples: DrawSamples | None
    samples_epochs: int | None
    losses: list[float] = dataclasses.field(default_factory=list)
    batch_losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    lr: float = math.nan
    progress: Any = None
    first_step: int = 0
    started: float = math.nan
    signals: list[int] = dataclasses.field(default_factory=list)

    @property
    def total_batch_size(self) -> int:
        """Number of samples in a batch of all processes."""
        return self.checkpoints.total_batch_size

    @property
    def rows(self) -> slice:
        """This process's rows in the batch of all processes."""
        first = self.args.train_batch_size * self.accelerator.process_index
        return slice(first, first + self.args.train_batch_size)

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        """Load the state to resume from, show a progress bar, and defer Ctrl-C and SIGTERM to the end of a step.

        Raises:
            CheckpointError: if that state doesn't exist, is broken, or belongs to another run.
        """
        self.losses = self.checkpoints.begin(self.args.resume_from_checkpoint)
        self.first_step = step = len(self.losses)
        if step > 0:
            self.accelerator.print(f"resuming at step {step}")
        hidden = not self.accelerator.is_local_main_process
        bar = progress_bar(total=self.max_train_steps, initial=step, desc="training", disable=hidden)
        with bar as self.progress, deferred_signals(self.accelerator) as self.signals:
            yield

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the steps that remain."""
        while len(self.losses) < self.max_train_steps:
            epoch, steps_done = divmod(len(self.losses), self.steps_per_epoch)
            loader = self.accelerator.skip_first_batches(
                self.dataloader, steps_done * self.args.gradient_accumulation_steps
            )
            # Accelerate starts again with the first epoch's order unless it knows the epoch. Which loader must know it
            # depends on the number of processes and on the version (before or after 1.15).
            for each in (self.dataloader, loader):
                each.set_epoch(epoch)
            for batch in loader:
                with self.accelerator.accumulate(self.network):
                    yield batch
                if len(self.losses) == self.max_train_steps:
                    return

    def take_step(
        self, loss: torch.Tensor, shown: torch.Tensor, batch: Batch, t: torch.Tensor, eps: torch.Tensor
    ) -> None:
        """Add a batch's gradient, and after `gradient_accumulation_steps` batches take an optimizer step.

        Args:
            loss: the batch's loss, a scalar.
            shown: the loss to log and show, a scalar.
            batch, t, eps: the batch with its timesteps and noise, to find the reason if the step diverges.

        Raises:
            DivergenceError: if the loss or its gradient is no longer finite. The step is not taken.
            StoppedBySignal: if Ctrl-C or SIGTERM came during the step. The state is saved first.
        """
        accelerator = self.accelerator
        accelerator.backward(loss)
        self.batch_losses.append(shown.detach())
        if accelerator.sync_gradients:
            self.losses.append(self._clip_gradient(batch, t, eps))
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self._end_step()

    def _clip_gradient(self, batch: Batch, t: torch.Tensor, eps: torch.Tensor) -> float:
        """Clip the gradient, and return the step's loss."""
        accelerator, self.lr = self.accelerator, self.lr_scheduler.get_last_lr()[0]
        norm = float(accelerator.clip_grad_norm_(self.network.parameters(), self.args.max_grad_norm))
        loss = accelerator.reduce(torch.stack(self.batch_losses).mean(), "mean").item()
        self.batch_losses.clear()
        if not math.isfinite(loss + norm) and not _will_be_skipped(accelerator):
            x_t = self.pipeline.scheduler.add_noise(batch.x_0, eps, t)
            raise DivergenceError(
                f"the gradient's norm is {norm:.2g} and the loss is {loss} at step {len(self.losses) + 1}, with a "
                f"learning rate of {self.lr:.2g}: {_remedy(accelerator, self.network, x_t, t, batch)}; "
                f"{self.checkpoints.last_good}"
            )
        return loss

    def _end_step(self) -> None:
        """Average the weights, report the loss, and draw samples or save the state if due."""
        args, accelerator, step = self.args, self.accelerator, len(self.losses)
        if self.ema is not None:
            self.ema.step(self.network.parameters())
        report = {"loss": self.losses[-1], "lr": self.lr}
        self.progress.set_postfix(report, refresh=False)
        self.progress.update()
        self._estimate_time()
        accelerator.log(report, step=step)
        if self.draw_samples is not None and self.samples_epochs is not None and accelerator.is_main_process:
            is_due = step % (self.steps_per_epoch * self.samples_epochs) == 0 or step == self.max_train_steps
            if is_due:  # before the state is saved, because a run that resumes from it doesn't draw them again
                self.draw_samples(self.pipeline, self.ema, math.ceil(step / self.steps_per_epoch))
        is_stopped = accelerator.check_trigger()  # whether any process got a signal
        is_due = args.checkpointing_steps is not None and step % args.checkpointing_steps == 0
        if is_due or is_stopped:
            self.checkpoints.save(self.losses)
        if is_stopped:
            message = f"stopped at step {step}; go on with --resume_from_checkpoint latest"
            raise StoppedBySignal(message, self.signals[0] if self.signals else signal.SIGTERM)

    def _estimate_time(self) -> None:
        """After the first steps, say how long the rest will take, unless it is seconds."""
        done, remaining = len(self.losses) - self.first_step, self.max_train_steps - len(self.losses)
        if done == FIRST_STEPS:
            self.started = time.monotonic()
        if done != TIMED_STEPS:
            return
        minutes = (time.monotonic() - self.started) / (done - FIRST_STEPS) * remaining / 60
        if minutes > 1:
            about = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
            note = "Ctrl-C saves the state, from which --resume_from_checkpoint latest goes on"
            self.accelerator.print(f"{remaining} more steps take about {about}; {note}")

    def result(self) -> torch.nn.Module:
        """Return a network with the trained weights, or with their average if `use_ema` is set.

        In processes other than the main one, it has the initial weights.
        """
        if self.ema is not None:
            self.ema.foreach = False  # FSDP's tensors don't support the fused copy
            self.ema.copy_to(self.network.parameters())
        # A compiled module adds a prefix to the names of its weights.
        network = self.network._orig_mod if is_compiled_module(self.network) else self.network
        weights = self.accelerator.get_state_dict(network)
        if self.accelerator.is_main_process:
            self.whole.load_state_dict(weights)
        return self.whole.to(self.accelerator.device).eval()

    def save(self) -> None:
        """Save the pipeline in the main process, whole or not at all, and end the run."""
        if self.accelerator.is_main_process:
            save_pipeline(self.pipeline, Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def prepare_run(
    pipeline: DDPMMLPPipeline,
    dataset: BatchDataset,
    args: RunArguments,
    draw_samples: DrawSamples | None = None,
    samples_epochs: int | None = None,
    network: torch.nn.Module | None = None,
    learning_rates: Mapping[str, float] | None = None,
    any_processes: bool = False,
) -> Run:
    """Check the options against the data, and prepare network, optimizer and data with Accelerate.

    Args:
        pipeline: the pipeline to save at the end.
        dataset: the training data.
        args: the options.
        draw_samples: see `train`; called after every `samples_epochs` epochs, and at the end.
        samples_epochs: number of epochs between draws; by default none is drawn.
        network: the network to train; by default the pipeline's.
        learning_rates: peak learning rates by name of parameter; by default `args.learning_rate`.
        any_processes: see `Checkpoints`.

    Raises:
        OutputExistsError, ConfigurationError: see `train`.
    """
    accelerator = _make_accelerator(args)
    total_batch_size = args.train_batch_size * accelerator.num_processes
    if total_batch_size > len(dataset):
        raise ConfigurationError(
            f"a batch of {args.train_batch_size} on each of {accelerator.num_processes} processes is larger than the "
            f"data set, which holds {len(dataset)} samples: lower --train_batch_size"
        )
    set_seed(args.seed)
    network = pipeline.unet if network is None else network
    whole = copy.deepcopy(network)
    if accelerator.distributed_type == DistributedType.FSDP:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP shards no other
    own = learning_rates or {}
    groups: list[dict[str, Any]] = [{"params": [p for name, p in network.named_parameters() if name not in own]}]
    groups += [{"params": [network.get_parameter(name)], "lr": lr} for name, lr in own.items()]
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, fused=True)
    dataloader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # any class with a length and `__getitems__` works
        batch_size=args.train_batch_size,
        sampler=(sampler := getattr(dataset, "sampler", None)),
        shuffle=sampler is None,
        drop_last=True,
        collate_fn=lambda batch: batch,
        # With the global generator, a resumed run would draw once more than a run that never stopped.
        generator=torch.Generator(),
    )
    network, optimizer, dataloader = accelerator.prepare(network, optimizer, dataloader)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_steps(steps_per_epoch)
    lr_scheduler = accelerator.prepare(
        get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=max_train_steps,
        )
    )
    ema = None
    if args.use_ema:
        ema = EMAModel(network.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        ema.to(accelerator.device)
    if args.report_to != "none":
        given = {name: value for name, value in vars(args).items() if value is not None}
        options = {name: value if isinstance(value, int | float) else str(value) for name, value in given.items()}
        accelerator.init_trackers("train", options)
    checkpoints = Checkpoints(
        *(accelerator, pipeline, ema, total_batch_size),
        Path(args.output_dir),
        args.checkpoints_total_limit,
        any_processes,
    )
    return Run(
        args=args,
        pipeline=pipeline,
        accelerator=accelerator,
        network=network,
        whole=whole,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        dataloader=dataloader,
        ema=ema,
        checkpoints=checkpoints,
        steps_per_epoch=steps_per_epoch,
        max_train_steps=max_train_steps,
        draw_samples=draw_samples,
        samples_epochs=samples_epochs,
    )


def _make_accelerator(args: RunArguments) -> Accelerator:
    """Make the run's folder and its accelerator."""
    this_process()  # refuses launchers that are not supported
    check_output_dir(args)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / args.logging_dir),
            # Accelerate would step it once for each process, so that its state would depend on their number.
            step_scheduler_with_optimizer=False,
            # The order of the data depends on seed and epoch only, so that a resumed run finds its place.
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
    except ValueError as error:  # such as fp16 on a CPU
        raise ConfigurationError(str(error)) from None
    if args.report_to != "none" and not accelerator.log_with:
        raise ConfigurationError(f"report_to: {args.report_to} is not installed: install it, or pass --report_to none")
    return accelerator


def _will_be_skipped(accelerator: Accelerator) -> bool:
    """Tell whether fp16's scaler will skip a step that overflows. Below a scale of 1, the scale is not the cause."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1


def _remedy(
    accelerator: Accelerator, network: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor, batch: Batch
) -> str:
    """Return advice after a divergence. If float32 gives a finite output, 16-bit numbers have overflowed."""
    if accelerator.mixed_precision != "no":
        with torch.no_grad():
            prediction = accelerator.unwrap_model(network, keep_fp32_wrapper=False)(x_t, t, **batch.known).sample
        if prediction.square().mean().isfinite():
            return f"{accelerator.mixed_precision} overflows where float32 does not, so use --mixed_precision no"
    return "a lower --learning_rate may help"
