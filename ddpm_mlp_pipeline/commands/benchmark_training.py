"""Compare variants of training by images per second, and by sample quality after equal time or equally many images.

python train_scripts/benchmark_training.py mnist "mnist --dynamo_backend inductor" --minutes 10
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import check_names, whole_file
from .parser import FEATURES_HELP, CommandParser, command, command_imports

with command_imports("training", __name__):
    import numpy as np
    import psutil
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ..data.images import count_images, load_images
    from ..judge.metrics import choose_features, frechet_distance, image_features, to_uint8
    from ..pipeline import DDPMMLPPipeline
    from ..training.options import PRESETS, ImageTrainingArguments
    from ..training.run import check_output_dir
    from .presets import parse_options


TIMED_STEPS, WARM_UP_STEPS = 40, 10  # of a timing run, and of those the ones that are left out
SAMPLING_BATCH_SIZE = 250
POLLING_SECONDS = 0.2  # how often the memory in use is read
REPORT = "benchmark.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of training: the options of `train_images.py`, and how Accelerate launches it."""

    name: str
    options: ImageTrainingArguments
    argv: list[str]
    num_processes: int
    num_threads: int
    dynamo_backend: str

    @property
    def images_per_step(self) -> int:
        return self.options.train_batch_size * self.options.gradient_accumulation_steps * self.num_processes


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one training took.

    Attributes:
        step_time: median time of a step, in seconds.
        start_time: seconds until the first step was done: imports, data and, with `--dynamo_backend`, compilation.
        seconds: duration of the whole command.
        memory: peak of the processes' resident memory, in MiB, in the first half of the steps and in the second. What
            came before the steps counts to the first.
    """

    step_time: float
    start_time: float
    seconds: float
    memory: tuple[float, float]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other options are those of train_images.py, and apply to every variant; so do --num_processes, "
        "--num_cpu_threads_per_process and --dynamo_backend of accelerate launch",
    )
    parser.add_argument("variants", nargs="+", help="a preset's name and options that change it, in one argument")
    parser.add_argument("--minutes", type=float, default=10, help="time of each, its start included (default: 10)")
    parser.add_count("--num_images", "train each on equally many images, instead of as long")
    parser.add_count("--repeats", "timings of each before that, taken in turn (default: 3)", default=3)
    parser.add_count("--num_samples", "samples to measure (default: 2000)", default=2000)
    parser.add_count("--num_inference_steps", "DDPM steps (default: 100)", default=100)
    parser.add_argument("--split", default="test", help="split to compare samples with (default: test)")
    parser.add_argument("--features", help=FEATURES_HELP)
    parser.add_argument("--output_dir", type=Path, help="folder for the checkpoints and a report (default: keep none)")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace those of an earlier run")
    args, shared = parser.parse_known_args(argv)
    if not args.minutes > 0:
        raise ConfigurationError(f"--minutes must be more than 0, got {args.minutes}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        variants = [_read(words, shared, folder / str(i)) for i, words in enumerate(args.variants)]
        check_names(folder, [REPORT], args.overwrite_output_dir)
        for variant in variants:
            variant.options.overwrite_output_dir = args.overwrite_output_dir
            check_output_dir(variant.options)
        for name in dict.fromkeys(variant.options.dataset_name for variant in variants):
            count_images(name, args.split)  # before hours of training
        rows = _compare(args, variants)
        with whole_file(folder / REPORT, overwrite=True) as report:
            report.write_text(json.dumps(rows, indent=2))


def _read(words: str, shared: Sequence[str], output_dir: Path) -> Variant:
    """Read a variant's own options and those that all variants share."""
    parser = CommandParser(add_help=False)
    parser.add_count("--num_processes", "", default=1)
    parser.add_count("--num_cpu_threads_per_process", "")
    parser.add_argument("--dynamo_backend", default="no")
    launch, argv = parser.parse_known_args([*shlex.split(words), *shared])
    argv = ["--config", *argv, f"--output_dir={output_dir}", "--report_to=tensorboard", "--no-figures"]
    options = parse_options(ImageTrainingArguments, argv, __doc__, PRESETS)
    cores = int(os.environ.get("OMP_NUM_THREADS", psutil.cpu_count(logical=False) or 1))
    threads = launch.num_cpu_threads_per_process or max(1, cores // launch.num_processes)
    return Variant(words, options, argv, launch.num_processes, threads, launch.dynamo_backend)


def _compare(args: argparse.Namespace, variants: list[Variant]) -> list[dict[str, Any]]:
    timings: list[list[Measured]] = [[] for _ in variants]
    for _ in range(args.repeats):
        for variant, own in zip(variants, timings, strict=True):  # in turn, so that other load slows all alike
            own.append(_train(variant, TIMED_STEPS))
    rows: list[dict[str, Any]] = []
    for variant, own in zip(variants, timings, strict=True):
        step_time = float(np.median([measured.step_time for measured in own]))
        start_time = max(measured.start_time for measured in own)  # the first one's: compiled code is kept
        if args.num_images:
            steps = math.ceil(args.num_images / variant.images_per_step)
        else:
            steps = max(1, round((60 * args.minutes - start_time) / step_time))
        trained = _train(variant, steps)
        pipeline = DDPMMLPPipeline.from_pretrained(variant.options.output_dir)
        row = {
            "variant": variant.name,
            "parameters": pipeline.unet.num_parameters(),
            "images_per_second": variant.images_per_step / step_time,
            "start_seconds": start_time,
            "steps": steps,
            "minutes": trained.seconds / 60,
            "memory_mib": trained.memory,
            "frechet_distance": _distance(args, variant.options, pipeline),
        }
        rows.append(row)
        print(
            f"{variant.name}: {row['parameters'] / 1e6:.2f} M parameters, {row['images_per_second']:.0f} images/s "
            f"({row['images_per_second'] / rows[0]['images_per_second']:.2f}×) after {start_time:.0f} s to start, "
            f"{steps} steps in {row['minutes']:.1f} min, memory at most {trained.memory[0]:.0f} MiB in their first "
            f"half and {trained.memory[1]:.0f} in the second, Fréchet distance {row['frechet_distance']:.2f}",
            flush=True,
        )
    return rows


def _train(variant: Variant, steps: int) -> Measured:
    """Train a variant with `accelerate launch`, as a user does, and read its tracker's file for the times."""
    several = ["--multi_gpu"] if variant.num_processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *several, "--num_machines=1"]
    launch += [f"--num_processes={variant.num_processes}", f"--num_cpu_threads_per_process={variant.num_threads}"]
    launch += [f"--mixed_precision={variant.options.mixed_precision}", f"--dynamo_backend={variant.dynamo_backend}"]
    launch += ["-m", "ddpm_mlp_pipeline.commands.train_images", *variant.argv]
    launch += [f"--max_train_steps={steps}", "--overwrite_output_dir"]
    on_cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    used: list[tuple[float, float]] = []  # when, and MiB of resident memory
    with tempfile.TemporaryDirectory() as logs, tempfile.TemporaryFile() as errors:
        start = time.time()
        launch.append(f"--logging_dir={logs}")
        process = psutil.Popen(launch, env=os.environ | on_cpu, stdout=errors, stderr=errors)
        try:
            while process.poll() is None:
                used.append((time.time(), _memory(process)))
                time.sleep(POLLING_SECONDS)
        finally:
            _end(process)
        end = time.time()
        if process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
            why = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
            raise ConfigurationError(f"{variant.name} could not be trained: {why.removeprefix('error: ')}")
        recorded = EventAccumulator(str(Path(logs) / "train")).Reload().Scalars("loss")
    times = np.array([event.wall_time for event in recorded])
    intervals = np.diff(times)[min(WARM_UP_STEPS, len(times) - 2) :] if len(times) > 1 else times - start
    middle = times[len(times) // 2]
    first = max((mib for when, mib in used if when < middle), default=0.0)
    second = max((mib for when, mib in used if middle <= when <= times[-1]), default=first)
    return Measured(float(np.median(intervals)), times[0] - start, end - start, (first, second))


def _end(process: psutil.Popen) -> None:
    """End a process, if it runs, and those that it has started."""
    if process.poll() is None:
        for each in (*process.children(recursive=True), process):
            each.kill()
        process.wait()


def _memory(process: psutil.Popen) -> float:
    """Return the resident memory of a process and of those that it has started, in MiB."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return total / 2**20


def _distance(args: argparse.Namespace, options: ImageTrainingArguments, pipeline: DDPMMLPPipeline) -> float:
    def draw() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, args.num_samples, SAMPLING_BATCH_SIZE):
            size = min(SAMPLING_BATCH_SIZE, args.num_samples - start)
            yield to_uint8(pipeline(size, generator, args.num_inference_steps, "np")[0])

    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    channels, height, width = pipeline.sample_shape
    form = (height, width), options.fit, channels
    references = load_images(options.dataset_name, args.split, *form, on_corrupt=lambda message: None)
    network = choose_features(args.features, channels, args.num_samples, len(references))[1]
    return frechet_distance(image_features(draw(), network), image_features([references], network))


if __name__ == "__main__":
    main()
