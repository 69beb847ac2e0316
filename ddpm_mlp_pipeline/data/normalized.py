"""Data as a pipeline's network sees them: points with mean 0 and standard deviation 1, images in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import DatasetError
from ..pipeline import DDPMMLPPipeline
from .batches import BatchDataset, TensorBatches
from .images import ImageBatches, load_images
from .points import POINT_SETS, load_points, to_array


def load_normalized(
    pipeline: DDPMMLPPipeline,
    name: str,
    number: int | None = None,
    *,
    split: str = "train",
    fit: str = "resize",
    noise: float | None = None,
    seed: int = 0,
    on_corrupt: Callable[[str], None] | None = None,
) -> BatchDataset:
    """Load a data set for a pipeline that was trained on it, or on its like.

    Args:
        pipeline: whose samples' shape and, for points, whose columns, mean and standard deviation the data get.
        name: a point set's name, a file of points, or an image data set: as `load_points` or `load_images` take it.
        number: how many points to draw, or at most to choose, at random, from a file or an image data set.
        split, fit, on_corrupt: of an image data set, as `load_images` takes them.
        noise: of a point set, as `load_points` takes it.
        seed: of the points, or of the choice.

    Returns:
        What `train` and `variational_bound` take: its `__getitems__(indices)` is a `Batch`.

    Raises:
        DatasetError: if the data set can't be loaded, is of another shape, or lacks one of the pipeline's columns.
    """
    shape = pipeline.sample_shape
    if not pipeline.is_points:
        channels, height, width = shape
        images = load_images(name, split, (height, width), fit, channels, number, seed, on_corrupt=on_corrupt)
        return ImageBatches(images)
    drawn = number if name in POINT_SETS else None
    points = torch.tensor(to_array(load_points(name, drawn, noise, seed, columns=pipeline.config.data_columns)))
    if points.shape[1:] != shape:
        raise DatasetError(f"{name} has {points.shape[1]} coordinates, but the network takes {shape[0]}")
    if number is not None and len(points) > number:
        points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:number]]
    if pipeline.config.data_mean is not None:
        mean, std = (points.new_tensor(getattr(pipeline.config, key)) for key in ("data_mean", "data_std"))
        points = (points - mean) / std
    return TensorBatches(points.float())
