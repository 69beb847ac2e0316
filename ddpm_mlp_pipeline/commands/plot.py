"""Draw a checkpoint's samples, processes or drift, or a bundle's step table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import check_file
from ..runtime.step_table import StepTable
from .parser import CommandParser, add_data_options, add_overwrite, command, command_imports, leaving_out, noise_seed

with command_imports("ddpm-plot", __name__):
    from .. import figures
    from ..data.normalized import load_normalized
    from ..loading import load_checkpoint, without_tables


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-plot", description=__doc__)
    parser.add_argument(
        "kind", choices=["samples", "forward", "reverse", "drift", "animation", "table"], help="what to draw"
    )
    parser.add_checkpoint("checkpoint", "; for a table, a bundle")
    parser.add_argument("--output", type=Path, required=True, help="a .png file; for an animation, .gif or .mp4")
    dataset = "for forward and drift: the data to add noise to; for samples of points: data to show beside samples "
    dataset += "with the same labels and conditions"
    num_samples = "samples to draw (default: 3000 points, 16 images)"
    add_data_options(parser, num_samples, "train", dataset=dataset, required=False)
    parser.set_defaults(split="train")
    parser.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        metavar="T",
        help="timesteps to draw, for forward and reverse (default: 0, 499, 749 and 999 of 1,000)",
    )
    parser.add_argument("--seed", type=noise_seed, default=0, help="seed of the noise (default: 0)")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    suffixes = (".gif", ".mp4") if args.kind == "animation" else (".png",)
    if args.output.suffix not in suffixes:
        raise ConfigurationError(f"{args.output} must end in {' or '.join(suffixes)}")
    check_file(args.output, args.overwrite)
    if args.kind == "table":
        table = StepTable.load(args.checkpoint / "step_table.json")
        figures.save(figures.plot_table(table), args.output, args.overwrite)
        print(args.output)
        return
    pipeline = load_checkpoint(args.checkpoint)
    if pipeline.is_points and pipeline.sample_shape[0] < 2:
        raise ConfigurationError("a picture needs points of at least two coordinates: write samples with ddpm-sample")
    number = args.num_samples or (figures.NUM_POINTS if pipeline.is_points else 16)
    T = pipeline.scheduler.config.num_train_timesteps
    timesteps = sorted(args.timesteps or [0, T // 2 - 1, T * 3 // 4 - 1, T - 1])
    if not all(0 <= t <= T for t in timesteps):
        raise ConfigurationError(f"--timesteps must be from 0 to {T}")

    if args.kind == "animation":
        frames = figures.reverse_process(pipeline, number, args.seed)
        figures.animate_process([("reverse", frames)], args.output, args.overwrite)
    elif args.kind in ("forward", "drift") or (args.kind == "samples" and args.dataset and pipeline.is_points):
        if args.dataset is None:
            raise ConfigurationError(f"{args.kind} needs data: name them with --dataset")
        if args.kind == "drift" and pipeline.sample_shape != (2,):
            raise ConfigurationError("drift needs points of two coordinates: draw reverse instead")
        options: dict[str, Any] = {"split": args.split, "fit": args.fit, "noise": args.dataset_noise}
        with leaving_out(args.skip_corrupt) as on_corrupt:
            data = load_normalized(pipeline, args.dataset, number, **options, on_corrupt=on_corrupt)
        batch = data.__getitems__(list(range(len(data))))
        if args.kind == "drift":
            figure = figures.plot_drift(without_tables(pipeline), batch.x_0, args.seed)
        elif args.kind == "samples":
            figure = figures.plot_what_was_asked(pipeline, batch, args.seed)
        else:
            frames = figures.forward_process(pipeline, batch.x_0, args.seed, timesteps)
            figure = figures.plot_process(frames, figures.DATA_COLOR)
        figures.save(figure, args.output, args.overwrite)
    else:
        timesteps = [0] if args.kind == "samples" else timesteps
        figure = figures.plot_process(figures.reverse_process(pipeline, number, args.seed, timesteps))
        figures.save(figure, args.output, args.overwrite)
    print(args.output)


if __name__ == "__main__":
    main()
