"""Distances between samples and data, and the features of images that they are taken on.

What each needs is imported where it is used: points need no torch, images no optimal transport.
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


BATCH_SIZE = 50  # of images whose features are taken at once, at most 299 × 299 pixels each
CHUNK = 2**22  # distances between pairs that are in memory at once
NEIGHBOUR = 3  # whose distance is a manifold's radius, as in Kynkäänniemi et al. 2019
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in Bińkowski et al. 2018; fewer in a subset where there are fewer


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


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The energy distance √(2 E|X − Y| − E|X − X′| − E|Y − Y′|) (Székely and Rizzo 2013, "Energy statistics").

    The expectations are means over all pairs, each point with itself among them (the V-statistic), so that it is the
    exact distance of the two empirical distributions, as `scipy.stats.energy_distance` computes it in one dimension:
    0 for equal sets, and biased upwards by the number of points.

    Args:
        x, y: `[number of points, dimension]`; the numbers of points may differ.

    Returns:
        The distance, in the square root of the points' units.
    """
    squared = 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)
    return max(squared, 0.0) ** 0.5  # equal sets may come out a rounding error below 0


def _mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.spatial.distance import cdist

    rows = max(1, CHUNK // len(y))
    return float(sum(cdist(x[i : i + rows], y).sum() for i in range(0, len(x), rows)) / (len(x) * len(y)))


def to_uint8(images: np.ndarray) -> torch.Tensor:
    """Images in [0, 1], `[batch, height, width, channels]`, as feature networks take them.

    Raises:
        DatasetError: if a number is not in [0, 1].
    """
    import torch

    if not ((images >= 0) & (images <= 1)).all():
        raise DatasetError(f"images must be numbers in [0, 1], but are from {images.min():g} to {images.max():g}")
    return torch.from_numpy(to_pixels(images)).permute(0, 3, 1, 2)


def choose_features(
    path: str | os.PathLike[str] | None, channels: int, *numbers: int
) -> tuple[str | os.PathLike[str], Features]:
    """Load a feature network that suits images, before any of them is decoded or drawn.

    Args:
        path: as `load_features` takes it. By default the shipped classifier of MNIST, for grey images that are enough
            for a Fréchet distance on its features, and else the pixels, which suit few images and any channels.
        channels: of the images.
        numbers: of the images, on each side.

    Returns:
        The network's path, or "pixels", and the network.

    Raises:
        ConfigurationError: if the network takes another number of channels.
        DatasetError: if there are too few images.
        CheckpointError: if the network can't be loaded.
    """
    from ..checkpoints import FEATURES
    from .features import PIXELS, load_features

    network = load_features(FEATURES if path is None else path)
    if path is None:
        path = FEATURES
        if channels not in network.channels or min(numbers) <= (network.num_features or 0):
            path, network = PIXELS, load_features(PIXELS)
    _check_channels(network, channels)
    if network.num_features is not None:
        check_numbers_of_images(network.num_features, *numbers)
    elif min(numbers) <= NEIGHBOUR:
        raise DatasetError(
            f"more than {NEIGHBOUR} images are needed on both sides, got {' and '.join(map(str, numbers))}"
        )
    return path, network


def image_features(batches: Iterable[torch.Tensor], network: Features) -> torch.Tensor:
    """The features of images, on which all distances between sets of images are taken.

    Args:
        batches: uint8, each `[batch, channels, height, width]`, of any size.
        network: a feature network, as `load_features` loads it.

    Returns:
        float64, `[number of images, num_features]`.

    Raises:
        ConfigurationError: if the images have more or fewer channels than the network takes.
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
            f"{' or '.join(map(str, network.channels))}: take --features pixels, or train one by train_features.py"
        )


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Fréchet distance between Gaussians of the features' means and covariances (Heusel et al. 2017, eq. 6, which
    takes an Inception network's), as torchmetrics computes it.

    It is the squared distance, as is usual, and biased upwards by the numbers of samples: compare equal numbers.

    Args:
        x, y: `[number of images, num_features]`; the numbers of images may differ.

    Raises:
        DatasetError: if there are too few images for a covariance of full rank.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    num_features = x.shape[1]
    check_numbers_of_images(num_features, len(x), len(y))
    distance = FrechetInceptionDistance(_features_as_they_are(num_features))
    distance.update(x, real=False)
    distance.update(y, real=True)
    return float(distance.compute())


def check_numbers_of_images(num_features: int, *numbers: int) -> None:
    """Raise a `DatasetError` unless there are enough images on both sides for a covariance of full rank."""
    if min(numbers) <= num_features:
        raise DatasetError(
            f"a Fréchet distance on {num_features} features needs more than {num_features} images on both sides, got "
            f"{' and '.join(map(str, numbers))}: take --features pixels for fewer"
        )


def squared_energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The squared energy distance 2 E|X − Y| − E|X − X′| − E|Y − Y′| (Székely and Rizzo 2013), a kernel distance with
    the kernel −|x − y| (Sejdinovic et al. 2013), without bias: no image is compared with itself (the U-statistic).

    Of samples of one distribution it is 0 but for chance, however few, and may be negative.

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
    # The difference, not the dot product: an image's distance to itself is then exactly 0.
    mode = "donot_use_mm_for_euclid_dist"
    return float(sum(torch.cdist(some, y, compute_mode=mode).sum() for some in x.split(rows)))


def kernel_distance(x: torch.Tensor, y: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """The squared maximum mean discrepancy of the features, with the kernel (xᵀy / num_features + 1)³, over random
    subsets (KID; Bińkowski et al. 2018, "Demystifying MMD GANs"), as torchmetrics computes it.

    It is unbiased: of samples of one distribution it is 0 but for chance, and may be negative.

    Args:
        x, y: `[number of images, num_features]`; the numbers of images may differ.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    import torch
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that the features stay in memory, which they do already
        torch.manual_seed(seed)
        distance = KernelInceptionDistance(
            _features_as_they_are(x.shape[1]), KID_SUBSETS, min(KID_SUBSET_SIZE, len(x), len(y))
        )
        distance.update(x, real=False)
        distance.update(y, real=True)
        mean, deviation = distance.compute()
    return float(mean), float(deviation)


def _features_as_they_are(num_features: int) -> Any:
    """A feature network for torchmetrics, which would run one on images, where there are features already."""
    import torch

    network: Any = torch.nn.Identity()
    network.num_features = num_features
    return network


def share_in_manifold(x: torch.Tensor, y: torch.Tensor, k: int = NEIGHBOUR) -> float:
    """The share of `x` that lies in the manifold of `y`: no further from some y than that is from its k-th nearest
    neighbour among them (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Their precision is the share of the samples in the data's manifold, and their recall the data's in the samples'.

    Args:
        x, y: features, `[number of images, num_features]`; both shares depend on the numbers of images.
        k: which neighbour, from 1; there must be more than `k` images.
    """
    import torch

    rows = max(1, CHUNK // len(y))
    # Each y's nearest neighbour is itself, at place 0.
    radii = torch.cat([torch.cdist(some, y).topk(k + 1, largest=False).values[:, k] for some in y.split(rows)])
    inside = torch.cat([(torch.cdist(some, y) <= radii).any(dim=1) for some in x.split(rows)])
    return float(inside.double().mean())
