"""Nothing is lost: killed, stopped, out of disk or on several processes, a training ends where it would have ended."""

import collections
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import kill_training
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, SCRIPTS, assert_one_line_error, train_small, training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, pretrained, train
from ddpm_mlp_pipeline.errors import CheckpointError, DivergenceError
from ddpm_mlp_pipeline.resuming import _checksums
from ddpm_mlp_pipeline.training import TensorBatches

POINTS = ROOT / "train_scripts" / "train_points.py"
# (`--cpu --num_processes 2` starts one process, unless there is MPI.)
TWO_PROCESSES = (SCRIPTS / "accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", 2)
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def states(folder):
    return sorted(path.name for path in folder.glob("*checkpoint*"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_where_it_would_have_ended(tmp_path, accumulation):
    def mirror(x_0, u):
        return torch.where(u[:, None] < 0.5, x_0, -x_0)

    changes = {"gradient_accumulation_steps": accumulation, "augment": mirror, "checkpointing_steps": 1}
    weights, losses = train_small(tmp_path / "whole", **changes)
    for step in (3, 6, 9):  # in the middle of an epoch and, with four batches in each, at other places of it
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        assert train_small(folder, resume_from_checkpoint="latest", **changes) == (weights, losses)
        for name, checksum in _checksums(folder / "checkpoint-11").items():  # optimizer, random states, ...
            assert checksum == _checksums(tmp_path / "whole" / "checkpoint-11")[name], name


@pytest.mark.slow
@pytest.mark.parametrize("script", ["points", "images"])
def test_a_killed_run_ends_byte_for_byte_where_it_would_have_ended(tmp_path, script):
    main = {"points": kill_training.train_points, "images": kill_training.train_images}[script].main
    tally = kill_training.kill_and_compare(main, getattr(kill_training, script)(tmp_path), 3, 0, tmp_path)
    assert tally["kills"] == 3


def test_a_run_that_was_killed_after_its_last_step_only_writes_its_result(tmp_path):
    result = train_small(tmp_path, checkpointing_steps=11)
    shutil.rmtree(tmp_path / "unet")
    (tmp_path / ".partial-abc").mkdir()  # as a killed process leaves it
    (tmp_path / ".partial-checkpoint-12").mkdir()
    assert train_small(tmp_path, checkpointing_steps=11, resume_from_checkpoint="latest") == result
    assert not list(tmp_path.glob(".*"))


def test_old_states_go_and_the_newest_stay(tmp_path):
    train_small(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    assert states(tmp_path) == ["checkpoint-10", "checkpoint-8"]


def test_the_latest_state_is_the_newest_that_is_whole(tmp_path, capfd):
    result = train_small(tmp_path, checkpointing_steps=3)
    (tmp_path / "checkpoint-9" / "optimizer.bin").write_bytes(b"")
    (tmp_path / "checkpoint-6" / "random_states_0.pkl").unlink()
    assert train_small(tmp_path, checkpointing_steps=3, resume_from_checkpoint="latest") == result
    printed = capfd.readouterr().out
    assert "checkpoint-9 is broken (optimizer.bin is not as it was saved)" in printed
    assert "checkpoint-6 is broken (random_states_0.pkl is missing)" in printed
    assert "resuming at step 3" in printed
    assert states(tmp_path) == [
        *("checkpoint-3", "checkpoint-6", "checkpoint-6.broken", "checkpoint-9", "checkpoint-9.broken")
    ]


def test_before_the_first_state_the_latest_is_the_beginning(tmp_path, capfd):
    assert train_small(tmp_path, resume_from_checkpoint="latest") == train_small(tmp_path / "other")
    assert "no checkpoint-<step> yet" in capfd.readouterr().out


def test_what_can_not_be_resumed_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder checkpoint-5"):
        train_small(tmp_path, resume_from_checkpoint="checkpoint-5")
    train_small(tmp_path, checkpointing_steps=5)
    for changes in ({}, {"resume_from_checkpoint": "checkpoint-5"}):
        with pytest.raises(CheckpointError, match="checkpoint-10 is of an earlier run"):
            train_small(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="saved with --use_ema"):
        train_small(tmp_path, resume_from_checkpoint="latest", use_ema=False)
    torch.manual_seed(0)
    pipeline = DDPMMLPPipeline(MLPModel(2, hidden_dim=16, embedding_dim=4), DDPMScheduler())
    with pytest.raises(CheckpointError, match="its unet has hidden_dim 8, not 16"):
        train(
            pipeline, TensorBatches(torch.randn(150, 2)), training_options(tmp_path, resume_from_checkpoint="latest")
        )
    for name in ("model.safetensors", "optimizer.bin", "progress.bin", "unet/config.json", "manifest.json"):
        broken = shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "copy", dirs_exist_ok=True)
        (broken / name).write_bytes((broken / name).read_bytes()[:20])
        with pytest.raises(CheckpointError, match=f"can't resume from .*copy: {name} is"):
            train_small(tmp_path, resume_from_checkpoint="copy")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "progress.bin"])
def test_a_strangers_state_runs_no_code(tmp_path, name):
    train_small(tmp_path / "run", checkpointing_steps=11)
    folder = tmp_path / "run" / "checkpoint-11"
    torch.save({"losses": Malicious(tmp_path / "ran")}, folder / name)
    (folder / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    (folder / "manifest.json").write_text(json.dumps(_checksums(folder)))
    with pytest.raises(CheckpointError, match="can't resume from"):
        train_small(tmp_path / "run", resume_from_checkpoint="latest")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()
