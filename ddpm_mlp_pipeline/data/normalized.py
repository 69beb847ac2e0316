"""Data in a network's units: points with mean 0 and standard deviation 1, images in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import ConfigurationError, DatasetError
from ..pipeline import DDPMMLPPipeline
from ..runtime.columns import TableCodec
from .batches import TensorBatches
from .images import ImageBatches, load_labelled_images
from .points import POINT_SETS, load_points, split_columns
from .tables import load_frame, to_arrays


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
) -> TensorBatches:
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
        DatasetError: if the data set can't be loaded, is of another shape, lacks one of the pipeline's columns, or
            has a label that the pipeline doesn't know.
    """
    shape, config = pipeline.sample_shape, pipeline.config
    if not pipeline.is_points:
        channels, height, width = shape
        form = split, (height, width), fit, channels, number, seed
        images, labels, names = load_labelled_images(name, config.label_column, *form, on_corrupt=on_corrupt)
        return ImageBatches(images, _numbers_of(pipeline, name, labels, names))
    if config.columns is not None:
        return _load_rows(name, TableCodec(config.columns), number, seed)
    drawn = number if name in POINT_SETS else None
    dataset = load_points(
        name,
        drawn,
        noise,
        seed,
        columns=config.data_columns,
        label_column=config.label_column,
        condition_columns=config.condition_columns or (),
    )
    points, conditions, numbers, names = split_columns(dataset, config.label_column, config.condition_columns or ())
    if points.shape[1:] != shape:
        raise DatasetError(f"{name} has {points.shape[1]} coordinates, but the network takes {shape[0]}")
    samples = normalize(points, config.data_mean, config.data_std)
    condition = normalize(conditions, config.condition_mean, config.condition_std) if conditions.size else None
    batches = TensorBatches(samples, _numbers_of(pipeline, name, numbers, names), condition)
    if number is not None and len(points) > number:
        chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:number]
        return TensorBatches(*batches.__getitems__(chosen.tolist()))
    return batches


def _load_rows(name: str, codec: TableCodec, number: int | None, seed: int) -> TensorBatches:
    """Load the coordinates of a table's rows."""
    frame = load_frame(name, codec, number, seed)
    try:
        coordinates = codec.encode(to_arrays(frame), rng=np.random.default_rng(seed))
    except ConfigurationError as error:  # such as a category that the network doesn't know
        raise DatasetError(f"{name}: {error}") from None
    return TensorBatches(torch.from_numpy(coordinates).float())


def normalize(values: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None) -> torch.Tensor:
    """Return columns `[number, columns]` as the network sees them, float32: with the given mean and deviation."""
    if mean is not None:
        values = (values - np.asarray(mean)) / np.asarray(std)
    return torch.from_numpy(values).float()


def _numbers_of(
    pipeline: DDPMMLPPipeline, name: str, labels: torch.Tensor | np.ndarray | None, names: list[str]
) -> torch.Tensor | None:
    """Return the labels by the pipeline's own numbers of the classes."""
    if labels is None:
        return None
    known = pipeline.class_names
    unknown = [label for label in names if label not in known]
    if unknown:
        raise DatasetError(f"{name} has the label {unknown[0]!r}, which the network doesn't know: {', '.join(known)}")
    return torch.tensor([known.index(label) for label in names])[torch.as_tensor(labels)]
