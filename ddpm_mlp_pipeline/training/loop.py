"""The training loop (Ho et al. 2020, algorithm 1), on Accelerate."""

from __future__ import annotations

import copy
import functools
import math
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, Dataset

from ..bound import VariationalBound
from ..errors import ConfigurationError, DivergenceError, StoppedBySignal
from ..files import PARTIAL, check_names, move_into
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from .losses import bound_loss, min_snr_weights, simple_loss
from .options import TrainingArguments
from .state import Checkpoints, deferred_signals, explain_writing, resumes_in

CHECKPOINT = ("model_index.json", "pipeline.py", "unet", "scheduler")  # what a run writes to output_dir


def check_output_dir(args: TrainingArguments, *others: str) -> None:
    """Refuse to replace what another run has left in `args.output_dir`, unless this run goes on from a state there.

    Args:
        args: the run's options.
        others: names that the run writes there beside the checkpoint's.

    Raises:
        OutputExistsError: if there is such an entry, and `args.overwrite_output_dir` isn't set.
        ConfigurationError: if `args.output_dir` is a file.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigurationError(f"output_dir must be a folder, but {output_dir} is a file")
    overwrite = args.overwrite_output_dir or resumes_in(output_dir, args.resume_from_checkpoint)
    check_names(output_dir, (*CHECKPOINT, *others), overwrite)
    if args.save_samples_epochs is not None:  # a run that was killed before its first state may have left some
        check_names(output_dir, ["samples"], overwrite or args.resume_from_checkpoint == "latest")


def train(
    pipeline: DDPMMLPPipeline,
    dataset: Dataset,
    args: TrainingArguments,
    draw_samples: Callable[[DDPMMLPPipeline, EMAModel | None, int], None] | None = None,
    augment: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[float]:
    """Train the pipeline's ε-network, with the pipeline's scheduler as the forward process, and save the pipeline.

    Args:
        pipeline: the untrained network and the stock `DDPMScheduler` to train it with; afterwards it holds the
            trained weights (their average, with `use_ema`), in the main process.
        dataset: the training data as the network is to see it, normalised points or images in [-1, 1], whose
            `__getitems__(indices)` is a batch, `[len(indices), *pipeline.sample_shape]`.
        args: the options; `args.output_dir` receives the checkpoint, `checkpoint-<step>/` and the tracker's files.
        draw_samples: called as `draw_samples(pipeline, ema, epoch)` after every `args.save_samples_epochs` epochs,
            and at the end.
        augment: called as `augment(x_0, u)` with a batch and, for each of its samples, a random number from [0, 1);
            returns the batch to train on. (What the data set itself drew could not be drawn again by a resumed run,
            since batches are fetched ahead.)

    Returns:
        The loss of every optimizer step.

    Raises:
        OutputExistsError: if `args.output_dir` holds another run's checkpoint: see `check_output_dir`.
        ConfigurationError: if the batch size exceeds the number of samples.
        CheckpointError: if the state to resume from doesn't exist, is broken, or is another model's.
        DivergenceError: if the loss or its gradient is no finite number any more. The step is not taken.
        StoppedBySignal: after Ctrl-C or SIGTERM, once the step under way is done and its state is saved.
    """
    output_dir = Path(args.output_dir)
    check_output_dir(args)
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
    set_seed(args.seed)

    unet, noise_scheduler = pipeline.unet, pipeline.scheduler
    whole = copy.deepcopy(unet)  # to hold the result: FSDP divides the one that is trained among the processes
    if accelerator.distributed_type == DistributedType.FSDP:
        unet.to(memory_format=torch.contiguous_format)  # and can divide no other
    if args.loss_type == "bound":
        bound = VariationalBound(noise_scheduler, discretized=not pipeline.is_points, clip_sample=False)
        loss_function = functools.partial(bound_loss, bound)
    else:
        loss_function = functools.partial(simple_loss, noise_scheduler)
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
    ema = None
    if args.use_ema:
        ema = EMAModel(unet.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
        ema.to(accelerator.device)
    if args.report_to != "none":
        options = {name: value for name, value in vars(args).items() if value is not None}
        plain = {name: value if isinstance(value, int | float) else str(value) for name, value in options.items()}
        accelerator.init_trackers("train", plain)

    checkpoints = Checkpoints(accelerator, pipeline, ema, output_dir, args.checkpoints_total_limit)
    losses = checkpoints.begin(args.resume_from_checkpoint)
    step = len(losses)
    if step > 0:
        accelerator.print(f"resuming at step {step}")
    progress = progress_bar(
        total=max_train_steps, initial=step, desc="training", disable=not accelerator.is_local_main_process
    )

    # Every process draws the random numbers of the whole batch and uses its own rows of them, so that several
    # processes, each with its part of a batch, do what one does.
    total_batch_size = args.train_batch_size * accelerator.num_processes
    first = args.train_batch_size * accelerator.process_index
    rows = slice(first, first + args.train_batch_size)

    batch_losses: list[torch.Tensor] = []
    with progress, deferred_signals(accelerator) as signals:
        while step < max_train_steps:
            epoch, steps_done = divmod(step, steps_per_epoch)
            batches = accelerator.skip_first_batches(dataloader, steps_done * args.gradient_accumulation_steps)
            # Accelerate begins at the first order again if only one of them knows the epoch: of the first with several
            # processes, of the second before 1.15.
            for loader in (dataloader, batches):
                loader.set_epoch(epoch)
            for x_0 in batches:
                with accelerator.accumulate(unet):
                    if augment is not None:
                        x_0 = augment(x_0, torch.rand(total_batch_size, device=x_0.device)[rows])
                    # Algorithm 1: draw t and ε, and take a step on |ε − ε_θ(x_t, t)|², x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε
                    # (or on the same of another target than ε, or on a term of the bound: see the losses below).
                    T = noise_scheduler.config.num_train_timesteps
                    t = torch.randint(T, (total_batch_size,), device=x_0.device)[rows]
                    eps = torch.randn(total_batch_size, *x_0.shape[1:], device=x_0.device)[rows]
                    x_t = noise_scheduler.add_noise(x_0, eps, t)
                    errors = loss_function(unet(x_t, t).sample.float(), x_0, eps, x_t, t)
                    loss = errors.mean()
                    if args.snr_gamma is None:
                        accelerator.backward(loss)
                    else:
                        accelerator.backward((min_snr_weights(noise_scheduler, t, args.snr_gamma) * errors).mean())
                    batch_losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        lr = lr_scheduler.get_last_lr()[0]
                        # (DeepSpeed, which clips on its own, may have no norm to tell.)
                        norm = float(accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm) or 0.0)
                        mean_loss = accelerator.reduce(torch.stack(batch_losses).mean(), "mean").item()
                        if not math.isfinite(mean_loss + norm) and not _will_be_skipped(accelerator):
                            what = f"the gradient's norm is {norm:.2g} and the loss is {mean_loss} at step {step + 1}"
                            remedy = f"with a learning rate of {lr:.2g}: {_remedy(accelerator, unet, x_t, t)}"
                            raise DivergenceError(f"{what}, {remedy}; {checkpoints.last_good}")
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue

                step += 1
                batch_losses.clear()
                losses.append(mean_loss)
                if ema is not None:
                    ema.step(unet.parameters())
                progress.set_postfix({"loss": mean_loss, "lr": lr}, refresh=False)
                progress.update()
                accelerator.log({"loss": mean_loss, "lr": lr}, step=step)
                if draw_samples is not None and args.save_samples_epochs is not None and accelerator.is_main_process:
                    is_due = step % (steps_per_epoch * args.save_samples_epochs) == 0 or step == max_train_steps
                    if is_due:  # before the state is saved: a run that goes on from there has them already
                        draw_samples(pipeline, ema, epoch + 1)
                is_stopped = accelerator.check_trigger()  # by a signal to any process
                wants_checkpoint = args.checkpointing_steps is not None and step % args.checkpointing_steps == 0
                if wants_checkpoint or is_stopped:
                    checkpoints.save(losses)
                if is_stopped:
                    message = f"stopped at step {step}; go on with --resume_from_checkpoint latest"
                    raise StoppedBySignal(message, signals[0] if signals else signal.SIGTERM)
                if step == max_train_steps:
                    break

    if ema is not None:
        ema.foreach = False  # FSDP's tensors can only be copied one by one
        ema.copy_to(unet.parameters())
    weights = accelerator.get_state_dict(unet)
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
        pipeline.unet = whole.to(accelerator.device).eval()
        with explain_writing(output_dir), tempfile.TemporaryDirectory(prefix=PARTIAL, dir=output_dir) as folder:
            pipeline.save_pretrained(folder)
            for file in Path(folder).glob("*/*.safetensors"):  # which safetensors keeps private
                shutil.copymode(Path(folder) / pipeline.config_name, file)
            move_into(Path(folder), output_dir, last=pipeline.config_name)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return losses


def _will_be_skipped(accelerator: Accelerator) -> bool:
    """Whether the step is one that fp16's scaler leaves out, to go on with gradients scaled less. Below a scale of 1
    it is not the scale that makes them overflow."""
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1


def _remedy(accelerator: Accelerator, unet: torch.nn.Module, x_t: torch.Tensor, t: torch.Tensor) -> str:
    """What to do about numbers gone bad: an overflow of 16 bits is told from a divergence by float32's output."""
    if accelerator.mixed_precision != "no":
        with torch.no_grad():
            prediction = accelerator.unwrap_model(unet, keep_fp32_wrapper=False)(x_t, t).sample
        if prediction.square().mean().isfinite():
            return f"{accelerator.mixed_precision} overflows where float32 does not, so use --mixed_precision no"
    return "a lower --learning_rate may help"


def _identity(batch: torch.Tensor) -> torch.Tensor:
    return batch
