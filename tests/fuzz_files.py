"""Damaged files for every loader: python tests/fuzz_files.py --number 2000 --seed 0

Each case copies real files, damages one of them, loads the copy in a process with limits of time and memory, and
draws samples. The good outcomes are the same samples, other samples, and an error of the package. Any other outcome is
a failure. Its number is printed, and `--only NUMBER` repeats it.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported

import numpy as np
from numpy.random import Generator

SECONDS, BYTES = 60, 2 * 2**30  # limits of a case; the bytes are address space beyond that of the imports
ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e-300, 10**9, -(10**9), 2**31, 2**63, 10**400),
    *(float("nan"), float("inf"), "", "1", "NaN", "../../secret", "/etc/passwd", "\0", "é" * 1000),
    *([], {}, [[]], [1, 2], [[0] * 4], {"a": 1}, ["subprocess", "Popen"], ["torch", "load"], ["os", "system"]),
]
CODE = "import pathlib\npathlib.Path({marker!r}).touch()\n"  # the file shows that a checkpoint's code has run

Case = tuple[str, str, bytes | None]  # the target, the damaged file, and its content, or None to delete it
GOOD = ("same", "other", "refused")  # outcomes of a case


# ---------------------------------------------------------------------------------------------------------------------
# The real files, and their loaders. A loader returns numbers that depend on the file alone.


@dataclasses.dataclass
class Target:
    """A kind of folder, with its loader.

    Attributes:
        load: loads a copy of the target's folder.
        detects: the files in which every change must be detected: "other samples" is a failure.
    """

    load: Callable[[Path], Any]
    detects: tuple[str, ...] = ()


ASKED = {"class_labels": "a", "condition": [0.5, 1.0], "guidance_scale": 2.0, "known": [0.25, float("nan")]}


def _load_checkpoint(folder: Path, **asked: Any) -> np.ndarray:
    import torch

    from ddpm_mlp_pipeline import load_checkpoint

    pipeline = load_checkpoint(folder)
    return pipeline(4, torch.Generator().manual_seed(0), 4, "np", return_dict=False, **asked)[0]


def _load_features(folder: Path) -> np.ndarray:
    import torch

    from ddpm_mlp_pipeline.judge.features import load_features

    with torch.no_grad():
        return load_features(folder)(torch.arange(784, dtype=torch.uint8).reshape(1, 1, 28, 28)).numpy()


def _load_bundle(folder: Path, **asked: Any) -> np.ndarray:
    from ddpm_mlp_pipeline import OnnxSampler

    return OnnxSampler(folder, num_threads=1).sample(4, **asked)


def _load_asked(folder: Path) -> np.ndarray:
    """Read the files that `ddpm-sample` takes, as it does."""
    from ddpm_mlp_pipeline.commands.asking import _open_picture, _read_rows
    from ddpm_mlp_pipeline.runtime.request import _known

    conditions = _read_rows(folder / "rows.csv", ["c", "d"], may_be_empty=False)
    known = _read_rows(folder / "known.csv", ["x", "y"], may_be_empty=True)
    picture, mask = (_open_picture(folder / f"{name}.png") for name in ("picture", "mask"))
    y, m = _known({"sample_shape": [3, 8, 8]}, 1, picture, np.asarray(mask.convert("L")))
    return np.concatenate([np.nan_to_num(values).ravel() for values in (conditions, known, y, m)])


def _load_table(folder: Path) -> str:
    from ddpm_mlp_pipeline import StepTable

    return repr(dataclasses.asdict(StepTable.load(folder / "step_table.json")))


def _load_points(name: str) -> Callable[[Path], np.ndarray]:
    def load(folder: Path) -> np.ndarray:
        from ddpm_mlp_pipeline.data.points import load_points, to_array

        return to_array(load_points(folder / name))

    return load


def _load_images(folder: Path) -> np.ndarray:
    from ddpm_mlp_pipeline import load_images

    return load_images(folder).numpy()


def _load_samples(name: str) -> Callable[[Path], np.ndarray]:
    def load(folder: Path) -> np.ndarray:
        from ddpm_mlp_pipeline.judge.sources import open_source

        return open_source(folder / name).draw(4, 0)

    return load


def _load_preset(folder: Path) -> str:
    from ddpm_mlp_pipeline.commands.presets import parse_options
    from ddpm_mlp_pipeline.training.options import PointTrainingArguments

    argv = ["--output_dir", "runs", "--config", str(folder / "preset.yaml")]
    return repr(parse_options(PointTrainingArguments, argv, ""))


def _load_comparison(folder: Path) -> str:
    from ddpm_mlp_pipeline.commands.compare import _read

    return repr(_read(folder / "schedulers.json"))


TARGETS = {
    "heart": Target(_load_checkpoint),
    "digits": Target(_load_checkpoint),
    "labelled": Target(functools.partial(_load_checkpoint, **ASKED)),
    "mnist_features": Target(_load_features),
    "bundle": Target(_load_bundle, ("unet.onnx", "step_table.json")),
    "labelled bundle": Target(functools.partial(_load_bundle, **ASKED), ("unet.onnx", "step_table.json")),
    "asked": Target(_load_asked),
    "step table": Target(_load_table),
    "csv": Target(_load_points("points.csv")),
    "parquet": Target(_load_points("points.parquet")),
    "npy": Target(_load_points("points.npy")),
    "images": Target(_load_images),
    "point samples": Target(_load_samples("samples.npy")),
    "image samples": Target(_load_samples("samples.npy")),
    "preset": Target(_load_preset),
    "comparison": Target(_load_comparison),
}


def make_originals(root: Path) -> None:
    """Write the files of each target and of a donor: a folder of the same kind, whose files replace the target's."""
    import pandas as pd
    import torch
    from diffusers import DDPMScheduler
    from PIL import Image

    from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, SmallUNet2DModel, export_bundle, pretrained
    from ddpm_mlp_pipeline.checkpoints import FEATURES
    from ddpm_mlp_pipeline.judge.features import FeatureNetwork

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    originals, donors = root / "originals", root / "donors"
    for folder, name in ((originals, "heart"), (donors, "swiss_roll")):
        DDPMMLPPipeline.from_pretrained(pretrained(name)).save_pretrained(folder / "heart")
    for folder, width in ((originals, 8), (donors, 16)):
        unet = SmallUNet2DModel(12, block_out_channels=(width, 2 * width), attention_head_dim=8)
        scheduler = DDPMScheduler(prediction_type="v_prediction")
        DDPMMLPPipeline(unet, scheduler).save_pretrained(folder / "digits")
    for folder, width in ((originals, 16), (donors, 32)):
        unet = MLPModel(hidden_dim=width, num_class_embeds=2, condition_dim=2)
        torch.nn.init.normal_(unet.proj_out.weight, std=0.1)
        config = {"data_columns": ["x", "y"], "condition_columns": ["c", "d"], "class_names": ["a", "b"]}
        config |= {"data_mean": [1.0, 2.0], "data_std": [1.0, 3.0], "condition_mean": [0.0, 1.0]}
        DDPMMLPPipeline(unet, DDPMScheduler(), **config, condition_std=[1.0, 2.0]).save_pretrained(folder / "labelled")
        export_bundle(folder / "labelled", folder / "labelled bundle", "ddpm", 10, guidance_scale=1.5)
    for path in root.rglob("*.py"):
        path.write_text(CODE.format(marker=str(root / "code-has-run")))
    shutil.copytree(FEATURES[1], originals / "mnist_features")
    FeatureNetwork(num_features=32).save_pretrained(donors / "mnist_features")
    for folder, scheduler in ((originals, "ddpm"), (donors, "dpmsolver_multistep")):
        export_bundle(folder / "heart", folder / "bundle", scheduler, 10)
        (folder / "step table").mkdir()
        shutil.copy(folder / "bundle" / "step_table.json", folder / "step table")
    for folder, size in ((originals, 8), (donors, 9)):
        for name in ("csv", "parquet", "npy", "images", "point samples", "image samples", "preset", "comparison"):
            (folder / name).mkdir()
        (folder / "asked").mkdir()
        (folder / "asked" / "rows.csv").write_text("d,c\n1,2\n-0.5,1e-3\n")
        (folder / "asked" / "known.csv").write_text("y,x\n,0.5\n0.25,\n")
        for name, kind in (("picture", "RGB"), ("mask", "L")):
            pixels = rng.integers(256, size=(size, size), dtype=np.uint8)
            Image.fromarray(pixels).convert(kind).save(folder / "asked" / f"{name}.png")
        points = rng.standard_normal((size, 2)).astype(np.float32)
        table = pd.DataFrame(points, columns=["x", "y"])
        table.to_csv(folder / "csv" / "points.csv", index=False)
        table.to_parquet(folder / "parquet" / "points.parquet")
        np.save(folder / "npy" / "points.npy", points)
        np.save(folder / "point samples" / "samples.npy", points)
        np.save(folder / "image samples" / "samples.npy", rng.random((size, 6, 6, 1), dtype=np.float32))
        for i, ending in enumerate(("png", "jpg", "bmp", "gif", "tiff", "webp")):
            pixels = rng.integers(256, size=(size, size), dtype=np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / "images" / f"{i}.{ending}")
        preset = "dataset: swiss_roll\nlearning_rate: 0.001\nuse_ema: true\nseed: 5\nmax_train_steps: 10\n"
        (folder / "preset" / "preset.yaml").write_text(preset)
        row = {"scheduler": "ddpm", "num_inference_steps": 10, "network_calls": 10, "frechet_distance": 1.5}
        row |= {"num_samples": 4, "ms_per_sample": {"1": 1.0, "64": 0.5}}
        (folder / "comparison" / "schedulers.json").write_text(json.dumps([row] * 2))


# ---------------------------------------------------------------------------------------------------------------------
# The damage.


def make_case(root: Path, number: int, seed: int) -> Case:
    """Return a target, one of its files, and the file's damaged content, or `None` to delete it."""
    rng = np.random.default_rng([seed, number])
    target = list(TARGETS)[number % len(TARGETS)]
    folder = root / "originals" / target
    path = _pick(rng, [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".py"])
    name, content = str(path.relative_to(folder)), path.read_bytes()
    donor = root / "donors" / target / name
    damages = [_cut, _flip, _flip, _zero, _insert, _replace]
    if path.suffix in (".json", ".safetensors", ".npy", ".yaml"):
        damages += [_edit] * 6
    damage = _pick(rng, damages)
    if number % 25 == 0:
        return target, name, None
    if number % 10 == 0 and donor.is_file():
        return target, name, donor.read_bytes()
    if number % 31 == 0:
        return target, name, _pick(rng, [path for path in sorted(root.rglob("*")) if path.is_file()]).read_bytes()
    return target, name, damage(content, rng, path.suffix)


def _pick(rng: Generator, values: list) -> Any:
    return values[rng.integers(len(values))]


def _cut(content: bytes, rng: Generator, suffix: str) -> bytes:
    return content[: _pick(rng, [0, 1, 8, len(content) - 1, rng.integers(len(content)), rng.integers(len(content))])]


def _flip(content: bytes, rng: Generator, suffix: str) -> bytes:
    damaged = bytearray(content)
    end = _pick(rng, [len(content), min(len(content), 400)])  # damage to headers has the largest effect
    for _ in range(_pick(rng, [1, 1, 2, 8])):
        damaged[rng.integers(end)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _zero(content: bytes, rng: Generator, suffix: str) -> bytes:
    start, filling = int(rng.integers(len(content))), _pick(rng, [b"\0", b"\xff"])
    size = min(_pick(rng, [4, 8, 64]), len(content) - start)
    return content[:start] + filling * size + content[start + size :]


def _insert(content: bytes, rng: Generator, suffix: str) -> bytes:
    start = rng.integers(len(content))
    inserted = _pick(rng, [rng.bytes(5), b"\xef\xbb\xbf", b"[" * 100_000, b"9" * 5000, content[start:][:50]])
    return content[:start] + inserted + content[start:]


def _replace(content: bytes, rng: Generator, suffix: str) -> bytes:
    text = content.decode("latin-1")
    return _pick(rng, [rng.bytes(100), b"[" * 200_000, b'{"a":' * 100_000, text.encode("utf-16"), b"null", b"\0" * 99])


def _edit(content: bytes, rng: Generator, suffix: str) -> bytes:
    """Edit a file's metadata, and keep the rest."""
    if suffix == ".json":
        return json.dumps(_edited(json.loads(content), rng)).encode()
    if suffix == ".yaml":
        lines = content.decode().splitlines()
        i = rng.integers(len(lines))
        lines[i] = f"{lines[i].partition(':')[0]}: {json.dumps(_pick(rng, ODD_VALUES))}"
        return "\n".join(
            [*lines, *_pick(rng, [[], ["a: &a [x]", "b: *a"], ["!!python/name:os.system x: 1"]])]
        ).encode()
    if suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.dumps(_edited(json.loads(content[8:end]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + content[end:]
    array = np.load(io.BytesIO(content))
    shape = _pick(rng, [(10**12, 2), (10**9, 2), (2**62, 2), (-1, 2), (4,), (), (0, 2), (10**18, 0), (2, 2, 2)])
    kind = _pick(rng, ["<f4", "|O", "<f8", "<i8", "<U4", "<c8", "<M8[s]", "|V4", "<f2", ">f4", "|b1"])
    header = {"descr": kind, "fortran_order": bool(rng.integers(2)), "shape": _pick(rng, [shape, array.shape])}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def _edited(tree: Any, rng: Generator) -> Any:
    """Change a value, or delete, rename or copy a key."""
    tree = copy.deepcopy(tree)
    places = [*_places(tree)]
    holder, key = _pick(rng, places)
    choice = rng.integers(6)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder["another"] = holder.pop(key)
    elif choice == 2:
        other, other_key = _pick(rng, places)
        holder[key] = copy.deepcopy(other[other_key])
    elif choice == 3 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * _pick(rng, [-1, 2, 10, 1000, 10**6, 10**9, 1e300])
    else:
        holder[key] = _pick(rng, ODD_VALUES)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in tree.keys() if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


# ---------------------------------------------------------------------------------------------------------------------
# The cases, each in a process that can be killed.


def run_case(root: Path, case: Case | None, target: str) -> tuple[str, Any]:
    """Return the outcome of a case, and the numbers or the message."""
    from ddpm_mlp_pipeline.errors import DDPMPipelineError

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(root / "originals" / target, folder)
        if case is not None:
            _, name, content = case
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return "loaded", TARGETS[target].load(folder)
        except DDPMPipelineError as error:
            message = str(error)
            if isinstance(error.__context__, MemoryError) or "allocate" in message:
                return "too much memory", message
            return ("refused" if message.strip() else "refused without a word"), message
        except BaseException as error:
            return f"escaped: {type(error).__name__}", str(error)
        finally:
            if (root / "code-has-run").exists():
                os._exit(77)


def start_worker(root: Path) -> None:
    """Import what the loaders need, then bound the memory."""
    os.environ |= {"HF_DATASETS_CACHE": str(root / "cache"), "TQDM_DISABLE": "1"}
    import datasets
    import torch

    import ddpm_mlp_pipeline.commands.train_points  # noqa: F401

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)


def run_cases(root: Path, cases: Iterable[Case]) -> Iterator[tuple[Case, str, str]]:
    """Run cases, and yield each with its outcome and message."""

    def new_pool() -> concurrent.futures.ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        return concurrent.futures.ProcessPoolExecutor(1, context, start_worker, (root,))

    pool = new_pool()
    originals: dict[str, Any] = {}
    for case in cases:
        target, name, _ = case
        if target not in originals:
            end, originals[target] = pool.submit(run_case, root, None, target).result()
            assert end == "loaded", (target, originals[target])
        message = ""
        try:
            end, found = pool.submit(run_case, root, case, target).result(SECONDS)
            if end != "loaded":
                message = " ".join(found.split())
            elif np.array_equal(found, originals[target]):
                end = "same"
            else:
                end = "undetected" if name in TARGETS[target].detects else "other"
        except concurrent.futures.TimeoutError:
            end = "hangs"
        except concurrent.futures.process.BrokenProcessPool:
            end = "runs code" if (root / "code-has-run").exists() else "crashes"
        if end in ("hangs", "crashes", "runs code"):
            for process in pool._processes.copy().values():
                process.kill()
            pool.shutdown()
            pool = new_pool()
        yield case, end, message
    pool.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--number", type=int, default=2000, help="number of cases (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", help="run only the cases with these numbers")
    args = parser.parse_args()
    tally: dict[str, collections.Counter] = {target: collections.Counter() for target in TARGETS}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_originals(root)
        numbers = args.only or range(args.number)
        results = run_cases(root, (make_case(root, number, args.seed) for number in numbers))
        for number, ((target, name, _), end, message) in zip(numbers, results, strict=True):
            tally[target][end] += 1
            if args.only or end not in GOOD:
                print(f"{number:5} {target}/{name}: {end}: {message[:200]}", flush=True)
    ends = [*GOOD, *sorted({end for ends in tally.values() for end in ends} - {*GOOD})]
    print(f"{'':16}" + "".join(f"{end:>{len(end) + 2}}" for end in ends))
    for target, counts in (*tally.items(), ("all", sum(tally.values(), collections.Counter()))):
        print(f"{target:16}" + "".join(f"{counts[end]:>{len(end) + 2}}" for end in ends))
    return int(len(ends) > len(GOOD))


if __name__ == "__main__":
    sys.exit(main())
