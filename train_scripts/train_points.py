"""Train a DDPM on points: accelerate launch train_scripts/train_points.py --dataset heart --output_dir runs/heart"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from ddpm_mlp_pipeline.commands import command, command_imports
from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError

with command_imports("training", __name__):
    import torch
    from accelerate.utils import set_seed

    from ddpm_mlp_pipeline import hub, plots
    from ddpm_mlp_pipeline.arguments import parse_options
    from ddpm_mlp_pipeline.data.normalized import TensorBatches
    from ddpm_mlp_pipeline.data.points import POINT_SETS, load_points, to_array, warn_of_columns
    from ddpm_mlp_pipeline.models.mlp import MLPModel
    from ddpm_mlp_pipeline.pipeline import DDPMMLPPipeline
    from ddpm_mlp_pipeline.processes import this_process
    from ddpm_mlp_pipeline.training import TrainingArguments, check_output_dir, option, train


@dataclasses.dataclass(kw_only=True)
class PointTrainingArguments(TrainingArguments):
    """The training loop's options, with defaults that suit points, and those of data, network and schedule."""

    dataset: str = option("heart", "a point set's name, or a .csv, .parquet or .npy file of numeric columns")
    dataset_size: int | None = option(None, "points to draw (100,000 by default), or to choose from a file (all)")
    dataset_noise: float | None = option(None, "standard deviation of the data's noise; by default each set's own")
    exclude: Sequence[str] | None = option(None, "names of columns to leave out")
    embedding_dim: int = option(32, "size of the embedding of the timestep and of each coordinate")
    hidden_dim: int = option(64, "width of the network")
    num_hidden_layers: int = option(4, "number of residual blocks")

    train_batch_size: int | None = option(
        None, "batch size of each process; by default 2,048, or all of a smaller set"
    )
    max_train_steps: int | None = option(None, "optimizer steps; overrides num_epochs (8,000 if neither is given)")
    learning_rate: float = option(2e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "steps of linear warm-up of the learning rate")
    ema_max_decay: float = option(0.999, "decay that the average, which warms up, reaches at most")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.max_train_steps = 8000
        super().__post_init__()
        if self.mixed_precision != "no":
            raise ConfigurationError("points are trained in float32: lower precision would blur their embedding")


def make_point_pipeline(args: PointTrainingArguments) -> tuple[DDPMMLPPipeline, torch.Tensor]:
    """The untrained pipeline, and the points, normalised, that it is to learn."""
    size = 100_000 if args.dataset_size is None and args.dataset in POINT_SETS else args.dataset_size
    dataset = load_points(args.dataset, size, args.dataset_noise, args.seed, exclude=args.exclude or ())
    points = to_array(dataset)
    mean, std = points.mean(axis=0), points.std(axis=0)
    constant = [column for column, spread in zip(dataset.column_names, std, strict=True) if spread == 0]
    if constant:
        names = ", ".join(map(repr, constant))
        raise DatasetError(f"constant in {args.dataset}: {names}; leave out with --exclude {shlex.join(constant)}")
    x_0 = torch.from_numpy((points - mean) / std).float()

    try:
        out_channels = args.num_predictions * points.shape[1]
        unet = MLPModel(
            points.shape[1], None, args.embedding_dim, args.hidden_dim, args.num_hidden_layers, out_channels
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    scheduler = args.make_scheduler(clip_sample_range=x_0.abs().max().item())
    pipeline = DDPMMLPPipeline(unet, scheduler, mean.tolist(), std.tolist(), dataset.column_names)
    return pipeline, x_0


def default_batch_size(dataset_size: int) -> int:
    """Of a process whose share of the data is so large."""
    return min(2048, dataset_size)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(PointTrainingArguments, argv, __doc__, presets=Path(__file__).parent / "configs")
    check_output_dir(args, *plots.FIGURES, hub.CARD_NAME)
    set_seed(args.seed)
    repo_id = hub.create_repo(args) if args.push_to_hub and this_process().is_main_process else None
    pipeline, x_0 = make_point_pipeline(args)
    if this_process().is_main_process:
        warn_of_columns(args.dataset, pipeline.config.data_columns)
    if args.train_batch_size is None:
        args.train_batch_size = default_batch_size(len(x_0) // this_process().num_processes)
    pipeline.set_progress_bar_config(disable=True)
    losses = train(pipeline, TensorBatches(x_0), args)
    if this_process().is_main_process:
        written = ["the checkpoint", "README.md"]
        if args.figures:
            written += plots.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed)
        hub.write_model_card(args, pipeline, len(losses), args.dataset)
        print(f"{args.output_dir}: {', '.join(written)}")
        if repo_id is not None:
            print(hub.push(repo_id, args))


if __name__ == "__main__":
    main()
