"""Console commands in processes that are forked from one which has imported the libraries that they need."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

MODULES = ["train_points", "train_images", "bound", "compare", "doctor", "evaluate", "export", "fit", "plot", "sample"]
MODULES += ["benchmark", "tune"]
TIMEOUT = 300  # seconds


def run(command: str, argv: list[str], folder: Path, num_processes: int = 1) -> subprocess.CompletedProcess:
    """Run an entry point of `commands/console.py` in a folder: one process, or several on the CPU, as by torchrun."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"ddpm_mlp_pipeline.commands.{module}" for module in MODULES])
    environments: list[dict[str, str]] = [{}]
    if num_processes > 1:
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_processes)}
        world |= {"LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
        environments = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        processes = []
        for environment in environments:
            files = [multiprocessing.reduction.DupFd(file.fileno()) for file in (out, err)]
            processes.append(context.Process(target=_call, args=(command, argv, folder, environment, *files)))
            processes[-1].start()
        for process in processes:
            process.join(TIMEOUT)
            assert process.exitcode is not None, f"{command} {argv} takes too long"
        status = max((process.exitcode for process in processes), key=abs)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([command, *argv], status, out.read(), err.read())


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _call(command: str, argv: list[str], folder: Path, environment: dict[str, str], out, err) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.update(environment)
    from ddpm_mlp_pipeline.commands import console

    getattr(console, command)(argv)
