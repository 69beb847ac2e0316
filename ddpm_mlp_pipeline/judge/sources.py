"""Sources of samples to evaluate: a checkpoint, a bundle, a file, or a folder of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.arrays import holds_pictures, read_array
from ..errors import ConfigurationError, DatasetError, explain_missing_extra
from ..progress import sampling_bar
from ..runtime.columns import TableCodec
from ..runtime.pictures import to_pixels
from ..runtime.request import Asked

if TYPE_CHECKING:
    from typing import Unpack

IMAGE_BATCH_SIZE, POINT_BATCH_SIZE = 64, 512
NUM_POINTS, NUM_IMAGES = 10_000, 2_000  # samples to compare with data, unless told otherwise
DATA_SEED = 1000  # of the first draw of data; training and fits draw theirs with 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of samples.

    Attributes:
        shape: shape of a sample: `(dimension,)` for points, `(channels, height, width)` for images.
        draw: `draw(number, seed)` returns samples `[number, *shape]`, drawn by a sampler or chosen from a file. Points
            are floats in the data's units, images are uint8. A sampler's also takes what one asks for: see `Asked`.
        info: the sampler's settings, for the report.
        columns: names of the points' coordinates, if they are known.
        number: number of samples in a file or folder; `None` if any number can be drawn.
        class_names: names of the classes that can be asked for.
        codec: what turns the samples into rows of a table, if they are one's.
    """

    shape: tuple[int, ...]
    draw: Callable[..., np.ndarray]
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    columns: list[str] | None = None
    number: int | None = None
    class_names: list[str] = dataclasses.field(default_factory=list)
    codec: TableCodec | None = None

    @property
    def is_points(self) -> bool:
        return len(self.shape) == 1


def open_source(
    path: Path,
    scheduler: str | None = None,
    num_inference_steps: int | None = None,
    engine: str | None = None,
    **options: str | None,
) -> Source:
    """Open a checkpoint, a bundle, a file of points or images, or a folder of images.

    Args:
        path: the folder or the file. A Parquet file holds points, or pictures as `ddpm-sample` writes them.
        scheduler, num_inference_steps: replace a checkpoint's own.
        engine: `"ray"` to draw in Ray's workers.
        options: `device` or `provider`, as for `open_sampler`.

    Raises:
        ConfigurationError: if the path is none of these, if a scheduler is given and it is not a checkpoint, or an
            engine and it is neither a checkpoint nor a bundle.
        DatasetError: if a file does not hold points or images.
        DDPMPipelineError: if a loader fails.
    """
    if (path / "model_index.json").is_file() or (path / "bundle.json").is_file():
        return _open_sampler(path, scheduler, num_inference_steps, engine, options)
    if engine is not None:
        raise ConfigurationError(f"an engine draws from a checkpoint or a bundle, and {path} is neither")
    if scheduler is not None or num_inference_steps is not None:
        raise ConfigurationError(f"a scheduler and its steps are for a checkpoint, but {path} is not a checkpoint")
    if path.is_dir() or holds_pictures(path):
        with explain_missing_extra("reading images", "train"):
            from ..data.images import load_images
        return _choose_from(load_images(path).numpy(), path)
    if not path.is_file():
        raise ConfigurationError(f"there is no {path}: give a checkpoint, a bundle, a file or a folder of images")
    if path.suffix == ".npy":
        array = read_array(path)
        if array.ndim == 4:
            return _images_of(array, path)
        if array.ndim != 2:
            raise DatasetError(
                f"{path} holds an array of the shape {array.shape}: samples are of the shape [points, dimension] or "
                "[images, height, width, channels]"
            )
    elif path.suffix not in (".csv", ".parquet"):
        raise ConfigurationError(f"{path} is no file of samples: give a .npy, .csv or .parquet")
    with explain_missing_extra("reading points", "evaluate"):
        from ..data.points import load_points, to_array
    points = load_points(path)
    return _choose_from(to_array(points), path, points.column_names)


def _open_sampler(
    path: Path,
    scheduler: str | None,
    num_inference_steps: int | None,
    engine: str | None,
    options: dict[str, str | None],
) -> Source:
    from ..sampling import open_sampler

    sampler = open_sampler(path, scheduler, num_inference_steps, **options)  # type: ignore[arg-type]
    draw_batches: Callable[..., Iterable[np.ndarray]] = sampler.batches
    if engine == "ray":
        from ..ray_engine import batches_with_ray

        draw_batches = functools.partial(batches_with_ray, (path, scheduler, num_inference_steps), len(sampler))

    def draw(number: int, seed: int, **asked: Unpack[Asked]) -> np.ndarray:
        size = POINT_BATCH_SIZE if sampler.is_points else IMAGE_BATCH_SIZE
        with sampling_bar(number * len(sampler)) as progress:
            batches = draw_batches(number, seed, size, progress.update, **asked)
            if sampler.is_points:
                return np.concatenate([*batches])
            return np.concatenate([to_pixels(batch).transpose(0, 3, 1, 2) for batch in batches])

    info = {"scheduler": sampler.scheduler, "sampling_steps": len(sampler)}
    columns = sampler.data_columns if sampler.is_points else None
    return Source(sampler.sample_shape, draw, info, columns, class_names=sampler.class_names, codec=sampler.codec)


def _images_of(array: np.ndarray, path: Path) -> Source:
    """Choose from `[number, height, width, channels]`, uint8 or in [0, 1]. Read and check only the chosen images."""

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


def _choose_from(samples: np.ndarray, path: Path, columns: list[str] | None = None) -> Source:
    def draw(number: int, seed: int) -> np.ndarray:
        return samples[_choose(len(samples), number, seed, path)]

    return Source(samples.shape[1:], draw, columns=columns, number=len(samples))


def _choose(total: int, number: int, seed: int, path: Path) -> np.ndarray:
    if total < number:
        raise DatasetError(f"{path} holds {total} samples, fewer than the {number} asked for")
    return np.random.default_rng(seed).permutation(total)[:number]
