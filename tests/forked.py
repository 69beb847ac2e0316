"""Console commands in processes that are forked from one which has imported the libraries that they need."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

MODULES = ["train_points", "train_images", "bound", "compare", "doctor", "evaluate", "export", "fit", "plot", "sample"]
MODULES += ["benchmark", "tune"]
TIMEOUT = 300  # seconds


class Command:
    """A started entry point of `commands/console.py`: one process, or several on the CPU, as by torchrun."""

    def __init__(self, command: str, argv: list[str], folder: Path, num_processes: int = 1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"ddpm_mlp_pipeline.commands.{module}" for module in MODULES])
        environments: list[dict[str, str]] = [{}]
        if num_processes > 1:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_processes)}
            world |= {"LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
            environments = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]
        self.args = [command, *argv]
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (`wait` closes them)
        self.processes = []
        for environment in environments:
            files = [multiprocessing.reduction.DupFd(file.fileno()) for file in (self.out, self.err)]
            self.processes.append(context.Process(target=_call, args=(command, argv, folder, environment, *files)))
            self.processes[-1].start()

    def wait(self) -> subprocess.CompletedProcess:
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode is not None, f"{self.args} takes too long"
        with self.out, self.err:
            status = max((process.exitcode for process in self.processes), key=abs)
            return subprocess.CompletedProcess(self.args, status, read(self.out), read(self.err))


def read(file: TextIO) -> str:
    """Read what the processes have written so far."""
    with open(f"/dev/fd/{file.fileno()}") as again:  # with a place of its own in the file
        return again.read()


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
