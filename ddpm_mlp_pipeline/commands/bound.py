"""Measure the variational bound of a checkpoint on data, term by term."""

from __future__ import annotations

import contextlib
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import whole_file
from .parser import (
    CommandParser,
    add_data_options,
    add_device,
    add_overwrite,
    command,
    command_imports,
    leaving_out,
    noise_seed,
)

with command_imports("ddpm-bound", __name__):
    import torch
    from diffusers import DDPMScheduler
    from tabulate import tabulate

    from .. import figures
    from ..bound import VARIANCE_TYPES, BoundEstimate
    from ..data.images import HELD_OUT_SPLITS, choose_split
    from ..data.normalized import load_normalized
    from ..judge.likelihood import variational_bound
    from ..loading import load_checkpoint, without_tables
    from ..training.processes import choose_device, this_process


NUM_POINTS = 10_000


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-bound", description=__doc__)
    parser.add_checkpoint("checkpoint")
    add_data_options(parser, f"(default: {NUM_POINTS} points, all images)", "test, or train if there is none")
    parser.add_argument(
        "--variance_type", choices=VARIANCE_TYPES, help="variance of the denoising steps (default: the checkpoint's)"
    )
    stride = "spread the timesteps over groups of N samples, in 1 / N of the time (default: 1)"
    parser.add_count("--timestep_stride", stride, default=1)
    parser.add_count("--batch_size", "(default: 100)", default=100)
    parser.add_argument("--seed", type=noise_seed, default=1, help="seed of points and noise (default: 1)")
    parser.add_argument("--output", type=Path, help="a .json file; with it, an interrupted command can be resumed")
    parser.add_argument("--figure", type=Path, help="a .png file of the terms by timestep")
    add_device(parser)
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.figure is not None and args.figure.suffix != ".png":
        raise ConfigurationError(f"{args.figure} must end in .png")
    state_path = None if args.output is None else args.output.with_suffix(".partial.npz")
    is_main_process = this_process().is_main_process
    with contextlib.ExitStack() as stack:
        paths = (args.output, args.figure) if is_main_process else (None, None)
        output, figure = (path and stack.enter_context(whole_file(path, args.overwrite)) for path in paths)
        pipeline = without_tables(load_checkpoint(args.checkpoint).to(choose_device(args.device, torch.float64)))
        if args.variance_type is not None:
            pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, variance_type=args.variance_type)
        if args.split is None and not pipeline.is_points:
            args.split = choose_split(args.dataset, HELD_OUT_SPLITS)
        number = args.num_samples or (NUM_POINTS if pipeline.is_points else None)
        options = {"split": args.split, "fit": args.fit, "noise": args.dataset_noise, "seed": args.seed}
        with leaving_out(args.skip_corrupt, silent=not is_main_process) as on_corrupt:
            dataset = load_normalized(pipeline, args.dataset, number, **options, on_corrupt=on_corrupt)
        options = {"batch_size": args.batch_size, "timestep_stride": args.timestep_stride, "seed": args.seed}
        estimate = variational_bound(pipeline, dataset, **options, state_path=state_path)
        if not is_main_process:
            return
        if output is not None:
            output.write_text(json.dumps(_report(args, estimate, pipeline.scheduler, len(dataset)), indent=2))
        if figure is not None:
            figures.plot_bound(estimate).savefig(figure, dpi=100)
    if state_path is not None:
        state_path.unlink()
    variance_type = pipeline.scheduler.config.variance_type
    split = "" if args.split is None else f" (split {args.split!r})"
    print(f"{args.checkpoint} on {len(dataset):,} samples of {args.dataset}{split}, variance {variance_type}")
    print(_table(estimate))


def _table(estimate: BoundEstimate) -> str:
    T = len(estimate.terms) - 1
    rows = [
        ("L_0", estimate.terms[0], None),
        (f"L_1 + … + L_{T - 1}", estimate.terms[1:T].sum(), None),
        (f"L_{T}", estimate.terms[T], None),
        ("the bound, −K", estimate.total, estimate.standard_error),
        ("a standard Gaussian, −L_null", estimate.nulls.mean(), None),
        ("K − L_null", estimate.gain, estimate.gain_standard_error),
    ]
    headers, d = ("", "bits", "±", "bits/dim", "±"), estimate.dimension
    cells = [(name, bits, error, bits / d, error and error / d) for name, bits, error in rows]
    return tabulate(cells, headers, "plain", floatfmt=".4f")


def _report(args: Namespace, estimate: BoundEstimate, scheduler: DDPMScheduler, num_samples: int) -> dict[str, Any]:
    """Return the options and the estimate, in bits."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return options | {
        "variance_type": scheduler.config.variance_type,
        "num_samples": num_samples,
        "dimension": estimate.dimension,
        "bound": estimate.total,
        "bound_standard_error": _or_none(estimate.standard_error),
        "bits_per_dim": estimate.bits_per_dim,
        "null": float(estimate.nulls.mean()),
        "gain": estimate.gain,
        "gain_standard_error": _or_none(estimate.gain_standard_error),
        "terms": estimate.terms.tolist(),
    }


def _or_none(value: float) -> float | None:
    """Replace NaN, the standard error of a single group, by JSON's null."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
