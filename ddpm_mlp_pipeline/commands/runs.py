"""The first and the last steps of a training run, on points or on images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from accelerate.utils import set_seed

from .. import figures
from ..data.batches import KnownBatches
from ..pipeline import DDPMMLPPipeline
from ..progress import progress_bar
from ..training import model_card
from ..training.fit_features import default_features
from ..training.fitting import TableFitter, play
from ..training.options import PRESETS, FittingArguments, TrainingArguments
from ..training.processes import this_process
from ..training.run import check_output_dir, save_pipeline
from .presets import parse_options

Options = TypeVar("Options", bound=TrainingArguments)


def start_run(arguments: type[Options], argv: Sequence[str] | None, description: str) -> tuple[Options, str | None]:
    """Parse the options, check the output folder, and set the seed.

    Returns:
        The options, and the repository to push to: `None` without `--push_to_hub` or outside the main process.
    """
    args = parse_options(arguments, argv, description, presets=PRESETS)
    check_output_dir(args, *figures.FIGURES, model_card.CARD_NAME)
    set_seed(args.seed)
    is_pushed = args.push_to_hub and this_process().is_main_process
    return args, model_card.create_repo(args) if is_pushed else None


def finish_run(
    args: TrainingArguments,
    pipeline: DDPMMLPPipeline,
    data: KnownBatches,
    losses: list[float],
    dataset: str,
    repo_id: str | None,
    steps: int | None = None,
) -> None:
    """Draw the figures (see `draw_training_run`), write the model card, fit tables of few calls and push all, in the
    main process only."""
    if not this_process().is_main_process:
        return
    written = ["the checkpoint", "README.md"]
    if args.figures:
        number = figures.NUM_POINTS if pipeline.is_points else figures.NUM_IMAGES
        x_0 = data.__getitems__(list(range(min(number, len(data))))).x_0.cpu()
        written += figures.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed, steps or 100)
    model_card.write_model_card(args, pipeline, len(losses), dataset)
    print(f"{args.output_dir}: {', '.join(written)}", flush=True)
    if args.num_calls:
        _fit(args, pipeline, data, args.num_calls)
        print(f"{args.output_dir}: fitted tables of {', '.join(map(str, args.num_calls))} calls")
    if repo_id is not None:
        print(model_card.push(repo_id, args))


def _fit(args: TrainingArguments, pipeline: DDPMMLPPipeline, data: KnownBatches, num_calls: Sequence[int]) -> None:
    """Fit tables of few calls, and save the pipeline with a scheduler that plays them."""
    defaults = FittingArguments.of_points if pipeline.is_points else FittingArguments.of_images
    fitting = defaults(seed=args.seed)
    fitting = dataclasses.replace(fitting, batch_size=min(fitting.batch_size, len(data) // 2))
    fitter = TableFitter(pipeline, data, default_features(pipeline, data), fitting)
    with progress_bar(total=fitting.steps * len(set(num_calls)), desc="fitting") as progress:
        tables = fitter.fit(num_calls, progress.update)
    play(pipeline, [tables[calls] for calls in num_calls])
    save_pipeline(pipeline, Path(args.output_dir))
