"""The variational bound against closed forms, and against the stock scheduler's steps."""

import io
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from helpers import assert_one_line_error
from PIL import Image
from scipy import integrate, special, stats
from torch import nn

from ddpm_mlp_pipeline import (
    DDPMMLPPipeline,
    MLPModel,
    SmallUNet2DModel,
    TrainingArguments,
    export_bundle,
    pretrained,
    train,
)
from ddpm_mlp_pipeline.bound import VariationalBound, discretized_log_likelihood
from ddpm_mlp_pipeline.data.batches import TensorBatches
from ddpm_mlp_pipeline.data.images import ImageBatches
from ddpm_mlp_pipeline.data.points import load_points, to_array
from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError, DivergenceError
from ddpm_mlp_pipeline.judge.likelihood import variational_bound
from ddpm_mlp_pipeline.training.options import linear_log_snr

VARIANCE = torch.tensor([0.25, 4.0])  # of the data, per dimension


class BestNetwork(MLPModel):
    """The best prediction and `learned_range` variance for Gaussian data, in closed form."""

    def attach(self, scheduler):
        self.__dict__["bound"], self.__dict__["scheduler"] = VariationalBound(scheduler, discretized=False), scheduler
        return self

    def forward(self, sample, timestep, return_dict=True):
        bound, shape = self.bound, (-1, 1)
        alphas_cumprod = bound.alphas_cumprod[timestep].reshape(shape)
        of_x_t = alphas_cumprod * VARIANCE + 1 - alphas_cumprod  # variance of x_t
        x_0 = alphas_cumprod.sqrt() * VARIANCE / of_x_t * sample
        eps = (sample - alphas_cumprod.sqrt() * x_0) / (1 - alphas_cumprod).sqrt()
        v = alphas_cumprod.sqrt() * eps - (1 - alphas_cumprod).sqrt() * x_0
        prediction = {"epsilon": eps, "sample": x_0, "v_prediction": v}[self.scheduler.config.prediction_type]
        if bound.variance_type == "learned_range":
            variance_of_x_0 = VARIANCE * (1 - alphas_cumprod) / of_x_t  # given x_t
            smallest = bound.posterior_log_variance[timestep].reshape(shape)
            largest = bound.log_betas[timestep].reshape(shape)
            added = bound.share_of_x_0[timestep].reshape(shape) ** 2 * variance_of_x_0
            # At t = 0, the variance of x_0 given x_1 is best; elsewhere, the posterior's variance is added.
            best = torch.where(timestep.reshape(shape) == 0, added, smallest.exp() + added)
            prediction = torch.cat([prediction, 2 * (best.log() - smallest) / (largest - smallest) - 1], dim=1)
        return type("Output", (), {"sample": prediction})


def pipeline_of(scheduler):
    return DDPMMLPPipeline(BestNetwork(2).attach(scheduler), scheduler)


def closed_form(scheduler):
    """Return the bound of the best network, in bits. All distributions are Gaussian, so that each term's expectation
    depends only on the variance of x_0 given x_t."""
    betas = scheduler.betas.double().numpy()
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.concatenate([[1], alphas_cumprod[:-1]])
    total = 0.0
    for variance in VARIANCE.tolist():
        signal = alphas_cumprod[-1] * variance
        total += 0.5 * (signal - alphas_cumprod[-1] - math.log(1 - alphas_cumprod[-1]))
        for t in range(len(betas)):
            unexplained = variance * (1 - alphas_cumprod[t]) / (alphas_cumprod[t] * variance + 1 - alphas_cumprod[t])
            posterior = betas[t] * (1 - previous[t]) / (1 - alphas_cumprod[t])
            added = previous[t] * betas[t] ** 2 / (1 - alphas_cumprod[t]) ** 2 * unexplained
            sigma2 = {
                "fixed_small": posterior if t else betas[1] * (1 - previous[1]) / (1 - alphas_cumprod[1]),
                "fixed_large": betas[t],
                "learned_range": posterior + added,
            }[scheduler.config.variance_type]
            if t == 0:
                total += 0.5 * (math.log(2 * math.pi * sigma2) + unexplained / sigma2)
            else:
                total += 0.5 * ((posterior + added) / sigma2 - 1 + math.log(sigma2 / posterior))
    return total / math.log(2)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_gaussian_data_have_their_closed_form(variance_type, prediction_type):
    scheduler = DDPMScheduler(
        50,
        trained_betas=linear_log_snr(50),
        variance_type=variance_type,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    x_0 = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) * VARIANCE.sqrt()
    x_0 = (x_0 - x_0.mean(dim=0)) / x_0.std(dim=0) * VARIANCE.sqrt()  # sets the empirical variances to VARIANCE
    estimate = variational_bound(pipeline_of(scheduler), TensorBatches(x_0), batch_size=20_000)
    expected = closed_form(scheduler)
    assert estimate.total == pytest.approx(expected, rel=0.01)
    assert abs(estimate.total - expected) < 4 * estimate.standard_error
    entropy = sum(stats.norm(scale=math.sqrt(variance)).entropy() for variance in VARIANCE.tolist()) / math.log(2)
    assert estimate.total > entropy
    if variance_type != "fixed_small":  # fixed_small is best for data of a single point
        assert estimate.total < entropy + 1


def test_the_last_term_is_its_closed_form():
    """The divergence of two Gaussians, by numerical integration."""
    bound = VariationalBound(DDPMScheduler(10), discretized=False)
    x_0 = torch.tensor([[-0.3, 1.7]])
    alpha_cumprod = float(bound.alphas_cumprod[-1])
    expected = 0.0
    for x in x_0[0].double().tolist():
        q = stats.norm(math.sqrt(alpha_cumprod) * x, math.sqrt(1 - alpha_cumprod))
        p = stats.norm()
        expected += integrate.quad(lambda y: q.pdf(y) * (q.logpdf(y) - p.logpdf(y)) / math.log(2), -8, 8)[0]  # noqa: B023
    assert bound.prior_term(x_0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_mean_and_variance_are_those_of_the_stock_step(variance_type, prediction_type):
    # β is large enough for float32 to keep its digits in 1 − α.
    options = {"beta_start": 0.01, "variance_type": variance_type, "prediction_type": prediction_type}
    scheduler = DDPMScheduler(100, **options, clip_sample_range=0.8)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 1, 3, 3, generator=generator)
    model_output = torch.randn(2, 2 if variance_type == "learned_range" else 1, 3, 3, generator=generator).clamp(-1, 1)
    bound = VariationalBound(scheduler, discretized=True)
    for t in (1, 40, 99):
        timesteps = torch.full((2,), t)
        _, log_variance = bound.predict(model_output, x_t, timesteps)
        step = scheduler.step(model_output, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1))
        expected = bound.mean(model_output, x_t, timesteps) + (0.5 * log_variance).exp() * noise
        torch.testing.assert_close(step.double(), expected, atol=2e-5, rtol=1e-4)


def test_the_discretised_decoder_is_a_distribution_over_the_levels():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in ((0.1, 0.05), (-1.2, 0.02), (0.999, 1e-4), (0.0, 3.0), (2e6, 1.0), (-2e6, 1.0)):
        log_likelihood = discretized_log_likelihood(
            levels, torch.tensor(mean).double().expand(256), torch.tensor(2 * math.log(scale)).double().expand(256)
        )
        assert log_likelihood.exp().sum().item() == pytest.approx(1)
        assert log_likelihood.isfinite().all()
    gaussian = stats.norm(0.1, 0.05)
    expected = gaussian.cdf(100 / 127.5 - 1 + 1 / 255) - gaussian.cdf(100 / 127.5 - 1 - 1 / 255)
    assert discretized_log_likelihood(
        levels[100], torch.tensor(0.1).double(), torch.tensor(2 * math.log(0.05)).double()
    ).item() == pytest.approx(math.log(expected))


class Images(nn.Module):
    """A small untrained network, and random 8-bit images for it."""

    def __new__(cls):
        torch.manual_seed(0)
        unet = UNet2DModel(
            8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
        return unet.eval(), torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_an_untrained_network_is_worse_than_a_gaussian(variance_type):
    unet, images = Images()
    pipeline = DDPMMLPPipeline(unet, DDPMScheduler(20, variance_type=variance_type))
    estimate = variational_bound(pipeline, ImageBatches(images))
    assert math.isfinite(estimate.total)
    assert estimate.gain < 0
    assert estimate.terms.sum() == pytest.approx(estimate.total, rel=1e-12)
    assert estimate.terms.shape == (21,)
    assert (estimate.terms >= 0).all()  # divergences, and a discrete decoder
    assert estimate.bits_per_dim == estimate.total / 64


def test_strides_estimate_the_same():
    scheduler = DDPMScheduler(50, trained_betas=linear_log_snr(50), clip_sample=False, variance_type="fixed_large")
    x_0 = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) * VARIANCE.sqrt()
    whole = variational_bound(pipeline_of(scheduler), TensorBatches(x_0))
    part = variational_bound(pipeline_of(scheduler), TensorBatches(x_0), timestep_stride=10)
    assert len(part.totals) == 2000
    assert part.standard_error > whole.standard_error
    assert abs(part.total - whole.total) < 3 * part.standard_error
    assert part.terms.sum() == pytest.approx(part.total, rel=1e-12)


def test_an_interrupted_estimate_goes_on(tmp_path):
    unet, images = Images()
    pipeline = DDPMMLPPipeline(unet, DDPMScheduler(10))
    whole = variational_bound(pipeline, ImageBatches(images), batch_size=4)

    class Broken(ImageBatches):
        def __getitems__(self, indices):
            if len(indices) == 4 and indices[0] >= 8:
                raise KeyboardInterrupt
            return super().__getitems__(indices)

    state = tmp_path / "state.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpm_mlp_pipeline.judge.likelihood.SECONDS_BETWEEN_SAVES", 0)
        with pytest.raises(KeyboardInterrupt):
            variational_bound(pipeline, Broken(images), batch_size=4, state_path=state)

    class Rest(ImageBatches):
        def __getitems__(self, indices):
            assert indices[0] >= 8 or len(indices) == 2  # the two samples that identify the data
            return super().__getitems__(indices)

    resumed = variational_bound(pipeline, Rest(images), batch_size=4, state_path=state)
    np.testing.assert_array_equal(resumed.totals, whole.totals)
    np.testing.assert_allclose(resumed.terms, whole.terms, rtol=1e-12)
    with pytest.raises(ConfigurationError, match="another estimate"):
        variational_bound(pipeline, ImageBatches(images), batch_size=4, seed=1, state_path=state)
    with pytest.raises(ConfigurationError, match="another estimate"):  # other data
        variational_bound(pipeline, ImageBatches(images.flip(0)), batch_size=4, state_path=state)
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (b"PK", b"", array.getvalue()):
        state.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"state\.npz is not the state"):
            variational_bound(pipeline, ImageBatches(images), batch_size=4, state_path=state)


def test_what_has_no_bound_is_refused():
    unet, images = Images()
    for scheduler, message in (
        (DDIMScheduler(), "DDIMScheduler doesn't define"),
        (DDPMScheduler(variance_type="learned"), "not learned"),
        (DDPMScheduler(thresholding=True), "thresholding"),
        (DDPMScheduler(1), "at least 2 timesteps"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            variational_bound(DDPMMLPPipeline(unet, scheduler), ImageBatches(images))
    pipeline = DDPMMLPPipeline(unet, DDPMScheduler(10))
    with pytest.raises(ConfigurationError, match="10, and samples, 12; got 3"):
        variational_bound(pipeline, ImageBatches(images), timestep_stride=3)
    with pytest.raises(ConfigurationError, match="batch_size must be at least timestep_stride"):
        variational_bound(pipeline, ImageBatches(images), timestep_stride=2, batch_size=1)
    with pytest.raises(DatasetError, match=r"\(1, 8, 4\), but the network takes \(1, 8, 8\)"):
        variational_bound(pipeline, ImageBatches(images[..., :4]))
    with pytest.raises(DatasetError, match="8 bits"):
        variational_bound(pipeline, TensorBatches(torch.rand(3, 1, 8, 8)))
    with pytest.raises(DatasetError, match="8 bits"):
        variational_bound(pipeline, TensorBatches(images.float()))
    points = torch.zeros(5, 2)
    points[3, 1] = math.nan
    with pytest.raises(DatasetError, match="sample 3 of the data is not finite"):
        variational_bound(DDPMMLPPipeline(MLPModel(2), DDPMScheduler(10)), TensorBatches(points))
    network = MLPModel(2)
    nn.init.constant_(network.proj_out.bias, math.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        variational_bound(DDPMMLPPipeline(network, DDPMScheduler(10)), TensorBatches(torch.zeros(5, 2)))


def test_trained_on_the_bound_it_beats_a_gaussian_by_as_much_as_in_the_paper(run_forked, tmp_path):
    """Sohl-Dickstein et al. 2015, table 1: K is 2.35 bits for their swiss roll, K − L_null 6.45."""
    argv = ("--dataset", "swiss_roll", "--dataset_noise", 0.001, "--num_samples", 4000, "--batch_size", 4000)
    outputs = ("--output", tmp_path / "bound.json", "--figure", tmp_path / "bound.png")
    result = run_forked("bound", pretrained("swiss_roll_2015"), *argv, *outputs)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bound.json").read_text())
    assert report["gain"] - 2 * report["gain_standard_error"] > 6.45
    assert sum(report["terms"]) == pytest.approx(report["bound"], rel=1e-9)
    assert result.stdout.splitlines()[-1].split()[:4] == ["K", "−", "L_null", f"{report['gain']:.4f}"]
    assert {path.name for path in tmp_path.glob("bound*")} == {"bound.json", "bound.png"}
    assert report["gain"] < perfect_gain(0.001)


def perfect_gain(noise):
    """Return the gain, in bits, of the swiss roll's true density, an integral along the spiral."""
    points, many = (to_array(load_points("swiss_roll", number, noise, seed=1)) for number in (1000, 100_000))
    theta = 1.5 * np.pi * (1 + 2 * (np.arange(20_000) + 0.5) / 20_000)
    curve = (theta / (4.5 * np.pi))[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=1)
    exponents = [-((point - curve) ** 2).sum(axis=1) / (2 * noise**2) for point in points]
    log_density = special.logsumexp(exponents, axis=1) - np.log(20_000 * 2 * np.pi * noise**2)
    normalised = (points - many.mean(axis=0)) / many.std(axis=0)
    log_gaussian = -np.log(2 * np.pi) - (normalised**2).sum(axis=1) / 2
    return (log_density + np.log(many.std(axis=0)).sum() - log_gaussian).mean() / np.log(2)


def test_a_perfect_model_gains_what_the_results_say():
    assert perfect_gain(0.03) == pytest.approx(2.35, abs=0.1)
    assert perfect_gain(0.001) == pytest.approx(7.26, abs=0.1)


def test_a_learned_variance_is_sampled_by_ddpm_and_left_out_by_others(tmp_path):
    pipeline = DDPMMLPPipeline.from_pretrained(pretrained("swiss_roll_2015"))
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    theta = np.linspace(1.5 * np.pi, 4.5 * np.pi, 3000)
    curve = (theta / (4.5 * np.pi))[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=1)
    for cls in (DDPMScheduler, DDIMScheduler):
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
        points = pipeline(latents=latents, batch_size=500, generator=torch.Generator().manual_seed(0)).points
        distance = np.linalg.norm(points[:, None] - curve, axis=2).min(axis=1)
        assert np.median(distance) < 0.01
    report = export_bundle(pretrained("swiss_roll_2015"), tmp_path / "bundle")
    assert report.parity.ok
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["provenance"]["num_inference_steps"] == 40


def test_images_are_trained_on_the_bound_with_their_variance(tmp_path):
    """A few steps lower the bound."""
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        ddpm_num_steps=20,
        ddpm_beta_schedule="linear_log_snr",
        variance_type="learned_range",
        loss_type="bound",
        train_batch_size=32,
        max_train_steps=60,
        lr_warmup_steps=1,
        learning_rate=3e-3,
        use_ema=False,
        report_to="none",
    )
    unet = SmallUNet2DModel(8, 1, out_channels=2, block_out_channels=(8, 16), attention=False)
    pipeline = DDPMMLPPipeline(unet, args.make_scheduler(1.0))
    images = (torch.rand(64, 1, 1, 1) * 255).to(torch.uint8).expand(64, 1, 8, 8)
    before = variational_bound(pipeline, ImageBatches(images))
    train(pipeline, ImageBatches(images), args)
    pipeline = DDPMMLPPipeline.from_pretrained(tmp_path)
    after = variational_bound(pipeline, ImageBatches(images))
    assert after.bits_per_dim < 0.85 * before.bits_per_dim
    assert pipeline(2, output_type="np").images.shape == (2, 8, 8, 1)


def test_wrong_bounds_end_in_one_line(run_forked, tmp_path):
    heart = pretrained("heart")
    cases = [
        ((heart, "--dataset", "hart"), ["unknown data set 'hart'"]),
        ((heart, "--dataset", "heart", "--timestep_stride", 7), ["timestep_stride must divide", "1000"]),
        ((heart, "--dataset", "heart", "--variance_type", "learned_range"), ["twice as many channels"]),
        ((heart, "--dataset", "heart", "--figure", tmp_path / "a.jpg"), ["must end in .png"]),
        ((heart, "--dataset", "heart", "--figure", tmp_path / "none" / "a.png"), ["none", "no such folder"]),
        ((tmp_path, "--dataset", "heart"), ["no model_index.json"]),
    ]
    for argv, fragments in cases:
        assert_one_line_error(run_forked("bound", *argv), *fragments)


def test_the_drift_is_drawn(run_forked, tmp_path):
    argv = ("--dataset", "swiss_roll", "--num_samples", 100, "--output", tmp_path / "drift.png")
    assert run_forked("plot", "drift", pretrained("swiss_roll_2015"), *argv).returncode == 0
    with Image.open(tmp_path / "drift.png") as image:
        assert image.size == (800, 800)
    assert run_forked("plot", "drift", pretrained("swiss_roll"), *argv, "--overwrite").returncode == 0  # with tables
    assert_one_line_error(run_forked("plot", "drift", pretrained("mnist"), *argv, "--overwrite"), "two coordinates")
