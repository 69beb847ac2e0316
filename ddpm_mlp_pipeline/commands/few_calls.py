"""What ddpm-fit and ddpm-tune share: their data, their features and their report."""

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
from ..data.batches import Batch, TensorBatches
from ..data.images import HELD_OUT_SPLITS, choose_split
from ..data.normalized import load_normalized
from ..data.points import POINT_SETS
from ..errors import ConfigurationError
from ..export.compile import compile_by_name
from ..export.exporter import DEFAULT_OF_IMAGES, DEFAULT_OF_POINTS, export_bundle
from ..judge.features import FeatureNetwork, load_features
from ..judge.few_calls import TableJudge, TableRow, nearest
from ..judge.metrics import choose_features
from ..loading import load_checkpoint
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import StepTable
from ..table_scheduler import StepTableScheduler
from ..training.fit_features import FitFeatures, NetworkFeatures, PointFeatures, Preprocessed
from .parser import leaving_out

FIGURES = ("tables.png", "samples.png", "nearest.png")
NUM_FIT_POINTS = 100_000
NUM_POINTS, NUM_IMAGES = 5_000, 2_000  # of the report
POINT_REPEATS = 3
DATA_SEED = 1000  # of the report's points; the fit's have seed 0
STOCK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddim", {}),
    ("dpmsolver_multistep", {"algorithm_type": "sde-dpmsolver++"}),
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A sampler to measure: a table, played with the weights of a checkpoint. Samples of `shown` ones are drawn."""

    name: str
    table: StepTable
    checkpoint: Path
    shown: bool = False


@dataclasses.dataclass
class Report:
    """What was measured of some candidates.

    Attributes:
        title: what the distances are of.
        rows: the measurements, real data first.
        pictures: samples by title.
        neighbours: images of the last candidate shown, and the training images that they are closest to.
        nearest: median root mean square differences to the nearest training image.
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
        """Return the numbers, for a .json file."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "nearest": self.nearest}

    def draw(self, folder: Path, tables: Sequence[StepTable], pipeline: DDPMMLPPipeline) -> None:
        """Write the figures, and replace earlier ones."""
        drawn = {
            "tables.png": figures.plot_fits(tables, pipeline.scheduler),
            "samples.png": figures.plot_panels(self.pictures),
        }
        if self.neighbours is not None:
            drawn["nearest.png"] = figures.plot_panels(self.neighbours, 2)
        for name, figure in drawn.items():
            figures.save(figure, folder / name, overwrite=True)


def load_data(args: Any, pipeline: DDPMMLPPipeline) -> TensorBatches:
    """Load the data that `--dataset` and the options beside it name."""
    with leaving_out(args.skip_corrupt) as on_corrupt:
        number = args.num_samples or (NUM_FIT_POINTS if pipeline.is_points else None)
        form = _form(args)
        return load_normalized(
            pipeline, args.dataset, number, split=args.split or "train", **form, on_corrupt=on_corrupt
        )


def make_features(features: str | None, pipeline: DDPMMLPPipeline) -> FitFeatures:
    """Return what samples are compared on: by default coordinates, or the activations of the pipeline's network."""
    if pipeline.is_points:
        if features is not None:
            raise ConfigurationError("--features are for images: points are fitted by their coordinates")
        return PointFeatures(pipeline.num_classes)
    if features is None:
        return NetworkFeatures(pipeline)
    network = load_features(features)
    if not isinstance(network, FeatureNetwork):
        raise ConfigurationError("--features must be the folder of a network that train_features.py wrote")
    return Preprocessed(network.requires_grad_(False).embed)


def stock_candidates(pipeline: DDPMMLPPipeline, checkpoint: Path, num_calls: Sequence[int]) -> list[Candidate]:
    """Return the default sampler without a table, and some stock schedulers with few calls."""
    trained_with = pipeline.scheduler
    name, steps, options = DEFAULT_OF_POINTS if pipeline.is_points else DEFAULT_OF_IMAGES
    steps = min(steps, trained_with.config.num_train_timesteps)
    found = [Candidate(f"default: {name}", compile_by_name(name, trained_with, steps, options), checkpoint)]
    for calls in num_calls:
        found += [
            Candidate(name, compile_by_name(name, trained_with, calls, opts), checkpoint) for name, opts in STOCK
        ]
    return found


def measure(
    args: Any,
    pipeline: DDPMMLPPipeline,
    data: TensorBatches,
    held_out: Sequence[int],
    candidates: Sequence[Candidate],
) -> Report:
    """Measure candidates on data and features that no table was fitted to.

    Args:
        args: the command's options.
        pipeline: the pipeline, for its units.
        data: the training data, of which the fit has not used those of the indices `held_out`.
        candidates: what to measure.
    """
    references, fresh, title, network = _references(args, pipeline, data, list(held_out))
    number = min(len(references[0].x_0), NUM_POINTS if pipeline.is_points else NUM_IMAGES)
    num_shown = figures.NUM_POINTS if pipeline.is_points else figures.NUM_IMAGES
    T = pipeline.scheduler.config.num_train_timesteps
    with tempfile.TemporaryDirectory() as folder:
        samplers: dict[Path, OnnxSampler] = {}
        for checkpoint in dict.fromkeys(candidate.checkpoint for candidate in candidates):
            bundle = Path(folder) / str(len(samplers))
            has_table = isinstance(load_checkpoint(checkpoint).scheduler, StepTableScheduler)
            export_bundle(checkpoint, bundle, *(() if has_table else ("ddpm", min(10, T))))
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
                    title_shown = f"{candidate.name}, {calls} call{'s' if calls > 1 else ''}"
                    pictures[title_shown] = figures.to_show(pipeline, judge.draw(references[0], num_shown, 0))
        report = Report(title, rows, pictures)
        if not pipeline.is_points:
            _add_nearest(report, judge, references[0], data, pipeline)
    return report


def _form(args: Any) -> dict[str, Any]:
    return {"fit": args.fit, "noise": args.dataset_noise}


def _references(
    args: Any, pipeline: DDPMMLPPipeline, data: TensorBatches, held_out: list[int]
) -> tuple[list[Batch], list[Batch], str, Any]:
    """Return references and as many fresh data for each seed, a title, and the features that they are compared on.

    Where there are no other data, the held-out part, by which a fit has chosen the best table, is cut in halves.
    """
    has_others = args.dataset in POINT_SETS if pipeline.is_points else args.dataset is not None
    if not has_others:
        half, seeds = len(held_out) // 2, range(POINT_REPEATS if pipeline.is_points else 1)
        orders = [np.random.default_rng(seed).permutation(held_out) for seed in seeds]
        references = [data.__getitems__(order[:half].tolist()) for order in orders]
        fresh = [data.__getitems__(order[half : 2 * half].tolist()) for order in orders]
        if pipeline.is_points:
            return references, fresh, "sliced Wasserstein distance", None
        features, network = choose_features(args.judge, pipeline.sample_shape[0], half)
        return references, fresh, f"Fréchet distance on {features}", network
    if pipeline.is_points:
        seeds = range(DATA_SEED, DATA_SEED + POINT_REPEATS)
        both = [load_normalized(pipeline, args.dataset, 2 * NUM_POINTS, seed=seed, **_form(args)) for seed in seeds]
        references = [points.__getitems__(list(range(NUM_POINTS))) for points in both]
        fresh = [points.__getitems__(list(range(NUM_POINTS, 2 * NUM_POINTS))) for points in both]
        return references, fresh, "sliced Wasserstein distance", None
    split = choose_split(args.dataset, HELD_OUT_SPLITS)
    with leaving_out(args.skip_corrupt) as on_corrupt:
        test = load_normalized(pipeline, args.dataset, None, split=split, **_form(args), on_corrupt=on_corrupt)
    number = min(NUM_IMAGES, len(test))
    features, network = choose_features(args.judge, pipeline.sample_shape[0], number, len(test))
    fresh = [data.__getitems__(held_out[:number])]
    shuffled = torch.randperm(len(test), generator=torch.Generator().manual_seed(DATA_SEED)).tolist()
    references = [test.__getitems__(shuffled)]
    title = f"Fréchet distance to {len(test):,} images of the split {split!r}, on {features}"
    return references, fresh, title, network


def _add_nearest(
    report: Report, judge: TableJudge, references: Batch, data: TensorBatches, pipeline: DDPMMLPPipeline
) -> None:
    """Find the training images that samples of the last candidate are closest to, and real images, too."""
    train = data.__getitems__(list(range(len(data)))).x_0
    shown = judge.draw(references, figures.NUM_IMAGES, 1)
    indices, distances = nearest(shown, train)
    _, of_data = nearest(references.x_0[: 10 * figures.NUM_IMAGES], train)
    report.nearest = [("samples", float(distances.median())), ("unseen data", float(of_data.median()))]
    report.neighbours = {
        "samples": figures.to_show(pipeline, shown),
        "nearest training images": figures.to_show(pipeline, train[indices]),
    }
