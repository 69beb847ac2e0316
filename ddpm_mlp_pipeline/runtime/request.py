"""Check the labels, conditions and known values that samples are drawn with; bring them to the network's units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError
from .noise import draw_labels
from .step_table import StepTable

if TYPE_CHECKING:
    from PIL import Image


MAX_SAMPLES = 2**32  # the noise generator's counter has 32 bits for a sample's number


class Asked(TypedDict, total=False):
    """The arguments of `OnnxSampler.sample` that choose what is drawn."""

    class_labels: int | str | Sequence[int | str] | npt.NDArray[np.integer[Any]] | None
    condition: Mapping[str, float] | Sequence[Any] | npt.NDArray[np.floating[Any]] | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    known: Mapping[str, float] | Sequence[Any] | npt.NDArray[np.floating[Any]] | Image.Image | None
    mask: Sequence[Any] | npt.NDArray[Any] | Image.Image | None
    resample: int


@dataclass(frozen=True, eq=False)
class Request:
    """The checked arguments of a draw. Each array has one row for all samples, or one row for each sample.

    Attributes:
        samples: the numbers of the samples.
        inputs: inputs of the network besides `sample` and `timestep`: `class_labels` int64 `[rows]` and `condition`
            float32 `[rows, condition_dim]`, NaN for no condition.
        null: the same inputs without label and condition, for guidance; empty if no call is guided.
        known: y, float32 `[rows, *sample_shape]`, or `None`.
        mask: m, float32 that broadcasts with `known`: 1 where y is known, 0 elsewhere.
        class_shares: probability of each class. If given, `of` draws the labels, and ignores those of `inputs`.
    """

    samples: range
    inputs: dict[str, npt.NDArray[Any]]
    null: dict[str, npt.NDArray[Any]]
    known: npt.NDArray[np.float32] | None = None
    mask: npt.NDArray[np.float32] | None = None
    class_shares: list[float] | None = None

    def of(self, samples: range, seed: int) -> Request:
        """Return the request for some of its samples, with one row of inputs for each of them."""
        first = self.samples.start

        def rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return values[samples.start - first : samples.stop - first] if len(values) > 1 else values

        def for_each(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.ascontiguousarray(np.broadcast_to(rows(values), (len(samples), *values.shape[1:])))

        inputs, null = (
            {name: for_each(values) for name, values in given.items()} for given in (self.inputs, self.null)
        )
        if self.class_shares is not None:
            inputs["class_labels"] = draw_labels(seed, samples, self.class_shares)
        if self.known is None or self.mask is None:
            return Request(samples, inputs, null)
        return Request(samples, inputs, null, rows(self.known), rows(self.mask))


def numbered(samples: int | range) -> range:
    """Return the numbers of the samples to draw: those of a range, or as many as asked, from 0.

    Raises:
        ConfigurationError: if there are none, or if they are not consecutive numbers below 2³².
    """
    if not isinstance(samples, range):
        samples = range(samples)
        if not samples:
            raise ConfigurationError(f"samples must be at least 1, got {samples.stop}")
    if samples.step != 1 or not samples or samples.start < 0:
        raise ConfigurationError(f"the range of samples must go up by 1, from 0 or more, got {samples}")
    if samples.stop > MAX_SAMPLES:
        raise ConfigurationError(
            f"a seed has {MAX_SAMPLES} samples, numbered from 0, got {samples.stop - 1}: use another seed"
        )
    return samples


def resolve(
    info: dict[str, Any],
    table: StepTable,
    samples: range,
    class_labels: Any = None,
    condition: Any = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    known: Any = None,
    mask: Any = None,
    resample: int = 1,
) -> tuple[Request, StepTable]:
    """Check a draw's arguments against a bundle.

    Args:
        info: the content of `bundle.json`.
        table: the bundle's step table.
        samples: the numbers of the samples to draw.
        class_labels, …: see `OnnxSampler.sample`.

    Returns:
        The request, and the step table with the guidance and the resampling.

    Raises:
        ConfigurationError: if an argument has the wrong shape, isn't finite, or doesn't fit the network.
        BundleError: if the table can't be resampled.
    """
    if type(resample) is not int or resample < 1:
        raise ConfigurationError(f"resample must be a whole number of at least 1, got {resample}")
    class_shares = None
    if "class_labels" in info["inputs"] and class_labels is None and condition is None and known is None:
        class_shares = info.get("class_shares")
    if class_shares is not None:
        class_labels = 0  # a placeholder, until `Request.of` draws the labels
    inputs = _inputs(info, len(samples), class_labels, condition)
    y, m = _known(info, len(samples), known, mask)
    if info["condition_is_known"]:
        unknown = np.full((1, *info["sample_shape"]), np.nan, dtype=np.float32)
        inputs["condition"] = unknown if y is None or m is None else np.where(m > 0, y, unknown)
    if guidance_scale is not None:
        if guidance_interval is not None:
            bounds = _numbers(guidance_interval, "guidance_interval")
            if bounds.shape != (2,) or not np.isfinite(bounds).all():
                raise ConfigurationError("guidance_interval must be 2 finite numbers")
            t_high, t_low = map(float, bounds)
            if t_high < t_low:
                raise ConfigurationError(f"guidance_interval must be (t_high, t_low), got ({t_high:g}, {t_low:g})")
            guidance_interval = t_high, t_low
        table = table.guided(_finite(guidance_scale, "guidance_scale"), guidance_interval)
    elif guidance_interval is not None:
        raise ConfigurationError("guidance_interval needs a guidance_scale")
    null = {}
    if table.num_evaluations > len(table):
        if not inputs:
            raise ConfigurationError("guidance_scale needs a network that takes labels or conditions")
        if "class_labels" in inputs and info["null_label"] is None:
            raise ConfigurationError("guidance_scale needs a network with a null label (ddpm-export --null_label)")
        nulls = {"class_labels": info.get("null_label"), "condition": math.nan}
        null = {name: np.full_like(values, nulls[name]) for name, values in inputs.items()}
    if y is not None and table.alphas_cumprod is None:
        raise ConfigurationError("this bundle's step table takes no known values: export the checkpoint again")
    return Request(samples, inputs, null, y, m, class_shares), table.repeated(resample)


def _inputs(info: dict[str, Any], num_samples: int, class_labels: Any, condition: Any) -> dict[str, npt.NDArray[Any]]:
    inputs: dict[str, npt.NDArray[Any]] = {}
    if "class_labels" in info["inputs"]:
        labels = info["null_label"] if class_labels is None else class_labels
        if labels is None:
            raise ConfigurationError(f"this network needs class_labels: {', '.join(info['class_names'])}")
        is_one = isinstance(labels, str) or np.ndim(labels) == 0
        numbers = [_class(info, label) for label in ([labels] if is_one else labels)]
        if len(numbers) not in (1, num_samples):
            raise ConfigurationError(f"class_labels must be one, or {num_samples}, got {len(numbers)}")
        inputs["class_labels"] = np.array(numbers, dtype=np.int64)
    elif class_labels is not None:
        raise ConfigurationError("class_labels: this network knows no classes")
    if "condition" in info["inputs"] and not info["condition_is_known"]:
        columns = info["condition_columns"]
        if condition is None:
            inputs["condition"] = np.full((1, len(columns)), np.nan, dtype=np.float32)
        else:
            values = np.atleast_2d(_by_name(condition, columns, "condition"))
            if values.shape not in ((1, len(columns)), (num_samples, len(columns))) or not np.isfinite(values).all():
                raise ConfigurationError(
                    f"condition must hold finite numbers, {len(columns)} ({', '.join(columns)}) for all samples or "
                    f"for each of {num_samples}"
                )
            mean, std = np.array(info["condition_mean"]), np.array(info["condition_std"])
            inputs["condition"] = ((values - mean) / std).astype(np.float32)
    elif condition is not None:
        raise ConfigurationError("condition: this network takes no condition")
    return inputs


def _class(info: dict[str, Any], label: Any) -> int:
    names: list[str] = info["class_names"]
    if isinstance(label, str):
        if label not in names:
            shown = names if len(names) <= 20 else [*names[:20], "…"]
            raise ConfigurationError(f"there is no class {label!r}, only {', '.join(shown)}")
        return names.index(label)
    number = int(label) if isinstance(label, int | np.integer) else -1
    if not 0 <= number < len(names) and number != info["null_label"]:
        raise ConfigurationError(f"class_labels must be names, or numbers from 0 to {len(names) - 1}, got {label!r}")
    return number


def _known(
    info: dict[str, Any], num_samples: int, known: Any, mask: Any
) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.float32] | None]:
    """Return y in the network's units and m, both with one row, or with one for each sample."""
    if known is None:
        if mask is not None:
            raise ConfigurationError("a mask needs known values")
        return None, None
    shape = tuple(info["sample_shape"])
    if len(shape) == 1:
        y = np.atleast_2d(_by_name(known, info["data_columns"], "known"))
        _check_rows(y, num_samples, shape, "known")
        y = (y - np.array(info["data_mean"])) / np.array(info["data_std"])
        m = ~np.isnan(y) if mask is None else np.atleast_2d(np.asarray(mask)).astype(bool)
        _check_rows(m, num_samples, shape, "the mask")
    else:
        if mask is None:
            raise ConfigurationError("known images need a mask, which is true where they are known")
        y = 2 * _images(known, shape[0]) - 1
        y = np.moveaxis(y.reshape(-1, *y.shape[-3:]), -1, 1)
        _check_rows(y, num_samples, shape, "known")
        m = np.asarray(mask)
        m = m > 127 if m.dtype == np.uint8 else m.astype(bool)
        if m.shape[-2:] != shape[1:]:
            raise ConfigurationError(f"the mask must be of {shape[1]}×{shape[2]} pixels, got the shape {m.shape}")
        m = m.reshape(-1, 1, *shape[1:])
        _check_rows(m, num_samples, (1, *shape[1:]), "the mask")
    y = np.where(m, y, 0)
    if not np.isfinite(y).all():
        raise ConfigurationError("known values must be finite where the mask says that they are known")
    return y.astype(np.float32), m.astype(np.float32)


def _check_rows(values: npt.NDArray[Any], num_samples: int, shape: tuple[int, ...], what: str) -> None:
    if values.shape not in ((1, *shape), (num_samples, *shape)):
        raise ConfigurationError(f"{what} must have the shape {shape}, or {(num_samples, *shape)}, got {values.shape}")


def _images(images: Any, channels: int) -> npt.NDArray[np.float64]:
    """Return a picture or an array as images in [0, 1], `[…, height, width, channels]`."""
    if hasattr(images, "convert"):
        array = np.asarray(images.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]), dtype=np.float64) / 255
        return array.reshape(*array.shape[:2], channels)
    array = _numbers(images, "known")
    if array.ndim not in (3, 4):
        raise ConfigurationError(f"known images must be [height, width, channels], got the shape {array.shape}")
    return array


def _by_name(values: Any, columns: list[str], what: str) -> npt.NDArray[np.float64]:
    """Return a dictionary's values in the columns' order, NaN for missing known values; or an array as it is."""
    if not isinstance(values, Mapping):
        return _numbers(values, what)
    if unknown := [name for name in values if name not in columns]:
        raise ConfigurationError(f"{what} has no column {unknown[0]!r}, only {', '.join(columns)}")
    if what == "condition" and (missing := [name for name in columns if name not in values]):
        raise ConfigurationError(f"the condition lacks {missing[0]!r}")
    return _numbers([values.get(name, math.nan) for name in columns], what)


def _numbers(values: Any, what: str) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        raise ConfigurationError(f"{what} must hold numbers") from None


def _finite(value: Any, what: str) -> float:
    number = _numbers(value, what)
    if number.ndim != 0 or not np.isfinite(number):
        raise ConfigurationError(f"{what} must be a finite number, got {value}")
    return float(number)
