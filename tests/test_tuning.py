"""Tuned networks: closed forms of Gaussian data, exact resuming, several processes, and the command."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gaussian import VARIANCE, gaussian_data, gaussian_pipeline
from helpers import assert_one_line_error

from ddpm_mlp_pipeline import OnnxSampler, load_checkpoint, pretrained
from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError
from ddpm_mlp_pipeline.runtime.noise import normal
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler
from ddpm_mlp_pipeline.training.fit_features import PointFeatures
from ddpm_mlp_pipeline.training.options import FittingArguments, TuningArguments
from ddpm_mlp_pipeline.training.table_parameters import TableParameters
from ddpm_mlp_pipeline.training.tuning import tune


def options(folder, **changes):
    values = {"num_calls": 1, "train_batch_size": 256, "max_train_steps": 60, "report_to": "none"}
    return TuningArguments(output_dir=str(folder), **values | changes)


@pytest.mark.parametrize("calls", [1, 2])
def test_gaussian_data_are_drawn_by_a_network_that_was_wrong(calls, tmp_path):
    """The network's ε is half of the true one at first; the distance alone tells that its samples are too wide."""
    pipe = gaussian_pipeline(scale=0.5)
    args = options(tmp_path, num_calls=calls, learning_rate=0.02, denoising_weight=0.0, max_train_steps=150)
    distances, held_out = tune(pipe, gaussian_data(), PointFeatures(), args)
    assert np.mean(distances[-20:]) < 0.1 * np.mean(distances[:5])
    assert len(distances) == 150
    assert len(set(held_out)) == 2000
    assert isinstance(pipe.scheduler, StepTableScheduler)
    points = pipe(20_000, torch.Generator().manual_seed(0)).points
    assert points.std() == pytest.approx(VARIANCE**0.5, rel=0.05)


def test_the_denoising_loss_leads_to_the_exact_network(tmp_path):
    """The distance alone is content with any ε that the table makes up for; the denoising loss wants the true one."""
    factors = []
    for weight in (0.0, 100.0):
        pipe = gaussian_pipeline(scale=0.5)
        args = options(tmp_path / str(weight), denoising_weight=weight, learning_rate=0.02, max_train_steps=150)
        tune(pipe, gaussian_data(), PointFeatures(), args)
        factors.append(pipe.unet.factor.item())
    free, held = factors
    assert abs(held - 1) < 0.05 < abs(free - 1)


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_exactly(tmp_path):
    class StoppingFeatures(PointFeatures):
        calls = 0

        def __call__(self, batch, generator):
            self.calls += 1
            if self.calls == 20:
                raise Stop
            return super().__call__(batch, generator)

    def run(folder, features, **changes):
        pipe = load_checkpoint(pretrained("heart"))  # with a fitted table, as most networks to be tuned have
        table = TableParameters.start(3, FittingArguments.of_points(), pipe.scheduler).to_table()
        pipe.scheduler = StepTableScheduler.from_config(pipe.scheduler.config, tables=[table.to_dict()])
        args = options(folder, num_calls=2, max_train_steps=12, checkpointing_steps=4, **changes)
        data = gaussian_data()
        distances, _ = tune(pipe, data, features, args)
        return (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes(), pipe.scheduler.tables, distances

    expected = run(tmp_path / "whole", PointFeatures())
    with pytest.raises(Stop):
        run(tmp_path / "stopped", StoppingFeatures())
    assert (tmp_path / "stopped/checkpoint-4").is_dir()
    assert not (tmp_path / "stopped/checkpoint-12").exists()
    assert run(tmp_path / "stopped", PointFeatures(), resume_from_checkpoint="latest") == expected


def test_wrong_input_is_refused(tmp_path):
    output = tmp_path / "tuned"
    with pytest.raises(DatasetError, match="100 samples are too few"):
        tune(gaussian_pipeline(), gaussian_data(100), PointFeatures(), options(output))
    with pytest.raises(ConfigurationError, match="from 1 to 1000"):
        tune(gaussian_pipeline(), gaussian_data(), PointFeatures(), options(output, num_calls=1001))
    with pytest.raises(ConfigurationError, match="denoising_weight"):
        options(output, denoising_weight=-1.0)
    assert not output.exists()


@pytest.mark.slow
def test_the_command(run_forked, tmp_path):
    """Tuned for seconds, one call is closer to the data than a solver's; torch, runtime and graph draw the same."""
    output, bundle = tmp_path / "tuned", tmp_path / "bundle"
    argv = ("--checkpoint", pretrained("heart"), "--dataset", "heart", "--output_dir", output)
    argv = (*argv, "--report_to", "none", "--train_batch_size", 512, "--num_samples", 20_000, "--max_train_steps", 150)
    result = run_forked("tune", *argv)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row["distance"] for row in json.loads((output / "tune.json").read_text())["rows"]}
    assert rows["tuned"] < 0.5 * min(rows["ddim"], rows["dpmsolver_multistep"])
    assert {"tables.png", "samples.png"} <= {path.name for path in output.iterdir()}
    assert_one_line_error(run_forked("tune", *argv), "--overwrite_output_dir")

    assert run_forked("export", output, bundle, "--sampler").returncode == 0
    samples = OnnxSampler(bundle, num_threads=1).sample(16, seed=3)
    latents = torch.from_numpy(normal(3, range(16), 2, range(1))[0].copy())
    np.testing.assert_allclose(load_checkpoint(output)(latents=latents).points, samples, atol=1e-4)
    graph = onnx.load(bundle / "sampler.onnx")
    assert "Loop" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (drawn,) = session.run(None, {"seed": np.array(3), "num_samples": np.array(16)})
    np.testing.assert_allclose(drawn, samples, atol=1e-4)


@pytest.mark.slow
def test_two_processes(run_forked, tmp_path):
    output = tmp_path / "tuned"
    argv = ("--checkpoint", pretrained("heart"), "--dataset", "heart", "--output_dir", output, "--report_to", "none")
    small = ("--num_samples", 20_000, "--train_batch_size", 256, "--max_train_steps", 60, "--num_calls", 2)
    result = run_forked("tune", *argv, *small, num_processes=2)
    assert result.returncode == 0, result.stderr
    rows = {row["name"]: row["distance"] for row in json.loads((output / "tune.json").read_text())["rows"]}
    assert rows["tuned"] < 0.5 * min(rows["ddim"], rows["dpmsolver_multistep"])


@pytest.mark.slow
def test_the_column_of_labels_serves_the_tuning_and_the_report(run_forked, tmp_path):
    """A stock-like checkpoint, whose training did not record the column: the data's held-out split needs it, too."""
    checkpoint = shutil.copytree(pretrained("moons"), tmp_path / "moons")
    index = json.loads((checkpoint / "model_index.json").read_text())
    (checkpoint / "model_index.json").write_text(json.dumps(index | {"label_column": None}))
    argv = ("tune", "--checkpoint", checkpoint, "--dataset", "two_moons", "--output_dir", tmp_path / "tuned")
    argv = (*argv, "--num_samples", 3000, "--train_batch_size", 64, "--max_train_steps", 5, "--report_to", "none")
    assert_one_line_error(run_forked(*argv), "--label_column")
    result = run_forked(*argv, "--label_column", "label")
    assert result.returncode == 0, result.stderr
    assert "tuned" in result.stdout
