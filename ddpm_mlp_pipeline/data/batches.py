"""Batches of a data set: samples with their labels and conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class Batch(NamedTuple):
    """Samples in the network's units, with their labels and conditions.

    Attributes:
        x_0: float32 `[batch, *sample_shape]`, normalised points or images in [-1, 1].
        class_labels: int64 `[batch]`, or `None` for data without labels.
        condition: float32 `[batch, condition_dim]`, normalised, or `None` for data without conditions.
    """

    x_0: torch.Tensor
    class_labels: torch.Tensor | None = None
    condition: torch.Tensor | None = None

    @property
    def known(self) -> dict[str, torch.Tensor]:
        """The network's arguments besides x_t and t."""
        given = {"class_labels": self.class_labels, "condition": self.condition}
        return {name: values for name, values in given.items() if values is not None}

    def to(self, device: torch.device) -> Batch:
        """Move the samples, with their labels and conditions, to a device."""
        return Batch(self.x_0.to(device), **{name: values.to(device) for name, values in self.known.items()})

    def take(self, rows: slice | torch.Tensor) -> Batch:
        """Return some of the samples, with their labels and conditions."""
        return Batch(self.x_0[rows], **{name: values[rows] for name, values in self.known.items()})

    def forget(self, is_forgotten: torch.Tensor, null_label: int | None) -> Batch:
        """Remove labels and conditions where `is_forgotten`, bool `[batch]`, is true.

        Classifier-free guidance needs a network that is also trained without them (Ho & Salimans 2022,
        https://arxiv.org/abs/2207.12598, algorithm 1).
        """
        labels, condition = self.class_labels, self.condition
        if labels is not None and null_label is not None:
            labels = labels.masked_fill(is_forgotten, null_label)
        if condition is not None:
            condition = condition.masked_fill(is_forgotten[:, None], math.nan)
        return Batch(self.x_0, labels, condition)


Draw = Callable[..., torch.Tensor]
"""`draw(*shape)` returns uniform random numbers in [0, 1), `[batch, *shape]`."""


class BatchDataset(Protocol):
    """A data set that returns whole batches. If it has a `sampler`, that is the order of its epochs."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Batch: ...


class KnownBatches(BatchDataset, Protocol):
    """A data set whose labels and conditions are known without its samples, with the shapes of a `Batch`."""

    class_labels: torch.Tensor | None
    condition: torch.Tensor | None


class TensorBatches(Dataset[Batch]):
    """A data set in memory, from which one indexing operation takes a whole batch.

    Args:
        samples, class_labels, condition: the whole data set, with the shapes of a `Batch`.
    """

    def __init__(
        self,
        samples: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
    ):
        self.samples, self.class_labels, self.condition = samples, class_labels, condition

    def to(self, device: torch.device) -> Self:
        """Move the data set to a device, whose memory must hold it."""
        known = (None if known is None else known.to(device) for known in (self.class_labels, self.condition))
        return type(self)(self.samples.to(device), *known)

    def to_accelerator(self, device: torch.device) -> Self:
        """Move the data set to a GPU that trains, if it takes a quarter of the free memory at most.

        Batches are then chosen there, which is several times as fast as to send each of them.
        """
        if device.type != "cuda" or self.samples.nbytes > torch.cuda.mem_get_info(device)[0] // 4:
            return self
        return self.to(device)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices, device=self.samples.device)
        labels, condition = (None if all_ is None else all_[rows] for all_ in (self.class_labels, self.condition))
        return Batch(self.samples[rows], labels, condition)
