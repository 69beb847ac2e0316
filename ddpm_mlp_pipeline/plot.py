"""Draw a checkpoint's samples, the forward or reverse process, or a bundle's step table: the command `ddpm-plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .commands import CommandParser, command, noise_seed, one_line_errors, positive_int
from .errors import ConfigurationError, explain_missing_extra
from .export.step_table import StepTable

with one_line_errors(), explain_missing_extra("ddpm-plot"):
    import torch

    from . import plots
    from .loading import load_checkpoint
    from .pipeline import DDPMMLPPipeline


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="ddpm-plot", description=__doc__)
    parser.add_argument("kind", choices=["samples", "forward", "reverse", "animation", "table"], help="what to draw")
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder; for a table, a bundle")
    parser.add_argument("--output", type=Path, required=True, help="a .png file; for an animation, .gif or .mp4")
    parser.add_argument("--dataset", help="for forward: the point set or image set whose data turn into noise")
    parser.add_argument("--num_samples", type=positive_int, metavar="N", help="points (3000) or images (16) to draw")
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="for reverse (default: 999 749 499 0)")
    parser.add_argument("--seed", type=noise_seed, default=0, help="of the noise (default: 0)")
    args = parser.parse_args(argv)
    suffixes = (".gif", ".mp4") if args.kind == "animation" else (".png",)
    if args.output.suffix not in suffixes:
        raise ConfigurationError(f"{args.output} must end in {' or '.join(suffixes)}")
    if args.kind == "table":
        plots.save(plots.plot_table(StepTable.load(args.checkpoint / "step_table.json")), args.output)
        print(args.output)
        return
    pipeline = load_checkpoint(args.checkpoint)
    if pipeline.is_points and pipeline.sample_shape[0] < 2:
        raise ConfigurationError("points of one coordinate have no picture")
    number = args.num_samples or (plots.NUM_POINTS if pipeline.is_points else 16)

    if args.kind == "animation":
        plots.animate_process([("reverse", plots.reverse_process(pipeline, number, args.seed))], args.output)
    elif args.kind == "forward":
        if args.dataset is None:
            raise ConfigurationError("the forward process starts from data: name them with --dataset")
        x_0 = _load_data(pipeline, args.dataset, number)
        plots.save(
            plots.plot_process(plots.some_frames(plots.forward_process(pipeline, x_0, args.seed)), plots.DATA_COLOR),
            args.output,
        )
    else:
        T = pipeline.scheduler.config.num_train_timesteps
        several = args.timesteps or [T - 1, T * 3 // 4 - 1, T // 2 - 1, 0]
        timesteps = [0] if args.kind == "samples" else several
        if not all(0 <= t <= T for t in timesteps):
            raise ConfigurationError(f"--timesteps must be from 0 to {T}")
        plots.save(plots.plot_process(plots.reverse_process(pipeline, number, args.seed, timesteps)), args.output)
    print(args.output)


def _load_data(pipeline: DDPMMLPPipeline, dataset: str, number: int) -> torch.Tensor:
    """Data as the network sees them."""
    if pipeline.is_points:
        from .data.points import POINT_SETS, load_points, to_array

        # Of a file, as many as there are, up to that number
        rows = load_points(dataset, number if dataset in POINT_SETS else None)
        points = torch.from_numpy(to_array(rows)[:number]).float()
        return (points - points.new_tensor(pipeline.config.data_mean)) / points.new_tensor(pipeline.config.data_std)
    from .data.images import load_images, to_network_units

    channels, height, width = pipeline.sample_shape
    resolution = height if height == width else None
    return to_network_units(load_images(dataset, f"train[:{number}]", resolution, channels=channels))


if __name__ == "__main__":
    main()
