"""Draw samples from a bundle, without PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ddpm_mlp_pipeline.commands import CommandParser, command, positive_int, seed
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.files import whole_file

from .runtime import OnnxSampler

FORMATS = (".png", ".npy", ".csv")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-sample", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a folder that ddpm-export wrote")
    parser.add_argument("--num_samples", type=positive_int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed gives the same samples (default: 0)")
    parser.add_argument(
        "--batch_size", type=positive_int, default=512, metavar="N", help="at most so many at once (default: 512)"
    )
    parser.add_argument("--output", type=Path, required=True, help=f"the file to write: {', '.join(FORMATS)}")
    args = parser.parse_args(argv)

    if args.output.suffix not in FORMATS:
        raise ConfigurationError(f"{args.output} must end in one of {', '.join(FORMATS)}")
    sampler = OnnxSampler(args.bundle)
    check_format(sampler, args.output.suffix)
    with (
        whole_file(args.output) as path,
        tqdm(total=args.num_samples * len(sampler.table), desc="sampling", bar_format=_BAR) as progress,
    ):
        samples = sampler.sample(args.num_samples, args.seed, args.batch_size, on_step=progress.update)
        write_samples(sampler, samples, path)
    print(f"{args.output}: {args.num_samples} {'points' if sampler.is_points else 'images'}")


_BAR = "{l_bar}{bar}| {elapsed}<{remaining}"


def check_format(sampler: OnnxSampler, suffix: str) -> None:
    """Raise a `ConfigurationError` if such samples can't be written in the format of that ending."""
    if suffix == ".csv" and not sampler.is_points:
        raise ConfigurationError("a .csv holds points, but this bundle makes images: use .png or .npy")
    if suffix == ".png" and sampler.sample_shape[0] == 1 and sampler.is_points:
        raise ConfigurationError("a picture needs points of at least two coordinates: use .npy or .csv")
    if suffix == ".png" and not sampler.is_points and sampler.sample_shape[0] not in (1, 3):
        raise ConfigurationError(f"a picture needs 1 or 3 channels, not {sampler.sample_shape[0]}: use .npy")


def write_samples(sampler: OnnxSampler, samples: np.ndarray, path: Path) -> None:
    """Write samples, as `OnnxSampler.sample` returns them, in the format of the path's ending."""
    if path.suffix == ".npy":
        np.save(path, samples)
    elif path.suffix == ".csv":
        header = ",".join(sampler.info["data_columns"])
        np.savetxt(path, samples, fmt="%.9g", delimiter=",", header=header, comments="")
    else:
        from .pictures import draw_points, image_grid  # Pillow takes a while to import, and only pictures need it

        (draw_points if sampler.is_points else image_grid)(samples).save(path)


if __name__ == "__main__":
    sys.exit(main())
