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

from .checkpoints import FEATURES
from .commands import CommandParser, command, positive_int
from .errors import ConfigurationError, DatasetError, explain_missing_extra
from .export.schedulers import SCHEDULERS
from .files import whole_file
from .sources import Source, open_source

if TYPE_CHECKING:
    import torch

NUM_POINTS, NUM_IMAGES = 10_000, 2_000
POINT_REPEATS, IMAGE_REPEATS, IMAGE_FLOOR_REPEATS = 5, 1, 5
DATA_SEED = 1000  # of the first draw of data

LABELS = {  # of the measures, by their keys in the report
    "sliced_wasserstein_distance": "sliced Wasserstein distance",
    "energy_distance": "energy distance",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance (KID)",
    "kernel_distance_deviation": "  its deviation over subsets",
    "precision": "precision",
    "recall": "recall",
}
# Of a measure without bias, the floor is 0 but for chance, so that a ratio to it says nothing.
WITHOUT_RATIO = ("kernel_distance", "kernel_distance_deviation")
PACKAGES = ("ddpm-mlp-pipeline", "numpy", "onnxruntime", "scipy", "POT", "torch", "diffusers", "torchmetrics")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-evaluate", description=__doc__)
    parser.add_argument(
        "samples",
        type=Path,
        help="a checkpoint folder, a bundle, a .npy file, a .csv or .parquet file of points, or a folder of images",
    )
    parser.add_argument("--dataset", required=True, help="a point set's name, a file of points, or an image data set")
    parser.add_argument(
        "--num_samples",
        type=positive_int,
        metavar="N",
        help=f"samples, on both sides if points (default: {NUM_POINTS} points or half of a file, {NUM_IMAGES} images)",
    )
    parser.add_argument("--dataset_noise", type=float, help="of a point set, as in training (default: the set's own)")
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
    images = parser.add_argument_group("images")
    images.add_argument("--split", default="test", help="the split to compare with, all of it (default: test)")
    images.add_argument("--train_split", default="train", help="the split that the floor's come from (default: train)")
    images.add_argument(
        "--resolution", type=positive_int, metavar="N", help="bring the data to this size, as in training"
    )
    images.add_argument("--fit", choices=["resize", "pad"], default="resize", help="as in training (default: resize)")
    images.add_argument("--channels", type=int, choices=[1, 3, 4], help="bring the data to so many, as in training")
    images.add_argument(
        "--features",
        type=Path,
        default=FEATURES,
        help="a feature network's folder, or a file of torch-fidelity's Inception weights (default: MNIST's, shipped)",
    )
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        output = None if args.output is None else stack.enter_context(whole_file(args.output))
        source = open_source(args.samples, args.scheduler, args.num_inference_steps)
        evaluate, extra = (_evaluate_points, "evaluate") if source.is_points else (_evaluate_images, "train")
        with explain_missing_extra("ddpm-evaluate", extra):
            report = {"samples": str(args.samples), **source.info, "dataset": args.dataset, **evaluate(source, args)}
        print(_heading(report, "points" if source.is_points else "images"))
        print(_table(report["measures"]))
        if output is not None:
            output.write_text(json.dumps({**report, "versions": _versions()}, indent=2), encoding="utf-8")


def _evaluate_points(source: Source, args: Namespace) -> dict[str, Any]:
    from .data.points import POINT_SETS, load_points, to_array

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

    from .data.images import load_images
    from .loading import load_features
    from .metrics import check_numbers_of_images, image_features

    if args.split == args.train_split:
        raise ConfigurationError(
            "--split and --train_split must share no image; slices are splits, too: train[:80%] and train[80%:]"
        )
    n, seeds = args.num_samples or NUM_IMAGES, range(args.repeats or IMAGE_REPEATS)
    data_seeds = [DATA_SEED + i for i in range(IMAGE_FLOOR_REPEATS)]
    network = load_features(args.features)
    form = {"resolution": args.resolution, "fit": args.fit, "channels": args.channels}
    references = load_images(args.dataset, args.split, **form).numpy()
    check_numbers_of_images(network.num_features, n, len(references))  # before any work
    if source.shape != references.shape[1:]:
        shapes = ["×".join(map(str, shape)) for shape in (source.shape, references.shape[1:])]
        raise DatasetError(
            f"the samples are {shapes[0]} (channels × height × width), but {args.dataset} is {shapes[1]}: bring the "
            "data to the samples' form, as in training, by --resolution, --fit and --channels"
        )

    def features_of(images: np.ndarray, name: object) -> torch.Tensor:
        return image_features([torch.from_numpy(_varied(images, name))], network)

    def fresh(seed: int) -> np.ndarray:
        images = load_images(args.dataset, args.train_split, **form, number=n, seed=seed).numpy()
        if len(images) < n:
            raise DatasetError(f"the split {args.train_split!r} holds {len(images)} images, fewer than the {n} needed")
        return images

    y = features_of(references, args.dataset)
    floor = [_measure_images(features_of(fresh(seed), args.dataset), y) for seed in data_seeds]
    samples = [_measure_images(features_of(source.draw(n, seed), args.samples), y) for seed in seeds]
    return {
        "split": args.split,
        "train_split": args.train_split,
        **form,
        "features": str(args.features),
        "num_samples": n,
        "num_references": len(references),
        "seeds": list(seeds),
        "data_seeds": data_seeds,
        "measures": _rows(samples, floor),
    }


def _varied(samples: np.ndarray, name: object) -> np.ndarray:
    """The samples as they are, if they are not all the same, as a blank picture's copies would be."""
    if (samples == samples[0]).all():
        raise DatasetError(f"the {len(samples)} samples of {name} are all the same: there is nothing to compare")
    return samples


def _measure_points(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    from .metrics import energy_distance, sliced_wasserstein_distance

    return {
        "sliced_wasserstein_distance": sliced_wasserstein_distance(x, y),
        "energy_distance": energy_distance(x, y),
    }


def _measure_images(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    from .metrics import frechet_distance, kernel_distance, share_in_manifold

    kernel_mean, kernel_deviation = kernel_distance(x, y)
    return {
        "frechet_distance": frechet_distance(x, y),
        "kernel_distance": kernel_mean,
        "kernel_distance_deviation": kernel_deviation,
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


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':30}{'samples':>19}{'floor':>19}{'ratio':>9}"]
    for key, row in rows.items():
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{LABELS[key]:29} {_mean(row['samples']):>18} {_mean(row['floor']):>18} {ratio:>8}")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}" if values else "–"


def _versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


if __name__ == "__main__":
    main()
