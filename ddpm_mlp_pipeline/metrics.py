"""Distances between samples and data."""

from __future__ import annotations

import numpy as np
import ot


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
    return float(ot.sliced_wasserstein_distance(x, y, n_projections=num_projections, p=2, seed=seed))
