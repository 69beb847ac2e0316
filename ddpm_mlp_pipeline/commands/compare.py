"""Compare schedulers and numbers of steps on a checkpoint, by sample quality and sampling time."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, DivergenceError, UnsupportedSchedulerError
from ..export.schedulers import scheduler_option
from ..files import check_file, whole_file
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import StepTable
from .parser import (
    FEATURES_HELP,
    CommandParser,
    add_data_options,
    add_overwrite,
    add_provider,
    command,
    command_imports,
    leaving_out,
)

with command_imports("ddpm-compare", __name__):
    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from matplotlib.figure import Figure
    from tabulate import tabulate

    from .. import figures
    from ..data.images import HELD_OUT_SPLITS, choose_split, count_images, load_images
    from ..data.normalized import load_normalized, normalize
    from ..export.compile import compile_by_name, compile_scheduler
    from ..export.exporter import export_bundle
    from ..judge.features import PIXELS
    from ..judge.metrics import (
        choose_features,
        frechet_distance,
        image_features,
        sliced_wasserstein_distance,
        squared_energy_distance,
        to_uint8,
    )
    from ..judge.sources import DATA_SEED, NUM_IMAGES, NUM_POINTS
    from ..loading import fingerprint, load_checkpoint
    from ..pipeline import DDPMMLPPipeline
    from ..table_scheduler import StepTableScheduler
    from ..training.processes import share_out, this_process


STEPS = (10, 20, 30, 50)
SAMPLERS = (
    "ddpm",
    "ddim",
    "dpmsolver_multistep",
    "dpmsolver_multistep:algorithm_type=sde-dpmsolver++",
    "unipc",
    "deis",
    "euler_ancestral",
    "sasolver",
)
REQUIRED_KEYS = {"scheduler", "num_inference_steps", "num_samples"}
MAX_PIXEL_REFERENCES = 2000  # all pairs are compared
LABELS = {
    "frechet_distance": "Fréchet distance",
    "energy_distance": "squared energy distance",
    "sliced_wasserstein_distance": "sliced Wasserstein distance",
}
REPEATS = 5


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _make_parser().parse_args(argv)
    if args.figure is not None:
        check_file(args.figure, args.overwrite)
    process, known = this_process(), _read(args.output)
    if process.is_main_process:
        _write(known, args.output)  # fails before the work if the file can't be written
    pipeline = load_checkpoint(args.checkpoint)
    yardstick = _for_points(args, pipeline) if pipeline.is_points else _for_images(args, pipeline)
    tables, measure = _compile_all(args, pipeline.scheduler), yardstick.measure
    sha256, scheduler_config = fingerprint(pipeline, **yardstick.identity)
    run = {
        "checkpoint": str(args.checkpoint),
        "sha256": sha256,  # of network, data and features: the paths may hold others later
        "trained_with": json.loads(json.dumps(scheduler_config, default=list)),
        "dataset": args.dataset,
        "num_samples": yardstick.num_samples,
        **yardstick.run,
    }
    process.print(f"{LABELS[measure]} to {yardstick.title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export_bundle(args.checkpoint, bundle, "ddpm", min(10, pipeline.scheduler.config.num_train_timesteps))
        threads = torch.get_num_threads() if process.num_processes > 1 else None
        sampler, rows = OnnxSampler(bundle, threads, args.provider or "cpu"), []
        for (scheduler, num_inference_steps), table in tables.items():
            sampler.table = table
            row = run | {"scheduler": scheduler, "num_inference_steps": num_inference_steps}
            row["network_calls"] = len(table)
            before = next((other for other in known if row.items() <= other.items()), None)
            if before is None:
                try:
                    row[measure] = yardstick.distance(sampler)
                except DivergenceError as error:
                    process.print(f"{scheduler}, {num_inference_steps} steps: {error}", flush=True)
                    continue
                known.append(row)
                if process.is_main_process:
                    _write(known, args.output)
            else:
                row = before
            if not process.is_main_process:  # which only draws its share
                continue
            row["ms_per_sample"] = {str(size): _milliseconds(sampler, size) for size in yardstick.batch_sizes}
            rows.append(row)
            print(f"{scheduler}, {num_inference_steps} steps: {row[measure]:.4g}", flush=True)
    if not process.is_main_process:
        return
    _write(known, args.output)
    if not rows:
        raise DivergenceError(f"no scheduler gives finite samples of {args.checkpoint}: train it longer")
    print(_table(rows, measure))
    if args.figure is not None:
        _draw(rows, args.figure, measure, args.overwrite)


@dataclasses.dataclass(frozen=True)
class _Yardstick:
    """What samples are compared with.

    Attributes:
        measure: a key of `LABELS`.
        title: the references in words.
        distance: draws samples and returns their distance to the references.
        num_samples: number of samples that it draws.
        batch_sizes: to measure the time with; samples are drawn in batches of the last.
        run: what identifies the comparison beside the data.
        identity: arrays that identify data and features.
    """

    measure: str
    title: str
    distance: Callable[[OnnxSampler], float]
    num_samples: int
    batch_sizes: tuple[int, int]
    run: dict[str, Any]
    identity: dict[str, Any]


def _for_images(args: argparse.Namespace, pipeline: DDPMMLPPipeline) -> _Yardstick:
    channels, height, width = pipeline.sample_shape
    split, number = args.split or choose_split(args.dataset, HELD_OUT_SPLITS), args.num_samples or NUM_IMAGES
    features, network = choose_features(args.features, channels, number, count_images(args.dataset, split))
    measure, between, num_references, batch_sizes = "frechet_distance", frechet_distance, None, (1, 64)
    if features == PIXELS:
        measure, between, num_references = "energy_distance", squared_energy_distance, MAX_PIXEL_REFERENCES
    with leaving_out(args.skip_corrupt) as on_corrupt:
        form = args.dataset, split, (height, width), args.fit, channels, num_references
        images = load_images(*form, on_corrupt=on_corrupt)
    references = image_features([images], network)

    def distance(sampler: OnnxSampler) -> float:
        batches = map(to_uint8, _draw_shared(sampler, number, batch_sizes[-1]))
        return between(image_features(batches, network), references)

    title = f"{len(images):,} images of {args.dataset}, split {split!r}, on {features}"
    run = {"split": split, "features": str(features)}
    identity = {"images": images, **network.state_dict()}
    return _Yardstick(measure, title, distance, number, batch_sizes, run, identity)


def _for_points(args: argparse.Namespace, pipeline: DDPMMLPPipeline) -> _Yardstick:
    if args.features is not None or args.split is not None:
        raise ConfigurationError("--features and --split are for images")
    if pipeline.condition_columns:
        raise ConfigurationError("ddpm-compare doesn't know which conditions to ask for: use ddpm-evaluate")
    number, batch_sizes = args.num_samples or NUM_POINTS, (1, 1000)
    points = load_normalized(pipeline, args.dataset, number, seed=DATA_SEED, noise=args.dataset_noise).samples

    def distance(sampler: OnnxSampler) -> float:
        drawn = np.concatenate([*_draw_shared(sampler, number, batch_sizes[-1])])
        samples = normalize(drawn, pipeline.config.data_mean, pipeline.config.data_std)
        return sliced_wasserstein_distance(samples.numpy(), points.numpy())

    title = f"{len(points):,} points of {args.dataset}"
    return _Yardstick("sliced_wasserstein_distance", title, distance, number, batch_sizes, {}, {"points": points})


def _draw_shared(sampler: OnnxSampler, number: int, size: int) -> Iterator[np.ndarray]:
    """Draw a share in each process that `accelerate launch` has started, and yield all batches in each, in order."""
    batches = [range(i, min(i + size, number)) for i in range(0, number, size)]
    for _, drawn in share_out(batches, lambda batch, _: sampler.sample(batch, 0, size)):
        yield from drawn


def _make_parser() -> CommandParser:
    parser = CommandParser(prog="ddpm-compare", description=__doc__)
    parser.add_checkpoint("checkpoint")
    number = f"(default: {NUM_POINTS} points, {NUM_IMAGES} images)"
    add_data_options(parser, number, "test, or train if there is none")
    parser.add_argument(
        "--schedulers",
        type=_scheduler,
        nargs="+",
        default=[_scheduler(text) for text in SAMPLERS],
        metavar="NAME[:OPTION=VALUE,…]",
        help=f"schedulers and their options (default: {' '.join(SAMPLERS)})",
    )
    parser.add_count("--num_inference_steps", f"(default: {' '.join(map(str, STEPS))})", nargs="+", default=STEPS)
    parser.add_argument("--features", help=FEATURES_HELP)
    parser.add_argument(
        "--output", type=Path, required=True, help="a .json file; distances already in it are not measured again"
    )
    parser.add_argument("--figure", type=Path, help="a .png file for distance by time")
    add_provider(parser)
    add_overwrite(parser)
    return parser


def _scheduler(text: str) -> tuple[str, str, dict[str, Any]]:
    """Parse `NAME[:OPTION=VALUE,…]`, as an argparse type; return the text, the name and the options."""
    name, _, options = text.partition(":")
    return text, name, dict(scheduler_option(option) for option in options.split(",") if option)


def _compile_all(args: argparse.Namespace, trained_with: SchedulerMixin) -> dict[tuple[str, int], StepTable]:
    """Compile each scheduler for each number of steps; print an error for each that can't be compiled.

    The checkpoint's own fitted tables come first.
    """
    tables: dict[tuple[str, int], StepTable] = {}
    if isinstance(trained_with, StepTableScheduler):
        tables = {("fitted", number): compile_scheduler(trained_with, number) for number in trained_with.tables}
    for (text, name, options), steps in itertools.product(args.schedulers, args.num_inference_steps):
        try:
            tables[text, steps] = compile_by_name(name, trained_with, steps, options)
        except UnsupportedSchedulerError as error:
            this_process().print(error)
    if not tables:
        raise ConfigurationError("no scheduler can be compiled: name others with --schedulers")
    return tables


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that an earlier run measured."""
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not all(row.keys() >= REQUIRED_KEYS for row in rows):
            raise ValueError
        return [row for row in rows if math.isfinite(next(row[measure] for measure in LABELS if measure in row))]
    except (ValueError, AttributeError, StopIteration, TypeError, RecursionError):
        raise ConfigurationError(f"{path} does not hold what ddpm-compare writes: name another file") from None


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    with whole_file(path, overwrite=True) as temporary:  # _read has checked its content
        temporary.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def _milliseconds(sampler: OnnxSampler, size: int) -> float:
    """Return the median time per image, in milliseconds, of sampling a batch of `size`."""
    seconds = timeit.repeat(lambda: sampler.sample(size, batch_size=size), number=1, repeat=REPEATS)
    return 1000 * float(np.median(seconds)) / size


def _table(rows: list[dict[str, Any]], measure: str) -> str:
    headers = ("", "steps", "calls", "distance", *(f"ms, batch {size}" for size in rows[0]["ms_per_sample"]))
    columns = ("scheduler", "num_inference_steps", "network_calls", measure)
    best_first = sorted(rows, key=lambda row: row[measure])
    cells = [[*(row[column] for column in columns), *row["ms_per_sample"].values()] for row in best_first]
    return tabulate(cells, headers, "plain", floatfmt=("", "", "", ".4g", ".3g", ".3g"))


def _draw(rows: list[dict[str, Any]], path: Path, measure: str, overwrite: bool) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    *_, size = rows[0]["ms_per_sample"]
    for scheduler in dict.fromkeys(row["scheduler"] for row in rows):
        own_rows = sorted((row for row in rows if row["scheduler"] == scheduler), key=lambda row: row["network_calls"])
        times, distances = zip(*((row["ms_per_sample"][size], row[measure]) for row in own_rows), strict=True)
        (line,) = axes.plot(times, distances, marker="o", markersize=4, label=scheduler)
        for row, *point in zip(own_rows, times, distances, strict=True):
            calls, style = str(row["network_calls"]), {"size": 6, "color": line.get_color()}
            axes.annotate(calls, point, (3, 3), textcoords="offset points", **style)
    axes.set(xscale="log", xlabel=f"ms per sample, batch {size}", ylabel=LABELS[measure])
    if all(row[measure] > 0 for row in rows):  # the unbiased energy distance may be negative
        axes.set_yscale("log")
    axes.set_title("Numbers: network evaluations", size="small")
    axes.grid(which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figures.save(figure, path, overwrite)


if __name__ == "__main__":
    main()
