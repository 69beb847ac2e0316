"""Train a DDPM on points: accelerate launch train_scripts/train_points.py --dataset heart --output_dir runs/heart"""

from __future__ import annotations

from collections.abc import Sequence

from .parser import command, command_imports

with command_imports("training", __name__):
    from ..data.points import warn_of_columns
    from ..training.loop import train
    from ..training.options import PointTrainingArguments
    from ..training.pipelines import default_batch_size, make_point_pipeline
    from ..training.processes import this_process
    from .runs import finish_run, start_run


@command
def main(argv: Sequence[str] | None = None) -> None:
    args, repo_id = start_run(PointTrainingArguments, argv, __doc__)
    pipeline, data = make_point_pipeline(args)
    if this_process().is_main_process:
        warn_of_columns(args.dataset, pipeline.config.data_columns)
    if args.train_batch_size is None:
        args.train_batch_size = default_batch_size(len(data) // this_process().num_processes)
    pipeline.set_progress_bar_config(disable=True)
    losses = train(pipeline, data, args)
    finish_run(args, pipeline, data, losses, args.dataset, repo_id)


if __name__ == "__main__":
    main()
