"""Console commands in processes that are forked from one which has imported the libraries that they need."""

import multiprocessing.reduction
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch

from ddpm_mlp_pipeline.commands import console

MODULES = ["train_points", "train_images", "bound", "compare", "doctor", "evaluate", "export", "fit", "plot", "sample"]
MODULES += ["benchmark", "train_features", "train_table", "tune"]
TIMEOUT = 300  # seconds
GRACE = 10  # seconds, for the other processes after one has failed


class Command:
    """A started entry point of `commands/console.py`: one process, or several on the CPU, as by torchrun.

    Each process calls `first` before the command.
    """

    def __init__(
        self,
        command: str,
        argv: list[str],
        folder: Path,
        num_processes: int = 1,
        first: Callable[[], object] | None = None,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"ddpm_mlp_pipeline.commands.{module}" for module in MODULES])
        environments: list[dict[str, str]] = [{}]
        if num_processes > 1:
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_processes)}
            world |= {"LOCAL_WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            environments = [world | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]
        self.args = [command, *argv]
        self.out, self.err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 (`wait` closes them)
        self.processes = []
        for environment in environments:
            files = [multiprocessing.reduction.DupFd(file.fileno()) for file in (self.out, self.err)]
            self.processes.append(
                context.Process(target=_call, args=(command, argv, folder, environment, first, *files))
            )
            self.processes[-1].start()

    def wait_for(self, text: str) -> None:
        """Wait until the processes have written a text to stderr."""
        deadline = time.monotonic() + TIMEOUT
        while text not in read(self.err):
            if not all(process.is_alive() for process in self.processes) or time.monotonic() > deadline:
                self._kill(self.processes)
                raise AssertionError(f"{self.args} has not written {text!r}: {read(self.err)}")
            time.sleep(0.1)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for the end. After one fails, the others, which may wait for it, are killed, as by torchrun."""
        status, deadline = 0, time.monotonic() + TIMEOUT
        running = {process.sentinel: process for process in self.processes}
        while running:
            ended = connection.wait(running, max(0.0, deadline - time.monotonic()))
            if not ended:
                break
            for sentinel in ended:
                process = running.pop(sentinel)
                process.join()
                status = status or process.exitcode
                if status:
                    deadline = min(deadline, time.monotonic() + GRACE)
        self._kill(running.values())
        with self.out, self.err:
            assert status or not running, f"{self.args} takes too long: {read(self.err)}"
            return subprocess.CompletedProcess(self.args, status, read(self.out), read(self.err))

    def _kill(self, processes: Iterable[BaseProcess]) -> None:
        for process in processes:
            process.kill()
            process.join()


def read(file: IO) -> str:
    """Read what the processes have written so far, and leave the file's position, which is also theirs, alone."""
    content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    return content.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _call(
    command: str,
    argv: list[str],
    folder: Path,
    environment: dict[str, str],
    first: Callable[[], object] | None,
    out: multiprocessing.reduction.DupFd,
    err: multiprocessing.reduction.DupFd,
) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(file.detach(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which torch has read already
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if first is not None:
        first()
    getattr(console, command)(argv)
