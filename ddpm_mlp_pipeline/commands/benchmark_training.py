"""Compare training variants by images per second, and by sample quality after equal training time.

python train_scripts/benchmark_training.py mnist "mnist --model stock" --minutes 10 --dataset_name ylecun/mnist
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoints import FEATURES
from ..errors import ConfigurationError
from ..files import check_names, whole_file
from .parser import CommandParser, command, command_imports

with command_imports("training", __name__):
    import numpy as np
    import torch
    from accelerate.utils import set_seed

    from ..data.images import ImageBatches, load_images, load_labelled_images
    from ..judge.features import load_features
    from ..judge.metrics import frechet_distance, image_features, to_uint8
    from ..pipeline import DDPMMLPPipeline
    from ..training.options import PRESETS, ImageTrainingArguments
    from ..training.run import check_output_dir
    from .presets import parse_options
    from .train_images import train_on_images


SHORT, LONG = 10, 40  # steps of two runs, whose difference in time is that of LONG - SHORT steps
SAMPLING_BATCH_SIZE = 250
REPORT = "benchmark.json"
load_images_once, load_labelled_images_once = functools.cache(load_images), functools.cache(load_labelled_images)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="all other options are those of train_images.py, and apply to every variant",
    )
    parser.add_argument("variants", nargs="+", help="a preset's name and options that change it, in one argument")
    parser.add_argument("--minutes", type=float, default=10, help="training time of each (default: 10)")
    parser.add_count("--repeats", "timings of each, taken in turn (default: 3)", default=3)
    parser.add_count("--num_samples", "samples to measure (default: 2000)", default=2000)
    parser.add_count("--num_inference_steps", "DDPM steps (default: 100)", default=100)
    parser.add_argument("--split", default="test", help="split to compare samples with (default: test)")
    parser.add_argument("--features", type=Path, default=FEATURES, help="feature network (default: MNIST's, shipped)")
    parser.add_argument("--output_dir", type=Path, help="folder for the checkpoints and a report (default: keep none)")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace those of an earlier run")
    args, shared = parser.parse_known_args(argv)
    if not args.minutes > 0:
        raise ConfigurationError(f"--minutes must be more than 0, got {args.minutes}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        runs = {}
        for i, variant in enumerate(args.variants):
            words = ["--config", *shlex.split(variant), *shared, "--report_to=none", f"--output_dir={folder / str(i)}"]
            runs[variant] = parse_options(ImageTrainingArguments, words, __doc__, PRESETS)
        if len({run.mixed_precision for run in runs.values()}) > 1:
            raise ConfigurationError("the variants must share one --mixed_precision: pass it after them")
        check_names(folder, [REPORT], args.overwrite_output_dir)
        for run in runs.values():
            run.overwrite_output_dir = args.overwrite_output_dir
            check_output_dir(run)
            run.overwrite_output_dir = True  # each training of a variant replaces the one before
        _compare(args, runs, folder)


def _compare(args: argparse.Namespace, runs: dict[str, ImageTrainingArguments], folder: Path) -> None:
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(args.repeats):
        for variant, run in runs.items():  # in turn, so that other load slows all alike
            times = [_timed_training(run, steps)[1] for steps in (SHORT, LONG)]
            seconds[variant].append((times[1] - times[0]) / (LONG - SHORT))
    rows = []
    for variant, run in runs.items():
        step_time = float(np.median(seconds[variant]))
        steps = max(1, round(60 * args.minutes / step_time))
        pipeline, training_time = _timed_training(run, steps)
        row = {
            "variant": variant,
            "parameters": pipeline.unet.num_parameters(),
            "images_per_second": run.train_batch_size * run.gradient_accumulation_steps / step_time,
            "steps": steps,
            "minutes": training_time / 60,
            "frechet_distance": _distance(args, run, pipeline),
        }
        rows.append(row)
        print(
            f"{variant}: {row['parameters'] / 1e6:.2f} M parameters, {row['images_per_second']:.0f} images/s "
            f"({row['images_per_second'] / rows[0]['images_per_second']:.2f}×), {steps} steps in "
            f"{row['minutes']:.1f} min, Fréchet distance {row['frechet_distance']:.2f}",
            flush=True,
        )
    with whole_file(folder / REPORT, overwrite=True) as temporary:
        temporary.write_text(json.dumps(rows, indent=2))


def _timed_training(run: ImageTrainingArguments, steps: int) -> tuple[DDPMMLPPipeline, float]:
    run.max_train_steps = steps
    set_seed(run.seed)
    form = run.label_column, run.split, run.resolution, run.fit, run.channels
    images, labels, class_names = load_labelled_images_once(run.dataset_name, *form)
    start = time.perf_counter()
    pipeline, _ = train_on_images(run, ImageBatches(images, labels), class_names)
    return pipeline, time.perf_counter() - start


def _distance(args: argparse.Namespace, run: ImageTrainingArguments, pipeline: DDPMMLPPipeline) -> float:
    def draw() -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, args.num_samples, SAMPLING_BATCH_SIZE):
            size = min(SAMPLING_BATCH_SIZE, args.num_samples - start)
            yield to_uint8(pipeline(size, generator, args.num_inference_steps, "np")[0])

    references = load_images_once(run.dataset_name, args.split, run.resolution, run.fit, run.channels)
    network = load_features(args.features)
    return frechet_distance(image_features(draw(), network), image_features([references], network))


if __name__ == "__main__":
    main()
