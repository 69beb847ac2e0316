"""Train a DDPM on images: accelerate launch train_scripts/train_images.py --dataset_name NAME --output_dir FOLDER"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ddpm_mlp_pipeline.commands import command, command_imports, leaving_out
from ddpm_mlp_pipeline.errors import ConfigurationError

with command_imports("training", __name__):
    import torch
    from accelerate.utils import set_seed
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    from ddpm_mlp_pipeline import hub, plots
    from ddpm_mlp_pipeline.arguments import parse_options
    from ddpm_mlp_pipeline.data.images import ImageBatches, load_images, mirror_half, to_network_units
    from ddpm_mlp_pipeline.models.mlp import MLPModel
    from ddpm_mlp_pipeline.models.unet import SmallUNet2DModel
    from ddpm_mlp_pipeline.pipeline import DDPMMLPPipeline
    from ddpm_mlp_pipeline.processes import this_process
    from ddpm_mlp_pipeline.training import TrainingArguments, check_output_dir, option, train


@dataclasses.dataclass(kw_only=True)
class ImageTrainingArguments(TrainingArguments):
    """The training loop's options, and those of data, network and schedule."""

    dataset_name: str = option(help="a data set on the hub, a folder that load_dataset takes, or a folder of images")
    split: str = option("train", "which split of it")
    resolution: int | None = option(
        None, "height and width to bring the images to; by default they are left as they are"
    )
    fit: str = option("resize", "how: scale the images, or centre them on black", choices=["resize", "pad"])
    channels: int | None = option(None, "1 (grey), 3 (RGB) or 4 (RGBA); by default what the first image has")
    skip_corrupt: bool = option(False, "leave out images that can't be read, and list them")
    random_flip: bool = option(False, "mirror half of the images, left to right")
    model: str = option("unet", "the network; stock is diffusers' UNet2DModel", choices=["unet", "mlp", "stock"])
    block_out_channels: str = option("32,64,128", "unet, stock: width at each resolution, separated by commas")
    layers_per_block: int = option(1, "unet, stock: residual blocks at each resolution, down and up")
    attention: bool = option(True, "unet, stock: self-attention at the lowest resolution")
    time_conditioning: str = option("every_block", "unet: where the timestep enters", choices=["every_block", "once"])
    embedding_dim: int = option(100, "mlp: size of the timestep's embedding")
    hidden_dim: int = option(2048, "mlp: width")
    num_hidden_layers: int = option(5, "mlp: number of residual blocks")
    ddpm_num_inference_steps: int | None = option(None, "sampling steps of the figures; by default 50, or T")

    learning_rate: float = option(1e-3, "peak learning rate of Adam")
    lr_warmup_steps: int = option(200, "steps of linear warm-up of the learning rate")
    ema_max_decay: float = option(0.999, "decay that the average, which warms up, reaches at most")

    def __post_init__(self) -> None:
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 20
        super().__post_init__()
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(50, self.ddpm_num_steps)
        if not 1 <= self.ddpm_num_inference_steps <= self.ddpm_num_steps:
            raise ConfigurationError(f"ddpm_num_inference_steps must be from 1 to {self.ddpm_num_steps}")


def make_image_pipeline(args: ImageTrainingArguments, sample_shape: tuple[int, int, int]) -> DDPMMLPPipeline:
    """The untrained pipeline, for images of `(channels, height, width)`."""
    channels, *size = sample_shape
    out_channels = args.num_predictions * channels
    try:
        widths = tuple(int(width) for width in args.block_out_channels.split(","))
        if args.model == "mlp":
            unet = MLPModel(
                channels, tuple(size), args.embedding_dim, args.hidden_dim, args.num_hidden_layers, out_channels
            )
        elif args.model == "unet":
            unet = SmallUNet2DModel(
                sample_size=tuple(size),
                in_channels=channels,
                out_channels=out_channels,
                block_out_channels=widths,
                layers_per_block=args.layers_per_block,
                attention=args.attention,
                time_conditioning=args.time_conditioning,
            )
        else:
            divisor = 2 ** (len(widths) - 1)
            if any(length % divisor for length in size):
                raise ConfigurationError(f"the stock model needs heights and widths that are multiples of {divisor}")
            lowest = "Attn" if args.attention else ""
            unet = UNet2DModel(
                sample_size=tuple(size),
                in_channels=channels,
                out_channels=out_channels,
                block_out_channels=widths,
                layers_per_block=args.layers_per_block,
                down_block_types=("DownBlock2D",) * (len(widths) - 1) + (f"{lowest}DownBlock2D",),
                up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
                add_attention=args.attention,
            )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return DDPMMLPPipeline(unet.to(memory_format=torch.channels_last), args.make_scheduler(clip_sample_range=1.0))


def draw_samples(args: ImageTrainingArguments, pipeline: DDPMMLPPipeline, ema: EMAModel | None, epoch: int) -> None:
    """Draw the same noise's samples with the raw and with the averaged weights, side by side."""
    raw = plots.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
    titles = (f"epoch {epoch}", "")
    averaged = raw
    if ema is not None:
        ema.store(pipeline.unet.parameters())
        ema.copy_to(pipeline.unet.parameters())
        averaged = plots.draw_samples(pipeline, args.ddpm_num_inference_steps, args.seed)
        ema.restore(pipeline.unet.parameters())
        # An average over more steps than there were is mostly made of the untrained weights.
        young = ema.optimization_step < 5 / (1 - ema.cur_decay_value)
        titles = (f"epoch {epoch}, raw weights", "EMA, still young: it will catch up" if young else "EMA")
    folder = Path(args.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    plots.save(plots.plot_samples(raw, averaged, titles), folder / f"epoch-{epoch:04}.png", overwrite=True)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(ImageTrainingArguments, argv, __doc__, presets=Path(__file__).parent / "configs")
    check_output_dir(args, *plots.FIGURES, hub.CARD_NAME)
    set_seed(args.seed)
    repo_id = hub.create_repo(args) if args.push_to_hub and this_process().is_main_process else None
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
            x_0, steps = to_network_units(images[: plots.NUM_IMAGES]), args.ddpm_num_inference_steps
            written += plots.draw_training_run(pipeline, x_0, losses, Path(args.output_dir), args.seed, steps)
        hub.write_model_card(args, pipeline, len(losses), args.dataset_name)
        print(f"{args.output_dir}: {', '.join(written)}")
        if repo_id is not None:
            print(hub.push(repo_id, args))


if __name__ == "__main__":
    main()
