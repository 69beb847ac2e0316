"""Fixtures for all tests: shipped checkpoints, bundles exported from them, and commands run as a user runs them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from diffusers import DDPMScheduler
from helpers import SCRIPTS
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 (hooks of pytest's)

os.environ["HF_HUB_OFFLINE"] = "1"  # set before diffusers is imported: no test may wait for a network

from ddpm_mlp_pipeline import DDPMMLPPipeline, export_bundle, pretrained


@pytest.fixture
def heart() -> DDPMMLPPipeline:
    """The heart with the scheduler that it was trained with, instead of its tables."""
    pipeline = DDPMMLPPipeline.from_pretrained(pretrained("heart"))
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def ddim_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "heart-ddim"
    export_bundle(pretrained("heart"), folder, "ddim", 20)
    return folder


@pytest.fixture(scope="session")
def ddpm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "heart-ddpm"
    export_bundle(pretrained("heart"), folder, "ddpm", 100)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command in an empty folder. A bare name is an installed console command."""

    def run(*argv: object, **kwargs: object) -> subprocess.CompletedProcess:
        words = [str(word) for word in argv]
        if (SCRIPTS / words[0]).exists():
            words[0] = str(SCRIPTS / words[0])
        folder = tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        return subprocess.run(words, **{"capture_output": True, "text": True, "cwd": folder, "timeout": 300, **kwargs})

    return run


@pytest.fixture
def run_forked(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command like `run`, but in a process that is forked from one which has imported the libraries.

    Importing them takes seconds, and most of what a small or a refused command does.
    """

    def run_forked(command: str, *argv: object, **kwargs: Any) -> subprocess.CompletedProcess:
        folder = tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        return forked.Command(command, [str(word) for word in argv], folder, **kwargs).wait()

    return run_forked
