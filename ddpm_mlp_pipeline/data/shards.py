"""Images of Parquet files that are read while they are trained on."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

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
from .images import (
    check_size,
    decode,
    explain_loading,
    image_column,
    label_feature,
    labels_of,
    target_size,
    to_network_units,
)

WINDOW = 10_000  # images that are shuffled together


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
    """Images of Parquet files, read when a batch needs them, and decoded then.

    Memory holds the undecoded images of two windows of the `sampler` and of two of the largest row groups, at most.

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
        DatasetError: if there are no Parquet files, or no column of images or of labels, or if the files' columns
            differ. Later, if a file can't be read, or if an image can't be decoded or has another size.
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
        files, features = _find_files(name, split)
        self.groups: list[tuple[str, pyarrow.parquet.FileMetaData, int]] = []
        labels: list[pyarrow.Table] = []
        schema: pyarrow.Schema | None = None
        for file in files:
            with _open(file) as opened:
                features = features or datasets.Features.from_arrow_schema(opened.schema_arrow)
                self.column = image_column(name, features)
                columns = [self.column]
                if label_column is not None:
                    label_type = label_feature(name, features, label_column)
                    columns.append(label_column)
                own = pyarrow.schema([opened.schema_arrow.field(column) for column in columns])
                schema = schema or own
                if not own.equals(schema):
                    raise DatasetError(
                        f"the columns {' and '.join(columns)} of {file} differ from those of {files[0]}"
                    )
                metadata = opened.metadata
                numbers = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
                self.groups += [(file, metadata, i) for i, number in enumerate(numbers) if number]
                if label_column is not None:
                    labels.append(opened.read([label_column]).replace_schema_metadata())
        sizes = [metadata.row_group(i).num_rows for _, metadata, i in self.groups]
        if not sizes or features is None:
            raise DatasetError(f"the split {split!r} of {name} is empty")
        self.firsts = np.cumsum([0, *sizes])
        self.class_labels: torch.Tensor | None = None
        self.condition: torch.Tensor | None = None
        self.class_names: list[str] = []
        if label_column is not None:
            info = datasets.DatasetInfo(features=datasets.Features({label_column: label_type}))
            table = datasets.Dataset(pyarrow.concat_tables(labels), info)
            self.class_labels, self.class_names = labels_of(table, name, label_column)
        self.sampler = WindowSampler(sizes, seed)
        self.cache: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self.channels = channels
        self.sample_shape: tuple[int, ...] = ()
        self.sample_shape = self._decode(0).shape  # the others must be like the first
        self.channels = self.sample_shape[0]

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitems__(self, indices: list[int]) -> Batch:
        images = torch.from_numpy(np.stack([self._decode(row) for row in indices]))
        labels = None if self.class_labels is None else self.class_labels[torch.tensor(indices)]
        return Batch(to_network_units(images), labels)

    def _decode(self, row: int) -> np.ndarray:
        """Return an image, uint8 `[channels, height, width]`."""
        group = int(np.searchsorted(self.firsts, row, side="right")) - 1
        encoded = self._read(group)[row - int(self.firsts[group])].as_py()
        what = f"row {row} of {self.name}"
        try:
            image = decode(encoded, self.channels, self.size, self.fit, what)
        except DatasetError:
            raise
        except Exception as error:  # Pillow's decoders raise many types of errors
            raise DatasetError(f"{what} can't be decoded: {error}; --streaming can't leave images out") from None
        if self.sample_shape:
            check_size(image, self.sample_shape, what)
        return image

    def _read(self, group: int) -> pyarrow.ChunkedArray:
        """Return a group's images, undecoded, from memory or from its file."""
        if group not in self.cache:
            file, metadata, index = self.groups[group]
            with _open(file, metadata) as opened:
                self.cache[group] = opened.read_row_group(index, [self.column])[self.column]
            # A batch may lie in two windows, each of which may end with the largest group.
            most = 2 * (self.sampler.window + max(self.sampler.sizes))
            while sum(map(len, self.cache.values())) > most:
                self.cache.popitem(last=False)
        self.cache.move_to_end(group)
        return self.cache[group]


@contextlib.contextmanager
def _open(file: str, metadata: pyarrow.parquet.FileMetaData | None = None) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file, on this machine or elsewhere, and name it in errors of reading."""
    try:
        with fsspec.open(file, "rb") as opened:
            yield pyarrow.parquet.ParquetFile(opened, metadata=metadata)
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f"can't read {file}: {message}") from None


def _find_files(name: str | os.PathLike[str], split: str) -> tuple[list[str], datasets.Features | None]:
    """Return the Parquet files of a split, and the types of their columns, if the data set declares them."""
    if holds_pictures(Path(name)):
        files, features = {"train": [str(name)]}, None
    else:
        with explain_loading(name):
            builder = datasets.load_dataset_builder(str(name))
        files, features = builder.config.data_files or {}, builder.info.features
    if split not in files:
        raise DatasetError(f"{name} has no split {split!r}, only {', '.join(map(str, files)) or 'none'}")
    found = [str(file) for file in files[split]]
    if not all(file.endswith(".parquet") for file in found):
        raise DatasetError(f"{name} does not consist of Parquet files, which --streaming reads: leave it out")
    return found, features
