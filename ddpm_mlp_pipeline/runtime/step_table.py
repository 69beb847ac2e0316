"""A step table: a scheduler, compiled to the numbers that its sampling steps consist of. Needs numpy only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import BundleError

FORMAT, VERSION = "ddpm-step-table", 2
X, EPS, X_0, Z = range(4)  # the terms of a step, in the order of its coefficients
TERMS = ("x", "ε", "x̂_0", "z")
MAX_ROWS = 2**22  # of all steps together: enough for 2,000 of them that look back to the first


@dataclass(frozen=True, eq=False)
class StepTable:
    r"""
    A sampler as a table, one row for each call of the network. Call k turns x_k, what the network sees, and ε_k, its
    output for it at `timesteps[k]`, into what it sees next:

        x̂_0,k  = clip(to_x_0[k] · (x_k, ε_k), −clip_range, clip_range)
        x_k+1  = Σ_i to_next[k, i] · (x_k−i, ε_k−i, x̂_0,k−i, z_k−i)

    where z_k is standard normal noise, and i goes back over as many calls as the scheduler remembers: one for DDPM,
    DDIM and Euler, two or more for multistep solvers and those of second order. x_0 is `initial_scale` times standard
    normal noise, and the last x is the sample. Without clipping, x̂_0 is not needed: its coefficients are 0.

    (A scheduler that scales what the network sees, as Euler's does, keeps another sample than that. The table has the
    scales in its coefficients.)

    Attributes:
        scheduler: name of the scheduler's class.
        initial_scale: of the first x.
        timesteps: float32 `[calls]`, what the network is told.
        to_x_0: float64 `[calls, 2]`, coefficients of the predicted x_0 (Ho et al. 2020, eq. 15).
        to_next: float64 `[calls, history, 4]`, coefficients of the next x.
        clip_range: largest magnitude of the predicted x_0, in the network's units, or `None`.

    Raises:
        BundleError: if the arrays' shapes or values can't be a table.
    """

    scheduler: str
    initial_scale: float
    timesteps: npt.NDArray[np.float32]
    to_x_0: npt.NDArray[np.float64]
    to_next: npt.NDArray[np.float64]
    clip_range: float | None

    def __post_init__(self) -> None:
        calls, history = len(self.timesteps), self.history
        for name, shape in (("timesteps", (calls,)), ("to_x_0", (calls, 2)), ("to_next", (calls, history, 4))):
            array = getattr(self, name)
            if array.shape != shape or calls == 0 or history == 0:
                raise BundleError(f"a step table's {name} must have the shape {shape}, not {array.shape}")
            if not np.isfinite(array).all():
                raise BundleError(f"a step table's {name} must be finite")
        if history > calls:
            raise BundleError(f"a step table of {calls} rows can't look back over {history}")
        for k in range(history):
            if self.to_next[k, k + 1 :].any():
                raise BundleError(f"a step table's row {k} can't use what was before the first")
        if not 0 < self.initial_scale < np.inf:
            raise BundleError(f"a step table's initial_scale must be positive, got {self.initial_scale}")
        if self.clip_range is None and self.to_next[..., X_0].any():
            raise BundleError("a step table that does not clip can't use the clipped x_0")
        if self.clip_range is not None and not 0 < self.clip_range < np.inf:
            raise BundleError(f"a step table's clip_range must be positive, got {self.clip_range}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def history(self) -> int:
        """Over how many calls of the network a step looks back, its own among them."""
        return self.to_next.shape[1] if self.to_next.ndim == 3 else 0

    @property
    def terms(self) -> list[tuple[int, int]]:
        """What the steps use: how many calls back, and `X`, `EPS`, `X_0` or `Z` of that call."""
        return [(i, term) for i in range(self.history) for term in range(4) if self.to_next[:, i, term].any()]

    @property
    def is_stochastic(self) -> npt.NDArray[np.bool_]:
        """bool `[calls]`: whether the noise of the call is used, by its own step or a later one."""
        used = np.zeros(len(self), dtype=bool)
        for i in range(self.history):
            used[: len(self) - i] |= self.to_next[i:, i, Z] != 0
        return used

    @property
    def summary(self) -> str:
        """What sampler this is, in a few words."""
        clip = "no clipping" if self.clip_range is None else f"x̂_0 clipped to ±{self.clip_range:.4g}"
        return f"{self.scheduler}, {len(self)} network calls, {clip}"

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, one line for each call."""
        head = {"format": FORMAT, "version": VERSION, "scheduler": self.scheduler}
        head |= {"initial_scale": self.initial_scale, "clip_range": self.clip_range}
        rows = []
        for t, to_x_0, to_next in zip(self.timesteps, self.to_x_0, self.to_next, strict=True):
            used = max([1, *(np.flatnonzero(to_next.any(axis=1)) + 1)])
            rows.append(json.dumps({"timestep": float(t), "to_x_0": list(to_x_0), "to_next": to_next[:used].tolist()}))
        text = json.dumps(head)[:-1] + ', "steps": [\n' + ",\n".join(rows) + "\n]}\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepTable:
        """Read a table that `save` wrote.

        Raises:
            BundleError: if the file is missing, or is not such a table.
        """
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise BundleError(f"the bundle lacks its step table, {path}") from None
        except OSError as error:
            raise BundleError(f"can't read {path}: {error.strerror}") from None
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: str | os.PathLike[str]) -> StepTable:
        """Turn what the file at `path` holds into a table.

        Raises:
            BundleError: if it is not a table that `save` wrote.
        """
        try:
            table = json.loads(content.decode("utf-8"))
            if (table["format"], table["version"]) != (FORMAT, VERSION):
                raise BundleError(f"{path} is not a step table of version {VERSION}")
            steps = table["steps"]
            rows = [np.array(step["to_next"], dtype=np.float64).reshape(-1, 4) for step in steps]
            history = max((len(row) for row in rows), default=0)
            if (
                len(rows) * history > MAX_ROWS
            ):  # a small file can list few rows for each of many steps, and many for one
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
            )
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:  # no JSON, or other JSON
            raise BundleError(f"{path} is not a step table: {type(error).__name__}: {error}") from None
