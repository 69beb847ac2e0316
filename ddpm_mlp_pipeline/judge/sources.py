"""Samples to evaluate, from wherever they are: a checkpoint, a bundle, a file, or a folder of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..data.arrays import read_array
from ..errors import ConfigurationError, DatasetError, explain_missing_extra
from ..runtime.pictures import to_pixels

IMAGE_BATCH_SIZE, POINT_BATCH_SIZE = 64, 512  # of samples that are drawn together


@dataclasses.dataclass(frozen=True)
class Source:
    """Where samples come from.

    Attributes:
        shape: of one of them: `(dimension,)` of points, `(channels, height, width)` of images.
        draw: `draw(number, seed)` draws so many, or chooses them from a file, `[number, *shape]`: points are floats in
            the data's units, images uint8.
        info: what else is to be known to draw them again.
        columns: names of the points' coordinates, if they are known.
        number: how many there are; `None` if any number can be drawn.
    """

    shape: tuple[int, ...]
    draw: Callable[[int, int], np.ndarray]
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: list[str] | None = None
    number: int | None = None

    @property
    def is_points(self) -> bool:
        return len(self.shape) == 1


def open_source(path: Path, scheduler: str | None = None, num_inference_steps: int | None = None) -> Source:
    """What there is at a path: a checkpoint, a bundle, a file of points or images, or a folder of images.

    Args:
        path: the folder or the file.
        scheduler, num_inference_steps: of a checkpoint, in place of its own.

    Raises:
        ConfigurationError: if it is something else, or a scheduler is asked of what has none.
        DatasetError: if a file holds something else than points or images.
        DDPMPipelineError: what the loaders of each kind raise.
    """
    if (path / "model_index.json").is_file() or (path / "bundle.json").is_file():
        return _open_sampler(path, scheduler, num_inference_steps)
    if scheduler is not None or num_inference_steps is not None:
        raise ConfigurationError(f"a scheduler and its steps are for a checkpoint, but {path} is none")
    if path.is_dir():
        with explain_missing_extra("reading images", "train"):
            from ..data.images import load_images
        return _choose_from(load_images(path).numpy(), path)
    if not path.is_file():
        raise ConfigurationError(f"there is no {path}")
    if path.suffix == ".npy":
        array = _open_npy(path)
        if array.ndim == 4:
            return _images_of(array, path)
    elif path.suffix not in (".csv", ".parquet"):
        raise ConfigurationError(f"{path} is no file of samples: give a .npy, .csv or .parquet")
    with explain_missing_extra("reading points", "evaluate"):
        from ..data.points import load_points, to_array
    points = load_points(path)
    return dataclasses.replace(_choose_from(to_array(points), path), columns=points.column_names)


def _open_sampler(path: Path, scheduler: str | None, num_inference_steps: int | None) -> Source:
    from ..sampling import open_sampler

    sampler = open_sampler(path, scheduler, num_inference_steps)

    def draw(number: int, seed: int) -> np.ndarray:
        batches = sampler.batches(number, seed, POINT_BATCH_SIZE if sampler.is_points else IMAGE_BATCH_SIZE)
        if sampler.is_points:
            return np.concatenate([*batches])
        return np.concatenate([to_pixels(batch).transpose(0, 3, 1, 2) for batch in batches])

    info = {"scheduler": sampler.scheduler, "sampling_steps": len(sampler)}
    return Source(sampler.sample_shape, draw, info, sampler.data_columns if sampler.is_points else None)


def _open_npy(path: Path) -> np.ndarray:
    array = read_array(path)
    if array.ndim not in (2, 4):
        raise DatasetError(
            f"{path} holds an array of the shape {array.shape}: samples are of the shape [points, dimension] or "
            "[images, height, width, channels]"
        )
    return array


def _images_of(array: np.ndarray, path: Path) -> Source:
    """Of `[number, height, width, channels]`, uint8 or in [0, 1]; what isn't drawn isn't read."""

    def draw(number: int, seed: int) -> np.ndarray:
        rows = _choose(len(array), number, seed, path)
        images = array[rows]
        if images.dtype != np.uint8:
            finite = np.isfinite(images).all(axis=(1, 2, 3))
            if not finite.all():
                raise DatasetError(f"image {rows[~finite].min()} of {path} holds nan or infinity")
            if images.min() < 0 or images.max() > 1:
                raise DatasetError(
                    f"{path} holds values from {images.min():.4g} to {images.max():.4g}, but images are in [0, 1], "
                    "or uint8: scale them"
                )
            images = to_pixels(images)
        return images.transpose(0, 3, 1, 2)

    height, width, channels = array.shape[1:]
    return Source((channels, height, width), draw, number=len(array))


def _choose_from(samples: np.ndarray, path: Path) -> Source:
    def draw(number: int, seed: int) -> np.ndarray:
        return samples[_choose(len(samples), number, seed, path)]

    return Source(samples.shape[1:], draw, number=len(samples))


def _choose(total: int, number: int, seed: int, path: Path) -> np.ndarray:
    if total < number:
        raise DatasetError(f"{path} holds {total} samples, fewer than the {number} asked for")
    return np.random.default_rng(seed).permutation(total)[:number]
