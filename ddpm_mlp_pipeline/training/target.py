"""Data as the target of samples: how far the samples of a table are from them, in the network's own features."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..data.batches import Batch, TensorBatches
from ..errors import DatasetError
from ..pipeline import DDPMMLPPipeline
from .fit_features import FitFeatures, PointFeatures, energy_distance, mean_distance
from .options import FittingArguments
from .table_parameters import TableParameters, draw

CHUNK = 256  # samples at once, where no gradient is needed


class Target:
    """
    Data that samples are compared with, a part of them held out.

    All randomness follows from the options' seed and the numbers given to `generator`.

    Args:
        pipeline: the pipeline, for its classes.
        data: data in the network's units, in the pipeline's classes and conditions.
        features: what samples and data are compared on.
        args: the options.

    Attributes:
        fitted, held_out: indices of the data, each in the order of the labels.

    Raises:
        DatasetError: if there are too few data, or they lack the labels that the network takes.
    """

    def __init__(self, pipeline: DDPMMLPPipeline, data: TensorBatches, features: FitFeatures, args: FittingArguments):
        self.data, self.features, self.args = data, features, args
        if pipeline.num_classes and data.class_labels is None:
            raise DatasetError(
                "the network takes labels, but the data have none: name their column with --label_column"
            )
        if len(data) < 2 * args.batch_size:
            raise DatasetError(f"{len(data)} samples are too few for a fit: it needs {2 * args.batch_size}")
        order = torch.randperm(len(data), generator=self.generator(0, 0)).tolist()
        needed = args.num_held_out + args.num_references
        held_out = min(args.num_held_out, len(data) // 2) if len(data) < needed else args.num_held_out
        self.held_out, self.fitted = order[:held_out], order[held_out:]
        if data.class_labels is not None:
            for indices in (self.held_out, self.fitted):
                indices.sort(key=data.class_labels.tolist().__getitem__)  # stable
        number = min(args.num_references, len(self.fitted))
        self.references = self._features_of(self._some(number, self.generator(0, 3)))
        self.held_out_references = self._features_of(data.__getitems__(self.held_out))

    def generator(self, *key: int) -> torch.Generator:
        """Return a generator of the stream that seed and key stand for."""
        (seed,) = np.random.SeedSequence([self.args.seed, *key]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def distance(self, parameters: TableParameters, network: nn.Module, generator: torch.Generator) -> torch.Tensor:
        """Return the distance between fresh samples and data of the same shares of labels and conditions."""
        args = self.args
        batch = self._some(args.batch_size, generator)
        samples = batch._replace(x_0=draw(parameters, network, batch, generator))
        references, scales = self.references
        if len(self.fitted) > args.num_references and isinstance(self.features, PointFeatures):  # cheap: take others
            references = self.features(self._some(args.num_references, generator), generator)
        return energy_distance(self.features(samples, generator), references, scales)

    @torch.no_grad()
    def held_out_distance(self, parameters: TableParameters, network: nn.Module) -> float:
        """Return the distance between samples, always of the same noise, and the held-out data."""
        generator = self.generator(0, 1)
        labels = self._some(self.args.num_drawn, generator, self.held_out)
        groups: list[list[torch.Tensor]] = []
        for batch in _split(labels):
            samples = batch._replace(x_0=draw(parameters, network, batch, generator))
            groups.append(self.features(samples, generator))
        features = [torch.cat(some) for some in zip(*groups, strict=True)]
        return float(energy_distance(features, *self.held_out_references))

    @torch.no_grad()
    def _features_of(self, data: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the features of data, and their mean distances."""
        generator = self.generator(0, 2)
        batches = _split(data)
        groups = [self.features(batch, generator) for batch in batches]
        features = [torch.cat(some) for some in zip(*groups, strict=True)]
        return features, [mean_distance(x) for x in features]

    def _some(self, number: int, generator: torch.Generator, indices: list[int] | None = None) -> Batch:
        """Choose some of the data, by default of those that the table is fitted to.

        Each class has its share of them, up to one: chance in the labels would move the distance more than a step.
        """
        indices = self.fitted if indices is None else indices  # in the order of their labels
        places = (torch.arange(number) + torch.rand(number, generator=generator)) * (len(indices) / number)
        return self.data.__getitems__([indices[int(place)] for place in places.clamp(max=len(indices) - 1)])


def _split(batch: Batch) -> list[Batch]:
    """Split a batch into some of at most `CHUNK` samples."""
    return [batch.take(slice(i, i + CHUNK)) for i in range(0, len(batch.x_0), CHUNK)]
