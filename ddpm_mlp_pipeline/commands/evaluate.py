"""Measure distances of samples to data, and their floor: the same distances between two sets of real data."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigurationError, DatasetError, explain_missing_extra
from ..export.schedulers import SCHEDULERS
from ..files import whole_file
from ..judge import metrics
from ..judge.sources import DATA_SEED, NUM_IMAGES, NUM_POINTS, Source, open_source
from ..runtime.columns import TableCodec
from ..runtime.request import Asked
from ..sampling import is_first_process
from .asking import add_guidance_options, read_guidance
from .parser import (
    FEATURES_HELP,
    CommandParser,
    add_data_options,
    add_engine,
    add_overwrite,
    check_engine,
    command,
    command_imports,
    leaving_out,
)

with command_imports("ddpm-evaluate", __name__):
    from tabulate import tabulate

if TYPE_CHECKING:
    import torch


MIN_OF_CLASS = 70  # a Fréchet distance of 64 features needs more samples
POINT_REPEATS, IMAGE_REPEATS, IMAGE_FLOOR_REPEATS = 5, 1, 5
LABELS = {
    "sliced_wasserstein_distance": "sliced Wasserstein distance",
    "energy_distance": "energy distance",
    "squared_energy_distance": "energy distance, squared",
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance (KID)",
    "kernel_distance_deviation": "– its deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "column_shapes": "column shapes (sdmetrics; 1 is best)",
    "column_pair_trends": "column pair trends (sdmetrics; 1 is best)",
    "quality": "quality: mean of these two",
    "gap_shares": "shares of missing cells (1 is best)",
    "auc": "AUC of telling samples from data (0.5 is best)",
    "closer_to_training": "share closer to training than to held-out rows (0.5 is best)",
    "exact_copies": "share of exact copies of training rows",
    "target": "predicting the target in held-out rows, trained on samples",
}
# The floor of an unbiased measure is 0 apart from chance, so that a ratio to it is meaningless.
WITHOUT_RATIO = ("kernel_distance", "kernel_distance_deviation", "squared_energy_distance")
PACKAGES: tuple[str, ...] = (
    "ddpm-mlp-pipeline",
    "numpy",
    "onnxruntime",
    "scipy",
    "torch",
    "diffusers",
    "torchmetrics",
)
PACKAGES += ("sdmetrics", "scikit-learn")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-evaluate", description=__doc__)
    parser.add_checkpoint(
        "samples", ", a bundle, a .npy or .parquet file, a .csv file of points, or a folder of images"
    )
    default = f"{NUM_POINTS} points or half of a file, at most {NUM_IMAGES} images"
    add_data_options(parser, f"number of samples, and of points to compare with (default: {default})", "test")
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="for a checkpoint (default: its own)")
    parser.add_count("--num_inference_steps", "for a checkpoint (default: all timesteps)")
    parser.add_count("--repeats", f"draws to average (default: {POINT_REPEATS} of points, {IMAGE_REPEATS} of images)")
    parser.add_argument("--output", type=Path, help="a .json file for the results and their settings")
    add_engine(parser)
    add_overwrite(parser)
    classes = parser.add_argument_group("classes")
    classes.add_argument(
        "--class_labels",
        action="store_true",
        help="ask for as many samples of each class, and measure each class, too",
    )
    classes.add_argument("--label_column", default="label", help="the data's column of labels (default: label)")
    add_guidance_options(classes)
    images = parser.add_argument_group("images")
    images.add_argument(
        "--train_split",
        help="split of the images for the floor (default: train; a data set with one split is cut into random halves)",
    )
    images.add_argument("--features", help=FEATURES_HELP)
    tables = parser.add_argument_group("tables", "--dataset is the file of training")
    tables.add_argument("--held_out", metavar="FILE", help="rows that were not trained on, for the floor")
    tables.add_argument("--target", metavar="COLUMN", help="column to predict by models that are trained on samples")
    args = parser.parse_args(argv)
    check_engine(args)
    is_first = is_first_process(args.samples)
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(whole_file(args.output, args.overwrite)) if args.output and is_first else None
        options = {"device": args.device, "provider": args.provider, "engine": args.engine}
        source = open_source(args.samples, args.scheduler, args.num_inference_steps, **options)
        if args.engine == "ray":
            if not is_first:
                return
            from ..ray_engine import connected

            stack.enter_context(connected(args.address))  # once for all repeats
        if args.class_labels and not source.class_names:
            raise ConfigurationError(f"{args.samples} knows no classes: leave --class_labels out")
        evaluate, extra = (_evaluate_points, "evaluate") if source.is_points else (_evaluate_images, "train")
        if source.codec is not None:
            evaluate, extra = functools.partial(_evaluate_table, source.codec), "tables"
        elif args.held_out or args.target:
            raise ConfigurationError(f"--held_out and --target are for tables, and {args.samples} draws none")
        with explain_missing_extra("ddpm-evaluate", extra):
            report = {"samples": str(args.samples), **source.info, "dataset": args.dataset, **evaluate(source, args)}
        if not is_first:
            return
        print(_heading(report, "rows" if source.codec is not None else "points" if source.is_points else "images"))
        print(_table(report["measures"]))
        if args.class_labels:
            print(_class_table(report["classes"]))
        if output is not None:
            output.write_text(json.dumps({**report, "versions": _versions()}, indent=2), encoding="utf-8")


def _evaluate_points(source: Source, args: Namespace) -> dict[str, Any]:
    from ..data.points import POINT_SETS, load_points, split_columns

    # Each repeat draws new data for both sides. Two finite sets of data are never at distance 0: that is the floor.
    n, seeds = args.num_samples or NUM_POINTS, range(args.repeats or POINT_REPEATS)
    data_seeds = [DATA_SEED + seed for seed in seeds]
    label_column = args.label_column if args.class_labels else None

    def load(number: int | None, seed: int) -> np.ndarray:
        """Return points, and in a further column their labels by the network's numbers."""
        noise = args.dataset_noise if number is not None else None
        dataset = load_points(args.dataset, number, noise, seed, columns=source.columns, label_column=label_column)
        points, _, labels, names = split_columns(dataset, label_column)
        numbers = np.zeros(len(points)) if labels is None else _numbers_of(source, args.dataset, names)[labels]
        return np.append(points, numbers[:, None], axis=1)

    if args.dataset in POINT_SETS:
        data = [load(2 * n, seed) for seed in data_seeds]
    else:  # a file, of which the two sides share no point
        points = load(None, 0)
        n = args.num_samples or min(n, len(points) // 2)
        if len(points) < 2 * n:
            raise DatasetError(
                f"{args.dataset} holds {len(points)} points, too few for two sets of {n}: lower --num_samples"
            )
        data = [np.random.default_rng(seed).permutation(points) for seed in data_seeds]
    dimension = data[0].shape[1] - 1
    if source.shape != (dimension,):
        raise DatasetError(f"the samples have {source.shape[0]} coordinates, but {args.dataset} has {dimension}")

    references = [_varied(both[:n], args.dataset) for both in data]
    fresh = [both[n : 2 * n] for both in data]
    asked = _asked(source, args, n)
    numbers = np.array(asked.get("class_labels", np.zeros(n)))
    drawn = [np.append(_varied(source.draw(n, s, **asked), args.samples), numbers[:, None], axis=1) for s in seeds]

    def measure(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        return _measure_points(x[:, :-1], y[:, :-1])

    samples, floor = ([measure(*pair) for pair in zip(x, references, strict=True)] for x in (drawn, fresh))
    sides = [[(points, points[:, -1]) for points in side] for side in (drawn, fresh, references)]
    return {
        "dataset_noise": args.dataset_noise,
        "num_samples": n,
        "num_references": n,
        "seeds": list(seeds),
        "data_seeds": data_seeds,
        "measures": _rows(samples, floor),
        **_classes(source, args, measure, sides),
    }


def _evaluate_table(codec: TableCodec, source: Source, args: Namespace) -> dict[str, Any]:
    from pandas import DataFrame

    from ..data.tables import load_frame
    from ..judge.tables import judge_table

    if args.held_out is None:
        raise ConfigurationError("a table is judged beside rows that were not trained on: name their file, --held_out")
    train, held_out = (load_frame(path, codec) for path in (args.dataset, args.held_out))
    n, seeds = args.num_samples or len(train), range(args.repeats or 1)
    judged = [
        judge_table(
            train, held_out, DataFrame(codec.decode(source.draw(n, seed))), codec.columns, args.target, seed=seed
        )
        for seed in seeds
    ]
    sides = ("samples", "floor")
    defined = [
        name
        for name in judged[0]["measures"]
        if all(each["measures"][name][side] is not None for each in judged for side in sides)
    ]
    samples, floor = ([{name: each["measures"][name][side] for name in defined} for each in judged] for side in sides)
    return {
        "held_out": args.held_out,
        "num_samples": n,
        "num_references": len(train),
        "seeds": list(seeds),
        "data_seeds": list(seeds),
        "target": args.target,
        "measures": {name: {**row, "ratio": None} for name, row in _rows(samples, floor).items()},
    }


def _evaluate_images(source: Source, args: Namespace) -> dict[str, Any]:
    import torch

    from ..data.images import load_labelled_images
    from ..judge.features import PIXELS, FeatureNetwork

    # All errors of the options are raised before any image is decoded or drawn.
    split, train_split, n, num_references = _choose_images(source, args)
    seeds = range(args.repeats or IMAGE_REPEATS)
    data_seeds = [DATA_SEED + i for i in range(IMAGE_FLOOR_REPEATS)]
    channels, height, width = source.shape
    features, network = metrics.choose_features(args.features, channels, n, num_references)
    measure = functools.partial(_measure_images, on_pixels=features == PIXELS)
    max_references = NUM_IMAGES if features == PIXELS else None  # all pairs of pixels are compared

    def features_of(images: np.ndarray, name: object) -> torch.Tensor:
        return metrics.image_features([torch.from_numpy(_varied(images, name))], network)

    def load(split: str, number: int | None, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        """Return images' features, and their labels by the network's numbers."""
        label_column = args.label_column if args.class_labels else None
        form = split, (height, width), args.fit, channels, number, seed
        images, labels, names = load_labelled_images(args.dataset, label_column, *form, on_corrupt=on_corrupt)
        numbers = np.zeros(len(images)) if labels is None else _numbers_of(source, args.dataset, names)[labels.numpy()]
        return features_of(images.numpy(), args.dataset), numbers

    with leaving_out(args.skip_corrupt) as on_corrupt:
        if split == train_split:  # each repeat halves it anew
            data = load(split, max_references and 2 * max_references, DATA_SEED)
            half = len(data[0]) // 2
            orders = [np.random.default_rng(seed).permutation(len(data[0])) for seed in data_seeds]
            references = [(data[0][order[:half]], data[1][order[:half]]) for order in orders]
            rest = [order[half : 2 * half] for order in orders]
            fresh = [(data[0][order], data[1][order]) for order in rest]
        else:
            references = [load(split, max_references, DATA_SEED)] * len(data_seeds)
            fresh = [load(train_split, n, seed) for seed in data_seeds]
    n = min(n, *(len(x) for x, _ in fresh))  # corrupt images may be left out
    fresh = [(x[:n], labels[:n]) for x, labels in fresh]
    asked = _asked(source, args, n)
    numbers = np.array(asked.get("class_labels", np.zeros(n)))
    drawn = [(features_of(source.draw(n, seed, **asked), args.samples), numbers) for seed in seeds]
    floor = [measure(x, y) for (x, _), (y, _) in zip(fresh, references, strict=True)]
    samples = [measure(x, y) for (x, _), (y, _) in zip(drawn, itertools.cycle(references), strict=False)]
    classify = network.classify if isinstance(network, FeatureNetwork) else None
    by_class = _classes(source, args, measure, [drawn, fresh, references], classify)
    return {
        "split": split,
        "train_split": train_split,
        "fit": args.fit,
        "shape": list(source.shape),
        "features": str(features),
        "num_samples": n,
        "num_references": len(references[0][0]),
        "seeds": list(seeds),
        "data_seeds": data_seeds,
        "measures": _rows(samples, floor),
        **by_class,
    }


def _asked(source: Source, args: Namespace, number: int) -> Asked:
    """Return what to ask for: with `--class_labels`, the classes one after the other."""
    asked = read_guidance(args)
    if args.class_labels:
        asked["class_labels"] = [i % len(source.class_names) for i in range(number)]
    return asked


def _numbers_of(source: Source, dataset: str, names: list[str]) -> np.ndarray:
    """Return the network's number of each of the data's classes."""
    if unknown := [name for name in names if name not in source.class_names]:
        raise DatasetError(f"{dataset} has the class {unknown[0]!r}, which the network doesn't know")
    return np.array([source.class_names.index(name) for name in names])


def _classes(
    source: Source,
    args: Namespace,
    measure: Callable[..., dict[str, float]],
    sides: list[list[Any]],
    classify: Callable[[Any], Any] | None = None,
) -> dict[str, Any]:
    """Measure each class by itself: its samples, and fresh data of it, against the references of the class.

    `sides` are draws of samples, of fresh data and of references: pairs of points or features, and of labels.
    """
    if not args.class_labels:
        return {}
    classes: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(source.class_names):
        own = [[x[labels == number] for x, labels in side] for side in sides]
        if min(len(x) for side in own for x in side) < MIN_OF_CLASS:
            continue
        samples, floor = (
            [measure(x, y) for x, y in zip(side, itertools.cycle(own[2]), strict=False)] for side in own[:2]
        )
        classes[name] = {"measures": _rows(samples, floor)}
        if classify is not None:
            shares = [[float((classify(x) == number).float().mean()) for x in side] for side in own[:2]]
            classes[name]["as_asked"] = {"samples": shares[0], "floor": shares[1]}
    if not classes:
        raise DatasetError(f"no class has {MIN_OF_CLASS} samples and data: raise --num_samples")
    return {"classes": classes}


def _class_table(classes: dict[str, Any]) -> str:
    """Return each class's distance and, where a classifier tells, the share of samples that are what was asked for."""
    key = next(iter(next(iter(classes.values()))["measures"]))
    rows: list[tuple[Any, ...]] = []
    for name, row in classes.items():
        found, shares = row["measures"][key], row.get("as_asked")
        told = (np.mean(shares["samples"]), np.mean(shares["floor"])) if shares else ()
        rows.append((name, np.mean(found["samples"]), np.mean(found["floor"]), *told))
    means = np.mean([row[1:] for row in rows], axis=0)
    headers = ["class", LABELS[key], "floor", "as asked", "data"][: len(means) + 1]
    cells = [*rows, ("all", *means)]
    formats = ("", ".4f", ".4f", ".1%", ".1%")
    return tabulate(
        [[format(v, f) for v, f in zip(row, formats, strict=False)] for row in cells],
        headers,
        "plain",
        disable_numparse=True,
        colalign=("left", *["right"] * len(means)),
    )


def _choose_images(source: Source, args: Namespace) -> tuple[str, str, int, int]:
    """Return the split to compare with, the split for the floor, and the numbers of samples and of references.

    The two splits are the same if the data set has only one.
    """
    from ..data.images import HELD_OUT_SPLITS, choose_split, count_images

    split = args.split or choose_split(args.dataset, HELD_OUT_SPLITS)
    train_split = args.train_split or choose_split(args.dataset, ["train"])
    if split == train_split and (args.split or args.train_split):
        raise ConfigurationError(
            "--split and --train_split must share no image: pass two splits, or slices (train[:80%] and train[80%:])"
        )
    num_references = count_images(args.dataset, split)
    if split == train_split:
        num_references = num_fresh = num_references // 2
    else:
        num_fresh = count_images(args.dataset, train_split)
    n = args.num_samples or min(NUM_IMAGES, num_fresh, source.number or NUM_IMAGES)
    if num_fresh < n:
        what = f"half of the split {split!r}" if split == train_split else f"the split {train_split!r}"
        raise DatasetError(f"{what} holds {num_fresh} images, fewer than the {n} needed: lower --num_samples")
    if source.number is not None and source.number < n:
        raise DatasetError(
            f"{args.samples} holds {source.number} samples, fewer than the {n} needed: lower --num_samples"
        )
    return split, train_split, n, num_references


def _varied(samples: np.ndarray, name: object) -> np.ndarray:
    """Return the samples, or raise an error if they are all the same."""
    if (samples == samples[0]).all():
        raise DatasetError(f"the {len(samples)} samples of {name} are all the same: there is nothing to compare")
    return samples


def _measure_points(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "sliced_wasserstein_distance": metrics.sliced_wasserstein_distance(x, y),
        "energy_distance": metrics.energy_distance(x, y),
    }


def _measure_images(x: torch.Tensor, y: torch.Tensor, on_pixels: bool) -> dict[str, float]:
    if on_pixels:
        distances = {"squared_energy_distance": metrics.squared_energy_distance(x, y)}
    else:
        distances = {"frechet_distance": metrics.frechet_distance(x, y)}
        kernel_distance, deviation = metrics.kernel_distance(x, y)
        distances |= {"kernel_distance": kernel_distance, "kernel_distance_deviation": deviation}
    return distances | {"precision": metrics.share_in_manifold(x, y), "recall": metrics.share_in_manifold(y, x)}


def _rows(samples: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return each measure's values by draw and, where it is meaningful, the ratio of their mean to the floor's."""
    rows = {}
    for key in samples[0]:
        values, floors = ([measures[key] for measures in draws] for draws in (samples, floor))
        has_ratio = key not in WITHOUT_RATIO and np.mean(floors) > 0
        ratio = float(np.mean(values) / np.mean(floors)) if has_ratio else None
        rows[key] = {"samples": values, "floor": floors, "ratio": ratio}
    return rows


def _heading(report: dict[str, Any], kind: str) -> str:
    heading = (
        f"{report['num_samples']:,} {kind} of {report['samples']} against "
        f"{report['num_references']:,} of {report['dataset']}\ndraws of samples: {len(report['seeds'])}, "
        f"of data: {len(report['data_seeds'])} (means ± standard error)"
    )
    if kind != "images":
        return heading
    split, train_split = report["split"], report["train_split"]
    channels, height, width = report["shape"]
    splits = f"split {split!r}, floor from {train_split!r}"
    if split == train_split:
        splits = f"random halves of split {split!r}, since there is no other"
    return f"{heading}\ndata: {splits}; {width}×{height}, channels: {channels}; features: {report['features']}"


def _table(rows: dict[str, dict[str, Any]]) -> str:
    cells = ((LABELS[key], _mean(row["samples"]), _mean(row["floor"]), row["ratio"]) for key, row in rows.items())
    headers, alignment = ("", "samples", "floor", "ratio"), ("left", "right", "right", "right")
    return tabulate(cells, headers, "plain", floatfmt=("", ".4f", ".4f", ".2f"), missingval="–", colalign=alignment)


def _mean(values: list[float]) -> str:
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{error}"


def _versions() -> dict[str, str]:
    installed = {distribution.name for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


if __name__ == "__main__":
    main()
