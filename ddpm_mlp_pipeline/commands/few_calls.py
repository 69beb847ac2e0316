"""Shared parts of ddpm-fit and ddpm-tune: data, features and report."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from .. import figures
from ..data.batches import Batch, KnownBatches, TensorBatches
from ..data.images import HELD_OUT_SPLITS, choose_split
from ..data.normalized import load_normalized
from ..data.points import POINT_SETS
from ..errors import ConfigurationError
from ..export.compile import compile_by_name
from ..export.exporter import DEFAULT_OF_IMAGES, DEFAULT_OF_POINTS, export_bundle
from ..judge.features import FeatureNetwork, load_features
from ..judge.few_calls import TableJudge, TableRow, nearest
from ..judge.metrics import choose_features
from ..judge.sources import DATA_SEED
from ..loading import load_checkpoint
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler
from ..training.fit_features import FitFeatures, Preprocessed, default_features
from .parser import leaving_out

FIGURES = ("tables.png", "samples.png", "nearest.png")
NUM_FIT_POINTS = 100_000
NUM_POINTS, NUM_IMAGES = 5_000, 2_000  # samples of each measurement
POINT_REPEATS = 3  # measurements of points, whose mean is reported
STOCK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("dpmsolver_multistep", {"algorithm_type": "sde-dpmsolver++"}),
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A sampler to measure: a step table with a checkpoint's weights. If `shown`, a figure shows its samples."""

    name: str
    table: StepTable
    checkpoint: Path
    shown: bool = False


@dataclasses.dataclass
class Report:
    """Measurements of some candidates.

    Attributes:
        title: name of the distance.
        rows: the measurements, those of real data first.
        pictures: samples to show, by title.
        neighbours: images of the last candidate and the training images nearest to them, by title.
        nearest: median RMS difference to the nearest training image, with the images' name.
    """

    title: str
    rows: list[TableRow]
    pictures: dict[str, np.ndarray]
    neighbours: dict[str, np.ndarray] | None = None
    nearest: list[tuple[str, float]] | None = None

    def __str__(self) -> str:
        floor = self.rows[0].distance
        headers = ["", "calls", "distance", "÷ floor", "precision", "recall"]
        cells = [
            [row.name, row.calls, row.distance, row.distance / floor, row.precision, row.recall] for row in self.rows
        ]
        if self.rows[0].precision is None:
            headers, cells = headers[:4], [row[:4] for row in cells]
        lines = [tabulate(cells, headers, "plain", floatfmt=("", "", ".4g", ".2f", ".3f", ".3f"))]
        if self.nearest:
            distances = ", ".join(f"{name} {value:.3f}" for name, value in self.nearest)
            lines.append(f"nearest training image, RMS difference, median: {distances}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON-compatible values."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "nearest": self.nearest}

    def draw(self, folder: Path, tables: Sequence[StepTable], pipeline: DDPMMLPPipeline) -> None:
        """Write the figures to a folder, and replace earlier ones."""
        drawn = {
            "tables.png": figures.plot_fits(tables, pipeline.scheduler),
            "samples.png": figures.plot_panels(self.pictures),
        }
        if self.neighbours is not None:
            drawn["nearest.png"] = figures.plot_panels(self.neighbours, 2)
        for name, figure in drawn.items():
            figures.save(figure, folder / name, overwrite=True)


def load_pipeline(args: Any) -> DDPMMLPPipeline:
    """Load the checkpoint, which knows the data's column of labels from its training or from `--label_column`."""
    pipeline = load_checkpoint(args.checkpoint)
    if args.label_column is not None:
        pipeline.register_to_config(label_column=args.label_column)
    return pipeline


def load_data(args: Any, pipeline: DDPMMLPPipeline) -> TensorBatches:
    """Load the data set that the command's options name."""
    number = args.num_samples or (NUM_FIT_POINTS if pipeline.is_points else None)
    return _load(args, pipeline, number, split=args.split or "train")


def make_features(features: str | None, pipeline: DDPMMLPPipeline, data: KnownBatches) -> FitFeatures:
    """Return the features to compare samples on: by default coordinates, or the network's activations for images."""
    if features is None:
        return default_features(pipeline, data)
    if pipeline.is_points:
        raise ConfigurationError("--features are for images: points are fitted by their coordinates")
    network = load_features(features)
    if not isinstance(network, FeatureNetwork):
        raise ConfigurationError("--features must be the folder of a network that train_features.py wrote")
    return Preprocessed(network.to(pipeline.device).requires_grad_(False).embed)


def stock_candidates(
    pipeline: DDPMMLPPipeline, checkpoint: Path, num_calls: Sequence[int], guidance_scale: float | None = None
) -> list[Candidate]:
    """Return the exporter's default sampler, and stock schedulers with few calls, with guidance if there is any."""
    trained_with = pipeline.scheduler
    name, steps, options = DEFAULT_OF_POINTS if pipeline.is_points else DEFAULT_OF_IMAGES
    steps = min(steps, trained_with.config.num_train_timesteps)
    found = [Candidate(f"default: {name}", compile_by_name(name, trained_with, steps, options), checkpoint)]
    for calls in num_calls:
        found += [
            Candidate(name, compile_by_name(name, trained_with, calls, opts), checkpoint) for name, opts in STOCK
        ]
    if guidance_scale is None:
        return found
    return [dataclasses.replace(stock, table=stock.table.guided(guidance_scale)) for stock in found]


def measure(
    args: Any,
    pipeline: DDPMMLPPipeline,
    data: TensorBatches,
    held_out: list[int],
    candidates: Sequence[Candidate],
    null_label: int | None = None,
) -> Report:
    """Measure candidates on data that no table was fitted to.

    Args:
        args: the command's options.
        pipeline: the pipeline, for its units.
        data: the training data.
        held_out: indices of the data that were not fitted to.
        candidates: the samplers to measure.
        null_label: the class that a stock network takes for "no label".
    """
    references, fresh, title, network = _references(args, pipeline, data, held_out)
    number = min(len(references[0].x_0), NUM_POINTS if pipeline.is_points else NUM_IMAGES)
    num_shown = figures.NUM_POINTS if pipeline.is_points else figures.NUM_IMAGES
    T = pipeline.scheduler.config.num_train_timesteps
    with tempfile.TemporaryDirectory() as folder:
        samplers: dict[Path, OnnxSampler] = {}
        for checkpoint in dict.fromkeys(candidate.checkpoint for candidate in candidates):
            bundle = Path(folder) / str(len(samplers))
            has_table = isinstance(load_checkpoint(checkpoint).scheduler, StepTableScheduler)
            scheduler, steps = (None, None) if has_table else ("ddpm", min(10, T))
            export_bundle(checkpoint, bundle, scheduler, steps, null_label=null_label)
            samplers[checkpoint] = OnnxSampler(bundle)
        judge = TableJudge(pipeline, references, network)
        rows = [judge.measure_data("real data (floor)", fresh)]
        pictures = {"data": figures.to_show(pipeline, references[0].x_0[:num_shown])}
        with progress_bar(iterable=candidates, desc="measuring") as progress:
            for candidate in progress:
                judge.play(samplers[candidate.checkpoint], candidate.table)
                rows.append(judge.measure(candidate.name, number))
                if candidate.shown:
                    calls = len(candidate.table)
                    name = f"{candidate.name}, {calls} call{'s' if calls > 1 else ''}"
                    pictures[name] = figures.to_show(pipeline, judge.draw(references[0], num_shown, 0))
        report = Report(title, rows, pictures)
        if not pipeline.is_points:
            _add_nearest(report, judge, references[0], data, pipeline)
    return report


def _load(args: Any, pipeline: DDPMMLPPipeline, number: int | None, **options: Any) -> TensorBatches:
    with leaving_out(args.skip_corrupt) as on_corrupt:
        form = {"fit": args.fit, "noise": args.dataset_noise, "on_corrupt": on_corrupt}
        return load_normalized(pipeline, args.dataset, number, **form, **options)


def _references(
    args: Any, pipeline: DDPMMLPPipeline, data: TensorBatches, held_out: list[int]
) -> tuple[list[Batch], list[Batch], str, Any]:
    """Return reference data and fresh data for each measurement, the distance's name, and the feature network.

    If there are no other data, each half of the held-out part serves as one of them.
    """
    halves: list[tuple[Batch, Batch]]
    to, repeats = "", range(POINT_REPEATS if pipeline.is_points else 1)
    if args.dataset is None or (pipeline.is_points and args.dataset not in POINT_SETS):
        orders = [np.random.default_rng(seed).permutation(held_out) for seed in repeats]
        halves = [_halves(data, order.tolist()) for order in orders]
    elif pipeline.is_points:
        both = [_load(args, pipeline, 2 * NUM_POINTS, seed=DATA_SEED + seed) for seed in repeats]
        halves = [_halves(points, list(range(2 * NUM_POINTS))) for points in both]
    else:
        split = choose_split(args.dataset, HELD_OUT_SPLITS)
        test = _load(args, pipeline, None, split=split)
        shuffled = torch.randperm(len(test), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
        number = min(NUM_IMAGES, len(test))
        halves = [(test.__getitems__(shuffled), data.__getitems__(held_out[:number]))]
        to = f" to {len(test):,} images of the split {split!r},"
    references, fresh = map(list, zip(*halves, strict=True))
    if pipeline.is_points:
        return references, fresh, "sliced Wasserstein distance", None
    features, network = choose_features(
        args.judge, pipeline.sample_shape[0], len(fresh[0].x_0), len(references[0].x_0)
    )
    return references, fresh, f"Fréchet distance{to} on {features}", network


def _halves(data: TensorBatches, indices: list[int]) -> tuple[Batch, Batch]:
    half = len(indices) // 2
    return data.__getitems__(indices[:half]), data.__getitems__(indices[half : 2 * half])


def _add_nearest(
    report: Report, judge: TableJudge, references: Batch, data: TensorBatches, pipeline: DDPMMLPPipeline
) -> None:
    """Find the training images nearest to samples of the last candidate, and to real images."""
    train = data.__getitems__(list(range(len(data)))).x_0
    shown = judge.draw(references, figures.NUM_IMAGES, 1)
    indices, distances = nearest(shown, train)
    _, of_data = nearest(references.x_0[: 10 * figures.NUM_IMAGES], train)
    report.nearest = [("samples", float(distances.median())), ("unseen data", float(of_data.median()))]
    report.neighbours = {
        "samples": figures.to_show(pipeline, shown),
        "nearest training images": figures.to_show(pipeline, train[indices]),
    }
