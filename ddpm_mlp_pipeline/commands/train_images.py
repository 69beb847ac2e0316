"""Train a DDPM on images: accelerate launch train_scripts/train_images.py --dataset_name NAME --output_dir FOLDER"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from .parser import command, command_imports, leaving_out

with command_imports("training", __name__):
    from diffusers.training_utils import EMAModel

    from .. import figures
    from ..data.batches import Batch, Draw
    from ..data.images import ImageBatches, load_labelled_images, mirror_half
    from ..data.shards import ImageShards
    from ..pipeline import DDPMMLPPipeline
    from ..training.loop import train
    from ..training.options import ImageTrainingArguments
    from ..training.pipelines import choose_resolution, class_shares_of, make_image_pipeline
    from ..training.processes import this_process
    from .runs import finish_run, start_run


def draw_samples(args: ImageTrainingArguments, pipeline: DDPMMLPPipeline, ema: EMAModel | None, epoch: int) -> None:
    """Draw samples of the raw and of the averaged weights from the same noise, side by side."""
    raw = figures.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
    titles = (f"epoch {epoch}", "")
    averaged = raw
    if ema is not None:
        ema.store(pipeline.unet.parameters())
        ema.copy_to(pipeline.unet.parameters())
        averaged = figures.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
        ema.restore(pipeline.unet.parameters())
        # With fewer steps than the average spans, it consists mostly of the untrained weights.
        young = ema.optimization_step < 5 / (1 - ema.cur_decay_value)
        titles = (f"epoch {epoch}, raw weights", "EMA, still young: it will catch up" if young else "EMA")
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    figures.save(figures.plot_samples(raw, averaged, titles), folder / f"epoch-{epoch:04}.png", overwrite=True)


def train_on_images(
    args: ImageTrainingArguments,
    data: ImageBatches | ImageShards,
    class_names: Sequence[str] = (),
    draw_samples: Callable[..., None] | None = None,
) -> tuple[DDPMMLPPipeline, list[float]]:
    """Train a new pipeline on images of some classes; return it and the steps' losses."""
    shares = class_shares_of(data.class_labels, len(class_names))
    pipeline = make_image_pipeline(args, data.sample_shape, class_names, shares)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, train(pipeline, data, args, draw_samples, _mirror if args.random_flip else None)


def _mirror(batch: Batch, draw: Draw) -> Batch:
    return batch._replace(x_0=mirror_half(batch.x_0, draw()))


@command
def main(argv: Sequence[str] | None = None) -> None:
    args, repo_id = start_run(ImageTrainingArguments, argv, __doc__)
    data, class_names = _load_data(args)
    channels, height, width = data.sample_shape
    shape = f"{height}×{width}, channels: {channels}"
    this_process().print(f"{len(data)} images, {shape}, classes: {len(class_names) or 'none'}")
    pipeline, losses = train_on_images(args, data, class_names, functools.partial(draw_samples, args))
    finish_run(args, pipeline, data, losses, args.dataset_name, repo_id, args.ddpm_num_inference_steps)


def _load_data(args: ImageTrainingArguments) -> tuple[ImageBatches | ImageShards, list[str]]:
    """Return the images, and the names of their classes."""
    if args.streaming:
        form = (args.resolution, args.fit, args.channels, args.seed)
        shards = ImageShards(args.dataset_name, args.label_column, args.split, *form)
        return shards, shards.class_names
    process = this_process()
    with process.local_main_process_first(), leaving_out(args.skip_corrupt, not process.is_main_process) as on_corrupt:
        choose_resolution(args)
        images, labels, class_names = load_labelled_images(
            *(args.dataset_name, args.label_column, args.split),
            *(args.resolution, args.fit, args.channels),
            on_corrupt=on_corrupt,
        )
    return ImageBatches(images, labels).to_accelerator(process.device), class_names


if __name__ == "__main__":
    main()
