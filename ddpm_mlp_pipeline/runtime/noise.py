"""Generate the runtime's noise. The generator is counter-based: any value can be computed without those before it.

Philox-4×32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11) maps a key, the seed, and a
counter, the position, to four uniform 32-bit words. The Box–Muller transform maps these to four standard normals.
Each sample has its own stream: block b of sample i is Philox(key = seed, counter = (b, i, 0, 0)). The normals of its
blocks, `dimension` at a time, are the initial sample and then the noise of step 0, 1, 2 … A sample therefore depends
only on the seed and its index, whatever the batch. The counter's third word numbers further streams of the sample:
stream 1 is the noise of its known values, stream 2 its label where none is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio, and √3 − 1
ROUNDS = 10
FEW_BLOCKS = 12  # up to so many, Python's integers are faster than numpy's arrays
_MASK = 0xFFFFFFFF

Words: TypeAlias = npt.NDArray[np.uint64]
"""32-bit words in 64-bit arrays, which hold their products."""


Word = TypeVar("Word", int, Words)  # integers, or arrays of them


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Return Philox-4×32-10's output for a counter and a key.

    Args:
        counter: four uint64 arrays that broadcast together, or four integers; all values are below 2³².
        key: two integers below 2³².

    Returns:
        Four uint64 arrays, or four integers, of uniform values below 2³².
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    p0: Any
    p1: Any
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _MASK, (k1 + KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(a: Words, b: Words) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Map two 32-bit words to two standard normals. The upper 24 bits of each are used: float32 holds them exactly."""
    unit = np.float32(2.0**-24)
    u = ((a >> np.uint64(8)) + np.uint64(1)).astype(np.float32) * unit  # in (0, 1], so that the logarithm is finite
    angle = (b >> np.uint64(8)).astype(np.float32) * (unit * np.float32(2 * np.pi))
    radius = np.sqrt(np.float32(-2) * np.log(u))
    return radius * np.cos(angle), radius * np.sin(angle)


def normal(seed: int, samples: range, dimension: int, draws: range, stream: int = 0) -> npt.NDArray[np.float32]:
    """Return the standard normals of some draws of some samples.

    Args:
        seed: in [0, 2⁶³).
        samples: indices of the samples, below 2³².
        dimension: number of values in a sample.
        draws: in stream 0, 0 is the initial sample and k + 1 the noise of step k; in stream 1, k is the noise of the
            known values after step k.
        stream: number of the sample's stream.

    Returns:
        float32, `[len(draws), len(samples), dimension]`.
    """
    first, last = draws.start * dimension, draws.stop * dimension
    words = _words(seed, samples, range(first // 4, -(-last // 4)), stream)
    normals = np.empty((*words.shape[1:], 2, 2), dtype=np.float32)
    normals[..., 0], normals[..., 1] = (values.transpose(1, 2, 0) for values in _box_muller(words[::2], words[1::2]))
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
    word = _words(seed, samples, range(1), stream=2)[0].ravel()
    labels: npt.NDArray[np.int64] = np.searchsorted(thresholds, word.astype(np.float64), side="right").astype(np.int64)
    return labels


def _words(seed: int, samples: range, blocks: range, stream: int) -> Words:
    """Return the four words of some blocks of a stream, `[4, len(samples), len(blocks)]`."""
    key = seed & _MASK, seed >> 32
    if len(samples) * len(blocks) <= FEW_BLOCKS:
        each = [philox((block, index, stream, 0), key) for index in samples for block in blocks]
        return np.array(each, dtype=np.uint64).T.reshape(4, len(samples), len(blocks))
    zero = np.zeros((), dtype=np.uint64)
    index = np.arange(samples.start, samples.stop, dtype=np.uint64)[:, None]
    block = np.arange(blocks.start, blocks.stop, dtype=np.uint64)
    return np.stack(philox((block, index, zero + np.uint64(stream), zero), key))
