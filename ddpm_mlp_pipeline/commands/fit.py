"""Fit step tables of a few network calls to a checkpoint. Its weights stay as they are."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import check_folder, whole_file, whole_folder
from .parser import CommandParser, add_data_options, add_overwrite, command, command_imports, leaving_out, noise_seed

with command_imports("ddpm-fit", __name__):
    import numpy as np
    import torch
    from tabulate import tabulate

    from .. import figures
    from ..checkpoint_sampler import CheckpointSampler
    from ..data.batches import Batch, TensorBatches
    from ..data.images import HELD_OUT_SPLITS, choose_split
    from ..data.normalized import load_normalized, normalize
    from ..data.points import POINT_SETS
    from ..export.compile import compile_by_name
    from ..export.exporter import DEFAULT_OF_IMAGES, DEFAULT_OF_POINTS, export_bundle
    from ..judge.features import FeatureNetwork, load_features
    from ..judge.few_calls import TableJudge, TableRow, nearest
    from ..judge.metrics import choose_features
    from ..loading import fingerprint, load_checkpoint
    from ..pipeline import DDPMMLPPipeline
    from ..progress import progress_bar, sampling_bar
    from ..runtime.request import Asked
    from ..runtime.sampler import OnnxSampler
    from ..table_scheduler import StepTableScheduler
    from ..training.fit_features import FitFeatures, NetworkFeatures, PointFeatures, Preprocessed
    from ..training.fitting import CHUNK, FittingArguments, TableFitter, TableParameters

FOLDERS = ("unet/", "scheduler/")
FILES = ("model_index.json", "pipeline.py", "fit.json", "tables.png", "samples.png", "nearest.png")
NUM_FIT_POINTS = 100_000
NUM_POINTS, NUM_IMAGES = 5_000, 2_000  # of the report
POINT_REPEATS = 3
DATA_SEED = 1000  # of the report's points; the fit's have seed 0
STOCK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("dpmsolver_multistep", {"algorithm_type": "sde-dpmsolver++"}),
)


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
    pipeline = load_checkpoint(args.checkpoint)
    if args.label_column is not None:
        pipeline.register_to_config(label_column=args.label_column)
    form = {"fit": args.fit, "noise": args.dataset_noise}
    if args.data_free is not None:
        data = _own_samples(args, pipeline)
    else:
        with leaving_out(args.skip_corrupt) as on_corrupt:
            number = args.num_samples or (NUM_FIT_POINTS if pipeline.is_points else None)
            split = args.split or "train"
            data = load_normalized(pipeline, args.dataset, number, split=split, **form, on_corrupt=on_corrupt)
    options = {
        name: getattr(args, name) for name in ("steps", "batch_size", "seed") if getattr(args, name) is not None
    }
    defaults = FittingArguments.of_points if pipeline.is_points else FittingArguments.of_images
    fitting = defaults(**options)
    state_path = args.output.with_name(f"{args.output.name}.partial.json")
    begun = time.monotonic()
    fitter = TableFitter(pipeline, data, _features(args, pipeline), fitting, state_path)
    with progress_bar(total=fitting.steps * len(set(args.num_calls)), desc="fitting") as progress:
        tables = fitter.fit(args.num_calls, progress.update)
    seconds = time.monotonic() - begun

    judged = _judge(args, pipeline, data, fitter, form)
    _write(args, pipeline, fitter, judged, seconds)
    state_path.unlink(missing_ok=True)
    print(f"{args.checkpoint} on {args.dataset or 'its own samples'}: {judged.title}")
    print(_table(judged.rows))
    if judged.nearest:
        print(
            "nearest training image, RMS difference, median: " + ", ".join(f"{k} {v:.3f}" for k, v in judged.nearest)
        )
    sizes = ", ".join(f"{table.num_numbers} numbers for {len(table)} calls" for table in tables.values())
    print(f"fitted in {seconds:.0f} s: {sizes}")


def _write(args: Namespace, pipeline: DDPMMLPPipeline, fitter: TableFitter, judged: _Judged, seconds: float) -> None:
    """Write the checkpoint with its tables, the figures and the report."""
    trained_with, tables = pipeline.scheduler, fitter.tables
    with whole_folder(args.output, is_own, args.overwrite) as folder:
        in_order = [tables[number].to_dict() for number in dict.fromkeys(args.num_calls)]
        pipeline.scheduler = StepTableScheduler.from_config(trained_with.config, tables=in_order)
        pipeline.save_pretrained(folder)
        figures.save(figures.plot_fits(list(tables.values()), trained_with), folder / "tables.png")
        figures.save(figures.plot_panels(judged.pictures), folder / "samples.png")
        if judged.neighbours is not None:
            figures.save(figures.plot_panels(judged.neighbours, 2), folder / "nearest.png")
        report = {
            "checkpoint": args.checkpoint.resolve().name,
            "dataset": args.dataset,
            "num_calls": list(tables),
            "seconds": round(seconds, 1),
            "options": dataclasses.asdict(fitter.args),
            "log": fitter.log,
            "rows": [dataclasses.asdict(row) for row in judged.rows],
            "nearest": judged.nearest,
        }
        (folder / "fit.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


def make_parser() -> CommandParser:
    parser = CommandParser(prog="ddpm-fit", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder")
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
    parser.add_count("--batch_size", "samples of each step (default: 512 points, 96 images)")
    parser.add_argument("--seed", type=noise_seed, default=0, help="seed of the fit (default: 0)")
    parser.add_argument(
        "--features",
        help="a feature network's folder to fit on (default: coordinates, or the network's own activations)",
    )
    parser.add_argument("--judge", metavar="FEATURES", help="features that the report compares images on")
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
        sampler = CheckpointSampler(args.checkpoint, "ddpm")
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


def _features(args: Namespace, pipeline: DDPMMLPPipeline) -> FitFeatures:
    if pipeline.is_points:
        if args.features is not None:
            raise ConfigurationError("--features are for images: points are fitted by their coordinates")
        return PointFeatures(pipeline.num_classes)
    if args.features is None:
        return NetworkFeatures(pipeline)
    network = load_features(args.features)
    if not isinstance(network, FeatureNetwork):
        raise ConfigurationError("--features must be the folder of a network that train_features.py wrote")
    return Preprocessed(network.requires_grad_(False).embed)


@dataclasses.dataclass
class _Judged:
    title: str
    rows: list[TableRow]
    pictures: dict[str, np.ndarray]
    neighbours: dict[str, np.ndarray] | None = None
    nearest: list[tuple[str, float]] | None = None


def _judge(
    args: Namespace,
    pipeline: DDPMMLPPipeline,
    data: TensorBatches,
    fitter: TableFitter,
    form: dict[str, Any],
) -> _Judged:
    """Measure the fitted tables beside stock schedulers, on data and features that the fit has not seen."""
    trained_with = pipeline.scheduler
    references, fresh, title, network = _held_out(args, pipeline, data, fitter, form)
    number = min(len(references[0].x_0), NUM_POINTS if pipeline.is_points else NUM_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(args.checkpoint, bundle, "ddpm", min(10, trained_with.config.num_train_timesteps))
        judge = TableJudge(OnnxSampler(bundle), pipeline, references, network)
        name, steps, options = DEFAULT_OF_POINTS if pipeline.is_points else DEFAULT_OF_IMAGES
        steps = min(steps, trained_with.config.num_train_timesteps)
        candidates = [(f"default: {name}", compile_by_name(name, trained_with, steps, options))]
        for calls, table in fitter.tables.items():
            start = TableParameters.start(calls, fitter.args, trained_with).to_table()
            candidates.append(("ddim, equal log SNR", start))
            for name, options in STOCK:
                candidates.append((name, compile_by_name(name, trained_with, calls, options)))
            candidates.append(("fitted", table))
        rows = [judge.measure_data("real data (floor)", fresh)]
        pictures: dict[str, np.ndarray] = {
            "data": figures.to_show(pipeline, references[0].x_0[: _number_shown(pipeline)])
        }
        with progress_bar(iterable=candidates, desc="measuring") as progress:
            for name, table in progress:
                rows.append(judge.measure(name, table, number))
                if name == "fitted":
                    shown = judge.draw(references[0], _number_shown(pipeline), 0)
                    pictures[f"{len(table)} fitted calls"] = figures.to_show(pipeline, shown)
        judged = _Judged(title, rows, pictures)
        if not pipeline.is_points:
            _add_nearest(judged, judge, references[0], data, pipeline)
    return judged


def _held_out(
    args: Namespace, pipeline: DDPMMLPPipeline, data: TensorBatches, fitter: TableFitter, form: dict[str, Any]
) -> tuple[list[Batch], list[Batch], str, Any]:
    """Return references and as many fresh data for each seed, a title, and the features that they are compared on.

    Where there are no other data, the fit's held-out part, by which it has chosen the best table, is cut in halves.
    """
    has_others = args.dataset in POINT_SETS if pipeline.is_points else args.data_free is None
    if not has_others:
        half, seeds = len(fitter.held_out) // 2, range(POINT_REPEATS if pipeline.is_points else 1)
        orders = [np.random.default_rng(seed).permutation(fitter.held_out) for seed in seeds]
        references = [data.__getitems__(order[:half].tolist()) for order in orders]
        fresh = [data.__getitems__(order[half : 2 * half].tolist()) for order in orders]
        if pipeline.is_points:
            return references, fresh, "sliced Wasserstein distance", None
        features, network = choose_features(args.judge, pipeline.sample_shape[0], half)
        return references, fresh, f"Fréchet distance on {features}", network
    if pipeline.is_points:
        seeds = range(DATA_SEED, DATA_SEED + POINT_REPEATS)
        both = [load_normalized(pipeline, args.dataset, 2 * NUM_POINTS, seed=seed, **form) for seed in seeds]
        references = [points.__getitems__(list(range(NUM_POINTS))) for points in both]
        fresh = [points.__getitems__(list(range(NUM_POINTS, 2 * NUM_POINTS))) for points in both]
        return references, fresh, "sliced Wasserstein distance", None
    split = choose_split(args.dataset, HELD_OUT_SPLITS)
    with leaving_out(args.skip_corrupt) as on_corrupt:
        test = load_normalized(pipeline, args.dataset, None, split=split, **form, on_corrupt=on_corrupt)
    number = min(NUM_IMAGES, len(test))
    features, network = choose_features(args.judge, pipeline.sample_shape[0], number, len(test))
    fresh = [data.__getitems__(fitter.held_out[:number])]
    shuffled = torch.randperm(len(test), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    references = [test.__getitems__(shuffled)]
    title = f"Fréchet distance to {len(test):,} images of the split {split!r}, on {features}"
    return references, fresh, title, network


def _number_shown(pipeline: DDPMMLPPipeline) -> int:
    return figures.NUM_POINTS if pipeline.is_points else figures.NUM_IMAGES


def _add_nearest(
    judged: _Judged, judge: TableJudge, references: Batch, data: TensorBatches, pipeline: DDPMMLPPipeline
) -> None:
    """Find the training images that samples of the last table measured are closest to, and real images, too."""
    train = data.__getitems__(list(range(len(data)))).x_0
    shown = judge.draw(references, figures.NUM_IMAGES, 1)
    indices, distances = nearest(shown, train)
    _, of_data = nearest(references.x_0[: 10 * figures.NUM_IMAGES], train)
    judged.nearest = [("samples", float(distances.median())), ("unseen data", float(of_data.median()))]
    judged.neighbours = {
        "samples": figures.to_show(pipeline, shown),
        "nearest training images": figures.to_show(pipeline, train[indices]),
    }


def _table(rows: Sequence[TableRow]) -> str:
    floor = rows[0].distance
    headers = ["", "calls", "distance", "÷ floor", "precision", "recall"]
    cells = [[row.name, row.calls, row.distance, row.distance / floor, row.precision, row.recall] for row in rows]
    if rows[0].precision is None:
        headers, cells = headers[:4], [row[:4] for row in cells]
    return tabulate(cells, headers, "plain", floatfmt=("", "", ".4g", ".2f", ".3f", ".3f"))


if __name__ == "__main__":
    main()
