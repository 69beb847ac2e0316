"""A step table: a scheduler, compiled to the numbers that its sampling steps consist of. Needs numpy only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpm_mlp_pipeline.errors import BundleError

FORMAT, VERSION = "ddpm-step-table", 1


@dataclass(frozen=True, eq=False)
class StepTable:
    r"""
    A sampler as a table, one row for each sampling step: with x the current sample, ε the network's output for it at
    `timesteps[k]`, and z standard normal noise, step k is

        x̂_0 = clip(to_x_0[k] · (x, ε), −clip_range, clip_range)
        x   = to_next[k] · (x, ε, x̂_0, z)

    Without clipping, x̂_0 is not needed: its coefficient in `to_next` is 0.

    Attributes:
        scheduler: name of the scheduler's class.
        timesteps: float32 `[steps]`, what the network is told.
        to_x_0: float64 `[steps, 2]`, coefficients of the predicted x_0 (Ho et al. 2020, eq. 15).
        to_next: float64 `[steps, 4]`, coefficients of the next sample.
        clip_range: largest magnitude of the predicted x_0, in the network's units, or `None`.

    Raises:
        BundleError: if the arrays' shapes or values can't be a table.
    """

    scheduler: str
    timesteps: np.ndarray
    to_x_0: np.ndarray
    to_next: np.ndarray
    clip_range: float | None

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        for name, shape in (("timesteps", (steps,)), ("to_x_0", (steps, 2)), ("to_next", (steps, 4))):
            array = getattr(self, name)
            if array.shape != shape or steps == 0:
                raise BundleError(f"a step table's {name} must have the shape {shape}, not {array.shape}")
            if not np.isfinite(array).all():
                raise BundleError(f"a step table's {name} must be finite")
        if self.clip_range is not None and not 0 < self.clip_range < np.inf:
            raise BundleError(f"a step table's clip_range must be positive, got {self.clip_range}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def is_stochastic(self) -> np.ndarray:
        """bool `[steps]`: whether the step adds noise."""
        return self.to_next[:, 3] != 0

    def __repr__(self) -> str:
        clip = "no clipping" if self.clip_range is None else f"x̂_0 clipped to ±{self.clip_range:.4g}"
        rows = [
            f"{self.scheduler}, {len(self)} steps, {clip}",
            f"{'step':>4} {'t':>7} │" + "".join(f"{name:>11}" for name in ("x", "ε", "x̂_0", "z")),
        ]
        for k in range(len(self)):
            if len(self) > 20 and 8 <= k < len(self) - 8:
                if k == 8:
                    rows.append(f"{'…':>4}")
                continue
            rows.append(f"{k:>4} {self.timesteps[k]:>7g} │" + "".join(f"{value:>11.5g}" for value in self.to_next[k]))
        return "\n".join(rows)

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON, one line for each step."""
        head = {"format": FORMAT, "version": VERSION, "scheduler": self.scheduler, "clip_range": self.clip_range}
        rows = [
            json.dumps({"timestep": float(t), "to_x_0": list(to_x_0), "to_next": list(to_next)})
            for t, to_x_0, to_next in zip(self.timesteps, self.to_x_0, self.to_next, strict=True)
        ]
        text = json.dumps(head)[:-1] + ', "steps": [\n' + ",\n".join(rows) + "\n]}\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> StepTable:
        """Read a table that `save` wrote.

        Raises:
            BundleError: if the file is missing, or is not such a table.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (FORMAT, VERSION):
                raise BundleError(f"{path} is not a step table of version {VERSION}")
            steps = content["steps"]
            return cls(
                scheduler=str(content["scheduler"]),
                timesteps=np.array([step["timestep"] for step in steps], dtype=np.float32),
                to_x_0=np.array([step["to_x_0"] for step in steps], dtype=np.float64),
                to_next=np.array([step["to_next"] for step in steps], dtype=np.float64),
                clip_range=None if content["clip_range"] is None else float(content["clip_range"]),
            )
        except FileNotFoundError:
            raise BundleError(f"the bundle lacks its step table, {path}") from None
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:  # invalid JSON or UTF-8; other keys; other types
            raise BundleError(f"{path} is not a step table: {type(error).__name__}: {error}") from None
