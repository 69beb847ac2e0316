"""`StepTable`, a scheduler compiled to the coefficients of its sampling steps. Needs numpy only."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from .bundle import FILES, read_bytes

FORMAT, VERSION = "ddpm-step-table", 3
READ_VERSIONS = (2, VERSION)  # version 2 has no guidance, no learned variance and no ᾱ
X, EPS, X_0, Z = range(4)  # the terms of a step, in the order of their coefficients
TERMS = ("x", "ε", "x̂_0", "z")
OPTIONAL = {"alpha_cumprod": "alphas_cumprod", "guidance_scale": "guidance_scale", "log_variance": "log_variance"}
MAX_ROWS = 2**22  # of all steps together: 2,000 steps may look back to the first


@dataclass(frozen=True, eq=False)
class StepTable:
    r"""
    A sampler as a table with one row for each call of the network. Row k turns the network's input x_k and its output
    ε_k at `timesteps[k]` into the next input:

        x̂_0,k  = clip(to_x_0[k] · (x_k, ε_k), −clip_range, clip_range)
        x_k+1  = Σ_i to_next[k, i] · (x_k−i, ε_k−i, x̂_0,k−i, z_k−i)

    z_k is standard normal noise. The sum goes back over `history` calls: one for DDPM, DDIM and Euler, two or more for
    multistep and second-order solvers. The first x is `initial_scale` times standard normal noise; the last is the
    sample. Without clipping, the coefficients of x̂_0 are 0. Where a scheduler scales the network's input, as Euler's
    does, the coefficients contain the scale.

    A row may do three more things:

    - Guidance: ε_k = w · ε(x_k, t, c) + (1 − w) · ε(x_k, t, ∅) with the row's w (Ho & Salimans 2022,
      https://arxiv.org/abs/2207.12598, eq. 6, whose w is one less).
    - Learned variance: z_k is multiplied by exp(½ (a v + b)), where v is the second half of the network's output
      (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15).
    - Known values, after the sum: x_k+1 ← m (√ᾱ′ y + √(1 − ᾱ′) z′) + (1 − m) x_k+1, where ᾱ′ is the next call's ᾱ, or
      1 after the last call (Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, eq. 8).

    Attributes:
        scheduler: name of the scheduler's class.
        initial_scale: standard deviation of the first x.
        timesteps: float32 `[calls]`, the timesteps given to the network.
        to_x_0: float64 `[calls, 2]`, coefficients of the predicted x_0 (Ho et al. 2020, eq. 15).
        to_next: float64 `[calls, history, 4]`, coefficients of the next x.
        clip_range: largest magnitude of the predicted x_0, in the network's units, or `None`.
        alphas_cumprod: float64 `[calls]`, ᾱ of the network's input, or `None` if not recorded.
        guidance_scale: float64 `[calls]`, w, or `None` for 1 everywhere.
        log_variance: float64 `[calls, 2]`, a and b, or `None` without a learned variance.

    Raises:
        BundleError: if an array has the wrong shape or a value is out of range.
    """

    scheduler: str
    initial_scale: float
    timesteps: npt.NDArray[np.float32]
    to_x_0: npt.NDArray[np.float64]
    to_next: npt.NDArray[np.float64]
    clip_range: float | None
    alphas_cumprod: npt.NDArray[np.float64] | None = None
    guidance_scale: npt.NDArray[np.float64] | None = None
    log_variance: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        calls, history = len(self.timesteps), self.history
        for name, shape in (
            ("timesteps", (calls,)),
            ("to_x_0", (calls, 2)),
            ("to_next", (calls, history, 4)),
            ("alphas_cumprod", (calls,)),
            ("guidance_scale", (calls,)),
            ("log_variance", (calls, 2)),
        ):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape or calls == 0 or history == 0:
                raise BundleError(f"a step table's {name} must have the shape {shape}, not {array.shape}")
            if not np.isfinite(array).all():
                raise BundleError(f"a step table's {name} must be finite")
        if self.alphas_cumprod is not None and not ((self.alphas_cumprod >= 0) & (self.alphas_cumprod <= 1)).all():
            raise BundleError("a step table's alphas_cumprod must be from 0 to 1")
        if history > calls:
            raise BundleError(f"a step table of {calls} rows can't look back over {history}")
        for k in range(history):
            if self.to_next[k, k + 1 :].any():
                raise BundleError(f"a step table's row {k} can't look back beyond the first")
        if not 0 < self.initial_scale < np.inf:
            raise BundleError(f"a step table's initial_scale must be positive, got {self.initial_scale}")
        if self.clip_range is None and self.to_next[..., X_0].any():
            raise BundleError("a step table without a clip_range can't use the clipped x_0")
        if self.clip_range is not None and not 0 < self.clip_range < np.inf:
            raise BundleError(f"a step table's clip_range must be positive, got {self.clip_range}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Number of calls of the network that a step uses, its own included."""
        return self.to_next.shape[1] if self.to_next.ndim == 3 else 0

    @property
    def terms(self) -> list[tuple[int, int]]:
        """Terms with a coefficient other than 0: how many calls back, and `X`, `EPS`, `X_0` or `Z` of that call."""
        return [(i, term) for i in range(self.history) for term in range(4) if self.to_next[:, i, term].any()]

    @property
    def num_numbers(self) -> int:
        """The number of timesteps, scales and coefficients that are not 0, of which the sampler consists."""
        numbers = int(np.count_nonzero(self.to_x_0)) + int(np.count_nonzero(self.to_next))
        return len(self) + numbers + int(self.is_guided.sum())

    @functools.cached_property
    def is_stochastic(self) -> npt.NDArray[np.bool_]:
        """bool `[calls]`: whether this step or a later one uses the call's noise."""
        used = np.zeros(len(self), dtype=bool)
        for i in range(self.history):
            used[: len(self) - i] |= self.to_next[i:, i, Z] != 0
        return used

    @functools.cached_property
    def guidance_scales(self) -> npt.NDArray[np.float64]:
        """float64 `[calls]`: w of each call, 1 without guidance."""
        return np.ones(len(self)) if self.guidance_scale is None else self.guidance_scale

    @functools.cached_property
    def is_guided(self) -> npt.NDArray[np.bool_]:
        """bool `[calls]`: whether the call is guided, which costs two network evaluations."""
        return np.not_equal(self.guidance_scales, 1)

    @functools.cached_property
    def num_evaluations(self) -> int:
        """The number of network evaluations of a sample: two for a guided call."""
        return len(self) + int(self.is_guided.sum())

    def guided(self, scale: float, interval: tuple[float, float] | None = None) -> StepTable:
        """Return a copy with this guidance.

        Args:
            scale: w.
            interval: `(t_high, t_low)`, the range of timesteps to guide at (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724); by default all.
        """
        t_high, t_low = interval or (np.inf, -np.inf)
        is_inside = (self.timesteps <= t_high) & (self.timesteps >= t_low)
        return dataclasses.replace(self, guidance_scale=np.where(is_inside, float(scale), 1.0))

    def repeated(self, times: int) -> StepTable:
        """Return a table that takes each step `times` times, and adds the step's noise back in between.

        This is RePaint's resampling (Lugmayr et al. 2022, algorithm 1, with jumps of one step), which fits the drawn
        values to the known ones. q(x_t | x_t′) = N(√(ᾱ_t / ᾱ_t′) x_t′, …) is linear in x and z, so the result is a
        table, too.

        Raises:
            BundleError: if the table has no `alphas_cumprod`, has a learned variance, or uses the noise of earlier
                calls.
        """
        if times == 1:
            return self
        if self.alphas_cumprod is None:
            raise BundleError("a step table without alphas_cumprod can't be resampled: export the bundle again")
        if self.log_variance is not None or self.to_next[:, 1:, Z].any():
            raise BundleError(
                f"{self.scheduler}'s steps can't be resampled: their noise is learned or comes from earlier steps"
            )
        alphas, alphas_next = self.alphas_cumprod, np.append(self.alphas_cumprod[1:], 1.0)
        share = np.sqrt(alphas / alphas_next)
        variance = np.maximum(1 - alphas - share**2 * (1 - alphas_next), 0)
        calls, history = len(self), self.history
        to_next = np.zeros((calls, times, (history - 1) * times + 1, 4))
        for j in range(times):
            to_next[:, j, 0] = self.to_next[:, 0]
            for i in range(1, history):  # the last repetition of the call that was i before this one
                to_next[:, j, (i - 1) * times + j + 1] = self.to_next[:, i]
        again = to_next[:, :-1]
        again *= share[:, None, None, None]
        again[:, :, 0, Z] = np.sqrt(again[:, :, 0, Z] ** 2 + variance[:, None])  # the variances add
        rows: dict[str, Any] = {
            name: np.repeat(value, times, axis=0)
            for name in ("timesteps", "to_x_0", "alphas_cumprod", "guidance_scale")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, to_next=to_next.reshape(calls * times, -1, 4), **rows)

    @property
    def summary(self) -> str:
        """Scheduler, number of network calls, and options, in one line."""
        clip = "no clipping" if self.clip_range is None else f"x̂_0 clipped to ±{self.clip_range:.4g}"
        more = ", a learned variance" if self.log_variance is not None else ""
        more += f", {self.is_guided.sum()} of them guided" if self.is_guided.any() else ""
        return f"{self.scheduler}, {len(self)} network calls{more}, {clip}"

    def __repr__(self) -> str:
        rows = [
            self.summary,
            f"{'call':>4} {'t':>7} │"
            + "".join(f"{TERMS[term] + (f'₋{i}' if i else ''):>11}" for i, term in self.terms),
        ]
        for k in range(len(self)):
            if len(self) > 20 and 8 <= k < len(self) - 8:
                if k == 8:
                    rows.append(f"{'…':>4}")
                continue
            cells = "".join(f"{self.to_next[k, i, term]:>11.5g}" for i, term in self.terms)
            rows.append(f"{k:>4} {self.timesteps[k]:>7g} │{cells}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return what `step_table.json` holds."""
        values = {key: getattr(self, name) for key, name in OPTIONAL.items()}
        optional = {key: value for key, value in values.items() if value is not None}
        steps: list[dict[str, Any]] = []
        for k, to_next in enumerate(self.to_next):
            used = max([1, *(np.flatnonzero(to_next.any(axis=1)) + 1)])
            step = {"timestep": float(self.timesteps[k]), "to_x_0": self.to_x_0[k].tolist()}
            step["to_next"] = to_next[:used].tolist()
            steps.append(step | {key: value[k].tolist() for key, value in optional.items()})
        head = {"format": FORMAT, "version": VERSION, "scheduler": self.scheduler}
        return head | {"initial_scale": self.initial_scale, "clip_range": self.clip_range, "steps": steps}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, one line for each call."""
        table = self.to_dict()
        rows = ",\n".join(map(json.dumps, table.pop("steps")))
        Path(path).write_text(f'{json.dumps(table)[:-1]}, "steps": [\n{rows}\n]}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTable:
        """Read a table that `save` wrote.

        Raises:
            BundleError: if the file can't be read or holds no valid table.
        """
        return cls.parse(read_bytes(path, FILES["step_table.json"]), path)

    @classmethod
    def parse(cls, content: bytes, path: str | os.PathLike[str]) -> StepTable:
        """Parse the content of a table's file; errors name it by `path`.

        Raises:
            BundleError: if the content is no valid table.
        """
        try:
            table = json.loads(content.decode("utf-8"))
            if table["format"] != FORMAT or table["version"] not in READ_VERSIONS:
                raise BundleError(f"{path} is not a step table of version {VERSION}")
            steps = table["steps"]
            rows = [np.array(step["to_next"], dtype=np.float64).reshape(-1, 4) for step in steps]
            history = max((len(row) for row in rows), default=0)
            # The array is padded to the longest history, so that a small file could demand a large array.
            if len(rows) * history > MAX_ROWS:
                raise BundleError(f"it looks back over {history} rows in each of {len(rows)} steps, which is too much")
            to_next = np.zeros((len(rows), history, 4))
            for k, row in enumerate(rows):
                to_next[k, : len(row)] = row
            return cls(
                scheduler=str(table["scheduler"]),
                initial_scale=float(table["initial_scale"]),
                timesteps=np.array([step["timestep"] for step in steps], dtype=np.float32),
                to_x_0=np.array([step["to_x_0"] for step in steps], dtype=np.float64),
                to_next=to_next,
                clip_range=None if table["clip_range"] is None else float(table["clip_range"]),
                **{
                    name: np.array([step[key] for step in steps], dtype=np.float64)
                    for key, name in OPTIONAL.items()
                    if table["version"] == VERSION and steps and key in steps[0]
                },
            )
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # no or other JSON
            raise BundleError(f"{path} is not a step table: {type(error).__name__}: {error}") from None
