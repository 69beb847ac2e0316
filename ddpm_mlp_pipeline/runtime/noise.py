"""The runtime's noise: a counter-based generator, so that any number of it can be had without those before it.

Philox-4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns the key, which is the
seed, and a counter, which says where the number stands, into four uniform 32-bit words; Box and Muller's transform
turns those into four standard normals. Sample i has a stream of its own: block b of it is Philox(key = seed, counter =
(b, i, 0, 0)), and the normals of all its blocks in a row are, `dimension` at a time, the initial sample and then the
noise of step 0, 1, 2 … So a sample depends on the seed and on its index alone, not on the batch that it is drawn in.
The counter's third word numbers further streams of the same sample: stream 1 is the noise of its known values, and
stream 2 its label where none is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_INCREMENTS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))  # the golden ratio, and √3 − 1
ROUNDS = 10
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

Words: TypeAlias = npt.NDArray[np.uint64]
"""32-bit words in 64-bit arrays, so that products are whole."""


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Philox-4×32-10.

    Args:
        counter: four uint64 arrays that broadcast together, of values below 2³².
        key: two integers below 2³².

    Returns:
        Four uint64 arrays of uniform values below 2³².
    """
    c0, c1, c2, c3 = counter
    k0, k1 = (np.uint64(k) for k in key)
    for _ in range(ROUNDS):
        # 32-bit words in 64-bit arrays: the product is whole, and its halves are a shift and a mask away.
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _MASK, (k1 + KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(a: Words, b: Words) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Two 32-bit words to two standard normals. Of each word the upper 24 bits count, which float32 holds exactly."""
    unit = np.float32(2.0**-24)
    u = ((a >> np.uint64(8)) + np.uint64(1)).astype(np.float32) * unit  # in (0, 1], so that the logarithm is finite
    angle = (b >> np.uint64(8)).astype(np.float32) * (unit * np.float32(2 * np.pi))
    radius = np.sqrt(np.float32(-2) * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


def normal(seed: int, samples: range, dimension: int, draws: range, stream: int = 0) -> npt.NDArray[np.float32]:
    """Standard normals for some draws of some samples.

    Args:
        seed: in [0, 2⁶³).
        samples: indices of the samples, below 2³².
        dimension: how many numbers a sample has.
        draws: in stream 0, 0 is the initial sample and k + 1 the noise of step k; in stream 1, k is the noise of the
            known values after step k.
        stream: of the sample.

    Returns:
        float32, `[len(draws), len(samples), dimension]`.
    """
    first, last = draws.start * dimension, draws.stop * dimension
    words = _words(seed, samples, np.arange(first // 4, -(-last // 4), dtype=np.uint64), stream)
    normals = np.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], axis=-1)
    numbers = normals.reshape(len(samples), -1)[:, first % 4 :][:, : last - first]
    return numbers.reshape(len(samples), len(draws), dimension).swapaxes(0, 1)


def draw_labels(seed: int, samples: range, class_shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """Draw the label of some samples, each from its own stream.

    Args:
        seed: in [0, 2⁶³).
        samples: indices of the samples, below 2³².
        class_shares: probability of each class; they sum to 1.

    Returns:
        int64, `[len(samples)]`.
    """
    # In float64, JavaScript has the same thresholds. The last class takes what rounding leaves.
    thresholds = np.floor(np.cumsum(class_shares, dtype=np.float64) * 2.0**32)[:-1]
    word = _words(seed, samples, np.zeros(1, dtype=np.uint64), stream=2)[0].ravel()
    return np.searchsorted(thresholds, word.astype(np.float64), side="right").astype(np.int64)


def _words(seed: int, samples: range, blocks: Words, stream: int) -> tuple[Words, Words, Words, Words]:
    """Return the four words of some blocks of a stream, each `[len(samples), len(blocks)]`."""
    zero = np.zeros((), dtype=np.uint64)
    index = np.arange(samples.start, samples.stop, dtype=np.uint64)[:, None]
    return philox((blocks, index, zero + np.uint64(stream), zero), (seed & 0xFFFFFFFF, seed >> 32))
