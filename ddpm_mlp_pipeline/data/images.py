"""Image sets: whatever `datasets` loads, decoded once, of one size and one number of channels."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from ..errors import DatasetError
from ..progress import progress_bar
from .batches import Batch
from .points import is_point_set

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for each number of channels
GREY = ("1", "L", "I", "F")  # and those that begin with I;16
# What Pillow opens, but has drawn by a program outside of it: a file may be a program, too.
REFUSED_FORMATS = ("EPS",)
HELD_OUT_SPLITS = ("test", "validation", "train")  # the first that a set has


def load_images(
    name: str | os.PathLike[str],
    split: str = "train",
    resolution: int | tuple[int, int] | None = None,
    fit: str = "resize",
    channels: int | None = None,
    number: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    on_corrupt: Callable[[str], None] | None = None,
) -> torch.Tensor:
    """Load a data set of images and decode it, once.

    The images stay in memory, or, where they are too many for it, in a temporary file that the tensor is a view of
    (beside the cache of `datasets`, where there is room for data sets).

    16 bits become 8 by leaving out the lower 8, as Pillow does where a file has 16 bits of each colour. Floats in
    [0, 1] are scaled to 255, and refused beyond. Transparent parts show white where `channels` leaves no room for
    them. Of an image with several frames or pages, the first is taken.

    Args:
        name: a data set on the hub, a folder that `datasets.load_dataset` takes, or a folder of images.
        split: which split of it.
        resolution: height and width to bring the images to, one number if they are equal; by default they are left as
            they are, and must all be of one size.
        fit: `"resize"` scales an image to the resolution, `"pad"` centres it on black. Nothing is cropped.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA), to which every image is converted; by default what the first has.
        number: only so many of the images, chosen at random; by default all of them.
        seed: of that choice.
        max_memory: bytes that the images may take in memory; by default this process's share of half of what is free.
        on_corrupt: called with a message for each image that can't be read, which is left out then; by default the
            message is raised.

    Returns:
        uint8, `[number of images, channels, height, width]`.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no column of images (found by its type, whatever its
            name), or an image can't be read or doesn't fit; the message names its row and its file.
    """
    form = split, resolution, fit, channels, number, seed, max_memory, on_corrupt
    return load_labelled_images(name, None, *form)[0]


def load_labelled_images(
    name: str | os.PathLike[str],
    label_column: str | None,
    split: str = "train",
    resolution: int | tuple[int, int] | None = None,
    fit: str = "resize",
    channels: int | None = None,
    number: int | None = None,
    seed: int = 0,
    max_memory: int | None = None,
    on_corrupt: Callable[[str], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[str]]:
    """Load a data set of images as `load_images` does, and the label of each.

    Args:
        label_column: name of a column of type `ClassLabel`, as a folder of pictures in subfolders has it (`label`), or
            of strings or whole numbers; `None` for no labels.

    Returns:
        The images; their labels, int64 `[number of images]`, or `None`; and the names of the classes.

    Raises:
        DatasetError: as `load_images` does, and if there is no such column, or a label is missing.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if size is not None and min(size) < 1:
        raise DatasetError(f"resolution must be at least 1, got {min(size)}")
    if channels is not None and channels not in MODES:
        raise DatasetError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {channels}")
    rows, column, indices = _open_rows(name, split, number, seed)

    labels, names = _labels_of(name, split, label_column)

    images: np.ndarray | None = None
    kept = []
    for row, index in zip(progress_bar(iterable=rows, desc="decoding", leave=False), indices, strict=True):
        what = _name(name, index, row[column]["path"])
        try:
            image = _open(row[column])
            channels = channels or _channels(image)
            image = _convert(image, channels)
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            message = f"{what} is no image that can be decoded: {error}"
            if on_corrupt is None:
                raise DatasetError(f"{message} (--skip_corrupt leaves such images out)") from None
            on_corrupt(message)
            continue
        pixels = np.asarray(_fit(image, size, fit, what))
        pixels = pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)
        if images is None:
            images = _allocate((len(rows), *pixels.shape), max_memory)
        if pixels.shape != images.shape[1:]:
            raise DatasetError(
                f"{what} is {pixels.shape[2]}×{pixels.shape[1]} pixels, but the first image is "
                f"{images.shape[3]}×{images.shape[2]}: give --resolution to bring them to one size"
            )
        images[len(kept)] = pixels
        kept.append(index)
    if images is None:
        raise DatasetError(f"none of the {len(rows)} images of {name} can be decoded")
    return torch.from_numpy(images[: len(kept)]), None if labels is None else labels[np.array(kept)], names


def _labels_of(
    name: str | os.PathLike[str], split: str, label_column: str | None
) -> tuple[torch.Tensor | None, list[str]]:
    """Return the labels of a split's rows, int64, and the classes' names."""
    if label_column is None:
        return None, []
    rows = _load(name, split)
    if label_column not in rows.features:
        raise DatasetError(f"{name} has no column {label_column!r} of labels, only {', '.join(rows.features)}")
    if not isinstance(rows.features[label_column], datasets.ClassLabel):
        try:
            rows = rows.select_columns([label_column]).class_encode_column(label_column)
        except ValueError as error:
            raise DatasetError(f"column {label_column!r} of {name} holds no labels: {error}") from None
    labels = torch.tensor([-1 if label is None else label for label in rows[label_column][:]])
    if (labels < 0).any():
        raise DatasetError(f"row {int((labels < 0).int().argmax())} of {name} has no label in {label_column!r}")
    return labels, rows.features[label_column].names


def image_shapes(
    name: str | os.PathLike[str], split: str = "train", number: int | None = None
) -> Counter[tuple[int, int, int]]:
    """Count the shapes, `(channels, height, width)`, that a data set's images come in.

    Args:
        name, split, number: as `load_images` takes them. Images that can't be read are left out.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no column of images.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    rows, column, _ = _open_rows(name, split, number)
    for row in rows:
        try:
            image = _open(row[column])
        except Exception:
            continue
        shapes[_channels(image), image.height, image.width] += 1
    return shapes


def count_images(name: str | os.PathLike[str], split: str) -> int:
    """Return the number of images in a split, without decoding any.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no column of images.
    """
    return len(_open_rows(name, split)[0])


def choose_split(name: str | os.PathLike[str], wanted: Sequence[str]) -> str:
    """Return the first of the splits in `wanted` that a data set has; if it has none of them, its own first split.

    Raises:
        DatasetError: if the set can't be loaded.
    """
    splits = list(_load(name, None))
    return next((split for split in wanted if split in splits), splits[0])


def load_labels(name: str | os.PathLike[str], split: str = "train") -> torch.Tensor:
    """The classes of a data set's rows, int64, `[number of rows]`, from its column of type `ClassLabel`.

    Raises:
        DatasetError: if the set can't be loaded, is empty or has no such column.
    """
    rows, column = _load_column(name, split, datasets.ClassLabel, "labels")
    return torch.tensor(rows[:][column])


def to_network_units(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the network is to see them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class ImageBatches(torch.utils.data.Dataset[Batch]):
    """Images in memory, handed out in batches as the network is to see them: in [-1, 1].

    Args:
        images: uint8, `[number of images, channels, height, width]`.
        class_labels: int64, `[number of images]`, or `None`.
    """

    def __init__(self, images: torch.Tensor, class_labels: torch.Tensor | None = None):
        self.images, self.class_labels = images, class_labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        labels = None if self.class_labels is None else self.class_labels[indices]
        return Batch(to_network_units(self.images[indices]), labels)


def mirror_half(x_0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirror, left to right, those of the images `[batch, channels, height, width]` whose number in `u` is below ½."""
    return torch.where(u[:, None, None, None] < 0.5, x_0.flip(-1), x_0)


def _load_column(
    name: str | os.PathLike[str], split: str, feature_type: type, what: str
) -> tuple[datasets.Dataset, str]:
    """A data set's first column of a type, which may have any name, and that name."""
    rows = _load(name, split)
    columns = [column for column, feature in rows.features.items() if isinstance(feature, feature_type)]
    if not columns:
        raise DatasetError(f"{name} has no column of {what}, only {', '.join(rows.features)}")
    if len(rows) == 0:
        raise DatasetError(f"the split {split!r} of {name} is empty")
    return rows.select_columns(columns[:1]), columns[0]


def _open_rows(
    name: str | os.PathLike[str], split: str, number: int | None = None, seed: int = 0
) -> tuple[datasets.Dataset, str, np.ndarray]:
    """A split's images, not decoded, or `number` of them at random; their column; and their rows in the split."""
    rows, column = _load_column(name, split, datasets.Image, "images")
    indices = np.arange(len(rows))
    if number is not None and number < len(rows):
        indices = np.random.default_rng(seed).permutation(len(rows))[:number]
        rows = rows.select(indices)
    return rows.cast_column(column, datasets.Image(decode=False)), column, indices


def _name(name: str | os.PathLike[str], index: int, path: str | None) -> str:
    return f"row {index} of {name}" + (f" ({path})" if path else "")


def _open(row: dict[str, Any]) -> Image.Image:
    """Open an image, and turn it as its camera says."""
    image = Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))
    if image.format in REFUSED_FORMATS:
        raise ValueError(f"{image.format} is a program that draws: convert it to PNG")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _channels(image: Image.Image) -> int:
    """Return what an image has by itself: 1 (grey), 3 (RGB) or 4 (RGBA)."""
    return 4 if _is_transparent(image) else 1 if image.mode in GREY or image.mode.startswith("I;16") else 3


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Bring an image to 8 bits of each channel."""
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is not
            raise ValueError(f"its floats are from {pixels.min():.4g} to {pixels.max():.4g}, not in [0, 1]")
        image = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
    elif image.mode.startswith("I"):  # I is what Pillow's older versions, and some formats, have 16 bits in
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its numbers are from {pixels.min()} to {pixels.max()}, not of 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if _is_transparent(image):
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def _load(name: str | os.PathLike[str], split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """Load a split, or, without a name, all of them."""
    if is_point_set(name):  # which the hub would be asked for, for half a minute
        raise DatasetError(f"{name} is a point set, but images are needed: a folder, or a data set on the hub")
    progress_bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(str(name), split=split)
    except Exception as error:  # from a missing folder to a broken file, datasets raises errors of many kinds
        what = "can't be loaded" if Path(name).exists() else "is neither a folder here nor a data set on the hub"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        of_split = "" if split is None else f" (split {split!r})"
        raise DatasetError(f"{name}{of_split} {what}: {message}") from None
    finally:
        if not progress_bars:
            datasets.enable_progress_bars()


def _allocate(shape: tuple[int, ...], max_memory: int | None) -> np.ndarray:
    """Room for so many bytes, in memory if they fit, beside those of the machine's other processes."""
    if max_memory is None:
        max_memory = psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if math.prod(shape) <= max_memory:
        return np.empty(shape, dtype=np.uint8)
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # which lasts as long as it is mapped
        return np.memmap(file, dtype=np.uint8, shape=shape)


def _fit(image: Image.Image, size: tuple[int, int] | None, fit: str, what: str) -> Image.Image:
    if size is None or image.size == size[::-1]:
        return image
    height, width = size
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if image.width > width or image.height > height:
        goal = width if width == height else f"{width}×{height}"
        raise DatasetError(
            f"{what} is {image.width}×{image.height} pixels, too large to be padded to {goal}: use resize"
        )
    left, top = (width - image.width) // 2, (height - image.height) // 2
    right, bottom = width - image.width - left, height - image.height - top
    return ImageOps.expand(image, (left, top, right, bottom), fill=0)
