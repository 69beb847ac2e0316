"""Record golden vectors: whole sampling runs of the runtime, as references for ports to other languages.

    python -m export.golden OUTPUT_DIR

exports networks with step tables of every kind, and writes one file for each run; export/FORMAT.md describes them.
Other machines agree with the recorded values up to the rounding of float32.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ddpm_mlp_pipeline import pretrained
from ddpm_mlp_pipeline.commands.parser import CommandParser, add_overwrite, command
from ddpm_mlp_pipeline.errors import explain_missing_extra
from ddpm_mlp_pipeline.files import check_folder, whole_folder
from ddpm_mlp_pipeline.runtime.columns import TableCodec
from ddpm_mlp_pipeline.runtime.noise import normal
from ddpm_mlp_pipeline.runtime.request import Asked, resolve
from ddpm_mlp_pipeline.runtime.sampler import OnnxSampler

if TYPE_CHECKING:
    from ddpm_mlp_pipeline import DDPMMLPPipeline

FORMAT, VERSION = "ddpm-golden", 2
GOLDEN = Path(__file__).parent / "golden"
NUM_SAMPLES = 3


class Run(NamedTuple):
    """A run to record. Without a `checkpoint`, it is of a tiny network; `asked` are arguments of `sample`."""

    checkpoint: str | None
    scheduler: str
    num_inference_steps: int
    seed: int
    asked: Asked
    is_table: bool = False


# A column of each kind and coding. The knots lie apart, so that the cells don't depend on rounding.
COLUMNS: list[dict[str, Any]] = [
    {"name": "price", "kind": "number", "z": [-1.5, 0.0, 1.5], "values": [0.5, 2.25, 9.0], "decimals": 1, "digits": 2},
    {"name": "weight, kg", "kind": "number", "z": [-1.0, -1.0, 1.0, 1.0], "values": [1e-5, 0.25, 0.25, 1.5e9]},
    {"name": "age", "kind": "integer", "z": [-0.7, -0.7, 0.6, 0.6], "values": [18, 30, 30, 65], "has_missing": True},
    {"name": "born", "kind": "date", "z": [-2.0, 2.0], "values": [-20, 20], "format": "%b %d, %Y", "unit": "D"},
    {"name": "seen", "kind": "date", "z": [-0.5, -0.5], "values": [951825599, 1735689600], "unit": "s"}
    | {"format": "%d/%m/%y %H:%M:%S", "has_missing": True},
    {"name": "country", "kind": "category", "values": ["DE", "NL", 'the "rest"'], "coding": "one_hot"}
    | {"has_missing": True},
    {"name": "grade", "kind": "category", "values": [0.5, 2.0, 1e-5], "coding": "one_hot"},
    {"name": "city", "kind": "category", "values": ["Bonn", "Köln", "Ulm"], "coding": "ranks", "z": [-0.9, -0.1, 0.8]}
    | {"has_missing": True},
    {"name": "member", "kind": "boolean", "values": [False, True], "coding": "one_hot", "text": ["no", "yes"]},
    {"name": "is_new", "kind": "boolean", "values": [False, True], "coding": "one_hot"},
]
# Cells of the three rows that are known; "" is to be drawn.
CELLS = {
    "age": ["", "30", ""],
    "born": ["", "Jan 03, 1970", ""],
    "country": ["NL", "", ""],
    "city": ["", "Köln", ""],
}

# The heart: deterministic and clipped; stochastic; multistep without clipping; second order. The seeds use both words
# of the key, and exceed the precision of a double. With Heun's seed, a point reaches the clip range. The other runs
# have a learned variance; labels, conditions and an interval of guidance; known values and repeated steps; labels that
# are drawn, since nothing is asked; rows of a table, with known cells.
RUNS = {
    "ddim_10": Run("heart", "ddim", 10, 0, {}),
    "ddpm_10": Run("heart", "ddpm", 10, 2**32 + 5, {}),
    "dpmsolver_multistep_10": Run("heart", "dpmsolver_multistep", 10, 2**63 - 1, {}),
    "heun_6": Run("heart", "heun", 6, 1234567890123456964, {}),
    "learned_variance": Run("swiss_roll_2015", "ddpm", 10, 7, {}),
    "guided": Run(
        None,
        "ddim",
        6,
        2**40 + 1,
        {
            "class_labels": [2, 0, 3],  # 3 stands for any class
            "condition": [[12.0], [8.5], [10.0]],
            "guidance_scale": 2.5,
            "guidance_interval": (700, 200),
        },
    ),
    "known_values": Run(
        None, "ddpm", 4, 3, {"known": [[1.5, math.nan], [math.nan, -2.0], [math.nan, math.nan]], "resample": 2}
    ),
    "drawn_labels": Run("moons", "ddim", 6, 2**33 + 5, {}),
    # With this seed, each column has two values or more, and four columns lack one.
    "table": Run(None, "ddpm", 4, 2882, {"known": TableCodec(COLUMNS).encode(CELLS, empty="unknown")}, is_table=True),
}


def record(bundle: Path, run: Run, num_samples: int = NUM_SAMPLES) -> dict[str, Any]:
    """Record a run, one network evaluation after another, in JSON's types: see export/FORMAT.md."""
    sampler = OnnxSampler(bundle, num_threads=1)
    request, table = resolve(sampler.info, sampler.table, range(num_samples), **run.asked)
    inputs = request.of(range(num_samples), run.seed).inputs
    told: Asked = {"class_labels": inputs.get("class_labels"), "condition": run.asked.get("condition")}
    if sampler.info["condition_is_known"]:
        told["known"] = run.asked.get("known")
    dimension = math.prod(sampler.sample_shape)
    x = sampler.first_input(num_samples, run.seed)
    calls = []
    for step in sampler.steps(num_samples, run.seed, **run.asked):
        k = step.index

        def draw(first: int, stream: int = 0, shape: tuple[int, ...] = x.shape) -> np.ndarray:
            return normal(run.seed, range(num_samples), dimension, range(first, first + 1), stream).reshape(shape)

        output = sampler.predict(x, step.timestep, **told)
        call = {"timestep": step.timestep, "x": x}
        eps, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        if table.is_guided[k]:
            output = np.concatenate([output, sampler.predict(x, step.timestep)])
            w = np.float32(table.guidance_scale[k])
            eps = w * eps + (1 - w) * output[num_samples:, : x.shape[1]]
        call["eps"] = eps
        if output.shape != x.shape:
            call["output"] = output
        if table.clip_range is not None:
            x_0 = table.to_x_0[k].astype(np.float32) @ np.stack([x, eps]).reshape(2, -1)
            call["x_0"] = x_0.clip(-table.clip_range, table.clip_range).reshape(x.shape)
        if table.is_stochastic[k]:
            call["z"] = draw(k + 1)
            if table.log_variance is not None:
                a, b = table.log_variance[k]
                call["z"] = call["z"] * np.exp((a * v + b) / 2)
        if request.known is not None and k + 1 < len(table):
            call["z_known"] = draw(k, stream=1)
        calls.append(call)
        x = step.sample
    data = sampler.to_data_units(x)
    cells = {} if sampler.codec is None else {"cells": [*sampler.codec.format(sampler.codec.decode(data))]}
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": run.checkpoint,
        "seed": str(run.seed),  # many a JSON reader makes doubles of numbers, and rounds beyond 2^53
        "num_samples": num_samples,
        "asked": {name: _numbers(value) for name, value in run.asked.items()},
        "inputs": {name: _numbers(rows) for name, rows in inputs.items()},
        "bundle": {
            name: value
            for name, value in json.loads((bundle / "bundle.json").read_text(encoding="utf-8")).items()
            if name not in ("provenance", "sha256")  # these differ between exports
        },
        "step_table": json.loads((bundle / "step_table.json").read_text(encoding="utf-8")),
        "calls": [{name: _numbers(value) for name, value in call.items()} for call in calls],
        "sample": _numbers(x),
        "data": _numbers(data),
        **cells,
    }


def tiny_pipeline() -> DDPMMLPPipeline:
    """Make an untrained network that takes labels and conditions."""
    return _untrained(
        2,
        {"num_class_embeds": 3, "condition_dim": 1},
        data_mean=[1.0, -2.0],
        data_std=[2.0, 0.5],
        data_columns=["x", "y"],
        class_names=["a", "b", "c"],
        condition_columns=["c"],
        condition_mean=[10.0],
        condition_std=[2.0],
    )


def table_pipeline() -> DDPMMLPPipeline:
    """Make an untrained network of a table, whose condition is the row itself."""
    codec = TableCodec(COLUMNS)
    return _untrained(
        codec.width,
        {"condition_dim": codec.width, "takes_known": True},
        data_columns=codec.coordinate_names,
        columns=codec.to_json(),
    )


def _untrained(dimension: int, network: dict[str, Any], **options: Any) -> DDPMMLPPipeline:
    """Make a pipeline of a tiny network. Its weights are the runtime's noise."""
    import torch
    from diffusers import DDPMScheduler

    from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel

    unet = MLPModel(dimension, embedding_dim=8, hidden_dim=16, num_hidden_layers=2, **network)
    for i, parameter in enumerate(unet.parameters()):
        weights = normal(0, range(1), parameter.numel(), range(1), stream=i).reshape(parameter.shape)
        parameter.data = torch.tensor(weights / parameter.shape[-1] ** 0.5)
    scheduler = DDPMScheduler(1000, prediction_type="sample", clip_sample=True, clip_sample_range=2.0)
    return DDPMMLPPipeline(unet, scheduler, **options)


def _numbers(value: Any) -> Any:
    """Round to nine digits, which identify every float32. NaN becomes `None`, since JSON lacks it."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_numbers(entry) for entry in value]
    if isinstance(value, int | np.integer):
        return int(value)
    return None if math.isnan(value) else float(f"{value:.9g}")


def write(golden: dict[str, Any], path: Path) -> None:
    """Write a run with one line for each network evaluation, so that a diff is readable."""
    head = {name: value for name, value in golden.items() if name not in ("calls", "sample", "data", "cells")}
    calls = ",\n".join(json.dumps(call) for call in golden["calls"])
    tail = {name: golden[name] for name in ("sample", "data", "cells") if name in golden}
    path.write_text(f'{json.dumps(head)[:-1]},\n"calls": [\n{calls}\n],\n{json.dumps(tail)[1:]}\n', encoding="utf-8")


def read() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and content of each golden vector in the repository."""
    for path in sorted(GOLDEN.glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m export.golden", description=__doc__.partition("\n")[0])
    parser.add_argument("output_dir", type=Path, help="the folder to write")
    add_overwrite(parser)
    args = parser.parse_args(argv)
    own = {f"{name}.json" for name in RUNS}.__contains__
    check_folder(args.output_dir, own, args.overwrite)
    with explain_missing_extra("making golden vectors", "export"):
        from ddpm_mlp_pipeline.export.exporter import export_bundle
    with (
        whole_folder(args.output_dir, own, args.overwrite) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        for name, run in RUNS.items():
            bundle, checkpoint = Path(temporary) / name, Path(temporary) / f"{name}-checkpoint"
            if run.checkpoint:
                checkpoint = pretrained(run.checkpoint)
            else:
                (table_pipeline() if run.is_table else tiny_pipeline()).save_pretrained(checkpoint)
            export_bundle(checkpoint, bundle, run.scheduler, run.num_inference_steps)
            write(record(bundle, run), folder / f"{name}.json")
    print(f"{args.output_dir}: {len(RUNS)} runs of {NUM_SAMPLES} samples")


if __name__ == "__main__":
    main()
