"""Train a DDPM on images: accelerate launch train_scripts/train_images.py --dataset_name NAME --output_dir FOLDER"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .parser import command, command_imports, leaving_out

with command_imports("training", __name__):
    from accelerate.utils import set_seed
    from diffusers.training_utils import EMAModel

    from .. import figures
    from ..data.images import ImageBatches, load_images, mirror_half, to_network_units
    from ..pipeline import DDPMMLPPipeline
    from ..training import model_card
    from ..training.loop import check_output_dir, train
    from ..training.options import PRESETS, ImageTrainingArguments
    from ..training.pipelines import make_image_pipeline
    from ..training.processes import this_process
    from .presets import parse_options


def draw_samples(args: ImageTrainingArguments, pipeline: DDPMMLPPipeline, ema: EMAModel | None, epoch: int) -> None:
    """Draw the same noise's samples with the raw and with the averaged weights, side by side."""
    raw = figures.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
    titles = (f"epoch {epoch}", "")
    averaged = raw
    if ema is not None:
        ema.store(pipeline.unet.parameters())
        ema.copy_to(pipeline.unet.parameters())
        averaged = figures.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
        ema.restore(pipeline.unet.parameters())
        # An average over more steps than there were is mostly made of the untrained weights.
        young = ema.optimization_step < 5 / (1 - ema.cur_decay_value)
        titles = (f"epoch {epoch}, raw weights", "EMA, still young: it will catch up" if young else "EMA")
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    figures.save(figures.plot_samples(raw, averaged, titles), folder / f"epoch-{epoch:04}.png", overwrite=True)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(ImageTrainingArguments, argv, __doc__, presets=PRESETS)
    check_output_dir(args, *figures.FIGURES, model_card.CARD_NAME)
    set_seed(args.seed)
    repo_id = model_card.create_repo(args) if args.push_to_hub and this_process().is_main_process else None
    process = this_process()
    with process.local_main_process_first(), leaving_out(args.skip_corrupt, not process.is_main_process) as on_corrupt:
        form = args.resolution, args.fit, args.channels
        images = load_images(args.dataset_name, args.split, *form, on_corrupt=on_corrupt)
    pipeline = make_image_pipeline(args, tuple(images.shape[1:]))
    pipeline.set_progress_bar_config(disable=True)
    augment = mirror_half if args.random_flip else None
    losses = train(pipeline, ImageBatches(images), args, lambda *state: draw_samples(args, *state), augment)
    if this_process().is_main_process:
        written = ["the checkpoint", "README.md"]
        if args.figures:
            x_0, steps = to_network_units(images[: figures.NUM_IMAGES]), args.ddpm_num_inference_steps
            written += figures.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed, steps)
        model_card.write_model_card(args, pipeline, len(losses), args.dataset_name)
        print(f"{args.output_dir}: {', '.join(written)}")
        if repo_id is not None:
            print(model_card.push(repo_id, args))


if __name__ == "__main__":
    main()
