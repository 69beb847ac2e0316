"""Train a DDPM on a table: accelerate launch train_scripts/train_table.py --dataset FILE --output_dir FOLDER"""

from __future__ import annotations

from collections.abc import Sequence

from .parser import command, command_imports

with command_imports("training", __name__):
    from ..data.tables import describe, load_table
    from ..training.loop import train
    from ..training.options import TableTrainingArguments
    from ..training.pipelines import conceal_columns, make_table_pipeline
    from ..training.processes import this_process
    from .runs import finish_run, start_run


@command
def main(argv: Sequence[str] | None = None) -> None:
    args, repo_id = start_run(TableTrainingArguments, argv, __doc__)
    table = load_table(
        args.dataset,
        column_kinds=args.kinds,
        exclude=args.exclude or (),
        num_samples=args.dataset_size,
        seed=args.seed,
    )
    this_process().print(describe(table))
    pipeline, data = make_table_pipeline(args, table)
    pipeline.set_progress_bar_config(disable=True)
    losses = train(pipeline, data, args, augment=conceal_columns(table.codec.column_numbers))
    finish_run(args, pipeline, data, losses, args.dataset, repo_id)


if __name__ == "__main__":
    main()
