"""Measure networks with a condition against what their data's distribution is known to be.

    python tests/measure_conditions.py linear-data DIR   write the data: y = A c + noise, 50,000 points and 4,000 more
    python tests/measure_conditions.py linear BUNDLE     mean and covariance of y given c, at 20 values of c
    python tests/measure_conditions.py angle BUNDLE      distance to the swiss roll's point at the angle, at 20 angles

docs/conditions.md says how the networks are trained and what came out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from tabulate import tabulate

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.data.points import POINT_SETS, load_points, split_columns

A = np.array([[1.0, -0.5], [0.5, 1.0], [-1.0, 0.25]])
COVARIANCE = np.array([[0.5, 0.2, 0.0], [0.2, 0.4, 0.1], [0.0, 0.1, 0.3]])  # of y given c
COLUMNS = ["y0", "y1", "y2", "c0", "c1"]
NUM_CONDITIONS = 20


def write_linear_data(folder: Path) -> None:
    """Write linear.csv and linear_test.csv, and print the entropy that `ddpm-bound` of a perfect model would find."""
    rng = np.random.default_rng(0)
    for name, number in (("linear", 50_000), ("linear_test", 4_000)):
        c = rng.standard_normal((number, 2))
        y = c @ A.T + rng.multivariate_normal(np.zeros(3), COVARIANCE, number)
        np.savetxt(folder / f"{name}.csv", np.c_[y, c], "%.7g", ",", header=",".join(COLUMNS), comments="")
        if name == "linear":
            std = y.std(axis=0)  # the unit of the bound
        entropy = np.linalg.slogdet(2 * math.pi * math.e * COVARIANCE)[1] / 2 - np.log(std).sum()
        nats = _negative_log_density(y, c).mean() - np.log(std).sum()
        print(f"{name}: −log p(y | c) is {nats / 3:.4f} nats/dim, {nats / math.log(2):.4f} bits;", end=" ")
        print(f"the entropy {entropy / 3:.4f} nats/dim, {entropy / math.log(2):.4f} bits")


def _negative_log_density(y: np.ndarray, c: np.ndarray) -> np.ndarray:
    rest = y - c @ A.T
    squares = (rest * np.linalg.solve(COVARIANCE, rest.T).T).sum(axis=1)
    return (squares + np.linalg.slogdet(2 * math.pi * COVARIANCE)[1]) / 2


def measure_linear(sampler: OnnxSampler, number: int) -> None:
    """Compare the samples' mean and covariance with A c and `COVARIANCE`, in standard errors of `number` samples."""
    upper = np.triu_indices(3)
    variances = np.diag(COVARIANCE)
    errors_of_mean = np.sqrt(variances / number)
    errors_of_covariance = np.sqrt((np.outer(variances, variances) + COVARIANCE**2) / number)[upper]
    errors, rows = [], []
    for i, c in enumerate(np.random.default_rng(1).standard_normal((NUM_CONDITIONS, 2))):
        y = sampler.sample(number, seed=i, condition=c).astype(np.float64)
        errors.append(np.append(y.mean(axis=0) - A @ c, (np.cov(y.T) - COVARIANCE)[upper]))
        z = errors[-1] / np.append(errors_of_mean, errors_of_covariance)
        rows.append((*c, *z))
    statistics = [f"mean {i}" for i in range(3)] + [f"cov {i}{j}" for i, j in zip(*upper, strict=True)]
    print(tabulate(rows, ("c0", "c1", *statistics), "plain", "+.1f"))
    z, bias = np.abs([row[2:] for row in rows]), np.array(errors)
    print(f"{(z > 3).sum()} of {z.size} are beyond 3 standard errors; the largest is at {z.max():.1f}")
    print(
        f"root mean square of the mean's errors: {_rms(bias[:, :3]):.4f}, of which chance: {_rms(errors_of_mean):.4f}"
    )
    print(f"of the covariance's: {_rms(bias[:, 3:]):.4f}, of which chance: {_rms(errors_of_covariance):.4f}")


def measure_angle(sampler: OnnxSampler, number: int) -> None:
    """Measure the samples' distance to the swiss roll's point at their angle, beside that of data."""
    noise = POINT_SETS["swiss_roll"][1]
    points, angles, _, _ = split_columns(
        load_points("swiss_roll", 200_000, condition_columns=["angle"]), condition_columns=["angle"]
    )
    rows = []
    for i, theta in enumerate(np.linspace(1.5, 4.5, NUM_CONDITIONS) * math.pi):
        true = _roll(np.array([theta]))
        samples = sampler.sample(number, seed=i, condition={"angle": theta}).astype(np.float64)
        nearest = np.abs(angles[:, 0] - theta).argsort()[:number]
        data = points[nearest] - _roll(angles[nearest, 0])
        offset = np.linalg.norm(samples.mean(axis=0) - true)
        rows.append((theta / math.pi, _rms(samples - true, 2), _rms(data, 2), offset))
    print(tabulate(rows, ("angle / π", "rms distance", "of data", "of the mean"), "plain", ".4f"))
    means = np.mean(rows, axis=0)
    print(f"means: {means[1]:.4f}, of data {means[2]:.4f} (noise {noise} · √2 = {noise * 2**0.5:.4f}), {means[3]:.4f}")


def _roll(theta: np.ndarray) -> np.ndarray:
    return (theta / (4.5 * math.pi) * np.stack([np.cos(theta), np.sin(theta)])).T


def _rms(values: np.ndarray, dimension: int = 1) -> float:
    return float(np.sqrt(np.mean(values**2) * dimension))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["linear-data", "linear", "angle"])
    parser.add_argument("path", type=Path, help="a bundle; for linear-data, a folder")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples of each condition (default: 1000)")
    args = parser.parse_args()
    if args.what == "linear-data":
        write_linear_data(args.path)
    else:
        measure = measure_linear if args.what == "linear" else measure_angle
        measure(OnnxSampler(args.path), args.num_samples)


if __name__ == "__main__":
    main()
