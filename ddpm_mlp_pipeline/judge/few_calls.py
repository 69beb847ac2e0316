"""Compare step tables of one network: distances to data with their floor, precision and recall, nearest images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..data.batches import Batch
from ..errors import DivergenceError
from ..pipeline import DDPMMLPPipeline
from ..runtime.request import Asked
from ..runtime.sampler import OnnxSampler
from ..runtime.step_table import StepTable
from .features import Features
from .metrics import frechet_distance, image_features, share_in_manifold, sliced_wasserstein_distance, to_uint8
from .sources import IMAGE_BATCH_SIZE, POINT_BATCH_SIZE

NUM_PROJECTIONS = 200  # of points: a fifth of the time of `ddpm-evaluate`'s 1,000, for a table of many rows


@dataclasses.dataclass(frozen=True)
class TableRow:
    """What was measured of a table, or of real data in the place of samples.

    Attributes:
        name: what it is.
        calls: network calls; `None` for data.
        distance: to the references, in the mean over the seeds: Fréchet distance of images on their features, sliced
            Wasserstein distance of points in the network's units. NaN where the samples are not finite.
        precision, recall: of images (Kynkäänniemi et al. 2019), in the mean over the seeds.
    """

    name: str
    calls: int | None
    distance: float
    precision: float | None = None
    recall: float | None = None


class TableJudge:
    """
    Measures samples of tables against data that no table was fitted to.

    Args:
        pipeline: the pipeline, for the points' units.
        references: a batch of data for each seed, with the labels and conditions that the samples are asked for.
        features: for images, the network whose features are compared.
    """

    def __init__(
        self,
        pipeline: DDPMMLPPipeline,
        references: Sequence[Batch],
        features: Features | None = None,
    ):
        self.pipeline, self.references, self.features = pipeline, references, features
        self.reference_features = [self._features(batch.x_0) for batch in references]

    def measure_data(self, name: str, data: Sequence[Batch]) -> TableRow:
        """Measure data in the samples' place: the floor, if they are as many."""
        return self._row(name, None, [self._features(batch.x_0) for batch in data])

    def play(self, sampler: OnnxSampler, table: StepTable) -> None:
        """Choose what samples are drawn with: a bundle's network, whose own table is replaced."""
        self.sampler, self.sampler.table = sampler, table

    def measure(self, name: str, number: int) -> TableRow:
        """Draw `number` samples for each seed, of the references' labels and conditions, and measure them."""
        calls = len(self.sampler.table)
        try:
            drawn = [self._features(self.draw(batch, number, seed)) for seed, batch in enumerate(self.references)]
        except DivergenceError:
            return TableRow(name, calls, float("nan"))
        return self._row(name, calls, drawn)

    def draw(self, like: Batch, number: int, seed: int) -> torch.Tensor:
        """Draw samples with a batch's labels and conditions, in the network's units; at most as many as it has."""
        number = min(number, len(like.x_0))
        asked = Asked()
        if like.class_labels is not None:
            asked["class_labels"] = like.class_labels[:number].numpy()
        if like.condition is not None:
            mean, std = (np.array(self.sampler.info[f"condition_{name}"]) for name in ("mean", "std"))
            asked["condition"] = like.condition[:number].double().numpy() * std + mean
        batch_size = POINT_BATCH_SIZE if self.pipeline.is_points else IMAGE_BATCH_SIZE
        samples = torch.from_numpy(self.sampler.sample(number, seed, batch_size, **asked))
        if not self.pipeline.is_points:
            return samples.permute(0, 3, 1, 2) * 2 - 1
        data_mean, data_std = (torch.tensor(self.sampler.info[f"data_{name}"]) for name in ("mean", "std"))
        return (samples - data_mean) / data_std

    def _features(self, x_0: torch.Tensor) -> torch.Tensor:
        if self.features is None:
            return x_0.double()
        images = (x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return image_features([to_uint8(images)], self.features)

    def _row(self, name: str, calls: int | None, sides: Iterable[torch.Tensor]) -> TableRow:
        pairs = list(zip(sides, self.reference_features, strict=True))
        if self.features is None:
            distances = [sliced_wasserstein_distance(x.numpy(), y.numpy(), NUM_PROJECTIONS) for x, y in pairs]
            return TableRow(name, calls, float(np.mean(distances)))
        distances = [frechet_distance(x, y) for x, y in pairs]
        precision = [share_in_manifold(x, y[: len(x)]) for x, y in pairs]
        recall = [share_in_manifold(y[: len(x)], x) for x, y in pairs]
        return TableRow(name, calls, *(float(np.mean(values)) for values in (distances, precision, recall)))


def nearest(x: torch.Tensor, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest of the data to each sample by Euclidean distance, and the distance, per coordinate.

    Args:
        x: `[number, *sample_shape]`.
        data: `[number of data, *sample_shape]`.

    Returns:
        Indices, int64 `[number]`, and root mean square differences, `[number]`.
    """
    distances, indices = torch.cdist(x.flatten(1), data.flatten(1)).min(dim=1)
    return indices, distances / x[0].numel() ** 0.5
