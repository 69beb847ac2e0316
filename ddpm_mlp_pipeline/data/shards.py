"""Images of Parquet files that are read while they are trained on."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import DatasetError
from .arrays import holds_pictures
from .batches import Batch
from .images import decode, labels_of, target_size, to_network_units

WINDOW = 10_000  # images that are shuffled together, and of which memory holds two lots


class WindowSampler(Sampler[int]):
    """Shuffle groups of rows, and then the rows of as many groups as a window holds.

    The order depends on the seed and the epoch alone, so that a resumed run finds its place without reading what comes
    before it.

    Args:
        sizes: number of rows in each group.
        seed: of the order.
        window: number of rows to shuffle together, at least.
    """

    def __init__(self, sizes: list[int], seed: int, window: int = WINDOW):
        self.sizes, self.seed, self.window, self.epoch = sizes, seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next; Accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        firsts = np.cumsum([0, *self.sizes])
        rows: list[int] = []
        for group in generator.permutation(len(self.sizes)):
            rows += range(firsts[group], firsts[group + 1])
            if len(rows) >= self.window:
                yield from generator.permutation(rows).tolist()
                rows = []
        yield from generator.permutation(rows).tolist() if rows else []


class ImageShards(Dataset[Batch]):
    """Images of Parquet files, decoded when a batch needs them. Memory holds two windows of the `sampler`.

    Args:
        name: a folder of Parquet files, one such file, or a data set on the hub that consists of them.
        label_column: as for `load_labelled_images`.
        split: the split.
        resolution: target height and width; by default the images keep their size, which must be the same for all.
        fit, channels: as for `load_images`.
        seed: of the order of the images.

    Attributes:
        sampler: the order of each epoch.
        class_labels: int64 `[number of images]`, or `None`.
        class_names: names of the classes.
        sample_shape: `(channels, height, width)`.

    Raises:
        DatasetError: if there are no Parquet files, or no column of images or of labels. Later, if an image can't be
            decoded or has another size.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        label_column: str | None,
        split: str = "train",
        resolution: int | None = None,
        fit: str = "resize",
        channels: int | None = None,
        seed: int = 0,
    ):
        self.name, self.size, self.fit = str(name), target_size(resolution, channels), fit
        self.files = _find_files(name, split)
        opened = [self._open(file) for file in self.files]
        self.groups = [(i, j) for i, file in enumerate(opened) for j in range(file.num_row_groups)]
        sizes = [opened[i].metadata.row_group(j).num_rows for i, j in self.groups]
        self.firsts = np.cumsum([0, *sizes])
        features = datasets.Features.from_arrow_schema(opened[0].schema_arrow)
        images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise DatasetError(f"{name} has no column of images, only {', '.join(features)}")
        if not len(self):
            raise DatasetError(f"the split {split!r} of {name} is empty")
        self.column = images[0]
        self.class_labels: torch.Tensor | None = None
        self.condition: torch.Tensor | None = None
        self.class_names: list[str] = []
        if label_column is not None:
            if label_column not in features:
                raise DatasetError(f"{name} has no column {label_column!r} of labels, only {', '.join(features)}")
            table = pyarrow.concat_tables([file.read([label_column]) for file in opened]).replace_schema_metadata()
            info = datasets.DatasetInfo(features=datasets.Features({label_column: features[label_column]}))
            labels = datasets.Dataset(table, info)
            self.class_labels, self.class_names = labels_of(labels, name, label_column)
        self.sampler = WindowSampler(sizes, seed)
        self.cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self.channels = channels
        self.sample_shape: tuple[int, ...] = ()
        self.read_group(0)  # the others must be like the first image

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = np.array(indices)
        groups = np.searchsorted(self.firsts, rows, side="right") - 1
        images = np.empty((len(rows), *self.sample_shape), dtype=np.uint8)
        for group in np.unique(groups):
            images[groups == group] = self.read_group(int(group))[rows[groups == group] - self.firsts[group]]
        labels = None if self.class_labels is None else self.class_labels[torch.from_numpy(rows)]
        return Batch(to_network_units(torch.from_numpy(images)), labels)

    def read_group(self, group: int) -> np.ndarray:
        """Return a group's images, uint8 `[number, channels, height, width]`, from memory or from its file."""
        if group not in self.cache:
            file, index = self.groups[group]
            rows = self._open(self.files[file]).read_row_group(index, [self.column])[self.column].to_pylist()
            images = [self._decode(row, int(self.firsts[group]) + i) for i, row in enumerate(rows)]
            self.cache[group] = np.stack(images)
            while len(self.cache) > 1 and sum(map(len, self.cache.values())) > 2 * self.sampler.window:
                self.cache.popitem(last=False)
        self.cache.move_to_end(group)
        return self.cache[group]

    def _decode(self, row: dict[str, Any], number: int) -> np.ndarray:
        what = f"row {number} of {self.name}"
        try:
            image = decode(row, self.channels, self.size, self.fit, what)
        except DatasetError:
            raise
        except Exception as error:  # Pillow's decoders raise many types of errors
            raise DatasetError(f"{what} can't be decoded: {error}; --streaming can't leave images out") from None
        if not self.sample_shape:
            self.channels, self.sample_shape = len(image), image.shape
        if image.shape != self.sample_shape:
            raise DatasetError(
                f"{what} is {image.shape[2]}×{image.shape[1]} pixels, but the first image is "
                f"{self.sample_shape[2]}×{self.sample_shape[1]}: pass --resolution to resize them"
            )
        return image

    def _open(self, file: str) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(fsspec.open(file, "rb").open())
        except (OSError, pyarrow.ArrowException) as error:
            raise DatasetError(f"can't read {file}: {str(error).splitlines()[0]}") from None


def _find_files(name: str | os.PathLike[str], split: str) -> list[str]:
    """Return the Parquet files of a split."""
    if holds_pictures(Path(name)):
        return [str(name)]
    try:
        files = datasets.load_dataset_builder(str(name)).config.data_files or {}
    except Exception as error:  # `datasets` raises many types of errors
        what = "can't be loaded" if Path(name).exists() else "is neither a folder nor a data set on the hub"
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"{name} {what}: {message}") from None
    if split not in files:
        raise DatasetError(f"{name} has no split {split!r}, only {', '.join(map(str, files)) or 'none'}")
    found = [str(file) for file in files[split]]
    if not all(file.endswith(".parquet") for file in found):
        raise DatasetError(f"{name} does not consist of Parquet files, which --streaming reads: leave it out")
    return found
