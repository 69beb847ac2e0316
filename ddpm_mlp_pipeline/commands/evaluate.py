"""Measure how far samples are from the data, beside how far the data are from themselves: the floor."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigurationError, DatasetError, explain_missing_extra
from ..export.schedulers import SCHEDULERS
from ..files import whole_file
from ..judge.sources import Source, open_source
from .parser import (
    FEATURES_HELP,
    CommandParser,
    add_data_options,
    add_overwrite,
    command,
    command_imports,
    leaving_out,
    positive_int,
)

with command_imports("ddpm-evaluate", __name__):
    from tabulate import tabulate

if TYPE_CHECKING:
    import torch


NUM_POINTS, NUM_IMAGES = 10_000, 2_000
POINT_REPEATS, IMAGE_REPEATS, IMAGE_FLOOR_REPEATS = 5, 1, 5
DATA_SEED = 1000  # of the first draw of data
LABELS = {  # of the measures, by their keys in the report
    "sliced_wasserstein_distance": "sliced Wasserstein distance",
    "energy_distance": "energy distance",
    "squared_energy_distance": "energy distance, squared",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance (KID)",
    "kernel_distance_deviation": "– its deviation over subsets",
    "precision": "precision",
    "recall": "recall",
}
# Of a measure without bias, the floor is 0 but for chance, so that a ratio to it says nothing.
WITHOUT_RATIO = ("kernel_distance", "kernel_distance_deviation", "squared_energy_distance")
PACKAGES = ("ddpm-mlp-pipeline", "numpy", "onnxruntime", "scipy", "POT", "torch", "diffusers", "torchmetrics")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-evaluate", description=__doc__)
    parser.add_argument(
        "samples",
        type=Path,
        help="a checkpoint folder, a bundle, a .npy file, a .csv or .parquet file of points, or a folder of images",
    )
    default = f"{NUM_POINTS} points or half of a file, at most {NUM_IMAGES} images"
    add_data_options(parser, f"samples, on both sides if points (default: {default})", "test")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="of a checkpoint (default: its own)")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, metavar="N", help="of a checkpoint (default: all timesteps)"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        metavar="N",
        help=f"draws to average (default: {POINT_REPEATS} of points, {IMAGE_REPEATS} of images)",
    )
    parser.add_argument("--output", type=Path, help="a .json file for the numbers, and how they came about")
    add_overwrite(parser)
    images = parser.add_argument_group("images")
    images.add_argument(
        "--train_split",
        help="the split that the floor's come from (default: train). If there is but one split, random halves of it "
        "take the place of both",
    )
    images.add_argument("--features", help=FEATURES_HELP)
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        output = None if args.output is None else stack.enter_context(whole_file(args.output, args.overwrite))
        source = open_source(args.samples, args.scheduler, args.num_inference_steps)
        evaluate, extra = (_evaluate_points, "evaluate") if source.is_points else (_evaluate_images, "train")
        with explain_missing_extra("ddpm-evaluate", extra):
            report = {"samples": str(args.samples), **source.info, "dataset": args.dataset, **evaluate(source, args)}
        print(_heading(report, "points" if source.is_points else "images"))
        if not source.is_points:
            print(_image_heading(report))
        print(_table(report["measures"]))
        if output is not None:
            output.write_text(json.dumps({**report, "versions": _versions()}, indent=2), encoding="utf-8")


def _evaluate_points(source: Source, args: Namespace) -> dict[str, Any]:
    from ..data.points import POINT_SETS, load_points, to_array

    # Every draw has data of its own on both sides: a distance between two finite draws is never 0, and how far it is
    # from 0 when both are data is the floor that a model's distance has to be read against.
    n, seeds = args.num_samples or NUM_POINTS, range(args.repeats or POINT_REPEATS)
    data_seeds = [DATA_SEED + seed for seed in seeds]
    if args.dataset in POINT_SETS:
        data = [
            to_array(load_points(args.dataset, 2 * n, args.dataset_noise, seed, columns=source.columns))
            for seed in data_seeds
        ]
    else:  # a file: the two sides share no point
        points = to_array(load_points(args.dataset, columns=source.columns))
        n = args.num_samples or min(n, len(points) // 2)
        if len(points) < 2 * n:
            raise DatasetError(
                f"{args.dataset} holds {len(points)} points, too few for two sets of {n}: lower --num_samples"
            )
        data = [np.random.default_rng(seed).permutation(points) for seed in data_seeds]
    (dimension,) = data[0].shape[1:]
    if source.shape != (dimension,):
        raise DatasetError(f"the samples have {source.shape[0]} coordinates, but {args.dataset} has {dimension}")

    references = [_varied(both[:n], args.dataset) for both in data]
    fresh = [both[n : 2 * n] for both in data]
    drawn = [_varied(source.draw(n, seed), args.samples) for seed in seeds]
    samples, floor = ([_measure_points(*pair) for pair in zip(x, references, strict=True)] for x in (drawn, fresh))
    return {
        "dataset_noise": args.dataset_noise,
        "num_samples": n,
        "num_references": n,
        "seeds": list(seeds),
        "data_seeds": data_seeds,
        "measures": _rows(samples, floor),
    }


def _evaluate_images(source: Source, args: Namespace) -> dict[str, Any]:
    import torch

    from ..data.images import load_images
    from ..judge.features import PIXELS
    from ..judge.metrics import choose_features, image_features

    # What is missing is said before anything is decoded or drawn.
    split, train_split = _choose_splits(args)
    n, num_references = _choose_numbers(source, args, split, train_split)
    seeds = range(args.repeats or IMAGE_REPEATS)
    data_seeds = [DATA_SEED + i for i in range(IMAGE_FLOOR_REPEATS)]
    channels, height, width = source.shape
    features, network = choose_features(args.features, channels, n, num_references)
    measure, max_references = _measure_images, None
    if features == PIXELS:  # all pairs are compared
        measure, max_references = _measure_pixels, NUM_IMAGES

    def load(split: str, number: int | None, seed: int) -> torch.Tensor:
        form = args.dataset, split, (height, width), args.fit, channels, number, seed
        images = load_images(*form, on_corrupt=on_corrupt).numpy()
        return image_features([torch.from_numpy(_varied(images, args.dataset))], network)

    with leaving_out(args.skip_corrupt) as on_corrupt:
        if split == train_split:  # each draw halves it anew
            data = load(split, max_references and 2 * max_references, DATA_SEED)
            half = len(data) // 2
            orders = [np.random.default_rng(seed).permutation(len(data)) for seed in data_seeds]
            references = [data[order[:half]] for order in orders]
            fresh = [data[order[half : 2 * half]] for order in orders]
        else:
            references = [load(split, max_references, DATA_SEED)] * len(data_seeds)
            fresh = [load(train_split, n, seed) for seed in data_seeds]
    n = min(n, *map(len, fresh))  # corrupt images may be left out
    floor = [measure(x[:n], y) for x, y in zip(fresh, references, strict=True)]
    samples = []
    for seed in seeds:
        images = torch.from_numpy(_varied(source.draw(n, seed), args.samples))
        samples.append(measure(image_features([images], network), references[seed % len(references)]))
    return {
        "split": split,
        "train_split": train_split,
        "fit": args.fit,
        "shape": list(source.shape),
        "features": str(features),
        "num_samples": n,
        "num_references": len(references[0]),
        "seeds": list(seeds),
        "data_seeds": data_seeds,
        "measures": _rows(samples, floor),
    }


def _choose_splits(args: Namespace) -> tuple[str, str]:
    """The split to compare with, and that of the floor: the same, to be halved, only if there is no other."""
    from ..data.images import HELD_OUT_SPLITS, choose_split

    split = args.split or choose_split(args.dataset, HELD_OUT_SPLITS)
    train_split = args.train_split or choose_split(args.dataset, ["train"])
    if split == train_split and (args.split or args.train_split):
        raise ConfigurationError(
            "--split and --train_split must share no image; slices are splits, too: train[:80%] and train[80%:]"
        )
    return split, train_split


def _choose_numbers(source: Source, args: Namespace, split: str, train_split: str) -> tuple[int, int]:
    """The numbers of samples, and of images to compare them with."""
    from ..data.images import count_images

    num_references = count_images(args.dataset, split)
    if split == train_split:
        num_references = num_fresh = num_references // 2
    else:
        num_fresh = count_images(args.dataset, train_split)
    n = args.num_samples or min(NUM_IMAGES, num_fresh, source.number or NUM_IMAGES)
    if num_fresh < n:
        what = f"half of the split {split!r}" if split == train_split else f"the split {train_split!r}"
        raise DatasetError(f"{what} holds {num_fresh} images, fewer than the {n} needed")
    if source.number is not None and source.number < n:
        raise DatasetError(f"{args.samples} holds {source.number} samples, fewer than the {n} asked for")
    return n, num_references


def _varied(samples: np.ndarray, name: object) -> np.ndarray:
    """The samples as they are, if they are not all the same, as a blank picture's copies would be."""
    if (samples == samples[0]).all():
        raise DatasetError(f"the {len(samples)} samples of {name} are all the same: there is nothing to compare")
    return samples


def _measure_points(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from ..judge.metrics import energy_distance, sliced_wasserstein_distance

    return {
        "sliced_wasserstein_distance": sliced_wasserstein_distance(x, y),
        "energy_distance": energy_distance(x, y),
    }


def _measure_images(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    from ..judge.metrics import frechet_distance, kernel_distance, share_in_manifold

    kernel_mean, kernel_deviation = kernel_distance(x, y)
    return {
        "frechet_distance": frechet_distance(x, y),
        "kernel_distance": kernel_mean,
        "kernel_distance_deviation": kernel_deviation,
        "precision": share_in_manifold(x, y),
        "recall": share_in_manifold(y, x),
    }


def _measure_pixels(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    from ..judge.metrics import share_in_manifold, squared_energy_distance

    return {
        "squared_energy_distance": squared_energy_distance(x, y),
        "precision": share_in_manifold(x, y),
        "recall": share_in_manifold(y, x),
    }


def _rows(samples: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each measure its values, one of each draw, and the ratio of their means where it says something."""
    rows = {}
    for key in samples[0]:
        values, floors = ([measures[key] for measures in draws] for draws in (samples, floor))
        has_ratio = key not in WITHOUT_RATIO and np.mean(floors) > 0
        ratio = float(np.mean(values) / np.mean(floors)) if has_ratio else None
        rows[key] = {"samples": values, "floor": floors, "ratio": ratio}
    return rows


def _heading(report: dict[str, Any], kind: str) -> str:
    return (
        f"{report['num_samples']:,} {kind} of {report['samples']} against {report['num_references']:,} of "
        f"{report['dataset']}\ndraws of samples: {len(report['seeds'])}, of data: {len(report['data_seeds'])} "
        "(means ± standard error)"
    )


def _image_heading(report: dict[str, Any]) -> str:
    split, train_split = report["split"], report["train_split"]
    channels, height, width = report["shape"]
    splits = f"split {split!r}, floor from {train_split!r}"
    if split == train_split:
        splits = f"random halves of split {split!r}, since there is no other"
    return f"data: {splits}; {width}×{height}, channels: {channels}; features: {report['features']}"


def _table(rows: dict[str, dict[str, Any]]) -> str:
    cells = ((LABELS[key], _mean(row["samples"]), _mean(row["floor"]), row["ratio"]) for key, row in rows.items())
    headers, alignment = ("", "samples", "floor", "ratio"), ("left", "right", "right", "right")
    return tabulate(cells, headers, "plain", floatfmt=("", ".4f", ".4f", ".2f"), missingval="–", colalign=alignment)


def _mean(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}" if values else "–"


def _versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


if __name__ == "__main__":
    main()
