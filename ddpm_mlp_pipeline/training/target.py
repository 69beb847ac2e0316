"""The distance between a step table's samples and data, as a loss and as a score on held-out data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from ..data.batches import Batch, KnownBatches
from ..errors import ConfigurationError, DatasetError
from ..pipeline import DDPMMLPPipeline
from .fit_features import FitFeatures, PointFeatures, energy_distance, mean_distance
from .options import FittingArguments
from .table_parameters import TableParameters, draw

CHUNK = 256  # samples drawn together when no gradient is needed


class Target:
    """
    Data to compare samples with, divided into a part to fit to and a held-out part.

    All randomness depends on the options' seed and the numbers given to `generator`.

    Args:
        pipeline: the pipeline, for its classes and its device. Random numbers are drawn on the CPU, the same for every
            device.
        data: data in the network's units, with the pipeline's classes and conditions.
        features: the features that samples and data are compared on.
        args: the options.

    Attributes:
        fitted, held_out: indices of the data of each part, sorted by label.

    Raises:
        ConfigurationError: if there is guidance, but nothing to guide by.
        DatasetError: if there are too few data, or the network takes labels that the data lack.
    """

    def __init__(self, pipeline: DDPMMLPPipeline, data: KnownBatches, features: FitFeatures, args: FittingArguments):
        self.data, self.features, self.args, self.device = data, features, args, pipeline.device
        if pipeline.num_classes and data.class_labels is None:
            raise DatasetError(
                "the network takes labels, but the data have none: name their column with --label_column"
            )
        if args.guidance_scale is not None:
            if data.class_labels is None and data.condition is None:
                raise ConfigurationError("guidance_scale needs a network and data with labels or conditions")
            if data.class_labels is not None and pipeline.null_label is None:
                raise ConfigurationError("guidance_scale needs a network with a null label (--null_label)")
        self.null_label = pipeline.null_label
        if len(data) < 2 * args.batch_size:
            at_most = f"it can be {len(data) // 2} at most"
            raise DatasetError(f"{len(data)} samples are too few for a batch size of {args.batch_size}: {at_most}")
        order = torch.randperm(len(data), generator=self.generator(0, 0)).tolist()
        held_out = args.num_held_out
        if len(data) < held_out + args.num_references:
            held_out = min(held_out, len(data) // 2)
        self.held_out, self.fitted = order[:held_out], order[held_out:]
        if data.class_labels is not None:
            for indices in (self.held_out, self.fitted):
                indices.sort(key=data.class_labels.tolist().__getitem__)  # stable
        number = min(args.num_references, len(self.fitted))
        self.references = self._measure(self._some(number, self.generator(0, 3)))
        self.held_out_references = self._measure(data.__getitems__(self.held_out).to(self.device))

    def generator(self, *key: int) -> torch.Generator:
        """Return a generator that is seeded with the options' seed and the key."""
        (seed,) = np.random.SeedSequence([self.args.seed, *key]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def distance(self, parameters: TableParameters, network: nn.Module, generator: torch.Generator) -> torch.Tensor:
        """Return the energy distance between fresh samples and data, with gradients: a scalar."""
        args = self.args
        batch = self._some(args.batch_size, generator)
        with self._autocast():
            samples = batch._replace(x_0=draw(parameters, network, batch, generator, self.null_label))
            features = self.features(samples, generator)
        references, scales = self.references
        if len(self.fitted) > args.num_references and isinstance(self.features, PointFeatures):  # new ones are cheap
            references = self.features(self._some(args.num_references, generator), generator)
        return energy_distance(features, references, scales)

    @torch.no_grad()
    def held_out_distance(self, parameters: TableParameters, network: nn.Module) -> float:
        """Return the energy distance between samples and the held-out data. The samples' noise is always the same."""
        generator = self.generator(0, 1)
        batches = _split(self._some(self.args.num_drawn, generator, self.held_out))
        samples = (
            batch._replace(x_0=draw(parameters, network, batch, generator, self.null_label)) for batch in batches
        )
        return float(energy_distance(self._features(samples, generator), *self.held_out_references))

    @torch.no_grad()
    def _measure(self, data: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the features of data, and the mean distance within each."""
        features = self._features(_split(data), self.generator(0, 2))
        return features, [mean_distance(x) for x in features]

    def _features(self, batches: Iterable[Batch], generator: torch.Generator) -> list[torch.Tensor]:
        with self._autocast():
            groups = [self.features(batch, generator) for batch in batches]
        return [torch.cat(some) for some in zip(*groups, strict=True)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

    def _some(self, number: int, generator: torch.Generator, indices: list[int] | None = None) -> Batch:
        """Choose data at random, by default from those to fit to. Each class has its share of them, up to one sample.

        Random shares would change the distance more than a step of the optimizer does.
        """
        indices = self.fitted if indices is None else indices  # sorted by label
        places = (torch.arange(number) + torch.rand(number, generator=generator)) * (len(indices) / number)
        chosen = [indices[int(place)] for place in places.clamp(max=len(indices) - 1)]
        return self.data.__getitems__(chosen).to(self.device)


def _split(batch: Batch) -> list[Batch]:
    """Split a batch into batches of at most `CHUNK` samples."""
    return [batch.take(slice(i, i + CHUNK)) for i in range(0, len(batch.x_0), CHUNK)]
