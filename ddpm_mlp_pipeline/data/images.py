"""Image sets: whatever `datasets` loads, decoded once, of one size and one number of channels."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..errors import DatasetError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name for each number of channels


def load_images(
    name: str | os.PathLike,
    split: str = "train",
    resolution: int | None = None,
    fit: str = "resize",
    channels: int | None = None,
) -> torch.Tensor:
    """Load a data set of images and decode it.

    Args:
        name: a data set on the hub, a folder that `datasets.load_dataset` takes, or a folder of images.
        split: which split of it.
        resolution: height and width to bring the images to; by default they are left as they are, and must all be of
            one size.
        fit: `"resize"` scales an image to the resolution, `"pad"` centres it on black. Nothing is cropped.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA), to which every image is converted; by default what the first has.

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
    rows = _load(name, split)
    columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise DatasetError(f"{name} has no column of images, only {', '.join(rows.features)}")
    if len(rows) == 0:
        raise DatasetError(f"the split {split!r} of {name} is empty")
    rows = rows.select_columns(columns[:1])

    images: np.ndarray | None = None
    for i in tqdm(range(len(rows)), desc="decoding", leave=False):
        try:
            image = rows[i][columns[0]]
            image.load()
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            raise DatasetError(f"row {i} of {name} is no image that can be decoded: {error}") from None
        if channels is None:
            channels = 1 if image.mode in ("1", "L", "I", "I;16", "F") else 4 if image.mode == "RGBA" else 3
        pixels = np.asarray(_fit(image.convert(MODES[channels]), resolution, fit, f"row {i} of {name}"))
        pixels = pixels.reshape(*pixels.shape[:2], channels)
        if images is None:
            images = np.empty((len(rows), *pixels.shape), dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DatasetError(
                f"row {i} of {name} is {pixels.shape[1]}×{pixels.shape[0]} pixels, but the first image is "
                f"{images.shape[2]}×{images.shape[1]}: give a resolution to bring them to"
            )
        images[i] = pixels
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_network_units(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the network is to see them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class ImageBatches(torch.utils.data.Dataset):
    """Images in memory, handed out in batches as the network is to see them: in [-1, 1], some of them mirrored.

    Args:
        images: uint8, `[number of images, channels, height, width]`.
        random_flip: whether to mirror each image, left to right, with a probability of one half.
    """

    def __init__(self, images: torch.Tensor, random_flip: bool = False):
        self.images, self.random_flip = images, random_flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        x_0 = to_network_units(self.images[indices])
        if self.random_flip:
            mirrored = torch.rand(len(x_0), 1, 1, 1) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(-1), x_0)
        return x_0


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
