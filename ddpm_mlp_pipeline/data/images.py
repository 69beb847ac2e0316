"""Image sets: whatever `datasets` loads, decoded once, of one size and one number of channels."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from ..errors import DatasetError
from ..progress import progress_bar

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for each number of channels


def load_images(
    name: str | os.PathLike,
    split: str = "train",
    resolution: int | None = None,
    fit: str = "resize",
    channels: int | None = None,
    number: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
) -> torch.Tensor:
    """Load a data set of images and decode it, once.

    The images stay in memory, or, where they are too many for it, in a temporary file that the tensor is a view of
    (beside the cache of `datasets`, where there is room for data sets).

    Args:
        name: a data set on the hub, a folder that `datasets.load_dataset` takes, or a folder of images.
        split: which split of it.
        resolution: height and width to bring the images to; by default they are left as they are, and must all be of
            one size.
        fit: `"resize"` scales an image to the resolution, `"pad"` centres it on black. Nothing is cropped.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA), to which every image is converted; by default what the first has.
        number: only so many of the images, chosen at random; by default all of them.
        seed: of that choice.
        max_memory: bytes that the images may take in memory; by default half of what is free.

    Returns:
        uint8, `[number of images, channels, height, width]`.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no column of images (found by its type, whatever its
            name), or an image can't be decoded or doesn't fit; the message names its row.
    """
    if resolution is not None and resolution < 1:
        raise DatasetError(f"resolution must be at least 1, got {resolution}")
    if channels is not None and channels not in MODES:
        raise DatasetError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {channels}")
    rows, column = _load_column(name, split, datasets.Image, "images")
    if number is not None and number < len(rows):
        rows = rows.shuffle(seed=seed).select(range(number))

    images: np.ndarray | None = None
    for i in progress_bar(iterable=range(len(rows)), desc="decoding", leave=False):
        try:
            image = rows[i][column]
            image.load()
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DatasetError(f"row {i} of {name} is no image that can be decoded: {error}") from None
        if channels is None:
            channels = 1 if image.mode in ("1", "L", "I", "I;16", "F") else 4 if image.mode == "RGBA" else 3
        pixels = np.asarray(_fit(image.convert(MODES[channels]), resolution, fit, f"row {i} of {name}"))
        pixels = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
        if images is None:
            images = _allocate((len(rows), *pixels.shape), max_memory)
        if pixels.shape != images.shape[1:]:
            raise DatasetError(
                f"row {i} of {name} is {pixels.shape[2]}×{pixels.shape[1]} pixels, but the first image is "
                f"{images.shape[3]}×{images.shape[2]}: give a resolution to bring them to"
            )
        images[i] = pixels
    return torch.from_numpy(images)


def load_labels(name: str | os.PathLike, split: str = "train") -> torch.Tensor:
    """The classes of a data set's rows, int64, `[number of rows]`, from its column of type `ClassLabel`.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no such column.
    """
    rows, column = _load_column(name, split, datasets.ClassLabel, "labels")
    return torch.tensor(rows[:][column])


def to_network_units(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the network is to see them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class ImageBatches(torch.utils.data.Dataset):
    """Images in memory, handed out in batches as the network is to see them: in [-1, 1].

    Args:
        images: uint8, `[number of images, channels, height, width]`.
    """

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return to_network_units(self.images[indices])


def mirror_half(x_0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirror, left to right, those of the images `[batch, channels, height, width]` whose number in `u` is below ½."""
    return torch.where(u[:, None, None, None] < 0.5, x_0.flip(-1), x_0)


def _load_column(name: str | os.PathLike, split: str, feature_type: type, what: str) -> tuple[datasets.Dataset, str]:
    """A data set's first column of a type, which may have any name, and that name."""
    rows = _load(name, split)
    columns = [column for column, feature in rows.features.items() if isinstance(feature, feature_type)]
    if not columns:
        raise DatasetError(f"{name} has no column of {what}, only {', '.join(rows.features)}")
    if len(rows) == 0:
        raise DatasetError(f"the split {split!r} of {name} is empty")
    return rows.select_columns(columns[:1]), columns[0]


def _load(name: str | os.PathLike, split: str) -> datasets.Dataset:
    progress_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(str(name), split=split)
    except Exception as error:  # from a missing folder to a broken file, datasets raises errors of many kinds
        what = "can't be loaded" if Path(name).exists() else "is neither a folder here nor a data set on the hub"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"{name} (split {split!r}) {what}: {message}") from None
    finally:
        if not progress_bars:
            datasets.enable_progress_bars()


def _allocate(shape: tuple[int, ...], max_memory: int | None) -> np.ndarray:
    """Room for so many bytes, in memory if they fit."""
    if max_memory is None:
        max_memory = psutil.virtual_memory().available // 2
    if math.prod(shape) <= max_memory:
        return np.empty(shape, dtype=np.uint8)
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # which lasts as long as it is mapped
        return np.memmap(file, dtype=np.uint8, shape=shape)


def _fit(image: Image.Image, resolution: int | None, fit: str, what: str) -> Image.Image:
    if resolution is None or image.size == (resolution, resolution):
        return image
    if fit == "resize":
        return image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    if max(image.size) > resolution:
        raise DatasetError(
            f"{what} is {image.width}×{image.height} pixels, too large to be padded to {resolution}: use resize"
        )
    left, top = (resolution - image.width) // 2, (resolution - image.height) // 2
    right, bottom = resolution - image.width - left, resolution - image.height - top
    return ImageOps.expand(image, (left, top, right, bottom), fill=0)
