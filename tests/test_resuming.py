"""Training that is killed, stopped, out of disk or on several processes ends as if it had not been interrupted."""

import contextlib
import json
import os
import shutil
import signal
import sys

import forked
import kill_training
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import ROOT, SCRIPTS, Payload, needs_mounts
from safetensors.torch import load_file
from small_training import small_pipeline, train_small, training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, SmallUNet2DModel, pretrained, train
from ddpm_mlp_pipeline.checkpoint_sampler import CheckpointSampler
from ddpm_mlp_pipeline.data.batches import TensorBatches
from ddpm_mlp_pipeline.errors import CheckpointError, ConfigurationError
from ddpm_mlp_pipeline.training.state import _checksums

POINTS = ROOT / "train_scripts" / "train_points.py"
# Without MPI, `--cpu --num_processes 2` starts one process.
TWO_PROCESSES = (SCRIPTS / "accelerate", "launch", "--quiet", "--multi_gpu", "--num_processes", 2)


def states(folder):
    return sorted(path.name for path in folder.glob("*checkpoint*"))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_where_it_would_have_ended(tmp_path, accumulation):
    def mirror(batch, draw):
        return batch._replace(x_0=torch.where(draw(1) < 0.5, batch.x_0, -batch.x_0))

    changes = {"gradient_accumulation_steps": accumulation, "augment": mirror, "checkpointing_steps": 1}
    weights, losses = train_small(tmp_path / "whole", **changes)
    for step in (3, 6, 9):  # at different places within epochs of four batches
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        assert train_small(folder, resume_from_checkpoint="latest", **changes) == (weights, losses)
        for name, checksum in _checksums(folder / "checkpoint-11").items():  # optimizer, random states, ...
            assert checksum == _checksums(tmp_path / "whole" / "checkpoint-11")[name], name


def test_a_state_may_be_of_a_network_in_another_memory_layout(tmp_path):
    """Adam's fused step reads weights and moments as they lie in memory."""
    weights = {}
    for name, layout in (("whole", torch.contiguous_format), ("other", torch.channels_last), ("other", None)):
        torch.manual_seed(0)
        unet = SmallUNet2DModel(8, block_out_channels=(8, 8), attention=False)
        if layout is not None:
            unet.to(memory_format=layout)
        steps = 2 if layout == torch.channels_last else 6
        changes = {"learning_rate": 0.01, "max_train_steps": 6, "lr_scheduler": "constant", "checkpointing_steps": 2}
        args = training_options(tmp_path / name, **changes, resume_from_checkpoint="latest")
        train(DDPMMLPPipeline(unet, DDPMScheduler()), TensorBatches(torch.randn(150, 1, 8, 8)), args)
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in unet.parameters()])
        for step in range(steps + 1, 7):
            shutil.rmtree(tmp_path / name / f"checkpoint-{step}", ignore_errors=True)
    # Rounding differs between the layouts, and is magnified where gradients are nearly 0.
    torch.testing.assert_close(weights["other"], weights["whole"], atol=3e-3, rtol=0)


@pytest.mark.slow
def test_a_killed_run_ends_byte_for_byte_where_it_would_have_ended(tmp_path):
    main, argv = kill_training.train_points.main, kill_training.points(tmp_path)
    assert kill_training.kill_and_compare(main, argv, 4, 0, tmp_path)["kills"] == 4


def test_a_run_that_was_killed_after_its_last_step_only_writes_its_result(tmp_path):
    result = train_small(tmp_path, checkpointing_steps=11)
    shutil.rmtree(tmp_path / "unet")
    (tmp_path / ".partial-abc").mkdir()  # a killed process leaves it
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
    assert "checkpoint-9 is broken (optimizer.bin is damaged)" in printed
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
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "checkpoint-5"}):
        with pytest.raises(CheckpointError, match="checkpoint-10 belongs to an earlier run"):
            train_small(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="saved with --use_ema"):
        train_small(tmp_path, resume_from_checkpoint="latest", use_ema=False)
    args = training_options(tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="its unet has hidden_dim 8, not 16"):
        train(small_pipeline(hidden_dim=16), TensorBatches(torch.randn(150, 2)), args)
    pipeline = small_pipeline()
    pipeline.register_to_config(data_mean=[0.0, 1.0], data_std=[1.0, 1.0], data_columns=["x", "y"])
    with pytest.raises(CheckpointError, match="its data differ"):
        train(pipeline, TensorBatches(torch.randn(150, 2)), args)
    for name in ("model.safetensors", "optimizer.bin", "progress_0.bin", "unet/config.json", "manifest.json"):
        broken = shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "copy", dirs_exist_ok=True)
        (broken / name).write_bytes((broken / name).read_bytes()[:20])
        with pytest.raises(CheckpointError, match=f"can't resume from .*copy: {name} is"):
            train_small(tmp_path, resume_from_checkpoint="copy")


def test_a_states_bare_name_is_of_the_output_folder_first(tmp_path, monkeypatch):
    result = train_small(tmp_path / "run", checkpointing_steps=10)
    shutil.copytree(tmp_path / "run" / "checkpoint-10", tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "manifest.json").unlink()  # a state without a manifest is refused
    monkeypatch.chdir(tmp_path)
    assert train_small(tmp_path / "run", resume_from_checkpoint="checkpoint-10") == result
    (tmp_path / "run" / "checkpoint-10").rename(tmp_path / "checkpoint-10.whole")
    changes = {"resume_from_checkpoint": "checkpoint-10.whole", "overwrite_output_dir": True}  # a state from elsewhere
    assert train_small(tmp_path / "run", **changes) == result


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "progress_0.bin", "custom_checkpoint_0.pkl"]
)
def test_a_strangers_state_runs_no_code(tmp_path, name):
    train_small(tmp_path / "run", checkpointing_steps=11)
    folder = tmp_path / "run" / "checkpoint-11"
    torch.save({"losses": Payload(tmp_path / "ran")}, folder / name)
    (folder / "manifest.json").write_text(json.dumps(_checksums(folder)))
    # Accelerate skips random states that it can't load.
    is_fatal = name != "random_states_0.pkl"
    with pytest.raises(CheckpointError, match="can't resume from") if is_fatal else contextlib.nullcontext():
        train_small(tmp_path / "run", resume_from_checkpoint="latest")
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # the test's code would have run


@needs_mounts
def test_a_full_disk_leaves_the_state_before_usable(tmp_path, run):
    argv = ("--checkpointing_steps", 5, *kill_training.points(tmp_path), "--checkpoints_total_limit", 100)
    script = """
        mount -t tmpfs -o size=700k tmpfs disk
        "$@"; echo "exit status $?"; ls -A disk/run
        mount -o remount,size=100m disk
        "$@"; cp -r disk/run whole
    """
    words = (*("unshare", "-rm", "sh", "-c", script, "sh"), sys.executable, POINTS, *argv)
    (tmp_path / "cwd" / "disk").mkdir(parents=True)
    result = run(*words, "--output_dir", "disk/run", "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint-" in error
    assert "Traceback" not in result.stderr
    full, resumed = result.stdout.split("resuming at step ")
    assert "exit status 1" in full
    assert ".partial" not in full
    assert f"checkpoint-{resumed.split()[0]}\n" in full
    kill_training.train_points.main([*map(str, argv), "--output_dir", str(tmp_path / "run")])
    assert states(tmp_path / "run") == states(tmp_path / "cwd" / "whole")
    assert _checksums(tmp_path / "run" / "checkpoint-120") == _checksums(tmp_path / "cwd" / "whole" / "checkpoint-120")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status", "num_processes"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_a_signal_saves_the_state_and_says_how_to_resume(tmp_path, signum, status, num_processes):
    """Several processes, which all get it, stop at the same step."""
    training = forked.Command("train_points", long_training(tmp_path), tmp_path, num_processes)
    training.wait_for("loss=")
    for process in training.processes:
        os.kill(process.pid, signum)
    result = training.wait()
    assert result.returncode == status
    (state,) = states(tmp_path / "run")
    step = state.partition("-")[2]
    assert result.stderr.splitlines()[-1] == f"stopped at step {step}; go on with --resume_from_checkpoint latest"
    assert result.stderr.count(f"stopped at step {step};") == num_processes


def long_training(folder):
    argv = ("--max_train_steps", 100_000, *kill_training.points(folder)[:4], "--output_dir", folder / "run")
    return [str(word) for word in argv]


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match="DeepSpeed is not supported: launch with --multi_gpu"):
        train_small(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(tmp_path, run_forked):
    argv = [str(word) for word in kill_training.points(tmp_path)]
    kill_training.train_points.main([*argv, "--output_dir", str(tmp_path / "one")])
    argv += ["--train_batch_size", "32"]
    for name in ("two", "resumed"):
        output = ("--output_dir", tmp_path / name, "--resume_from_checkpoint", "latest")
        result = run_forked("train_points", *argv, *output, num_processes=2)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("the checkpoint, README.md, loss.png") == 1
        if name == "two":
            shutil.copytree(tmp_path / "two" / "checkpoint-115", tmp_path / "resumed" / "checkpoint-115")
    one, two, resumed = (tmp_path / name / "checkpoint-120" for name in ("one", "two", "resumed"))
    assert _checksums(resumed) == _checksums(two)
    assert len(list(two.glob("random_states_*.pkl"))) == 2
    losses = [torch.load(folder / "progress_0.bin", weights_only=True)["losses"] for folder in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_where_one_with_the_same_batch_was_stopped(tmp_path, run_forked):
    argv, one, two = [str(word) for word in kill_training.points(tmp_path)], tmp_path / "one", tmp_path / "two"
    argv += ["--checkpoints_total_limit", "100"]
    kill_training.train_points.main([*argv, "--output_dir", str(one)])
    shutil.copytree(one / "checkpoint-40", two / "checkpoint-40")
    argv += ["--output_dir", str(two), "--resume_from_checkpoint", "latest", "--train_batch_size"]
    result = run_forked("train_points", *argv, 16, num_processes=2)
    assert "had 64 samples in all, not 32: pass --train_batch_size 32" in result.stderr
    result = run_forked("train_points", *argv, 32, num_processes=2)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 40" in result.stdout
    whole, resumed = (folder / "checkpoint-120" for folder in (one, two))
    losses = [torch.load(state / "progress_0.bin", weights_only=True)["losses"] for state in (whole, resumed)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    last, first = (load_file(state / "model.safetensors") for state in (whole, resumed))
    for name, weights in last.items():
        torch.testing.assert_close(first[name], weights, atol=1e-5, rtol=0)
    rates = [torch.load(state / "scheduler.bin", weights_only=True)["last_epoch"] for state in (whole, resumed)]
    assert rates == [120, 120]


def test_states_of_earlier_versions_go_on_in_one_process(tmp_path):
    result = train_small(tmp_path, checkpointing_steps=6)
    state = tmp_path / "checkpoint-6"
    progress = torch.load(state / "progress_0.bin", weights_only=True)
    torch.save({name: progress[name] for name in ("losses", "ema", "data")}, state / "progress_0.bin")
    (state / "manifest.json").write_text(json.dumps(_checksums(state)))
    assert train_small(tmp_path, checkpointing_steps=6, resume_from_checkpoint="latest") == result


def test_two_processes_draw_the_same_images_as_one(tmp_path, run_forked):
    argv = (pretrained("mnist"), "--output", tmp_path / "two.npy", "--num_inference_steps", 3)
    result = run_forked("sample", *argv, "--num_samples", 11, "--batch_size", 4, num_processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'two.npy'}: 11 images\n"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = np.concatenate(list(CheckpointSampler(pretrained("mnist"), num_inference_steps=3).batches(11, 0, 4)))
    torch.set_num_threads(threads)
    assert np.load(tmp_path / "two.npy").tobytes() == images.tobytes()


def test_two_processes_judge_as_one(tmp_path, run_forked):
    for name, *argv in [
        ("bound", pretrained("swiss_roll_2015"), "--dataset", "swiss_roll", "--num_samples", 40, "--batch_size", 9),
        ("evaluate", pretrained("heart"), "--dataset", "heart", "--num_samples", 700, "--repeats", 1),
    ]:
        outputs = []
        for number in (1, 2):
            output = tmp_path / f"{name}{number}.json"
            result = run_forked(name, *argv, "--output", output, num_processes=number)
            assert result.returncode == 0, result.stderr
            assert output.stat().st_size > 0
            outputs.append(result.stdout)
        assert outputs[0] == outputs[1]
