"""Make untrained pipelines from the options of a training run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch
from diffusers import UNet2DModel

from ..data.points import POINT_SETS, load_points, to_array
from ..errors import ConfigurationError, DatasetError
from ..models.mlp import MLPModel
from ..models.unet import SmallUNet2DModel
from ..pipeline import DDPMMLPPipeline
from .options import ImageTrainingArguments, PointTrainingArguments


def make_point_pipeline(args: PointTrainingArguments) -> tuple[DDPMMLPPipeline, torch.Tensor]:
    """Return the untrained pipeline and its training data: normalised points, float32 `[number, dimension]`."""
    size = 100_000 if args.dataset_size is None and args.dataset in POINT_SETS else args.dataset_size
    dataset = load_points(args.dataset, size, args.dataset_noise, args.seed, exclude=args.exclude or ())
    points = to_array(dataset)
    mean, std = points.mean(axis=0), points.std(axis=0)
    if constant := [column for column, spread in zip(dataset.column_names, std, strict=True) if spread == 0]:
        names = ", ".join(map(repr, constant))
        raise DatasetError(f"{args.dataset} has constant columns, {names}: pass --exclude {shlex.join(constant)}")
    x_0 = torch.from_numpy((points - mean) / std).float()

    in_channels = points.shape[1]
    sizes = (args.embedding_dim, args.hidden_dim, args.num_hidden_layers)
    try:
        unet = MLPModel(in_channels, None, *sizes, args.num_predictions * in_channels)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    scheduler = args.make_scheduler(clip_sample_range=x_0.abs().max().item())
    pipeline = DDPMMLPPipeline(unet, scheduler, mean.tolist(), std.tolist(), dataset.column_names)
    return pipeline, x_0


def default_batch_size(dataset_size: int) -> int:
    """Return the batch size of a process for its share of the data."""
    return min(2048, dataset_size)


def make_image_pipeline(args: ImageTrainingArguments, sample_shape: Sequence[int]) -> DDPMMLPPipeline:
    """Return the untrained pipeline for images of the shape `(channels, height, width)`."""
    channels, height, width = sample_shape
    out_channels = args.num_predictions * channels
    shape = {"sample_size": (height, width), "in_channels": channels, "out_channels": out_channels}
    try:
        widths = tuple(map(int, args.block_out_channels.split(",")))
        options = {"block_out_channels": widths, "layers_per_block": args.layers_per_block}
        if args.model == "mlp":
            sizes = (args.embedding_dim, args.hidden_dim, args.num_hidden_layers)
            unet = MLPModel(channels, (height, width), *sizes, out_channels)
        elif args.model == "unet":
            unet = SmallUNet2DModel(
                **shape, **options, attention=args.attention, time_conditioning=args.time_conditioning
            )
        else:
            divisor = 2 ** (len(widths) - 1)
            if height % divisor or width % divisor:
                raise ConfigurationError(f"the stock model needs heights and widths that are multiples of {divisor}")
            lowest = "Attn" if args.attention else ""
            unet = UNet2DModel(
                **shape,
                **options,
                down_block_types=("DownBlock2D",) * (len(widths) - 1) + (f"{lowest}DownBlock2D",),
                up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
                add_attention=args.attention,
            )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return DDPMMLPPipeline(unet.to(memory_format=torch.channels_last), args.make_scheduler(clip_sample_range=1.0))
