"""`ddpm-compare` on an untrained network and on points: its cache, its rows, and its error if all diverge."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import assert_one_line_error, random_weights
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, SmallUNet2DModel, load_checkpoint, pretrained
from ddpm_mlp_pipeline.commands.compare import main
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler
from ddpm_mlp_pipeline.training.options import FittingArguments
from ddpm_mlp_pipeline.training.table_parameters import TableParameters


@pytest.fixture
def compare(tmp_path, capsys):
    """Save a network with a seed into the same folder, compare it, and return the exit status and both outputs."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(256, size=(12, 4, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{i}.png")

    def compare(seed, *argv, eps=None):
        torch.manual_seed(seed)
        unet = random_weights(SmallUNet2DModel((4, 8), 3, block_out_channels=(8, 8), attention=False))
        if eps is not None:
            torch.nn.init.zeros_(unet.conv_out.weight)
            torch.nn.init.constant_(unet.conv_out.bias, eps)
        DDPMMLPPipeline(unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(
            tmp_path / "checkpoint"
        )
        argv = (tmp_path / "checkpoint", "--dataset", pictures, "--num_samples", 8, *argv)
        argv += ("--num_inference_steps", 2, "--output", tmp_path / "rows.json")
        try:
            main([str(word) for word in argv])
            status = 0
        except SystemExit as end:
            status = end.code
        rows = json.loads((tmp_path / "rows.json").read_text())
        return status, *capsys.readouterr(), rows

    return compare


@pytest.mark.slow
def test_a_replaced_network_is_measured_again(compare):
    """Few colour pictures, not square, without a test split."""
    status, output, _, rows = compare(0, "--schedulers", "ddpm")
    assert status == 0
    assert "squared energy distance to 12 images" in output
    assert "split 'train', on pixels" in output
    assert len(rows) == 1
    *_, again = compare(0, "--schedulers", "ddpm")
    assert [row["energy_distance"] for row in again] == [row["energy_distance"] for row in rows]
    *_, other = compare(1, "--schedulers", "ddpm")
    assert len(other) == 2
    assert other[0]["energy_distance"] == rows[0]["energy_distance"] != other[1]["energy_distance"]


def test_where_every_sampler_diverges_it_ends_in_a_line(compare):
    status, output, errors, rows = compare(0, "--schedulers", "euler", eps=3e38)  # finite only with a clipped x_0
    assert status == 1
    assert "euler, 2 steps: the samples are not finite after step" in output
    assert errors.splitlines()[-1].startswith("error: no scheduler gives finite samples of")
    assert rows == []


@pytest.mark.slow
def test_two_processes_compare_as_one(tmp_path, run_forked):
    """A scheduler that diverges is left out by both."""
    unet = MLPModel(2, hidden_dim=8, num_hidden_layers=1)
    torch.nn.init.zeros_(unet.proj_out.weight)
    torch.nn.init.constant_(unet.proj_out.bias, 3e38)  # finite only with a clipped x_0
    DDPMMLPPipeline(unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")).save_pretrained(
        tmp_path / "checkpoint"
    )
    argv = (tmp_path / "checkpoint", "--dataset", "heart", "--num_samples", 1500, "--num_inference_steps", 2)
    argv += ("--schedulers", "euler", "ddpm")
    rows = []
    for number in (1, 2):
        output = tmp_path / f"{number}.json"
        result = run_forked("compare", *argv, "--output", output, num_processes=number)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("euler, 2 steps: the samples are not finite") == 1
        rows.append([row.pop("ms_per_sample") and row for row in json.loads(output.read_text())])
    assert rows[0] == rows[1]
    assert len(rows[0]) == 1


@pytest.mark.slow
def test_points_are_compared_with_fresh_ones(tmp_path, run_forked):
    """More calls are closer to the data, and a fitted table of few is among the rows."""
    checkpoint = load_checkpoint(pretrained("heart"))
    start = TableParameters.start(4, FittingArguments.of_points(), checkpoint.scheduler).to_table()
    checkpoint.scheduler = StepTableScheduler.from_config(checkpoint.scheduler.config, tables=[start.to_dict()])
    checkpoint.save_pretrained(tmp_path / "fitted")
    argv = ("compare", tmp_path / "fitted", "--dataset", "heart", "--num_samples", 4000, "--schedulers", "ddim")
    argv = (*argv, "--num_inference_steps", 3, 30, "--output", tmp_path / "rows.json")
    result = run_forked(*argv)
    assert result.returncode == 0, result.stderr
    assert "sliced Wasserstein distance to 4,000 points of heart" in result.stdout
    distances = {
        (row["scheduler"], row["network_calls"]): row["sliced_wasserstein_distance"]
        for row in json.loads((tmp_path / "rows.json").read_text())
    }
    assert distances.keys() == {("fitted", 4), ("ddim", 3), ("ddim", 30)}
    assert distances["ddim", 30] < 0.05 < distances["ddim", 3]
    assert_one_line_error(run_forked(*argv, "--split", "test"), "--split are for images")
