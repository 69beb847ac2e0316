"""Distances between samples and data: on points, and on features of images.

Functions import the libraries that they need: points need no torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigurationError, DatasetError
from ..runtime.pictures import to_pixels

if TYPE_CHECKING:
    import torch

    from .features import Features

BATCH_SIZE = 50  # images per network evaluation, of up to 299 × 299 pixels
CHUNK = 2**22  # pairwise distances in memory at once
NEIGHBOUR = 3  # k of the manifold's radii (Kynkäänniemi et al. 2019)
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in Bińkowski et al. 2018; smaller sets have smaller subsets


def sliced_wasserstein_distance(x: np.ndarray, y: np.ndarray, num_projections: int = 1000) -> float:
    """Return the root mean square, over random directions, of the 2-Wasserstein distance of the projections.

    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures". On a line, the best transport
    keeps the order: it goes from quantile to quantile.

    Args:
        x, y: `[number of points, dimension]`; the numbers of points may differ.
        num_projections: number of random directions; they are the same in each call.

    Returns:
        The distance, in the units of the points.
    """
    directions = np.random.RandomState(0).standard_normal((x.shape[1], num_projections))
    directions /= np.linalg.norm(directions, axis=0)
    n, m = len(x), len(y)
    edges = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)  # where a quantile function steps, times n m
    of_x, of_y, shares = edges[:-1] // m, edges[:-1] // n, np.diff(edges) / (n * m)
    moves = (np.sort(x @ direction)[of_x] - np.sort(y @ direction)[of_y] for direction in directions.T)
    return float(np.mean([shares @ move**2 for move in moves]) ** 0.5)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Return the energy distance √(2 E|X − Y| − E|X − X′| − E|Y − Y′|) (Székely and Rizzo 2013, "Energy statistics").

    The expectations are means over all pairs, including each point with itself (the V-statistic). The result is the
    exact distance of the two empirical distributions, as in `scipy.stats.energy_distance`. It is 0 for equal sets, and
    biased upwards for small ones.

    Args:
        x, y: `[number of points, dimension]`; the numbers of points may differ.

    Returns:
        The distance, in the square root of the points' units.
    """
    squared = 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)
    return max(squared, 0.0) ** 0.5  # rounding can take equal sets below 0


def _mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.spatial.distance import cdist

    rows = max(1, CHUNK // len(y))
    return float(sum(cdist(x[i : i + rows], y).sum() for i in range(0, len(x), rows)) / (len(x) * len(y)))


def to_uint8(images: np.ndarray) -> torch.Tensor:
    """Convert images in [0, 1], `[batch, height, width, channels]`, to the uint8 tensor that feature networks take.

    Raises:
        DatasetError: if a value is not in [0, 1].
    """
    import torch

    if not ((images >= 0) & (images <= 1)).all():
        raise DatasetError(f"images must be in [0, 1], but have values from {images.min():g} to {images.max():g}")
    return torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2)


def choose_features(
    path: str | os.PathLike[str] | None, channels: int, *numbers: int
) -> tuple[str | os.PathLike[str], Features]:
    """Load a feature network, and check that it fits the images before any of them is decoded or sampled.

    Args:
        path: as in `load_features`. The default is the shipped classifier of MNIST for grey images and of CIFAR-10 for
            colour, if there are enough for a Fréchet distance on its features, and pixels otherwise.
        channels: number of the images' channels.
        numbers: number of images on each side.

    Returns:
        The network's path, or `"pixels"`, and the network.

    Raises:
        ConfigurationError: if the network does not take this number of channels.
        DatasetError: if there are too few images.
        CheckpointError: if the network can't be loaded.
    """
    from ..checkpoints import FEATURES
    from .features import PIXELS, load_features

    is_default, path = path is None, FEATURES.get(channels, PIXELS) if path is None else path
    network = load_features(path)
    if is_default and min(numbers) <= (network.num_features or 0):
        path, network = PIXELS, load_features(PIXELS)
    _check_channels(network, channels)
    _check_numbers(network.num_features, *numbers)
    return path, network


def image_features(batches: Iterable[torch.Tensor], network: Features) -> torch.Tensor:
    """Compute the features of images.

    Args:
        batches: uint8, each `[batch, channels, height, width]`, of any size.
        network: a feature network from `load_features`.

    Returns:
        float64, `[number of images, num_features]`.

    Raises:
        ConfigurationError: if the network does not take the images' number of channels.
    """
    import torch

    features = []
    with torch.no_grad():
        for images in batches:
            _check_channels(network, images.shape[1])
            features += [network(batch).double() for batch in images.split(BATCH_SIZE)]
    return torch.cat(features)


def _check_channels(network: Features, channels: int) -> None:
    if channels not in network.channels:
        raise ConfigurationError(
            f"the images have {channels} channels, but the feature network takes "
            f"{' or '.join(map(str, network.channels))}: take --features pixels, or train one with train_features.py"
        )


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians with the features' means and covariances.

    On Inception's features, it is the FID (Heusel et al. 2017, eq. 6). It is biased upwards for few images: compare
    only distances of equally many.

    Args:
        x, y: `[number of images, num_features]`; the numbers of images may differ.

    Raises:
        DatasetError: if there are too few images for a covariance of full rank.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_numbers(x.shape[1], len(x), len(y))
    return float(_torchmetrics_distance(FrechetInceptionDistance, x, y))


def _check_numbers(num_features: int | None, *numbers: int) -> None:
    got = " and ".join(map(str, numbers))
    if num_features is None and min(numbers) <= NEIGHBOUR:
        raise DatasetError(f"more than {NEIGHBOUR} images are needed on both sides, got {got}")
    if num_features is not None and min(numbers) <= num_features:  # the covariance has no full rank
        raise DatasetError(
            f"a Fréchet distance on {num_features} features needs more than {num_features} images on both sides, got "
            f"{got}: take --features pixels for fewer"
        )


def squared_energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return an unbiased estimate of the squared energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′| (Székely and Rizzo
    2013).

    The means leave out each image's distance to itself (the U-statistic). The expected value for two sets from one
    distribution is 0, however few the images; a single value can be negative. It equals the maximum mean discrepancy
    with the kernel −|x − y| (Sejdinovic et al. 2013).

    Args:
        x, y: features, `[number of images, num_features]`; the numbers of images may differ, and are at least 2.

    Returns:
        The squared distance, in the features' units.
    """
    across, within_x, within_y = (_sum_of_distances(*pair) for pair in ((x, y), (x, x), (y, y)))
    n, m = len(x), len(y)
    return 2 * across / (n * m) - within_x / (n * (n - 1)) - within_y / (m * (m - 1))


def _sum_of_distances(x: torch.Tensor, y: torch.Tensor) -> float:
    import torch

    rows = max(1, CHUNK // len(y))
    # Without matrix products, an image's distance to itself is exactly 0.
    mode = "donot_use_mm_for_euclid_dist"
    return float(sum(torch.cdist(some, y, compute_mode=mode).sum() for some in x.split(rows)))


def kernel_distance(x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the kernel distance: the squared maximum mean discrepancy with the kernel (xᵀy / num_features + 1)³.

    It is averaged over random subsets (KID; Bińkowski et al. 2018, "Demystifying MMD GANs"). It is unbiased: the
    expected value for two sets from one distribution is 0, and a single value can be negative.

    Args:
        x, y: `[number of images, num_features]`; the numbers of images may differ.
        seed: seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torchmetrics warns of its use of memory; the features are there already
        torch.manual_seed(seed)
        size = min(KID_SUBSET_SIZE, len(x), len(y))
        mean, deviation = _torchmetrics_distance(KernelInceptionDistance, x, y, KID_SUBSETS, size)
    return float(mean), float(deviation)


def _torchmetrics_distance(metric: Any, x: torch.Tensor, y: torch.Tensor, *options: int) -> Any:
    import torch

    network: Any = torch.nn.Identity()  # in place of a feature network: x and y are features
    network.num_features = x.shape[1]
    distance = metric(network, *options)
    distance.update(x, real=False)
    distance.update(y, real=True)
    return distance.compute()


def share_in_manifold(x: torch.Tensor, y: torch.Tensor, k: int = NEIGHBOUR) -> float:
    """Return the share of `x` that lies in the manifold of `y` (Kynkäänniemi et al. 2019, eq. 1 and 2).

    The manifold is the union of balls around each y, whose radius is the distance to its k-th nearest neighbour in
    `y`. Precision is the share of the samples in the data's manifold, recall that of the data in the samples'.

    Args:
        x, y: features, `[number of images, num_features]`. The share depends on the numbers of images.
        k: rank of the neighbour, from 1; there must be more than `k` images.
    """
    import torch

    rows = max(1, CHUNK // len(y))
    # Index 0 is y itself.
    radii = torch.cat([torch.cdist(some, y).topk(k + 1, largest=False).values[:, k] for some in y.split(rows)])
    inside = torch.cat([(torch.cdist(some, y) <= radii).any(dim=1) for some in x.split(rows)])
    return float(inside.double().mean())
