"""Distances between samples and data, against closed forms and other libraries."""

import numpy as np
import pytest
import torch
from scipy import linalg, spatial, stats

from ddpm_mlp_pipeline.checkpoints import FEATURES
from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError
from ddpm_mlp_pipeline.judge import metrics
from ddpm_mlp_pipeline.judge.features import PixelFeatures
from ddpm_mlp_pipeline.judge.metrics import (
    choose_features,
    energy_distance,
    frechet_distance,
    image_features,
    kernel_distance,
    share_in_manifold,
    sliced_wasserstein_distance,
    squared_energy_distance,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_the_sliced_wasserstein_distance_of_a_shift_and_a_scaling_is_its_closed_form(rng):
    """A shift by v moves each projection by v · u, and the mean of (v · u)² over directions is |v|² / d."""
    x = rng.standard_normal((500, 2))
    distance = sliced_wasserstein_distance(x, x + np.array([3, 4]), num_projections=5000)
    assert distance == pytest.approx(5 / 2**0.5, rel=0.03)
    distance = sliced_wasserstein_distance(x, 3 * x[::-1], num_projections=5000)
    assert distance == pytest.approx(2 * np.sqrt((x**2).sum(axis=1).mean() / 2), rel=0.03)


def test_in_one_dimension_it_is_the_wasserstein_distance(rng):
    x, y = rng.standard_normal((400, 1)), 2 * rng.standard_normal((400, 1)) + 1
    quantiles = np.sort(x, axis=0) - np.sort(y, axis=0)
    assert sliced_wasserstein_distance(x, y) == pytest.approx(np.sqrt((quantiles**2).mean()))
    assert sliced_wasserstein_distance(x, y) >= stats.wasserstein_distance(x[:, 0], y[:, 0])
    # Points that are there twice change nothing, and neither does an equal share of each.
    assert sliced_wasserstein_distance(x, np.repeat(y, 2, axis=0)) == pytest.approx(sliced_wasserstein_distance(x, y))
    three, two = np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [3.0]])  # half of the middle point moves by 1 or 2
    assert sliced_wasserstein_distance(three, two) == pytest.approx((1 / 6 + 4 / 6 + 1 / 3) ** 0.5)


def test_the_energy_distance_in_one_dimension_is_scipys(rng, monkeypatch):
    x, y = rng.standard_normal((400, 1)), 2 * rng.standard_normal((300, 1)) + 1
    expected = stats.energy_distance(x[:, 0], y[:, 0])
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(metrics, "CHUNK", 1000)  # a few rows at a time
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert energy_distance(x, x[::-1]) == pytest.approx(0, abs=1e-6)


def test_the_energy_distance_of_shifted_gaussians_is_its_closed_form(rng):
    """In the plane, |X − X′| / √2 of two standard normals has a Rayleigh distribution, or a Rice one if shifted."""
    shift = np.array([0.6, -0.8])
    x, y = rng.standard_normal((4000, 2)), rng.standard_normal((4000, 2)) + shift
    across = 2**0.5 * stats.rice(np.linalg.norm(shift) / 2**0.5).mean()
    expected = (2 * across - 2 * np.pi**0.5) ** 0.5
    assert energy_distance(x, y) == pytest.approx(expected, rel=0.02)


def test_the_frechet_distance_is_the_closed_form_for_gaussians(rng):
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), by a direct matrix square root."""
    x = rng.normal((120, 90, 60), (20, 10, 30), (4000, 3))
    y = rng.normal(0, 25, (3000, 3)) @ rng.normal(0, 0.5, (3, 3)) + 128
    covariances = [np.cov(side, rowvar=False) for side in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_too_few_images_for_a_covariance_are_refused():
    x = torch.randn(50, 8).double()
    assert frechet_distance(x[:9], x) > 0
    for pair in ((x[:8], x), (x, x[:8])):
        with pytest.raises(DatasetError, match="on 8 features needs more than 8 images on both sides"):
            frechet_distance(*pair)


def test_the_kernel_distance_of_small_sets_is_the_unbiased_mmd(rng):
    """Each subset is then the whole set, so that the deviation is 0."""
    x, y = rng.standard_normal((300, 5)), rng.standard_normal((300, 5)) + 0.3
    k_xx, k_xy, k_yy = ((a @ b.T / 5 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    within = sum((k.sum() - np.trace(k)) / (300 * 299) for k in (k_xx, k_yy))
    mean, deviation = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(within - 2 * k_xy.mean(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_the_kernel_distances_subsets_are_those_of_a_seed(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 20)
    x, y = torch.randn(60, 4).double(), torch.randn(50, 4).double()
    state = torch.get_rng_state()
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_share_in_a_manifold_of_few_points():
    """The nearest neighbours of 0, 1 and 3 are 1, 1 and 2 away: the manifold is [-1, 5]."""
    y = torch.tensor([[0.0], [1.0], [3.0]]).double()
    x = torch.tensor([[-1.1], [-0.9], [1.5], [4.9], [5.1]]).double()
    assert share_in_manifold(x, y, k=1) == 3 / 5


def test_the_share_in_a_manifold_by_a_tree(rng, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 5000)
    x, y = rng.standard_normal((400, 3)) * 1.5, rng.standard_normal((300, 3))
    radii = spatial.cKDTree(y).query(y, k=4)[0][:, 3]
    inside = [(np.linalg.norm(point - y, axis=1) <= radii).any() for point in x]
    assert 0.2 < np.mean(inside) < 0.9
    assert share_in_manifold(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(np.mean(inside))


def test_images_of_other_channels_are_refused():
    with pytest.raises(ConfigurationError, match="have 3 channels, but the feature network takes 1: take --features"):
        choose_features(FEATURES[1], 3, 1000, 1000)


def test_features_are_chosen_by_channels_and_numbers():
    """The shipped networks have 64 features."""
    for channels, numbers, expected in [
        (1, (65, 65), FEATURES[1]),
        (1, (64, 1000), "pixels"),
        (3, (65, 65), FEATURES[3]),
        (4, (1000, 1000), "pixels"),
    ]:
        assert choose_features(None, channels, *numbers)[0] == expected
    with pytest.raises(DatasetError, match="more than 3 images are needed on both sides, got 3 and 9"):
        choose_features(None, 3, 3, 9)


def test_pixels_differ_by_the_root_mean_square_of_their_levels(rng):
    """This holds also for rows of more than 32 pixels, of which blocks are averaged."""
    small = rng.integers(256, size=(2, 3, 20, 32), dtype=np.uint8)
    expected = np.sqrt(np.mean((small[0] / 1.0 - small[1]) ** 2))
    for images in (small, small.repeat(3, axis=3)):
        x, y = image_features([torch.from_numpy(images)], PixelFeatures())
        assert torch.dist(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_the_unbiased_energy_distance_is_scipys_without_the_pairs_of_one(rng, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 1000)
    x, y = rng.standard_normal((40, 1)), 2 * rng.standard_normal((30, 1)) + 1
    own = [spatial.distance.pdist(side).mean() for side in (x, y)]
    biased = stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    expected = biased - own[0] / 40 - own[1] / 30  # 1 / n of all pairs are a point with itself
    assert squared_energy_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_the_unbiased_energy_distance_of_few_is_0_on_average(rng):
    pairs = torch.from_numpy(rng.standard_normal((400, 2, 8, 5)))
    distances = np.array([squared_energy_distance(*pair) for pair in pairs])
    assert abs(distances.mean()) < 4 * distances.std() / 20
    assert distances.min() < 0
