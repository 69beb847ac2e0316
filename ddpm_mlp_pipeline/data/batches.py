"""What the training loop gets from a data set: samples, and what is known of each."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """Some samples as the network is to see them.

    Attributes:
        x_0: float32 `[batch, *sample_shape]`, normalised points or images in [-1, 1].
        class_labels: int64 `[batch]`, or `None` for data without labels.
        condition: float32 `[batch, condition_dim]`, or `None` for data without conditions.
    """

    x_0: torch.Tensor
    class_labels: torch.Tensor | None = None
    condition: torch.Tensor | None = None

    @property
    def known(self) -> dict[str, torch.Tensor]:
        """What the network is told beside x_t and t, by the names of its arguments."""
        given = {"class_labels": self.class_labels, "condition": self.condition}
        return {name: values for name, values in given.items() if values is not None}


class BatchDataset(Protocol):
    """A data set that hands out whole batches."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...


class TensorBatches(Dataset[Batch]):
    """Samples in memory as one tensor, of which a batch is one indexing instead of one for each sample."""

    def __init__(self, samples: torch.Tensor):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self.samples[indices])
