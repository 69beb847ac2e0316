"""Fit step tables of a few network calls to a checkpoint. Its weights stay as they are."""

from __future__ import annotations

import dataclasses
import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError
from ..files import check_folder, whole_file, whole_folder
from .parser import CommandParser, add_data_options, add_device, add_overwrite, command, command_imports, noise_seed

with command_imports("ddpm-fit", __name__):
    import numpy as np
    import torch

    from ..checkpoint_sampler import CheckpointSampler
    from ..data.batches import TensorBatches
    from ..data.normalized import normalize
    from ..export.exporter import set_null_label
    from ..loading import fingerprint
    from ..pipeline import DDPMMLPPipeline
    from ..progress import progress_bar, sampling_bar
    from ..runtime.request import Asked
    from ..training.fitting import TableFitter, play
    from ..training.options import FittingArguments
    from ..training.processes import choose_device
    from ..training.table_parameters import TableParameters
    from ..training.target import CHUNK
    from .few_calls import (
        FIGURES,
        NUM_FIT_POINTS,
        Candidate,
        Report,
        load_data,
        load_pipeline,
        make_features,
        measure,
        stock_candidates,
    )

FOLDERS = ("unet/", "scheduler/")
FILES = ("model_index.json", "pipeline.py", "fit.json", *FIGURES)


def is_own(name: str) -> bool:
    """Tell whether the command writes an entry of this name."""
    return name in FILES or name.startswith(FOLDERS)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    fit(args)
    print(args.output)


def fit(args: Namespace) -> None:
    """Fit, measure, write the output, and print the report."""
    if (args.dataset is None) == (args.data_free is None):
        raise ConfigurationError("name the data with --dataset, or pass --data_free N")
    check_folder(args.output, is_own, args.overwrite)
    pipeline = load_pipeline(args).to(choose_device(args.device))
    set_null_label(pipeline, args.null_label)
    if pipeline.is_points and args.mixed_precision != "no":
        raise ConfigurationError("points need --mixed_precision no: lower precision makes their embedding inexact")
    data = load_data(args, pipeline) if args.data_free is None else _own_samples(args, pipeline)
    names = ("steps", "batch_size", "seed", "guidance_scale", "mixed_precision")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    defaults = FittingArguments.of_points if pipeline.is_points else FittingArguments.of_images
    fitting = defaults(**options)
    state_path = args.output.with_name(f"{args.output.name}.partial.json")
    begun = time.monotonic()
    fitter = TableFitter(pipeline, data, make_features(args.features, pipeline, data), fitting, state_path)
    with progress_bar(total=fitting.steps * len(set(args.num_calls)), desc="fitting") as progress:
        tables = fitter.fit(args.num_calls, progress.update)
    seconds = time.monotonic() - begun

    candidates = stock_candidates(pipeline, args.checkpoint, list(tables), args.guidance_scale)
    for calls, table in tables.items():
        start = TableParameters.start(calls, fitting, pipeline.scheduler).to_table()
        candidates.append(Candidate("ddim, equal log SNR", start, args.checkpoint))
        candidates.append(Candidate("fitted", table, args.checkpoint, shown=True))
    report = measure(args, pipeline, data, fitter.target.held_out, candidates, args.null_label)
    _write(args, pipeline, fitter, report, seconds)
    state_path.unlink(missing_ok=True)
    print(f"{args.checkpoint} on {args.dataset or 'its own samples'}: {report.title}")
    print(report)
    sizes = ", ".join(f"{table.num_numbers} numbers for {len(table)} calls" for table in tables.values())
    print(f"fitted in {seconds:.0f} s: {sizes}")


def _write(args: Namespace, pipeline: DDPMMLPPipeline, fitter: TableFitter, report: Report, seconds: float) -> None:
    """Write the checkpoint with its tables, the figures and the report."""
    with whole_folder(args.output, is_own, args.overwrite) as folder:
        report.draw(folder, list(fitter.tables.values()), pipeline)
        play(pipeline, [fitter.tables[number] for number in args.num_calls])
        pipeline.save_pretrained(folder)
        content = {
            "checkpoint": args.checkpoint.resolve().name,
            "dataset": args.dataset,
            "num_calls": list(fitter.tables),
            "seconds": round(seconds, 1),
            "options": dataclasses.asdict(fitter.args),
            "log": fitter.log,
        }
        (folder / "fit.json").write_text(json.dumps(content | report.to_dict(), indent=2), encoding="utf-8")


def make_parser() -> CommandParser:
    parser = CommandParser(prog="ddpm-fit", description=__doc__)
    parser.add_checkpoint("checkpoint")
    parser.add_argument(
        "output", type=Path, help="the checkpoint folder to write, with a scheduler that plays the tables"
    )
    default = f"number of samples to fit to (default: {NUM_FIT_POINTS} points, all images)"
    add_data_options(parser, default, "train", required=False)
    parser.add_count(
        "--data_free", "fit to N samples of the checkpoint's own DDPM, drawn once and kept, and not to data"
    )
    parser.add_count(
        "--num_calls", "network calls of the tables; the first is the default of the output", nargs="+", default=[6]
    )
    parser.add_argument("--label_column", help="the data's column of labels (default: the one of training)")
    parser.add_count("--steps", "optimiser steps for each table (default: 400 for points, 100 for images)")
    parser.add_count("--batch_size", "samples of each step (default: 1,024 points, 96 images)")
    parser.add_argument("--seed", type=noise_seed, default=0, help="seed of the fit (default: 0)")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        metavar="W",
        help="guide by labels and conditions with this scale in the mean; how it differs between the calls is fitted",
    )
    parser.add_argument(
        "--null_label", type=int, metavar="N", help='the class by which a stock UNet2DModel knows "none"'
    )
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16"], default="no", help="of images' networks (default: no)"
    )
    parser.add_argument(
        "--features",
        help="a feature network's folder to fit on (default: coordinates, or the network's own activations)",
    )
    parser.add_argument("--judge", metavar="FEATURES", help="features that the report compares images on")
    add_device(parser)
    add_overwrite(parser)
    return parser


def _own_samples(args: Namespace, pipeline: DDPMMLPPipeline) -> TensorBatches:
    """Return samples of the checkpoint's own DDPM, in the shares of its classes, and keep them beside the output."""
    if pipeline.condition_columns:
        raise ConfigurationError("--data_free doesn't know which conditions are likely: name data with --dataset")
    path, number = args.output.with_name(f"{args.output.name}.samples.npz"), args.data_free
    sha256, _ = fingerprint(pipeline)
    labels = None
    if pipeline.num_classes:
        shares = pipeline.config.class_shares or [1 / pipeline.num_classes] * pipeline.num_classes
        labels = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(number) + 0.5) / number)
    if path.exists():
        kept = np.load(path)
        if set(kept.files) != {"sha256", "samples"} or str(kept["sha256"]) != sha256 or len(kept["samples"]) != number:
            raise ConfigurationError(f"{path} holds other samples: delete it")
        samples = kept["samples"]
    else:
        sampler = CheckpointSampler(args.checkpoint, "ddpm", device=args.device)
        with sampling_bar(number * len(sampler)) as progress:
            asked = Asked() if labels is None else Asked(class_labels=labels.tolist())
            samples = np.concatenate([*sampler.batches(number, 0, CHUNK, progress.update, **asked)])
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, sha256=sha256, samples=samples)
    if pipeline.is_points:
        x_0 = normalize(samples, pipeline.config.data_mean, pipeline.config.data_std)
    else:
        x_0 = torch.from_numpy(samples).permute(0, 3, 1, 2) * 2 - 1
    return TensorBatches(x_0, None if labels is None else torch.from_numpy(labels))


if __name__ == "__main__":
    main()
