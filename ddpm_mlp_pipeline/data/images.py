"""Load image data sets as uint8 tensors of one size and number of channels."""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from ..errors import DatasetError
from ..progress import progress_bar
from .arrays import holds_pictures
from .batches import Batch, TensorBatches
from .points import is_point_set

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for each number of channels
GREY = ("1", "L", "I", "F")  # and modes that begin with I;16
REFUSED_FORMATS = ("EPS",)  # an EPS file is a program, which Pillow runs with Ghostscript
HELD_OUT_SPLITS = ("test", "validation", "train")  # in order of preference


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
    """Load and decode a data set of images.

    Images that don't fit into memory go to a temporary file in the cache folder of `datasets`, which the tensor maps.

    Of 16-bit values, the upper 8 bits are kept, as Pillow does for 16-bit RGB. Floats are scaled from [0, 1] to
    [0, 255]; values outside are refused. Without an alpha channel in the result, transparency is blended with white.
    Of an image with several frames or pages, the first is used.

    Args:
        name: a data set on the hub, a folder that `datasets.load_dataset` reads, a folder of images, or a Parquet
            file of them.
        split: the split.
        resolution: target size, `(height, width)` or one number for both; by default the images keep their size, which
            must be the same for all.
        fit: `"resize"` scales an image to the resolution, `"pad"` centres it on black. Images are never cropped.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default those of the first image.
        number: maximum number of images, chosen at random; by default all.
        seed: the seed of the choice.
        max_memory: maximum bytes in memory; by default this process's share of half of the free memory.
        on_corrupt: called with a message for each image that can't be read, which is then skipped; by default such an
            image raises an error.

    Returns:
        uint8, `[number of images, channels, height, width]`.

    Raises:
        DatasetError: if the data set can't be loaded, is empty or has no column of type `Image`; or if an image can't
            be read or has the wrong size (the message names its row and file).
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
    size = target_size(resolution, channels)
    everything = _load(name, split)
    rows, column, indices = _choose_images(everything, name, split, number, seed)
    labels, names = (None, []) if label_column is None else labels_of(everything, name, label_column)
    images: np.ndarray | None = None
    kept: list[int] = []
    for row, index in zip(progress_bar(iterable=rows, desc="decoding", leave=False), indices, strict=True):
        path = row[column]["path"]
        what = f"row {index} of {name}" + (f" ({path})" if path else "")
        try:
            pixels = decode(row[column], channels, size, fit, what)
        except DatasetError:
            raise
        except Exception as error:  # Pillow's decoders raise many types of errors
            message = f"{what} can't be decoded: {error}"
            if on_corrupt is None:
                raise DatasetError(f"{message} (pass --skip_corrupt to skip such images)") from None
            on_corrupt(message)
            continue
        channels = channels or len(pixels)
        if images is None:
            images = _allocate((len(rows), *pixels.shape), max_memory)
        check_size(pixels, images.shape[1:], what)
        images[len(kept)] = pixels
        kept.append(index)
    if images is None:
        raise DatasetError(f"none of the {len(rows)} images of {name} can be decoded")
    return torch.from_numpy(images[: len(kept)]), None if labels is None else labels[np.array(kept)], names


def target_size(resolution: int | tuple[int, int] | None, channels: int | None) -> tuple[int, int] | None:
    """Return the images' target height and width, `None` if they keep theirs.

    Raises:
        DatasetError: if it is less than 1, or if images can't have so many channels.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if size is not None and min(size) < 1:
        raise DatasetError(f"resolution must be at least 1, got {min(size)}")
    if channels is not None and channels not in MODES:
        raise DatasetError(f"channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {channels}")
    return size


def decode(row: dict[str, Any], channels: int | None, size: tuple[int, int] | None, fit: str, what: str) -> np.ndarray:
    """Decode an image, whose bytes or path `datasets` gives.

    Args:
        row: with the keys `bytes` and `path`.
        channels: 1, 3 or 4; by default the image's own.
        size: target height and width; by default its own.
        fit: as for `load_images`.
        what: names the image in errors.

    Returns:
        uint8 `[channels, height, width]`.

    Raises:
        DatasetError: if it is too large to be padded.
        Exception: of many types, if it can't be decoded.
    """
    image = _open(row)
    channels = channels or _channels(image)
    pixels = np.asarray(_fit(_convert(image, channels), size, fit, what))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


def check_size(pixels: np.ndarray, first: tuple[int, ...], what: str) -> None:
    """Check that an image has the shape of the first, `(channels, height, width)`.

    Raises:
        DatasetError: if it has not; the message names it by `what`.
    """
    if pixels.shape != first:
        raise DatasetError(
            f"{what} is {pixels.shape[2]}×{pixels.shape[1]} pixels, but the first image is {first[2]}×{first[1]}: "
            "pass --resolution to resize them"
        )


def image_column(name: str | os.PathLike[str], features: datasets.Features) -> str:
    """Return the first column of type `Image`.

    Raises:
        DatasetError: if there is none.
    """
    column = next((column for column, feature in features.items() if isinstance(feature, datasets.Image)), None)
    if column is None:
        raise DatasetError(f"{name} has no column of images, only {', '.join(features)}")
    return str(column)


def label_feature(name: str | os.PathLike[str], features: datasets.Features, label_column: str) -> Any:
    """Return the type of a column of labels.

    Raises:
        DatasetError: if there is no such column.
    """
    if label_column not in features:
        raise DatasetError(f"{name} has no column {label_column!r} of labels, only {', '.join(features)}")
    return features[label_column]


def labels_of(
    rows: datasets.Dataset, name: str | os.PathLike[str], label_column: str
) -> tuple[torch.Tensor, list[str]]:
    """Return the labels of a data set's rows, int64, and the classes' names."""
    if not isinstance(label_feature(name, rows.features, label_column), datasets.ClassLabel):
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
    """Count the images of each shape, `(channels, height, width)`. Images that can't be read are skipped.

    Args:
        name, split, number: as in `load_images`.

    Raises:
        DatasetError: if the data set can't be loaded, is empty or has no column of images.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    rows, column, _ = _choose_images(_load(name, split), name, split, number)
    for row in rows:
        try:
            image = _open(row[column])
        except Exception:
            continue
        shapes[_channels(image), image.height, image.width] += 1
    return shapes


def usual_resolution(name: str | os.PathLike[str], split: str, at_most: int) -> int | None:
    """Return the median of the images' heights and widths, or `at_most` if that is smaller, from their headers alone.

    Args:
        name, split: as in `load_images`.
        at_most: the largest height and width that images may keep, at least 4.

    Returns:
        A multiple of 4; `None` if all images have one size that they may keep.

    Raises:
        DatasetError: as `load_images` does, and if no image can be read.
    """
    rows, column, _ = _choose_images(_load(name, split), name, split)
    sizes: Counter[tuple[int, int]] = Counter()
    for row in rows:
        with contextlib.suppress(Exception):  # an image that can't be read is named when it is decoded
            sizes[_read(row[column]).size] += 1
    if not sizes:
        raise DatasetError(f"none of the images of {name} can be read")
    if len(sizes) == 1 and max(next(iter(sizes))) <= at_most:
        return None
    usual = min(at_most, int(np.median([length for size in sizes.elements() for length in size])))
    return max(4, usual // 4 * 4)


def count_images(name: str | os.PathLike[str], split: str) -> int:
    """Return the number of images in a split without decoding them.

    Raises:
        DatasetError: if the data set can't be loaded, is empty or has no column of images.
    """
    return len(_choose_images(_load(name, split), name, split)[0])


def choose_split(name: str | os.PathLike[str], wanted: Sequence[str]) -> str:
    """Return the first split in `wanted` that a data set has, or else its first split.

    Raises:
        DatasetError: if the data set can't be loaded.
    """
    splits = list(_load(name, None))
    return next((split for split in wanted if split in splits), splits[0])


def to_network_units(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to the network's units: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class ImageBatches(TensorBatches):
    """uint8 images in memory, `[number, channels, height, width]`, of which batches are in the network's units."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)`."""
        return tuple(self.samples.shape[1:])

    def __getitems__(self, indices: list[int]) -> Batch:
        batch = super().__getitems__(indices)
        return batch._replace(x_0=to_network_units(batch.x_0))


def mirror_half(x_0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Mirror the images `[batch, channels, height, width]` whose number in `u`, `[batch]`, is below ½."""
    return torch.where(u[:, None, None, None] < 0.5, x_0.flip(-1), x_0)


def _choose_images(
    rows: datasets.Dataset, name: str | os.PathLike[str], split: str, number: int | None = None, seed: int = 0
) -> tuple[datasets.Dataset, str, np.ndarray]:
    """Return undecoded images of a split's rows, at most `number`; their column; and the indices of their rows."""
    column = image_column(name, rows.features)
    if len(rows) == 0:
        raise DatasetError(f"the split {split!r} of {name} is empty")
    rows, indices = rows.select_columns([column]), np.arange(len(rows))
    if number is not None and number < len(rows):
        indices = np.random.default_rng(seed).permutation(len(rows))[:number]
        rows = rows.select(indices)
    return rows.cast_column(column, datasets.Image(decode=False)), column, indices


def _read(row: dict[str, Any]) -> Image.Image:
    """Read an image's header, which has its size. The pixels are read when they are needed."""
    return Image.open(row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"]))


def _open(row: dict[str, Any]) -> Image.Image:
    """Open an image, and rotate it according to its EXIF data."""
    image = _read(row)
    if image.format in REFUSED_FORMATS:
        raise ValueError(f"{image.format} files can run code: convert it to PNG")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _channels(image: Image.Image) -> int:
    """Return an image's own number of channels: 1 (grey), 3 (RGB) or 4 (RGBA)."""
    return 4 if _is_transparent(image) else 1 if image.mode in GREY or image.mode.startswith("I;16") else 3


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Convert an image to 8 bits per channel."""
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # false for NaN, too
            raise ValueError(f"its floats are from {pixels.min():.4g} to {pixels.max():.4g}: scale them to [0, 1]")
        image = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
    elif image.mode.startswith("I"):  # older versions of Pillow and some formats use I for 16 bits
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its integers are from {pixels.min()} to {pixels.max()}: scale them to 16 bits")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if _is_transparent(image):
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(MODES[channels])


def _load(name: str | os.PathLike[str], split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    """Load a split, or all splits if `split` is `None`."""
    is_parquet = holds_pictures(Path(name))
    if is_point_set(name) and not is_parquet:  # `datasets` would search the hub for half a minute
        raise DatasetError(f"{name} is a point set: pass a folder of images or an image data set on the hub")
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with explain_loading(name, split):
            if is_parquet:
                return datasets.load_dataset("parquet", data_files=str(name), split=split)
            return datasets.load_dataset(str(name), split=split)
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def explain_loading(name: str | os.PathLike[str], split: str | None = None) -> Iterator[None]:
    """Turn the errors of `datasets`, which are of many types, into a `DatasetError`."""
    try:
        yield
    except Exception as error:
        what = "can't be loaded" if Path(name).exists() else "is neither a folder nor a data set on the hub"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        of_split = "" if split is None else f" (split {split!r})"
        raise DatasetError(f"{name}{of_split} {what}: {message}") from None


def _allocate(shape: tuple[int, ...], max_memory: int | None) -> np.ndarray:
    """Allocate a uint8 array in memory or, above `max_memory` bytes, in a temporary file."""
    if max_memory is None:
        max_memory = psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if math.prod(shape) <= max_memory:
        return np.empty(shape, dtype=np.uint8)
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it alive
        return np.memmap(file, dtype=np.uint8, shape=shape)


def _fit(image: Image.Image, size: tuple[int, int] | None, fit: str, what: str) -> Image.Image:
    if size is None or image.size == size[::-1]:
        return image
    height, width = size
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if image.width > width or image.height > height:
        sizes = f"{image.width}×{image.height} pixels, too large to be padded to {width}×{height}"
        raise DatasetError(f"{what} is {sizes}: pass --fit resize")
    left, top = (width - image.width) // 2, (height - image.height) // 2
    right, bottom = width - image.width - left, height - image.height - top
    return ImageOps.expand(image, (left, top, right, bottom), fill=0)
