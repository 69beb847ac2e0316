"""Console commands in processes that are forked from one which has imported the libraries that they need."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ["train_points", "train_images", "bound", "compare", "doctor", "evaluate", "export", "fit", "plot", "sample"]
MODULES += ["benchmark", "tune"]
TIMEOUT = 300  # seconds


def run(command: str, argv: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run an entry point of `commands/console.py` in a folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"ddpm_mlp_pipeline.commands.{module}" for module in MODULES])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        files = [multiprocessing.reduction.DupFd(file.fileno()) for file in (out, err)]
        process = context.Process(target=_call, args=(command, argv, folder, *files))
        process.start()
        process.join(TIMEOUT)
        assert process.exitcode is not None, f"{command} {argv} takes too long"
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([command, *argv], process.exitcode, out.read(), err.read())


def _call(command: str, argv: list[str], folder: Path, out, err) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    from ddpm_mlp_pipeline.commands import console

    getattr(console, command)(argv)
