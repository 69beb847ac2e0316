"""The noise against the generator's published test vectors, a scalar reference, and the normal distribution."""

import itertools
import math

import numpy as np
import pytest
from helpers import PHILOX_ANSWERS
from hypothesis import given, settings, strategies as st
from scipy import stats

from ddpm_mlp_pipeline.runtime.noise import draw_labels, normal, philox


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), tuple(key))
    assert [int(word[0]) for word in words] == expected


def scalar_normal(seed: int, sample: int, element: int) -> float:
    """Return one number of a sample's stream in float64, computed as in the module's docstring."""
    counter = tuple(np.array([word], dtype=np.uint64) for word in (element // 4, sample, 0, 0))
    words = [int(word[0]) for word in philox(counter, (seed % 2**32, seed // 2**32))]
    a, b = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24))
    angle = 2 * math.pi * (b >> 8) / 2**24
    return radius * (math.cos(angle) if element % 2 == 0 else math.sin(angle))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    sample=st.integers(0, 2**32 - 1),
    dimension=st.integers(1, 9),
    draw=st.integers(0, 1000),
)
def test_each_number_stands_where_the_format_says(seed, sample, dimension, draw):
    drawn = normal(seed, range(sample, sample + 1), dimension, range(draw, draw + 1))
    expected = [scalar_normal(seed, sample, draw * dimension + d) for d in range(dimension)]
    np.testing.assert_allclose(drawn[0, 0], expected, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(
    dimension=st.integers(1, 9), i=st.integers(0, 20), k=st.integers(0, 20), n=st.integers(1, 5), m=st.integers(1, 5)
)
def test_noise_does_not_depend_on_what_is_drawn_with_it(dimension, i, k, n, m):
    everything = normal(3, range(25), dimension, range(25))
    part = normal(3, range(i, i + n), dimension, range(k, k + m))
    np.testing.assert_array_equal(part, everything[k : k + m, i : i + n])


def test_noise_is_standard_normal_and_uncorrelated():
    noise = normal(0, range(500), 4, range(100))
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    for axis in range(3):
        a, b = np.split(np.take(noise, range(noise.shape[axis] // 2 * 2), axis), 2, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_seeds_differ():
    a, b = normal(1, range(100), 2, range(10)), normal(2**32 + 1, range(100), 2, range(10))
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.1


SHARES = [0.1, 0.0, 0.35, 0.05, 0.5]


def test_labels_have_the_classes_shares():
    counts = np.bincount(draw_labels(2**40 + 1, range(10_000), SHARES), minlength=len(SHARES))
    assert counts[1] == 0
    is_possible = np.array(SHARES) > 0
    assert stats.chisquare(counts[is_possible], 10_000 * np.array(SHARES)[is_possible]).pvalue > 1e-3


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**32 - 6), counts=st.lists(st.integers(0, 9), min_size=1))
def test_each_label_is_as_the_format_says(seed, first, counts):
    total = max(1, sum(counts))
    shares = [count / total for count in counts] if sum(counts) else [1.0]
    labels = draw_labels(seed, range(first, first + 5), shares).tolist()
    for i, label in enumerate(labels):
        counter = tuple(np.array([word], dtype=np.uint64) for word in (0, first + i, 2, 0))
        word = int(philox(counter, (seed % 2**32, seed // 2**32))[0][0])
        assert label == sum(math.floor(end * 2**32) <= word for end in list(itertools.accumulate(shares))[:-1])
        assert draw_labels(seed, range(first + i, first + i + 1), shares).tolist() == [label]  # whatever the batch
