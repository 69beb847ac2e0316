"""Distances between samples and data.

What each needs is imported where it is used: points need no torch, images no optimal transport.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .errors import DatasetError

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 500  # of images whose features are taken at once


def sliced_wasserstein_distance(x: np.ndarray, y: np.ndarray, num_projections: int = 1000, seed: int = 0) -> float:
    """The 2-Wasserstein distance of the projections on random directions, in root mean square over the directions
    (Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures").

    Args:
        x, y: `[number of points, dimension]`; the numbers of points may differ.
        num_projections: number of random directions.
        seed: of the directions.

    Returns:
        The distance, in the units of the points.
    """
    import ot

    return float(ot.sliced_wasserstein_distance(x, y, n_projections=num_projections, p=2, seed=seed))


def to_uint8(images: np.ndarray) -> torch.Tensor:
    """Images in [0, 1], `[batch, height, width, channels]`, as feature networks take them.

    Raises:
        DatasetError: if a number is not in [0, 1].
    """
    import torch

    if not ((images >= 0) & (images <= 1)).all():
        raise DatasetError(f"images must be numbers in [0, 1], but are from {images.min():g} to {images.max():g}")

    return torch.from_numpy(np.rint(images * 255).astype(np.uint8)).permute(0, 3, 1, 2)


class FrechetDistance:
    """The Fréchet distance between the features of two sets of images (Heusel et al. 2017, eq. 6, which takes an
    Inception network's), as torchmetrics computes it.

    It compares means and covariances only, and is biased upwards by the number of samples: compare distances of
    as many samples.

    Args:
        references: batches of the one set's images, uint8, `[batch, channels, height, width]`.
        features: what turns such a batch into features, `[batch, num_features]`, and says how many in its attribute
            `num_features`: a [`FeatureNetwork`], for instance.
    """

    def __init__(self, references: Iterable[torch.Tensor], features: torch.nn.Module):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._metric = FrechetInceptionDistance(features, reset_real_features=False)
        self._update(references, real=True)

    def __call__(self, samples: Iterable[torch.Tensor]) -> float:
        """The distance of the other set, in batches of such images; the sets' sizes may differ."""
        self._metric.reset()
        self._update(samples, real=False)
        return float(self._metric.compute())

    def _update(self, images: Iterable[torch.Tensor], real: bool) -> None:
        import torch

        with torch.no_grad():
            for some in images:
                for batch in some.split(BATCH_SIZE):
                    self._metric.update(batch, real=real)
