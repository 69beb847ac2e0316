"""The untrained pipelines that the options of a training run describe."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from ..data.batches import Batch, Draw, TensorBatches
from ..data.images import usual_resolution
from ..data.normalized import normalize
from ..data.points import POINT_SETS, load_points, split_columns
from ..data.tables import Table
from ..errors import ConfigurationError, DatasetError
from ..models.mlp import MLPModel
from ..models.unet import SmallUNet2DModel
from ..pipeline import DDPMMLPPipeline
from .options import (
    ImageTrainingArguments,
    PointTrainingArguments,
    TableTrainingArguments,
    default_widths,
    widths_of,
)

MIN_ROWS = 100_000  # rows of a table in an epoch


def make_point_pipeline(args: PointTrainingArguments) -> tuple[DDPMMLPPipeline, TensorBatches]:
    """Make the untrained pipeline, and the points, normalised, that it is to learn."""
    size = 100_000 if args.dataset_size is None and args.dataset in POINT_SETS else args.dataset_size
    label_column, condition_columns = args.label_column, list(args.condition_columns or ())
    dataset = load_points(
        args.dataset,
        size,
        args.dataset_noise,
        args.seed,
        exclude=args.exclude or (),
        label_column=label_column,
        condition_columns=condition_columns,
    )
    points, conditions, labels, class_names = split_columns(dataset, label_column, condition_columns)
    columns = [name for name in dataset.column_names if name not in (label_column, *condition_columns)]
    (mean, std), (condition_mean, condition_std) = ((x.mean(axis=0), x.std(axis=0)) for x in (points, conditions))
    spreads = zip([*columns, *condition_columns], [*std, *condition_std], strict=True)
    if constant := [column for column, spread in spreads if spread == 0]:
        names = ", ".join(map(repr, constant))
        raise DatasetError(f"constant in {args.dataset}: {names}; leave out with --exclude {shlex.join(constant)}")
    x_0 = normalize(points, mean, std)
    condition = normalize(conditions, condition_mean, condition_std) if conditions.size else None

    try:
        unet = MLPModel(
            points.shape[1],
            embedding_dim=args.embedding_dim,
            hidden_dim=args.hidden_dim,
            num_hidden_layers=args.num_hidden_layers,
            out_channels=args.num_predictions * points.shape[1],
            num_class_embeds=len(class_names) or None,
            condition_dim=conditions.shape[1] or None,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    pipeline = DDPMMLPPipeline(
        unet,
        args.make_scheduler(clip_sample_range=x_0.abs().max().item()),
        mean.tolist(),
        std.tolist(),
        columns,
        class_names or None,
        label_column=label_column,
        condition_columns=condition_columns or None,
        condition_mean=condition_mean.tolist() or None,
        condition_std=condition_std.tolist() or None,
        # A sample loses its label and its condition together (label_dropout). The network has never seen a label
        # without a condition, so such a label is not to be drawn.
        class_shares=None if condition_columns else class_shares_of(labels, len(class_names)),
    )
    return pipeline, TensorBatches(x_0, None if labels is None else torch.from_numpy(labels), condition)


def make_table_pipeline(args: TableTrainingArguments, table: Table) -> tuple[DDPMMLPPipeline, TensorBatches]:
    """Make the untrained pipeline, and a table's coordinates that it is to learn."""
    codec = table.codec
    # A value that many rows share has a range of coordinates. A small table is drawn several times within these.
    rng, repeats = np.random.default_rng(args.seed), max(1, MIN_ROWS // len(table.frame))
    x_0 = torch.from_numpy(np.concatenate([table.points(rng) for _ in range(repeats)])).float()
    try:
        unet = MLPModel(
            codec.width,
            embedding_dim=args.embedding_dim,
            hidden_dim=args.hidden_dim,
            num_hidden_layers=args.num_hidden_layers,
            out_channels=args.num_predictions * codec.width,
            condition_dim=codec.width,
            takes_known=True,
            num_embedded=codec.num_numbers,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    pipeline = DDPMMLPPipeline(
        unet,
        args.make_scheduler(clip_sample_range=x_0.abs().max().item()),
        data_columns=codec.coordinate_names,
        columns=codec.to_json(),
    )
    return pipeline, TensorBatches(x_0)


def conceal_columns(column_numbers: Sequence[int]) -> Callable[[Batch, Draw], Batch]:
    """Return a function that tells the network some columns of each row, as its condition, and conceals the others.

    The share of the known columns is uniform in [0, 1), so that a network learns to fill any gaps.

    Args:
        column_numbers: for each of the D coordinates, the number of its column.
    """
    columns = torch.tensor(column_numbers)

    def conceal(batch: Batch, draw: Draw) -> Batch:
        number = int(columns.max()) + 1
        is_known = draw(number) < draw(1)  # [batch, columns]
        is_known = is_known[:, columns.to(is_known.device)]
        return batch._replace(condition=torch.where(is_known, batch.x_0, math.nan))

    return conceal


def class_shares_of(labels: torch.Tensor | np.ndarray | None, num_classes: int) -> list[float] | None:
    """Return the share of each class among training samples, in the order of their numbers."""
    if labels is None:
        return None
    counts = torch.as_tensor(labels).bincount(minlength=num_classes)
    shares: list[float] = (counts.cpu().double() / len(labels)).tolist()
    return shares


def default_batch_size(dataset_size: int) -> int:
    """Of a process whose share of the data is so large."""
    return min(2048, dataset_size)


def choose_resolution(args: ImageTrainingArguments) -> None:
    """Set the resolution that `max_resolution` leads to."""
    if args.resolution is None and args.max_resolution is not None:
        args.resolution = usual_resolution(args.dataset_name, args.split, args.max_resolution)


def make_image_pipeline(
    args: ImageTrainingArguments,
    sample_shape: Sequence[int],
    class_names: Sequence[str] = (),
    class_shares: list[float] | None = None,
) -> DDPMMLPPipeline:
    """Make the untrained pipeline, for images of `(channels, height, width)` of some classes and their shares."""
    channels, *size = sample_shape
    num_classes = len(class_names)
    shared: dict[str, Any] = {
        "in_channels": channels,
        "sample_size": tuple(size),
        "out_channels": args.num_predictions * channels,
        "num_class_embeds": num_classes or None,
    }
    try:
        if args.block_out_channels:
            widths = widths_of(args.block_out_channels)
        else:
            widths = default_widths(channels, *size) if args.model == "unet" else (32, 64, 128)
        of_unets = {"block_out_channels": widths, "layers_per_block": args.layers_per_block}
        if args.model == "mlp":
            mlp = {name: getattr(args, name) for name in ("embedding_dim", "hidden_dim", "num_hidden_layers")}
            is_posterior = args.prediction_type == "sample" and args.num_predictions == 1
            unet = MLPModel(**shared, **mlp, pixel_posterior=is_posterior)
        elif args.model == "unet":
            own = ("patch_size", "attention", "time_conditioning", "skip_connections")
            unet = SmallUNet2DModel(**shared, **of_unets, **{name: getattr(args, name) for name in own})
        else:
            divisor = 2 ** (len(widths) - 1)
            if any(length % divisor for length in size):
                raise ConfigurationError(f"the stock model needs heights and widths that are multiples of {divisor}")
            lowest = "Attn" if args.attention else ""
            if num_classes:
                shared["num_class_embeds"] = num_classes + 1  # it has no embedding of its own for "no label"
            unet = UNet2DModel(
                **shared,
                **of_unets,
                down_block_types=("DownBlock2D",) * (len(widths) - 1) + (f"{lowest}DownBlock2D",),
                up_block_types=(f"{lowest}UpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
                add_attention=args.attention,
            )
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return DDPMMLPPipeline(
        unet,
        args.make_scheduler(clip_sample_range=1.0),
        class_names=list(class_names) or None,
        null_label=num_classes or None,
        label_column=args.label_column,
        class_shares=class_shares,
    )
