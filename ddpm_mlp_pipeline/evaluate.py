"""Measure how far samples are from the data: points from a checkpoint, a bundle or a file against a point set."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .commands import CommandParser, command, positive_int
from .errors import ConfigurationError, DatasetError, explain_missing_extra
from .files import whole_file


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-evaluate", description=__doc__)
    parser.add_argument("samples", type=Path, help="a checkpoint folder, a bundle, or a .npy or .csv file of points")
    parser.add_argument("--dataset", required=True, help="a point set's name, or a file of points")
    parser.add_argument(
        "--num_samples", type=positive_int, default=10_000, metavar="N", help="points on each side (default: 10000)"
    )
    parser.add_argument(
        "--num_inference_steps", type=positive_int, metavar="N", help="of a checkpoint (default: all timesteps)"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="draws to average (default: 5)")
    parser.add_argument("--output", type=Path, help="a .json file for the numbers")
    args = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        output = None if args.output is None else stack.enter_context(whole_file(args.output))
        _evaluate(args, output)


def _evaluate(args: Namespace, output: Path | None) -> None:
    with explain_missing_extra("ddpm-evaluate", "evaluate"):
        from .data.points import POINT_SETS, load_points, to_array
        from .metrics import sliced_wasserstein_distance

    # Every draw has data of its own on both sides: a distance between two finite draws is never 0, and how far it is
    # from 0 when both are data is the floor that a model's distance has to be read against.
    n = args.num_samples
    if args.dataset in POINT_SETS:
        data = [to_array(load_points(args.dataset, 2 * n, seed=1000 + i)) for i in range(args.repeats)]
    else:  # a file: the two sides share no point
        points = to_array(load_points(args.dataset))
        if len(points) < 2 * n:
            raise DatasetError(
                f"{args.dataset} holds {len(points)} points, too few for two sets of {n}: lower --num_samples"
            )
        data = [np.random.default_rng(1000 + i).permutation(points) for i in range(args.repeats)]
    references, fresh = [both[:n] for both in data], [both[n : 2 * n] for both in data]
    draw = _make_draw(args)
    samples = [draw(seed) for seed in range(args.repeats)]
    if samples[0].shape[1] != data[0].shape[1]:
        raise DatasetError(
            f"the samples have {samples[0].shape[1]} coordinates, but {args.dataset} has {data[0].shape[1]}"
        )
    distances = [sliced_wasserstein_distance(*pair) for pair in zip(samples, references, strict=True)]
    floors = [sliced_wasserstein_distance(*pair) for pair in zip(fresh, references, strict=True)]

    distance, floor = np.mean(distances), np.mean(floors)
    print(f"sliced Wasserstein distance, {args.num_samples} points, means of {args.repeats} draws (± standard error)")
    for what, values in ((f"{args.samples} to {args.dataset}", distances), (f"{args.dataset} to itself", floors)):
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        print(f"  {what:40} {np.mean(values):.4f} ± {error:.4f}")
    print(f"  {'ratio':40} {distance / floor:.2f}")
    if output is not None:
        report = {"distances": distances, "floors": floors, "ratio": distance / floor}
        output.write_text(json.dumps({"samples": str(args.samples), "dataset": args.dataset, **report}, indent=2))


def _make_draw(args: Namespace) -> Callable[[int], np.ndarray]:
    """What draws points, `[num_samples, dimension]`, of a seed, or chooses them by it from a file."""
    from .data.points import load_points, to_array

    if args.samples.is_file():
        if args.samples.suffix not in (".npy", ".csv", ".parquet"):
            raise ConfigurationError(f"{args.samples} is no file of points: give a .npy, .csv or .parquet")
        return lambda seed: to_array(load_points(args.samples, args.num_samples, seed=seed))
    if (args.samples / "bundle.json").is_file():
        from .export.runtime import OnnxSampler

        source = OnnxSampler(args.samples)

        def draw(seed: int) -> np.ndarray:
            return source.sample(args.num_samples, seed)
    else:
        with explain_missing_extra("evaluating a checkpoint"):
            import torch

            from .loading import load_checkpoint

        source = load_checkpoint(args.samples)

        def draw(seed: int) -> np.ndarray:
            generator = torch.Generator().manual_seed(seed)
            return source(args.num_samples, generator, args.num_inference_steps).points

    if not source.is_points:
        raise ConfigurationError(f"{args.samples} makes images: only points can be evaluated")
    return draw


if __name__ == "__main__":
    main()
