"""Record golden vectors: whole sampling runs of the runtime, as references for ports to other languages.

    python -m export.golden OUTPUT_DIR

exports the shipped heart with four kinds of step table, and writes one file for each; export/FORMAT.md describes them.
Other machines agree with the recorded values up to the rounding of float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_mlp_pipeline import pretrained
from ddpm_mlp_pipeline.commands.parser import CommandParser, add_overwrite, command
from ddpm_mlp_pipeline.errors import explain_missing_extra
from ddpm_mlp_pipeline.files import check_folder, whole_folder
from ddpm_mlp_pipeline.runtime.noise import normal
from ddpm_mlp_pipeline.runtime.sampler import OnnxSampler

FORMAT, VERSION = "ddpm-golden", 1
GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT, NUM_SAMPLES = "heart", 3
# (scheduler, steps, seed): deterministic and clipped; stochastic; multistep without clipping; second order. The seeds
# use both words of the key, and exceed the precision of a double. With Heun's seed, a point reaches the clip range.
RUNS = (
    ("ddim", 10, 0),
    ("ddpm", 10, 2**32 + 5),
    ("dpmsolver_multistep", 10, 2**63 - 1),
    ("heun", 6, 1234567890123456964),
)


def record(bundle: Path, seed: int, num_samples: int = NUM_SAMPLES) -> dict[str, Any]:
    """Record a run, one network evaluation after another, in JSON's types: see export/FORMAT.md."""
    sampler = OnnxSampler(bundle, num_threads=1)
    table = sampler.table
    x = sampler.first_input(num_samples, seed)
    calls = []
    for step in sampler.steps(num_samples, seed):
        k = step.index
        call = {"timestep": step.timestep, "x": x, "eps": sampler.predict(x, step.timestep)}
        if table.clip_range is not None:
            x_0 = table.to_x_0[k].astype(np.float32) @ np.stack([x, call["eps"]]).reshape(2, -1)
            call["x_0"] = x_0.clip(-table.clip_range, table.clip_range).reshape(x.shape)
        if table.is_stochastic[k]:
            z = normal(seed, range(num_samples), np.prod(sampler.sample_shape), range(k + 1, k + 2))
            call["z"] = z.reshape(x.shape)
        calls.append(call)
        x = step.sample
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": CHECKPOINT,
        "seed": str(seed),  # many JSON readers round numbers beyond 2^53
        "num_samples": num_samples,
        "bundle": {
            name: value
            for name, value in json.loads((bundle / "bundle.json").read_text(encoding="utf-8")).items()
            if name not in ("provenance", "sha256")  # these differ between exports
        },
        "step_table": json.loads((bundle / "step_table.json").read_text(encoding="utf-8")),
        "calls": [{name: _numbers(value) for name, value in call.items()} for call in calls],
        "sample": _numbers(x),
        "data": _numbers(sampler.to_data_units(x)),
    }


def _numbers(value: np.ndarray | float) -> Any:
    """Round to nine digits, which identify every float32."""
    if isinstance(value, np.ndarray):
        return [_numbers(entry) for entry in value]
    return float(f"{value:.9g}")


def write(golden: dict[str, Any], path: Path) -> None:
    """Write a run with one line for each network evaluation, so that a diff is readable."""
    head = {name: value for name, value in golden.items() if name not in ("calls", "sample", "data")}
    calls = ",\n".join(json.dumps(call) for call in golden["calls"])
    tail = {name: golden[name] for name in ("sample", "data")}
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
    own = {f"{scheduler}_{steps}.json" for scheduler, steps, _ in RUNS}.__contains__
    check_folder(args.output_dir, own, args.overwrite)
    with explain_missing_extra("making golden vectors", "export"):
        from ddpm_mlp_pipeline.export.exporter import export_bundle
    with (
        whole_folder(args.output_dir, own, args.overwrite) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        for scheduler, num_inference_steps, seed in RUNS:
            name = f"{scheduler}_{num_inference_steps}"
            bundle = Path(temporary) / name
            export_bundle(pretrained(CHECKPOINT), bundle, scheduler, num_inference_steps)
            write(record(bundle, seed), folder / f"{name}.json")
    print(f"{args.output_dir}: {len(RUNS)} runs of {NUM_SAMPLES} samples")


if __name__ == "__main__":
    main()
