"""`ddpm-doctor` finds each fault, with its remedy, and none in a sound checkpoint."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from helpers import MNIST, assert_one_line_error, needs_mnist
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, TrainingArguments, pretrained, train
from ddpm_mlp_pipeline.commands.doctor import main
from ddpm_mlp_pipeline.data.batches import Batch, TensorBatches
from ddpm_mlp_pipeline.data.normalized import load_normalized
from ddpm_mlp_pipeline.data.points import load_points
from ddpm_mlp_pipeline.judge.checks import Patient, check_null_state, examine


@pytest.fixture
def patient(heart):
    x_0, held_out = (Batch(load_normalized(heart, "heart", 2000, seed=seed).samples) for seed in (0, 1))
    return Patient(heart, x_0, held_out, raw=copy.deepcopy(heart.unet))


def ailments(patient):
    return {finding.check for finding in examine(patient) if finding.remedy is not None}


def test_a_shipped_checkpoint_is_well(patient):
    findings = list(examine(patient))
    assert [finding.check for finding in findings if finding.remedy is not None] == []
    assert {finding.check for finding in findings} == {
        *("data", "terminal SNR", "timesteps", "precision", "conventions", "underfitting", "overfitting", "EMA")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    ],
)
def test_a_scheduler_that_it_was_not_trained_with(patient, changes):
    patient.pipeline.scheduler = DDPMScheduler.from_config(patient.pipeline.scheduler.config, **changes)
    (finding,) = (finding for finding in examine(patient) if finding.check == "conventions")
    assert "squaredcos_cap_v2 β and epsilon-prediction" in finding.message
    assert "scheduler_config.json" in finding.remedy


def test_a_forward_process_that_leaves_signal_or_has_few_steps(patient):
    patient.pipeline.scheduler = DDPMScheduler(50, clip_sample_range=2.0)
    found = ailments(patient)
    assert {"terminal SNR", "timesteps"} <= found
    patient.pipeline.scheduler = DDPMScheduler(1000, rescale_betas_zero_snr=True, clip_sample_range=2.0)
    (finding,) = (finding for finding in examine(patient) if finding.check == "terminal SNR")
    assert "v_prediction" in finding.remedy


def test_data_of_another_kind(patient):
    assert "data" in ailments(Patient(patient.pipeline, Batch(patient.x_0 + 0.5)))
    assert "data" in ailments(Patient(patient.pipeline, Batch(patient.x_0 * 3)))
    assert "data" in ailments(Patient(patient.pipeline, Batch(torch.ones(50, 2))))
    patient.pipeline.scheduler = DDPMScheduler.from_config(patient.pipeline.scheduler.config, clip_sample_range=1.0)
    (finding,) = (finding for finding in examine(patient) if finding.check == "data")
    assert "clip_sample_range to 1.9" in finding.remedy


def test_numbers_that_do_not_fit_into_16_bits(patient):
    with torch.no_grad():  # the same function, with large numbers in between
        patient.pipeline.unet.proj_out.weight *= 1e-6
        patient.pipeline.unet.blocks[0].linear.weight *= 1e6
    (finding,) = (finding for finding in examine(patient) if finding.check == "precision")
    assert "fp16" in finding.message
    assert "float32" in finding.remedy


def test_a_network_that_has_learned_nothing(patient):
    unet = MLPModel(2)
    found = {
        finding.check: finding for finding in examine(Patient(DDPMMLPPipeline(unet, DDPMScheduler()), patient.data))
    }
    assert found["underfitting"].remedy is not None
    assert found["overfitting"].remedy is None


def test_an_average_that_is_too_young(patient):
    patient.pipeline.unet = copy.deepcopy(patient.raw)
    untrained = MLPModel.from_config(patient.raw.config)
    with torch.no_grad():
        for ours, theirs in zip(patient.pipeline.unet.parameters(), untrained.parameters(), strict=True):
            ours.lerp_(theirs, 0.3)
    assert "EMA" in ailments(patient)


def test_a_network_that_knows_its_data_by_heart(tmp_path):
    torch.manual_seed(0)
    x_0, held_out = torch.randn(2, 1000, 2)
    few = x_0[:8].repeat(125, 1)
    pipeline = DDPMMLPPipeline(MLPModel(2), DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False))
    args = TrainingArguments(
        output_dir=str(tmp_path),
        train_batch_size=500,
        max_train_steps=400,
        learning_rate=3e-3,
        lr_warmup_steps=20,
        ema_max_decay=0.9,
        report_to="none",
    )
    train(pipeline, TensorBatches(few), args)
    assert "overfitting" in ailments(Patient(pipeline, Batch(few), Batch(held_out)))


def test_the_command_on_a_checkpoint(run_forked, heart, tmp_path):
    result = run_forked("doctor", pretrained("swiss_roll"), "--dataset", "swiss_roll", "--num_samples", 4000)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "nothing is wrong"

    heart.save_pretrained(tmp_path / "sick")
    path = tmp_path / "sick" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    result = run_forked("doctor", tmp_path / "sick", "--dataset", "heart", "--num_samples", 2000)
    assert result.returncode == 1
    assert "!!  conventions" in result.stdout
    assert "→ say in scheduler_config.json" in result.stdout
    assert_one_line_error(run_forked("doctor", tmp_path, "--dataset", "heart"), "no model_index.json")
    assert_one_line_error(run_forked("doctor", "harts", "--dataset", "heart"), "no preset 'harts'")


def test_a_checkpoint_of_another_scheduler_with_a_broken_state_beside_it(run_forked, heart, tmp_path):
    heart.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0)
    heart.save_pretrained(tmp_path / "heart")
    (tmp_path / "heart" / "checkpoint-20.broken").mkdir()
    (tmp_path / "heart" / "checkpoint-20.broken" / "model.safetensors").touch()
    result = run_forked("doctor", tmp_path / "heart", "--dataset", "heart", "--num_samples", 2000)
    assert result.returncode == 0, result.stdout + result.stderr
    too_few = run_forked("doctor", tmp_path / "heart", "--dataset", "heart", "--num_samples", 50)
    assert_one_line_error(too_few, "at least 100 samples, got 50")


def test_the_command_on_a_preset(run_forked, tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("ddpm_num_steps: 20\nddpm_beta_schedule: linear\nmax_train_steps: 100\nema_max_decay: 0.9999\n")
    result = run_forked("doctor", preset, "--dataset", "heart")
    assert result.returncode == 1
    ailing = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("!!")]
    assert ailing == ["terminal", "timesteps:", "EMA:"]
    assert run_forked("doctor", "heart").returncode == 0  # on the preset's own data


def test_labels_and_guidance_that_fit(run_forked):
    argv = (pretrained("moons"), "--dataset", "two_moons", "--num_samples", 1000, "--guidance_scale", 1.25)
    result = run_forked("doctor", *argv)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert {"ok  labels", "ok  null state", "ok  guidance"} < set(lines)


def test_other_labels_an_untrained_null_state_and_too_much_guidance(run_forked, tmp_path):
    pipeline = DDPMMLPPipeline.from_pretrained(pretrained("moons"))
    torch.manual_seed(0)
    torch.nn.init.normal_(pipeline.unet.class_embedding.weight.data[pipeline.null_label])  # as before training
    pipeline.save_pretrained(tmp_path / "moons")
    table = load_points("two_moons", 1000, label_column="label").to_pandas()
    table["moon"] = np.where(np.random.default_rng(0).random(1000) < 0.5, "lower", "upper")  # instead of its own
    table.drop(columns="label").to_csv(tmp_path / "points.csv", index=False)
    argv = ("--dataset", tmp_path / "points.csv", "--label_column", "moon", "--guidance_scale", 6)
    result = run_forked("doctor", tmp_path / "moons", *argv)
    assert result.returncode == 1
    ailing = [line[4:].partition(":")[0] for line in result.stdout.splitlines() if line.startswith("!!")]
    assert {"labels", "null state", "guidance"} <= set(ailing)


def test_a_null_state_of_a_condition_that_was_never_trained(heart):
    unet = MLPModel.from_config(heart.unet.config, condition_dim=1)
    unet.load_state_dict(heart.unet.state_dict(), strict=False)
    for parameter in unet.condition_embedding.parameters():
        torch.nn.init.zeros_(parameter)
    data = Batch(load_normalized(heart, "heart", 1000).samples, condition=torch.randn(1000, 1))
    patient = Patient(DDPMMLPPipeline(unet, heart.scheduler), data)
    assert "--label_dropout 0.1" in check_null_state(patient).remedy
    torch.nn.init.constant_(unet.condition_embedding.null, 1e-6)  # as if trained
    assert check_null_state(patient).remedy is None


def test_a_training_without_a_null_state(run_forked, tmp_path, capsys):
    preset = tmp_path / "preset.yaml"
    preset.write_text("dataset: two_moons\nlabel_column: label\nlabel_dropout: 0\n")
    result = run_forked("doctor", preset)
    assert result.returncode == 1
    assert "!!  null state: --label_dropout 0" in result.stdout
    for argv, message in [
        ((pretrained("heart"), "--dataset", "heart", "--label_column", "label"), "knows no classes"),
        ((pretrained("heart"), "--dataset", "heart", "--guidance_scale", 2), "needs labels or conditions"),
        (("moons", "--guidance_scale", 2), "is for a checkpoint"),
        ((pretrained("moons"), "--dataset", "two_moons", "--label_column", "kind"), "label"),
    ]:
        with pytest.raises(SystemExit):
            main([str(word) for word in argv])
        assert message in capsys.readouterr().err


@needs_mnist
def test_the_command_on_images(run_forked, tmp_path):
    result = run_forked("doctor", pretrained("mnist"), "--dataset", MNIST, "--num_samples", 200)
    assert result.returncode == 0, result.stdout + result.stderr
    others = ("--dataset", MNIST.parent / "cifar10", "--num_samples", 100, "--split", "train[:1%]")
    assert_one_line_error(run_forked("doctor", pretrained("mnist"), *others), "the label 'airplane'")
    info = json.loads((shutil.copytree(pretrained("mnist"), tmp_path / "mnist") / "model_index.json").read_text())
    (tmp_path / "mnist" / "model_index.json").write_text(json.dumps(info | {"label_column": None}))
    result = run_forked("doctor", tmp_path / "mnist", *others)
    assert result.returncode == 1
    assert "32×32 of 3 channels" in result.stdout


def test_pictures_of_several_sizes_with_a_preset_and_with_a_checkpoint(run_forked, capsys, tmp_path):
    """The doctor recommends no single --resolution, and the command line wins over the preset."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for i in range(100):
        size = (12 + i % 7, 10 + i % 5, 3)
        Image.fromarray(rng.integers(256, size=size, dtype=np.uint8)).save(pictures / f"{i:02}.png")
    (pictures / "50.png").write_bytes(b"")
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"dataset_name: {pictures}\nblock_out_channels: 16,32\nresolution: 8\nema_max_decay: 0.9\n")
    result = run_forked("doctor", preset, "--skip_corrupt", "--resolution", 20, "--fit", "pad", "--channels", 1)
    assert "left out 1 image" in result.stderr
    found = " ".join(result.stdout.split())
    assert (
        "ok shape: the images' sizes differ, with widths from 10 to 14 and heights from 12 to 18, and are brought to "
        "the network's 20×20 of 1 channel"
    ) in found
    assert "data: from -1.00 to" in found  # the black padding
    assert "larger than the 99 samples → lower --train_batch_size" in found
    for argv, message in [
        ((preset,), "50.png) can't be decoded"),
        ((preset, "--dataset", "heart"), "sets block_out_channels"),
        (("heart", "--resolution", 8), "are for images"),
        ((pretrained("mnist"), "--dataset", pictures, "--resolution", 8), "its own"),
        ((pretrained("mnist"),), "name them with --dataset"),
        ((pretrained("mnist"), "--dataset", "heart"), "heart is a point set"),
    ]:
        with pytest.raises(SystemExit):
            main([str(word) for word in argv])
        assert message in capsys.readouterr().err


def test_heavy_tails_and_whole_numbers_in_a_file(run_forked, tmp_path):
    rng = np.random.default_rng(0)
    columns = {"plain": rng.normal(size=3000), "price": rng.lognormal(0, 2, 3000), "count": rng.integers(9, size=3000)}
    pd.DataFrame(columns).to_csv(tmp_path / "own.csv", index=False)
    result = run_forked("doctor", "heart", "--dataset", tmp_path / "own.csv")
    assert result.returncode == 1
    found = " ".join(result.stdout.split())
    assert "!! heavy tails: values are more than 10 standard deviations from the mean in 'price' (" in found
    assert "-- whole numbers: in 'count'," in found
    assert "→ round the samples" in found
    assert result.stdout.splitlines()[-1] == "1 finding"
