"""Kill a training run with SIGKILL at random moments, resume it, and compare its files with those of a run that was
never interrupted, byte for byte.

python tests/kill_training.py --kills 30 --seed 0 [--images]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_mlp_pipeline.commands import train_images, train_points

RESULT = "model_index.json"  # the last file to be written
SHORT = (
    "--max_train_steps",
    "120",
    "--checkpointing_steps",
    "5",
    "--checkpoints_total_limit",
    "2",
    "--hidden_dim",
    "16",
)
SHORT += ("--num_hidden_layers", "1", "--lr_warmup_steps", "10", "--ddpm_num_steps", "20", "--report_to", "none")


def points(folder: Path) -> list[str]:
    """Return options to train on points of one dimension, for which the only figure is that of the loss."""
    table = np.random.default_rng(0).standard_normal((600, 1))
    np.savetxt(folder / "points.csv", table, header="x", comments="")
    return ["--dataset", str(folder / "points.csv"), "--train_batch_size", "64", *SHORT]


def images(folder: Path) -> list[str]:
    """Return options to train on images, with everything that draws random numbers."""
    (folder / "pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(256, size=(80, 4, 6), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02}.png")
    argv = ["--dataset_name", str(folder / "pictures"), "--train_batch_size", "16", *SHORT, "--model", "mlp"]
    return [*argv, "--random_flip", "--save_samples_epochs", "4", "--ddpm_num_inference_steps", "2"]


def kill_and_compare(main: Callable[[list[str]], None], argv: list[str], kills: int, seed: int, folder: Path) -> dict:
    """Kill runs of `main`, `kills` times in all, resume each of them until it ends, and compare.

    Returns:
        The number of kills at each stage of a run.

    Raises:
        AssertionError: if a run fails, or its files differ from those of the uninterrupted run.
    """
    start = time.time()
    _run(main, argv, folder / "whole" / "run")
    # Slightly longer than until the result is written, so that few kills hit the figures that follow it.
    duration = 1.1 * ((folder / "whole" / "run" / RESULT).stat().st_mtime - start)
    expected = _tree(folder / "whole" / "run")

    draw, tally = random.Random(seed), collections.Counter()
    while tally["kills"] < kills:
        tally["runs that ended"] += 1
        output_dir = folder / str(tally["runs that ended"]) / "run"
        while tally["kills"] < kills and not (output_dir / RESULT).exists():
            if _run(main, argv, output_dir, draw.uniform(0, duration)):
                tally["kills"] += 1
                tally[_what_was_hit(output_dir)] += 1
            else:  # the run was faster than the first one
                duration *= 0.9
        _run(main, argv, output_dir)
        found = _tree(output_dir)
        assert found.keys() == expected.keys(), f"{output_dir}: {sorted(found.keys() ^ expected.keys())}"
        differing = [name for name in expected if found[name] != expected[name]]
        assert not differing, f"{output_dir}: {differing} differ"
    tally["files"] = len(expected)
    return dict(tally)


def _run(main: Callable[[list[str]], None], argv: list[str], output_dir: Path, limit: float | None = None) -> bool:
    """Start or resume a run in a process forked after the imports, and return whether it was killed."""
    words = [*argv, "--output_dir", str(output_dir), "--resume_from_checkpoint", "latest"]
    log = output_dir.parent / "log.txt"
    log.parent.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(main, words, log))
    process.start()
    process.join(limit)
    killed = process.is_alive()
    if killed:
        process.kill()
        process.join()
    # The process can end just before it is killed.
    assert process.exitcode in (0, -9), log.read_text()
    return process.exitcode == -9


def _quietly(main: Callable[[list[str]], None], words: list[str], log: Path) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(words)


def _what_was_hit(output_dir: Path) -> str:
    if list(output_dir.glob(".partial-checkpoint-*")):
        return "while a state was saved"
    if list(output_dir.glob("**/.partial-*")):
        return "while the result or a figure was saved"
    if (output_dir / RESULT).exists():
        return "after the result was saved"
    if not list(output_dir.glob("checkpoint-*")):
        return "before the first state"
    return "between saves"


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", action="store_true", help="train on images, with flips and figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(KeyboardInterrupt):
        script, options = (train_images, images) if args.images else (train_points, points)
        tally = kill_and_compare(script.main, options(Path(temporary)), args.kills, args.seed, Path(temporary))
        print(", ".join(f"{number} {what}" for what, number in tally.items()), "compared byte for byte")
    sys.exit()
