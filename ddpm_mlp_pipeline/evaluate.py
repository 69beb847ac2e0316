"""Measure how far samples are from the data, beside how far the data are from themselves: the floor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from .checkpoints import FEATURES
from .commands import CommandParser, command, positive_int
from .data.arrays import read_array
from .errors import ConfigurationError, DatasetError, explain_missing_extra
from .export.schedulers import SCHEDULERS
from .files import whole_file

NUM_POINTS, NUM_IMAGES = 10_000, 2_000
IMAGE_BATCH_SIZE = 64


@dataclasses.dataclass
class Source:
    """Where samples come from: `draw(number, seed)` draws them, or chooses them from a file, in batches."""

    is_points: bool
    draw: Callable[[int, int], Iterable[np.ndarray]]  # [batch, dimension] or, in [0, 1], [batch, H, W, C]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-evaluate", description=__doc__)
    parser.add_argument(
        "samples",
        type=Path,
        help="a checkpoint folder, a bundle, a .npy file, a .csv file of points, or a folder of images",
    )
    parser.add_argument("--dataset", required=True, help="a point set's name, a file of points, or an image data set")
    parser.add_argument(
        "--num_samples",
        type=positive_int,
        metavar="N",
        help=f"samples, on both sides if points (default: {NUM_POINTS} points, {NUM_IMAGES} images)",
    )
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="of a checkpoint (default: its own)")
    parser.add_argument(
        "--num_inference_steps", type=positive_int, metavar="N", help="of a checkpoint (default: all timesteps)"
    )
    parser.add_argument(
        "--repeats", type=positive_int, metavar="N", help="draws to average (default: 5 of points, 1 of images)"
    )
    parser.add_argument("--output", type=Path, help="a .json file for the numbers")
    images = parser.add_argument_group("images")
    images.add_argument("--split", default="test", help="the split to compare with, all of it (default: test)")
    images.add_argument("--train_split", default="train", help="the split that the floor's come from (default: train)")
    images.add_argument("--fit", choices=["resize", "pad"], default="resize", help="as in training (default: resize)")
    images.add_argument("--features", type=Path, help="a feature network's folder (default: MNIST's, shipped)")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        output = None if args.output is None else stack.enter_context(whole_file(args.output))
        source = open_source(args.samples, args.scheduler, args.num_inference_steps)
        evaluate = _evaluate_points if source.is_points else _evaluate_images
        _report(args, *evaluate(source, args), output)


def open_source(path: Path, scheduler: str | None = None, num_inference_steps: int | None = None) -> Source:
    """What there is at a path: a checkpoint, a bundle, a file, or a folder of images.

    Raises:
        ConfigurationError: if it is a file of some other kind.
        DDPMPipelineError: what the loaders of each kind raise.
    """
    if (path / "model_index.json").is_file() or (path / "bundle.json").is_file():
        from .export.sample import open_sampler

        sampler = open_sampler(path, scheduler, num_inference_steps)
        if sampler.is_points:
            return Source(True, sampler.batches)
        return Source(False, lambda number, seed: sampler.batches(number, seed, IMAGE_BATCH_SIZE))
    if path.suffix == ".npy" and path.is_file():
        samples = read_array(path)
        if samples.ndim == 4:
            return Source(False, lambda number, seed: _choose(samples, number, seed, str(path)))
    if path.is_file():
        if path.suffix not in (".npy", ".csv", ".parquet"):
            raise ConfigurationError(f"{path} is no file of samples: give a .npy, .csv or .parquet")
        with explain_missing_extra("reading points", "evaluate"):
            from .data.points import load_points, to_array
        return Source(True, lambda number, seed: [to_array(load_points(path, number, seed=seed))])
    if not path.is_dir():
        raise ConfigurationError(f"there is no {path}")
    with explain_missing_extra("reading images", "train"):
        from .data.images import load_images
    pictures = load_images(path).permute(0, 2, 3, 1).numpy()
    return Source(False, lambda number, seed: [_choose(pictures, number, seed, str(path))[0] / np.float32(255)])


def _choose(samples: np.ndarray, number: int, seed: int, name: str) -> list[np.ndarray]:
    if len(samples) < number:
        raise DatasetError(f"{name} holds {len(samples)} samples, fewer than the {number} asked for")
    return [samples[np.random.default_rng(seed).permutation(len(samples))[:number]]]


def _evaluate_points(source: Source, args: Namespace) -> tuple[str, list[float], list[float]]:
    with explain_missing_extra("ddpm-evaluate", "evaluate"):
        from .data.points import POINT_SETS, load_points, to_array
        from .metrics import sliced_wasserstein_distance

    # Every draw has data of its own on both sides: a distance between two finite draws is never 0, and how far it is
    # from 0 when both are data is the floor that a model's distance has to be read against.
    n, repeats = args.num_samples or NUM_POINTS, args.repeats or 5
    if args.dataset in POINT_SETS:
        data = [to_array(load_points(args.dataset, 2 * n, seed=1000 + i)) for i in range(repeats)]
    else:  # a file: the two sides share no point
        points = to_array(load_points(args.dataset))
        if len(points) < 2 * n:
            raise DatasetError(
                f"{args.dataset} holds {len(points)} points, too few for two sets of {n}: lower --num_samples"
            )
        data = [np.random.default_rng(1000 + i).permutation(points) for i in range(repeats)]
    references, fresh = [both[:n] for both in data], [both[n : 2 * n] for both in data]
    samples = [np.concatenate(list(source.draw(n, seed))) for seed in range(repeats)]
    if samples[0].shape[1] != data[0].shape[1]:
        raise DatasetError(
            f"the samples have {samples[0].shape[1]} coordinates, but {args.dataset} has {data[0].shape[1]}"
        )
    distances = [sliced_wasserstein_distance(*pair) for pair in zip(samples, references, strict=True)]
    floors = [sliced_wasserstein_distance(*pair) for pair in zip(fresh, references, strict=True)]
    return f"sliced Wasserstein distance, {n} points", distances, floors


def _evaluate_images(source: Source, args: Namespace) -> tuple[str, list[float], list[float]]:
    with explain_missing_extra("evaluating images", "train"):
        from .data.images import load_images
        from .loading import load_features
        from .metrics import FrechetDistance, to_uint8

    if args.split == args.train_split:
        raise ConfigurationError(
            "--split and --train_split must share no image; slices are splits, too: train[:80%] and train[80%:]"
        )
    n, repeats = args.num_samples or NUM_IMAGES, args.repeats or 1
    features = load_features(args.features or FEATURES)
    draws = [[to_uint8(batch) for batch in source.draw(n, seed)] for seed in range(repeats)]
    channels, height, width = draws[0][0].shape[1:]
    if channels != features.config.in_channels:
        raise ConfigurationError(
            f"the samples have {channels} channels, but the feature network takes {features.config.in_channels}: "
            "name another with --features (train_features.py trains one)"
        )
    form = (height if height == width else None, args.fit, channels)
    references = load_images(args.dataset, args.split, *form)
    fresh = [load_images(args.dataset, args.train_split, *form, number=n, seed=seed) for seed in range(repeats)]
    distance = FrechetDistance([references], features)
    distances = [distance(draw) for draw in draws]
    floors = [distance([draw]) for draw in fresh]
    return f"Fréchet distance, {n} images against {len(references)}", distances, floors


def _report(args: Namespace, what: str, distances: list[float], floors: list[float], output: Path | None) -> None:
    distance, floor = np.mean(distances), np.mean(floors)
    number = len(distances)
    print(f"{what}, means of {number} draws (± standard error)" if number > 1 else what)
    for name, values in ((f"{args.samples} to {args.dataset}", distances), (f"{args.dataset} to itself", floors)):
        error = f" ± {np.std(values, ddof=1) / number**0.5:.4f}" if number > 1 else ""
        print(f"  {name:40} {np.mean(values):.4f}{error}")
    print(f"  {'ratio':40} {distance / floor:.2f}")
    if output is not None:
        report = {"distances": distances, "floors": floors, "ratio": distance / floor}
        output.write_text(json.dumps({"samples": str(args.samples), "dataset": args.dataset, **report}, indent=2))


if __name__ == "__main__":
    main()
