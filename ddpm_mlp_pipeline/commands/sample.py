"""Draw samples from a bundle, without PyTorch, or from a checkpoint, with PyTorch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from ..errors import ConfigurationError
from ..export.schedulers import SCHEDULERS
from ..files import check_file, check_folder, whole_file, whole_folder
from ..progress import sampling_bar
from ..runtime.sampler import OnnxSampler, Sampler
from ..sampling import open_sampler
from .asking import add_asking_options, read_asked
from .parser import CommandParser, add_overwrite, command, noise_seed

MAX_POINTS, MAX_GRID = 10**6, 2**28  # points, and bytes of a grid of images, in one picture
is_picture = re.compile(r"[0-9]+\.png").fullmatch  # the files of a folder that this command writes
PLAIN_NAME = re.compile(r'(?!(?:nan|inf|infinity)$)[A-Z_][^",\r\n]*', re.IGNORECASE | re.ASCII)
Writer = Callable[[Path, Iterable[np.ndarray], int, Sampler], None]


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-sample", description=__doc__)
    parser.add_checkpoint("source", ", or a bundle that ddpm-export wrote")
    parser.add_count("--num_samples", "number of samples (default: 1)", default=1)
    parser.add_argument("--seed", type=noise_seed, default=0, help="the same seed gives the same samples (default: 0)")
    parser.add_count("--batch_size", "samples drawn at once (default: 512)", default=512)
    parser.add_argument(
        "--output", type=Path, required=True, help="a .png, .npy or (for points) .csv file, or a folder for images"
    )
    add_asking_options(parser)
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="for a checkpoint (default: its own)")
    parser.add_count("--num_inference_steps", "for a checkpoint (default: all timesteps)")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.output.suffix not in (".png", ".npy", ".csv", ""):
        raise ConfigurationError(f"{args.output} must end in .png, .npy or .csv, or be a folder's name")
    if args.output.suffix:
        check_file(args.output, args.overwrite)
        whole = whole_file
    else:
        check_folder(args.output, is_picture, args.overwrite)
        whole = functools.partial(whole_folder, own=is_picture)

    sampler = open_sampler(args.source, args.scheduler, args.num_inference_steps)
    asked, number = read_asked(args, sampler)
    write = _find_writer(sampler.sample_shape, args.output.suffix, number)
    if not _is_first(sampler):  # this process only draws its share
        for _ in sampler.batches(number, args.seed, args.batch_size, **asked):
            pass
        return

    with (
        whole(args.output, overwrite=args.overwrite) as path,
        sampling_bar(number * len(sampler) * args.resample) as progress,
        closing(sampler.batches(number, args.seed, args.batch_size, progress.update, **asked)) as batches,
    ):
        write(path, batches, number, sampler)
    print(f"{args.output}: {number} {'points' if sampler.is_points else 'images'}")


def _is_first(sampler: Sampler) -> bool:
    """Return whether this process writes the samples, as the first of those that sample a checkpoint together."""
    if isinstance(sampler, OnnxSampler):
        return True
    from ..training.processes import this_process

    return this_process().is_main_process


def _find_writer(sample_shape: tuple[int, ...], suffix: str, number: int) -> Writer:
    """Return the writer for this shape, suffix (`""` for a folder) and number of samples."""
    if suffix == ".npy":
        return _write_npy
    if len(sample_shape) == 1:
        if suffix == ".csv":
            return _write_csv
        if suffix == "":
            raise ConfigurationError("a folder is for images, but these are points: use .png, .npy or .csv")
        if sample_shape[0] < 2:
            raise ConfigurationError("a picture needs points of at least two coordinates: use .npy or .csv")
        if number > MAX_POINTS:
            raise ConfigurationError(f"a picture holds {MAX_POINTS:,} points at most: use .npy or .csv")
        return _write_scatter
    if suffix == ".csv":
        raise ConfigurationError("a .csv holds points, but these are images: use .png, .npy or a folder")
    if sample_shape[0] not in (1, 3):
        raise ConfigurationError(f"a picture needs 1 or 3 channels, not {sample_shape[0]}: use .npy")
    if suffix and number * math.prod(sample_shape) > MAX_GRID:
        limit = MAX_GRID // math.prod(sample_shape)
        raise ConfigurationError(f"a grid holds {limit:,} images of this size at most: use .npy or a folder")
    return _write_grid if suffix else _write_folder


def _write_npy(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    with path.open("wb") as file:
        for i, batch in enumerate(batches):
            if i == 0:
                shape = (number, *batch.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(batch.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(batch).tobytes())


def _write_csv(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(csv_header(sampler.data_columns) + "\n")
        for batch in batches:
            np.savetxt(file, batch, fmt="%.9g", delimiter=",")


def csv_header(names: Iterable[str]) -> str:
    """Return the first line of a CSV file, the same as that of `toCsv` in `web/ddpm.js`.

    A name is quoted if readers could split it, change it or take it for a number. No quotes are needed if it begins
    with a letter or underscore and has no quotes, commas or line breaks.
    """
    return ",".join(name if PLAIN_NAME.fullmatch(name) else '"' + name.replace('"', '""') + '"' for name in names)


def _write_scatter(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from ..runtime.pictures import draw_points

    draw_points(np.concatenate([batch[:, :2] for batch in batches])).save(path)


def _write_grid(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from ..runtime.pictures import image_grid

    image_grid(batches, number).save(path)


def _write_folder(path: Path, batches: Iterable[np.ndarray], number: int, sampler: Sampler) -> None:
    from ..runtime.pictures import to_picture

    images = (image for batch in batches for image in batch)
    for i, image in enumerate(images):
        to_picture(image).save(path / f"{i:0{len(str(number - 1))}}.png")


if __name__ == "__main__":
    main()
