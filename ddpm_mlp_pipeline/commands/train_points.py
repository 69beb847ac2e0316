"""Train a DDPM on points: accelerate launch train_scripts/train_points.py --dataset heart --output_dir runs/heart"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .parser import command, command_imports

with command_imports("training", __name__):
    from accelerate.utils import set_seed

    from .. import figures
    from ..data.batches import TensorBatches
    from ..data.points import warn_of_columns
    from ..training import model_card
    from ..training.loop import check_output_dir, train
    from ..training.options import PRESETS, PointTrainingArguments
    from ..training.pipelines import default_batch_size, make_point_pipeline
    from ..training.processes import this_process
    from .presets import parse_options


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(PointTrainingArguments, argv, __doc__, presets=PRESETS)
    check_output_dir(args, *figures.FIGURES, model_card.CARD_NAME)
    set_seed(args.seed)
    repo_id = model_card.create_repo(args) if args.push_to_hub and this_process().is_main_process else None
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
            written += figures.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed)
        model_card.write_model_card(args, pipeline, len(losses), args.dataset)
        print(f"{args.output_dir}: {', '.join(written)}")
        if repo_id is not None:
            print(model_card.push(repo_id, args))


if __name__ == "__main__":
    main()
