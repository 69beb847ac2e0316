"""The first and the last steps of a training run, on points or on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import set_seed

from .. import figures
from ..pipeline import DDPMMLPPipeline
from ..training import model_card
from ..training.options import PRESETS, TrainingArguments
from ..training.processes import this_process
from ..training.run import check_output_dir
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
    x_0: torch.Tensor,
    losses: list[float],
    dataset: str,
    repo_id: str | None,
    steps: int | None = None,
) -> None:
    """Draw the figures (see `draw_training_run`), write the model card and push them, in the main process only."""
    if not this_process().is_main_process:
        return
    written = ["the checkpoint", "README.md"]
    if args.figures:
        written += figures.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed, steps or 100)
    model_card.write_model_card(args, pipeline, len(losses), dataset)
    print(f"{args.output_dir}: {', '.join(written)}")
    if repo_id is not None:
        print(model_card.push(repo_id, args))
