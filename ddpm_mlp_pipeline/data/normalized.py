"""Data in a network's units: points with mean 0 and standard deviation 1, images in [-1, 1]."""

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
    """Load a data set for a trained pipeline: in its shape and, for points, with its columns, mean and deviation.

    Args:
        pipeline: the pipeline.
        name: a point set, a file of points, or an image data set, as for `load_points` or `load_images`.
        number: number of points to draw, or maximum number of samples to choose from a file or an image data set.
        split, fit, on_corrupt: for images, as in `load_images`.
        noise: for points, as in `load_points`.
        seed: the seed of the points or of the choice.

    Returns:
        A data set for `train` and `variational_bound`.

    Raises:
        DatasetError: if the data set can't be loaded, has another shape, or lacks a column of the pipeline.
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
