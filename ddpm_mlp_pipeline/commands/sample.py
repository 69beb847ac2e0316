"""Draw samples from a bundle, without PyTorch, or from a checkpoint, with PyTorch.

A draw that takes long keeps its samples in parts, in a folder beside the output. If it is interrupted, the same
command goes on from there.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DDPMPipelineError
from ..export.schedulers import SCHEDULERS
from ..files import check_file, check_folder, whole_file, whole_folder
from ..parts import Drawn, Parts
from ..progress import sampling_bar
from ..runtime.pictures import to_pixels
from ..runtime.sampler import OnnxSampler, Sampler
from ..sampling import is_first_process, open_sampler
from ..writers import SUFFIXES, find_writer
from .asking import Asking, add_asking_options, read_asking
from .parser import (
    CommandParser,
    add_engine,
    add_overwrite,
    check_engine,
    command,
    noise_seed,
)

CHUNK = 2**18  # samples whose arguments are prepared at once
is_picture = re.compile(r"[0-9]+\.png").fullmatch  # the files of a folder that this command writes


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-sample", description=__doc__)
    parser.add_checkpoint("source", ", or a bundle that ddpm-export wrote")
    parser.add_argument("--seed", type=noise_seed, default=0, help="the same seed gives the same samples (default: 0)")
    parser.add_count("--batch_size", "samples drawn at once (default: 512)", default=512)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a .png, .npy, .parquet or (for points and tables) .csv file, or a folder for images",
    )
    add_asking_options(parser)
    parser.add_argument("--scheduler", choices=SCHEDULERS, help="for a checkpoint (default: its own)")
    parser.add_count("--num_inference_steps", "for a checkpoint (default: all timesteps)")
    add_engine(parser)
    add_overwrite(parser)
    args = parser.parse_args(argv)
    suffix = args.output.suffix
    if suffix not in SUFFIXES:
        raise ConfigurationError(f"{args.output} must end in .png, .npy, .csv or .parquet, or be a folder's name")
    check_engine(args)
    if suffix:
        check_file(args.output, args.overwrite)
        whole = whole_file
    else:
        check_folder(args.output, is_picture, args.overwrite)
        whole = functools.partial(whole_folder, own=is_picture)

    opening = (args.source, args.scheduler, args.num_inference_steps)
    sampler = open_sampler(*opening, device=args.device, provider=args.provider)
    asking = read_asking(args, sampler)
    number, steps = len(asking.samples), len(sampler) * args.resample
    write = find_writer(sampler, suffix, number)
    draw = functools.partial(_draw, sampler, asking, args.seed, args.batch_size)
    is_first = is_first_process(args.source)
    if args.engine == "ray":
        if not is_first:
            return
        from ..ray_engine import draw_with_ray

        draw = functools.partial(draw_with_ray, opening, args.address, steps, asking.of, args.seed, args.batch_size)
    elif not is_first:  # this process only draws its share
        for _ in draw(_shared(sampler)):
            pass
        return

    as_pixels = not sampler.is_points and suffix != ".npy"

    def describe() -> dict[str, Any]:
        return {
            "source": _checksum(args.source),
            "scheduler": [args.scheduler, args.num_inference_steps],
            "seed": args.seed,
            "samples": [asking.samples.start, asking.samples.stop],
            "labels, conditions and known values": asking.digest(),
            "type": "uint8" if as_pixels else "float32",
        }

    folder = args.output.with_name(f"{args.output.name}.parts")
    with (
        whole(args.output, overwrite=args.overwrite) as path,
        Parts(folder, asking.samples, describe, args.overwrite) as parts,
        sampling_bar(number * steps, parts.num_saved * steps) as progress,
    ):
        gaps = parts.gaps() if args.engine == "ray" else _shared(sampler, parts.gaps())
        try:
            with closing(draw(gaps, progress.update)) as drawn:
                parts.add((numbers, to_pixels(x) if as_pixels else x) for numbers, x in drawn)
            write(path, parts, number, sampler)
        except (KeyboardInterrupt, OSError, DDPMPipelineError) as error:
            raise _explained(error, parts, number) from error
    parts.delete()
    kind = "images" if not sampler.is_points else "points" if sampler.codec is None else "rows"
    print(f"{args.output}: {number} {kind}")


def _draw(
    sampler: Sampler,
    asking: Asking,
    seed: int,
    batch_size: int,
    gaps: Sequence[range],
    on_step: Callable[[int], Any] | None = None,
) -> Generator[Drawn, None, None]:
    """Draw the samples of these numbers."""
    for gap in gaps:
        for chunk in (gap[i : i + CHUNK] for i in range(0, len(gap), CHUNK)):
            first = chunk.start
            with closing(sampler.batches(chunk, seed, batch_size, on_step, **asking.of(chunk))) as batches:
                for batch in batches:
                    yield range(first, first + len(batch)), batch
                    first += len(batch)


def _shared(sampler: Sampler, gaps: list[range] | None = None) -> list[range]:
    """Return the first process's gaps in all processes that sample a checkpoint together."""
    if isinstance(sampler, OnnxSampler):
        return gaps or []
    from accelerate.utils import broadcast_object_list

    (shared,) = broadcast_object_list([gaps])
    return shared


def _checksum(source: Path) -> str:
    """Return a checksum of the files that say what is drawn."""
    if (source / "bundle.json").is_file():
        files = [source / name for name in ("bundle.json", "step_table.json", "unet.onnx")]
    else:
        folders = (source / "unet", source / "scheduler")
        files = [source / "model_index.json", *sorted(path for folder in folders for path in folder.glob("*.*"))]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _explained(error: BaseException, parts: Parts, number: int) -> BaseException:
    """Return the error that also says how to go on, if there are parts."""
    if not parts.num_saved:
        return error
    how = f"{parts.num_saved:,} of {number:,} samples are in {parts.folder}: the same command goes on from there"
    if isinstance(error, OSError) and error.strerror:
        return OSError(error.errno, f"{error.strerror}; {how}", error.filename)
    return type(error)(f"{str(error) or 'interrupted'}; {how}")


if __name__ == "__main__":
    main()
