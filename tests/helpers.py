"""Helpers for several tests."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
DATA = ROOT.parent / "shared" / "data"  # tests of real images need it
MNIST, CIFAR10 = DATA / "mnist", DATA / "cifar10"
needs_mnist, needs_cifar10 = (
    pytest.mark.skipif(
        not folder.is_dir(), reason=f"needs the hub's {name}, as a folder that load_dataset takes, in {folder}"
    )
    for folder, name in ((MNIST, "ylecun/mnist"), (CIFAR10, "uoft-cs/cifar10"))
)
LAUNCH = (
    SCRIPTS / "accelerate",
    "launch",
    "--quiet",
    "--cpu",
    "--num_processes",
    1,
    "--num_cpu_threads_per_process",
    1,
)


# In a new user namespace, an ordinary user may mount a file system of a certain size, which can then be full.
NO_MOUNTS = not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
needs_mounts = pytest.mark.skipif(
    bool(NO_MOUNTS), reason="needs the right to mount a file system: `unshare -rm true` must succeed"
)


def assert_one_line_error(result: subprocess.CompletedProcess, *fragments: str) -> None:
    """Assert that a command failed without a traceback, and that its last line is an error with all fragments."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1] == line
    for fragment in fragments:
        assert fragment in line, line


def peak_memory(*argv: object) -> float:
    """Run a command to its end, and return the most memory that its process took, in MiB."""
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on this machine, and yield the server's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Make weights that start at zero random, since zeros would hide errors."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


# Random123's known-answer tests for philox4x32-10 (kat_vectors): counter, key, result
PHILOX_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
