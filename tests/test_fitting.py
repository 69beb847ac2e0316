"""Fitted step tables: closed forms of Gaussian data, stock DDIM, exact resuming, and the command."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from gaussian import VARIANCE, GaussianModel, gaussian_data, gaussian_pipeline
from helpers import assert_one_line_error, random_weights
from pandas import DataFrame
from scipy.spatial.distance import cdist

from ddpm_mlp_pipeline import (
    DDPMMLPPipeline,
    MLPModel,
    SmallUNet2DModel,
    StepTable,
    compile_scheduler,
    load_checkpoint,
    pretrained,
)
from ddpm_mlp_pipeline.data.batches import Batch, TensorBatches
from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError, DivergenceError
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler
from ddpm_mlp_pipeline.training.fit_features import (
    NetworkFeatures,
    PointFeatures,
    energy_distance,
    mean_distance,
    whiten,
)
from ddpm_mlp_pipeline.training.fitting import TableFitter, play
from ddpm_mlp_pipeline.training.options import FittingArguments
from ddpm_mlp_pipeline.training.table_parameters import TableParameters, draw


def arguments(**options):
    small = {"steps": 40, "batch_size": 256, "num_references": 512, "num_held_out": 1024, "num_drawn": 1024}
    return FittingArguments.of_points(**(small | {"check_steps": 10, "learning_rate": 0.02} | options))


def test_without_noise_and_corrections_the_table_is_ddim():
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=1.5)
    expected = compile_scheduler(scheduler, 5, use_clipped_model_output=True)
    parameters = TableParameters.start(5, arguments(), scheduler)
    numbers = torch.zeros(6, 5)
    numbers[0] = torch.tensor(expected.timesteps) / 1000
    numbers[1] = torch.logit(torch.tensor(expected.alphas_cumprod)).float() / 10
    actual = dataclasses.replace(parameters, numbers=numbers).to_table()
    # DDIM ends at the first timestep's ᾱ, a fitted table at 1: all but the last step are the same.
    np.testing.assert_allclose(actual.timesteps, expected.timesteps, atol=1e-3)
    np.testing.assert_allclose(actual.to_x_0, expected.to_x_0, rtol=1e-4)
    x, eps = np.random.default_rng(0).standard_normal((2, 100))
    for k in range(4):
        x_0 = (expected.to_x_0[k] @ [x, eps]).clip(-1.5, 1.5)
        steps = [table.to_next[k, 0] @ [x, eps, x_0, np.zeros(100)] for table in (actual, expected)]
        np.testing.assert_allclose(*steps, atol=2e-3)


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_with_a_network_that_knows_x_0_every_call_sees_the_forward_process(noise, prediction_type):
    """It sees α x_0 + σ ε with ε of variance 1, whatever the share of fresh noise, and the last call returns x_0."""
    scheduler = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    parameters = TableParameters.start(6, arguments(noise=noise), scheduler)
    log_snr = iter((parameters.numbers[1] * 10).tolist())
    x_0 = torch.linspace(-1, 1, 80_000).reshape(-1, 2)
    variances = []

    def network(x, t):
        alpha_cumprod = torch.sigmoid(torch.tensor(next(log_snr)))
        alpha, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
        eps = (x - alpha * x_0) / sigma
        variances.append(float(eps.var()))
        return UNet2DOutput(
            sample={"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[prediction_type]
        )

    x = draw(parameters, network, Batch(x_0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(x, x_0, atol=1e-4, rtol=0)
    np.testing.assert_allclose(variances, 1, atol=0.03)  # the first x is N(0, 1), not α x_0 + σ ε


@pytest.mark.parametrize("dimension", [3, 40])  # computed in two ways
def test_the_distance_is_the_unbiased_energy_distance(dimension):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, dimension)), rng.standard_normal((40, dimension)) + 0.5
    of_x, of_y = (cdist(z, z)[~np.eye(len(z), dtype=bool)].mean() for z in (x, y))
    expected = 2 * cdist(x, y).mean() - of_x - of_y
    x, y = torch.tensor(x), torch.tensor(y)
    actual = energy_distance([x, x], [y, y], [mean_distance(y)] * 2)
    assert float(actual) == pytest.approx(2 * expected, rel=1e-6)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_fit_finds_the_samplers_of_gaussian_data(calls):
    """For Gaussian data, one call is enough: x times a number. DDIM's is wrong by a factor of three or more."""
    pipe, data = gaussian_pipeline(), gaussian_data()
    fitter = TableFitter(pipe, data, PointFeatures(), arguments(steps=80))
    fitter.fit([calls])
    start = TableParameters.start(calls, fitter.args, pipe.scheduler)
    before, after = ({row["step"]: row["distance"] for row in fitter.log}[step] for step in (0, 80))
    assert before > 0.02
    assert after < 0.003
    pipe.scheduler = StepTableScheduler.from_config(
        pipe.scheduler.config, tables=[table.to_dict() for table in (fitter.tables[calls], start.to_table())][:1]
    )
    points = pipe(20_000, torch.Generator().manual_seed(0)).points
    assert points.std() == pytest.approx(VARIANCE**0.5, rel=0.05)


def test_a_stopped_fit_goes_on_exactly(tmp_path):
    class Stop(Exception):
        pass

    def fit(path, stop_after=None):
        taken = 0

        def on_step():
            nonlocal taken
            taken += 1
            if taken == stop_after:
                raise Stop

        fitter = TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments(steps=20), path)
        return {number: table.to_dict() for number, table in fitter.fit([3, 2], on_step).items()}, fitter.log

    expected = fit(tmp_path / "whole.json")
    for stop_after in (15, 18):  # in the first table, then in the second
        with pytest.raises(Stop):
            fit(tmp_path / "stopped.json", stop_after)
    assert fit(tmp_path / "stopped.json") == expected
    assert fit(None) == expected
    # A table that was begun from another one is begun again.
    fitter = TableFitter(
        gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments(steps=20), tmp_path / "whole.json"
    )
    alone = TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments(steps=20))
    assert fitter.fit([2])[2].to_dict() == alone.fit([2])[2].to_dict() != expected[0][2]
    with pytest.raises(ConfigurationError, match=r"stopped\.json is of a fit with other options"):
        TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments(), tmp_path / "stopped.json")


def test_the_best_table_by_the_held_out_data_is_kept():
    fitter = TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments())
    fitted = fitter._fit_one(TableParameters.start(2, fitter.args, fitter.pipeline.scheduler), None)
    assert fitter.target.held_out_distance(fitted, fitter.network) == pytest.approx(
        min(row["distance"] for row in fitter.log), rel=1e-5
    )
    fitter.args, fitter.log = arguments(learning_rate=0.2, steps=2, check_steps=2), []
    kept = fitter._fit_one(fitted, None)
    start, last = [row["distance"] for row in fitter.log]
    assert start < last  # this learning rate is too high
    torch.testing.assert_close(kept.numbers, fitted.numbers, atol=0, rtol=0)


def test_labels_are_drawn_as_the_data_have_them():
    labels = torch.tensor([0] * 1800 + [1] * 200)
    data = TensorBatches(torch.randn(2000, 2), labels)
    unet = MLPModel(2, hidden_dim=16, num_hidden_layers=2, embedding_dim=8, num_class_embeds=2)
    pipe = DDPMMLPPipeline(unet, DDPMScheduler())
    fitter = TableFitter(pipe, data, PointFeatures(2), arguments(num_held_out=500, batch_size=200, num_references=200))
    drawn = fitter.target._some(200, torch.Generator().manual_seed(0)).class_labels
    share = (data.class_labels[fitter.target.fitted] == 1).double().mean()
    assert abs(int(drawn.sum()) - 200 * share) <= 1
    assert fitter.fit([2])[2].timesteps.shape == (2,)


class HalfGuidedModel(GaussianModel):
    """Two classes with the means ±1, of which the network knows only half: guidance with w = 2 is exact."""

    @register_to_config
    def __init__(self, in_channels=2, sample_size=None, num_class_embeds=2):
        super().__init__(in_channels, sample_size)
        self.class_embedding = torch.nn.Embedding(num_class_embeds, 1)  # one more would be the null label's

    def forward(self, sample, timestep, class_labels):
        mean = 0.5 * torch.tensor([-1.0, 1.0, 0.0])[class_labels, None]
        place = torch.as_tensor(timestep).detach().round().long()
        alpha = self.alphas_cumprod[place].sqrt().reshape(-1, 1)
        return super().forward(sample - alpha * mean, timestep)


def test_guided_tables_are_fitted():
    data = gaussian_data()
    labels = torch.arange(len(data)) % 2
    data = TensorBatches(data.samples + (2.0 * labels[:, None] - 1), labels)
    pipe = DDPMMLPPipeline(HalfGuidedModel(), DDPMScheduler(clip_sample=False), null_label=2)
    pipe.set_progress_bar_config(disable=True)
    fitter = TableFitter(pipe, data, PointFeatures(2), arguments(steps=80, guidance_scale=2.0))
    table = fitter.fit([3, 2])[2]
    assert table.guidance_scales.mean() == pytest.approx(2)
    assert table.guidance_scales.std() > 0.01
    play(pipe, [table])
    labels = [0] * 5000 + [1] * 5000
    points = pipe(10_000, torch.Generator().manual_seed(0), class_labels=labels).points.reshape(2, 5000, 2)
    np.testing.assert_allclose(points.mean(axis=1), [[-1, -1], [1, 1]], atol=0.05)
    assert points.std(axis=1) == pytest.approx(VARIANCE**0.5, rel=0.1)

    with pytest.raises(ConfigurationError, match="labels or conditions"):
        TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments(guidance_scale=2.0))
    with pytest.raises(ConfigurationError, match="must be finite"):
        arguments(guidance_scale=float("nan"))
    pipe = DDPMMLPPipeline(pipe.unet, pipe.scheduler)
    with pytest.raises(ConfigurationError, match="null label"):
        TableFitter(pipe, data, PointFeatures(2), arguments(guidance_scale=2.0))


@pytest.mark.parametrize("model", ["unet", "stock", "mlp"])
def test_features_of_networks_are_differentiable_and_tell_images_apart(model):
    unet = {
        "unet": lambda: SmallUNet2DModel(8, block_out_channels=(8, 16, 24), attention_head_dim=8),
        "stock": lambda: UNet2DModel(
            8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ),
        "mlp": lambda: MLPModel(1, 8, hidden_dim=16, num_hidden_layers=3),
    }[model]()  # fmt: skip
    features = NetworkFeatures(DDPMMLPPipeline(random_weights(unet), DDPMScheduler()))
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    groups = features(Batch(x), torch.Generator().manual_seed(0))
    assert len(groups) == {"unet": 6, "stock": 6, "mlp": 4}[model]  # at two noise levels
    sum(group.square().sum() for group in groups).backward()
    assert x.grad.flatten(1).norm(dim=1).min() > 0
    assert all(mean_distance(group) > 0 for group in groups)


def test_wrong_input_is_refused():
    with pytest.raises(DatasetError, match="100 samples are too few for a batch size of 256: it can be 50 at most"):
        TableFitter(gaussian_pipeline(), gaussian_data(100), PointFeatures(), arguments())
    unet = MLPModel(2, hidden_dim=16, num_hidden_layers=2, embedding_dim=8, num_class_embeds=2)
    with pytest.raises(DatasetError, match="name their column with --label_column"):
        TableFitter(DDPMMLPPipeline(unet, DDPMScheduler()), gaussian_data(), PointFeatures(2), arguments())
    fitter = TableFitter(gaussian_pipeline(), gaussian_data(), PointFeatures(), arguments())
    with pytest.raises(ConfigurationError, match="from 1 to 1000"):
        fitter.fit([1001])
    diverging = TableFitter(gaussian_pipeline(scale=1e30), gaussian_data(), PointFeatures(), arguments())
    with pytest.raises(DivergenceError, match="not finite"):
        diverging.fit([3])


@pytest.mark.slow
def test_the_command(run_forked, tmp_path):
    checkpoint, output = pretrained("heart"), tmp_path / "fitted"
    argv = ("fit", checkpoint, output, "--dataset", "heart", "--num_calls", 3, 4, "--steps", 60)
    result = run_forked(*argv)
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "fit.json").read_text())
    distance = {(row["name"], row["calls"]): row["distance"] for row in report["rows"]}
    for calls in (3, 4):
        assert distance["fitted", calls] < 0.8 * min(distance[name, calls] for name in ("ddim", "dpmsolver_multistep"))
    assert {"tables.png", "samples.png"} <= {path.name for path in output.iterdir()}
    assert not (tmp_path / "fitted.partial.json").exists()
    pipe = load_checkpoint(output)
    assert list(pipe.scheduler.tables) == [3, 4]
    assert pipe.scheduler.default_num_inference_steps == 3
    assert_one_line_error(run_forked(*argv), "exists and isn't empty")

    assert run_forked("export", output, tmp_path / "bundle").returncode == 0
    assert StepTable.load(tmp_path / "bundle/step_table.json").to_dict() == pipe.scheduler.tables[3]


def test_a_stock_network_is_fitted_with_guidance(run_forked, tmp_path):
    """Its null label is named, for the fit and for the samples that the report measures."""
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, num_class_embeds=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pixels = np.random.default_rng(0).integers(256, size=(300, 8, 8), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(pixels), "label": np.arange(300) % 3}, features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    argv = ("fit", tmp_path / "stock", tmp_path / "fitted", "--dataset", tmp_path / "data", "--label_column", "label")
    argv += ("--num_calls", 1, "--steps", 2, "--batch_size", 8, "--guidance_scale", 1.5, "--judge", "pixels")
    assert_one_line_error(run_forked(*argv), "null label (--null_label)")
    result = run_forked(*argv, "--null_label", 3, "--mixed_precision", "bf16")
    assert result.returncode == 0, result.stderr
    fitted = load_checkpoint(tmp_path / "fitted")
    assert (fitted.null_label, fitted.scheduler.guidance_scales) == (3, [1.5])


def test_a_training_ends_with_a_fit(run_forked, tmp_path):
    argv = ("--dataset", "circles", "--dataset_size", 120, "--max_train_steps", 3, "--hidden_dim", 8)
    argv += ("--num_hidden_layers", 1, "--ddpm_num_steps", 20, "--report_to", "none", "--no-figures")
    argv += ("--output_dir", tmp_path / "run")
    assert_one_line_error(run_forked("train_points", *argv, "--num_calls", 3, 21), "num_calls must be from 1 to", "20")
    result = run_forked("train_points", *argv, "--num_calls", 2)
    assert result.returncode == 0, result.stderr
    scheduler = load_checkpoint(tmp_path / "run").scheduler
    assert (list(scheduler.tables), scheduler.default_num_inference_steps) == ([2], 2)
    assert scheduler.config.num_train_timesteps == 20


@pytest.mark.slow
def test_the_command_fits_to_its_own_samples_and_an_export_fits(run_forked, tmp_path):
    small = ("--num_calls", 2, "--steps", 20, "--batch_size", 64)
    argv = ("fit", pretrained("moons"), tmp_path / "fitted", "--data_free", 400, *small)
    assert run_forked(*argv).returncode == 0
    kept = np.load(tmp_path / "fitted.samples.npz")["samples"]
    log = json.loads((tmp_path / "fitted/fit.json").read_text())["log"]
    assert min(row["distance"] for row in log) < log[0]["distance"] / 2
    assert run_forked(*argv, "--overwrite").returncode == 0  # from the same samples
    assert json.loads((tmp_path / "fitted/fit.json").read_text())["log"] == log
    np.testing.assert_array_equal(np.load(tmp_path / "fitted.samples.npz")["samples"], kept)
    assert_one_line_error(run_forked(*argv[:4], 300, *small, "--overwrite"), "fitted.samples.npz holds other samples")


def test_an_export_fits_a_table(run_forked, tmp_path):
    points = tmp_path / "points.csv"
    table = DataFrame(gaussian_data(3000).samples.numpy(), columns=["x", "y"])
    table.assign(label=["lower", "upper"] * 1500).to_csv(points, index=False)
    argv = ("export", pretrained("moons"), tmp_path / "bundle", "--fit", 1)
    assert_one_line_error(run_forked(*argv), "--fit needs data: name them with --dataset")
    assert_one_line_error(run_forked(*argv, "--dataset", points, "--scheduler", "ddim"), "leave out --scheduler")
    argv = (*argv, "--dataset", points, "--guidance_scale", 1.5)
    assert_one_line_error(run_forked(*argv, "--guidance_interval", 900, 100), "leave out --guidance_interval")
    result = run_forked(*argv)
    assert result.returncode == 0, result.stderr
    table = StepTable.load(tmp_path / "bundle/step_table.json")
    assert (table.scheduler, len(table), table.is_guided.sum()) == ("StepTableScheduler", 1, 1)
    assert json.loads((tmp_path / "bundle/bundle.json").read_text())["provenance"]["checkpoint"] == "moons"


def test_the_command_refuses_wrong_input(run_forked, tmp_path):
    output = tmp_path / "fitted"
    points = tmp_path / "few.csv"
    points.write_text("x,y\n" + "0,1\n1,0\n" * 100)
    argv = ("fit", pretrained("heart"), output, "--dataset")
    for more, message in [
        ((points,), "200 samples are too few for a batch size of 1024: it can be 100 at most"),
        (("heart", "--num_calls", 1001), "from 1 to 1000"),
        (("moons.csv",), "moons.csv"),
        (("heart", "--features", "pixels"), "--features are for images"),
        (("heart", "--guidance_scale", 2), "guidance_scale needs a network and data with labels or conditions"),
        (("heart", "--mixed_precision", "bf16"), "points need --mixed_precision no"),
        (("heart", "--data_free", 100), "name the data with --dataset, or pass --data_free N"),
    ]:
        assert_one_line_error(run_forked(*argv, *more), message)
        assert {path.name for path in tmp_path.iterdir()} == {"few.csv", "cwd"}
    output.mkdir()
    (output / "notes.txt").touch()
    assert_one_line_error(run_forked(*argv, "heart", "--overwrite"), "notes.txt, which this command does not write")


def test_whitened_numbers_show_noise_that_their_spread_hides():
    """Two columns differ by a tenth of their spread; those of the samples by a third."""

    def rows(seed, noise):
        common, differences = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(seed))
        return Batch(torch.cat([common, common + noise * differences], dim=1))

    data, like_data, noisy = rows(0, 0.1), rows(1, 0.1), rows(2, 0.33)
    whitening = whiten(data.x_0)
    torch.testing.assert_close(torch.cov((data.x_0 @ whitening).T), torch.eye(2), atol=1e-3, rtol=0)
    distances = {}
    for name, features in (("plain", PointFeatures()), ("whitened", PointFeatures(whitening=whitening))):
        of_data = features(data, torch.Generator())
        for samples in (like_data, noisy):
            groups = features(samples, torch.Generator())
            distances[name, samples is noisy] = float(
                energy_distance(groups, of_data, [mean_distance(x) for x in of_data])
            )
    assert abs(distances["plain", False]) < 0.003
    assert abs(distances["whitened", False]) < 0.006
    assert distances["plain", True] < 0.03
    assert distances["whitened", True] > 0.3


def test_directions_without_variance_are_not_blown_up():
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 2)
    assert (x @ whiten(x)).std(dim=0).max() < 1.01
    assert whiten(x).abs().max() < 30
    torch.testing.assert_close(whiten(x[:, :1]).abs(), 1 / x[:, :1].std(dim=0, keepdim=True))
