"""Labels, conditions, guidance and known values, against closed forms and from one backend to the next."""

import itertools
import json
import math

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from helpers import assert_one_line_error, random_weights
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, pretrained
from ddpm_mlp_pipeline.data.batches import Batch, TensorBatches
from ddpm_mlp_pipeline.data.points import load_points
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export import exporter
from ddpm_mlp_pipeline.export.compile import compile_scheduler
from ddpm_mlp_pipeline.export.sampler_graph import build_sampler
from ddpm_mlp_pipeline.figures import plot_what_was_asked
from ddpm_mlp_pipeline.judge.likelihood import variational_bound
from ddpm_mlp_pipeline.models.mlp import MLPModel
from ddpm_mlp_pipeline.models.unet import SmallUNet2DModel
from ddpm_mlp_pipeline.runtime.bundle import seal
from ddpm_mlp_pipeline.runtime.noise import draw_labels
from ddpm_mlp_pipeline.runtime.sampler import OnnxSampler
from ddpm_mlp_pipeline.sample_noise import SampleNoise

COVARIANCE = np.array([[1.0, 0.9, 0.3], [0.9, 1.0, 0.5], [0.3, 0.5, 1.0]])
A = np.array([0.5, -1.0, 2.0])  # the mean is A c
SHIFTS = np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])  # of the classes
SCHEDULERS = {
    "ddpm": (DDPMScheduler, 12, {}),
    "ddim": (DDIMScheduler, 10, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, 10, {}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, 10, {"algorithm_type": "sde-dpmsolver++"}),
}


class GaussianNetwork(ModelMixin, ConfigMixin):
    """The exact ε of x_0 ~ N(A c + shift of the class, COVARIANCE); without a class or a condition, of their zeros."""

    @register_to_config
    def __init__(self, num_class_embeds: int = 2, condition_dim: int = 1, in_channels: int = 3, sample_size=None):
        super().__init__()
        variances, axes = np.linalg.eigh(COVARIANCE)
        alphas_cumprod = DDPMScheduler().alphas_cumprod
        for name, values in {"variances": variances, "axes": axes, "A": A}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.register_buffer("alphas_cumprod", alphas_cumprod)
        self.class_embedding = torch.nn.Embedding(3, 3)
        self.class_embedding.weight.data = torch.tensor(np.append(SHIFTS, np.zeros((1, 3)), axis=0)).float()

    def forward(self, sample, timestep, class_labels=None, condition=None, return_dict=True):
        alpha_cumprod = self.alphas_cumprod[torch.as_tensor(timestep).long().reshape(-1)][:, None]
        mean = torch.zeros_like(sample) if class_labels is None else self.class_embedding(class_labels)
        if condition is not None:
            mean = mean + torch.where(condition.isnan(), 0.0, condition) * self.A
        centred = (sample - alpha_cumprod.sqrt() * mean) @ self.axes
        variance = alpha_cumprod * self.variances + 1 - alpha_cumprod
        eps = (1 - alpha_cumprod).sqrt() * (centred / variance) @ self.axes.T
        return UNet2DOutput(sample=eps) if return_dict else (eps,)


def make_pipeline(scheduler="ddpm", class_shares=None, **options):
    cls, _, own = SCHEDULERS[scheduler]
    stock = DDPMScheduler(clip_sample=False, **options)
    # Without units of its own, so that the network's are the data's
    pipeline = DDPMMLPPipeline(
        GaussianNetwork(),
        cls.from_config(stock.config, **own),
        class_names=["a", "b"],
        condition_columns=["c"],
        class_shares=class_shares,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_bundle(pipeline, folder, num_inference_steps):
    folder.mkdir()
    exporter.export_network(pipeline, folder / "unet.onnx")
    table = compile_scheduler(pipeline.scheduler, num_inference_steps)
    exporter._write_table(folder, table, exporter._describe(pipeline, folder, num_inference_steps, "fp32"))
    seal(folder)
    return OnnxSampler(folder, num_threads=1)


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """Many small steps, whose variance is exact for data of variance 1."""
    return make_bundle(make_pipeline(variance_type="fixed_large"), tmp_path_factory.mktemp("fine") / "bundle", 250)


@pytest.mark.parametrize(("label", "c"), [("a", 0.0), ("b", 0.5), ("a", -1.5), ("b", 2.0)])
def test_samples_follow_label_and_condition(fine, label, c):
    number = 4000
    samples = fine.sample(number, seed=1, class_labels=label, condition={"c": c})
    expected = A * c + SHIFTS["ab".index(label)]
    np.testing.assert_allclose(samples.mean(axis=0), expected, atol=3.5 / number**0.5 + 0.01)
    np.testing.assert_allclose(np.cov(samples.T), COVARIANCE, atol=0.08)


SHARES = [0.2, 0.8]
NULL = 2


def test_labels_are_drawn_where_nothing_is_asked(tmp_path):
    drawing, plain = (
        make_bundle(make_pipeline("ddim", shares), tmp_path / str(shares), 10) for shares in (SHARES, None)
    )
    number, seed = 4000, 3
    samples = drawing.sample(number, seed)
    np.testing.assert_allclose(samples.mean(axis=0), SHARES @ SHIFTS, atol=3.5 / number**0.5 + 0.01)
    number = 20
    labels = draw_labels(seed, range(number), SHARES)
    assert set(labels) == {0, 1}
    for asked in ({}, {"guidance_scale": 2.0}):
        expected = plain.sample(number, seed, class_labels=labels, **asked)
        for batch_size in (7, 512):
            np.testing.assert_allclose(drawing.sample(number, seed, batch_size, **asked), expected, atol=1e-5)
        *_, last = drawing.steps(number, seed, **asked)
        np.testing.assert_allclose(last.sample, expected, atol=1e-5)
    # Otherwise the null label stands.
    for asked in ({"condition": [0.5]}, {"known": {"x0": 1.0}}, {"class_labels": NULL}):
        expected = plain.sample(number, seed, **asked)
        np.testing.assert_array_equal(drawing.sample(number, seed, **asked), expected)
        np.testing.assert_array_equal(drawing.sample(number, seed, **{**asked, "class_labels": NULL}), expected)
    np.testing.assert_array_equal(drawing.predict(samples[:3], 500), plain.predict(samples[:3], 500))


def test_torch_draws_labels_where_nothing_is_asked():
    pipeline = make_pipeline("ddim", SHARES)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda unet, x, told: seen.append(told["class_labels"]), with_kwargs=True)

    def draw(number, generator, **asked):
        seen.clear()
        points = pipeline(number, generator, 3, **asked).points
        return points, seen[0]

    def generators(samples):
        return [torch.Generator().manual_seed(i) for i in samples]

    _, labels = draw(10_000, torch.Generator().manual_seed(0))
    assert abs(labels.double().mean() - SHARES[1]) < 4 * (SHARES[0] * SHARES[1] / 10_000) ** 0.5
    points, labels = draw(12, generators(range(12)))
    assert set(labels.tolist()) == {0, 1}
    parts = [draw(len(part), generators(part)) for part in (range(5), range(5, 6), range(6, 12))]
    np.testing.assert_allclose(np.concatenate([part for part, _ in parts]), points, atol=1e-5)
    assert torch.cat([part for _, part in parts]).tolist() == labels.tolist()
    assert draw(12, generators(range(12)), latents=torch.zeros(12, 3))[1].tolist() == labels.tolist()
    for asked in ({"condition": [0.5]}, {"known": {"x0": 1.0}}, {"class_labels": NULL}):
        assert draw(12, generators(range(12)), **asked)[1].tolist() == [NULL] * 12
    pipeline.register_to_config(class_shares=None)
    points, labels = draw(12, torch.Generator().manual_seed(1))
    assert labels.tolist() == [NULL] * 12
    np.testing.assert_array_equal(draw(12, torch.Generator().manual_seed(1), class_labels=NULL)[0], points)
    pipeline.register_to_config(class_shares=[1.0])
    with pytest.raises(ValueError, match="class_shares must hold 2 numbers, got 1"):
        draw(1, None)


def test_known_columns_leave_the_conditional_distribution(fine):
    known = {"x0": 1.5}
    gain = COVARIANCE[1:, 0] / COVARIANCE[0, 0]
    covariance = COVARIANCE[1:, 1:] - np.outer(gain, COVARIANCE[0, 1:])
    samples = fine.sample(2000, seed=2, known=known, resample=20)
    assert (samples[:, 0] == 1.5).all()
    np.testing.assert_allclose(samples[:, 1:].mean(axis=0), gain * 1.5, atol=0.06)
    np.testing.assert_allclose(np.cov(samples[:, 1:].T), covariance, atol=0.08)
    # Without resampling, the drawn part hardly heeds the known one: that is RePaint's reason to resample.
    once = fine.sample(2000, seed=2, known=known)
    assert once[:, 1].mean() < gain[0] * 1.5 - 0.2


def test_the_bound_given_the_condition_is_the_conditional_entropy():
    rng = np.random.default_rng(0)
    labels, c = rng.integers(2, size=2000), rng.standard_normal((2000, 1))
    x_0 = c * A + SHIFTS[labels] + rng.multivariate_normal(np.zeros(3), COVARIANCE, 2000)
    data = TensorBatches(*(torch.tensor(values) for values in (x_0.astype("f4"), labels, c.astype("f4"))))
    estimate = variational_bound(make_pipeline(variance_type="fixed_large"), data, timestep_stride=10)
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * COVARIANCE)[1]
    assert abs(estimate.total * math.log(2) - entropy) / 3 < 0.05 + 3 * estimate.standard_error / 3
    without = variational_bound(
        make_pipeline(variance_type="fixed_large"), TensorBatches(data.samples), timestep_stride=10
    )
    assert without.total > estimate.total + 1


def draw_with_torch(pipeline, number, steps, seed, **asked):
    """Draw with the pipeline and its stock scheduler on the runtime's noise."""
    with SampleNoise(seed, range(number)) as noise:
        latents = noise.latents((number, *pipeline.sample_shape))
        call = {"latents": latents, "callback_on_step_end": noise.next_step, **asked}
        return pipeline(number, noise, steps, "np", return_dict=False, **call)[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_torch_runtime_and_graph_draw_the_same(scheduler, tmp_path):
    number, seed, steps = 6, 2**40 + 3, SCHEDULERS[scheduler][1]
    pipeline = make_pipeline(scheduler)
    runtime = make_bundle(pipeline, tmp_path / "bundle", steps)
    graph = onnxruntime.InferenceSession(
        build_sampler(tmp_path / "bundle", takes_known=True).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    y, nothing = np.array([0.3, np.nan, np.nan]), np.zeros((number, 3), dtype=np.float32)
    cases = itertools.product([None, "b", [0, 1, 0, 1, 0, 1]], [None, [0.7]], [1.0, 2.5], [None, y])
    for labels, condition, scale, known in cases:
        asked = {"class_labels": labels, "condition": condition, "guidance_scale": scale, "known": known}
        expected = draw_with_torch(pipeline, number, steps, seed, **asked)
        np.testing.assert_allclose(runtime.sample(number, seed, **asked), expected, atol=2e-5)
        feeds = {
            "seed": np.array(seed),
            "num_samples": np.array(number),
            "class_labels": np.full(number, {None: 2, "b": 1}[labels])
            if not isinstance(labels, list)
            else np.array(labels),
            "condition": np.full((number, 1), np.nan if condition is None else condition[0], dtype=np.float32),
            "guidance_scale": np.array(scale, dtype=np.float32),
            "known": nothing if known is None else np.tile(known.astype(np.float32), (number, 1)),
            "mask": nothing if known is None else np.tile([1, 0, 0], (number, 1)).astype(np.float32),
        }
        np.testing.assert_allclose(graph.run(None, feeds)[0], expected, atol=2e-5)


def test_guidance_holds_in_its_interval_alone(fine):
    first = fine.table.guided(3.0, (800, 200))
    is_inside = (fine.table.timesteps <= 800) & (fine.table.timesteps >= 200)
    np.testing.assert_array_equal(first.is_guided, is_inside)
    plain, guided, interval = (
        fine.sample(50, class_labels="b", guidance_scale=scale, guidance_interval=between)
        for scale, between in ((1.0, None), (3.0, None), (3.0, (800, 200)))
    )
    assert plain[:, 0].mean() < interval[:, 0].mean() < guided[:, 0].mean()


def test_a_sample_has_the_same_noise_whatever_is_asked(fine):
    # Of these Gaussians the class shifts the samples, and no more.
    a, b = (fine.sample(20, seed=3, class_labels=label) for label in "ab")
    np.testing.assert_allclose(b - a, np.broadcast_to(SHIFTS[1], a.shape), atol=1e-2)
    parts = [fine.sample(20, seed=3, batch_size=size, class_labels=[0, 1] * 10, condition=[1.0]) for size in (3, 20)]
    np.testing.assert_allclose(*parts, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"class_labels": "z"}, "no class 'z'"),
        ({"class_labels": 3}, "from 0 to 1"),
        ({"class_labels": 0.5}, "from 0 to 1"),
        ({"class_labels": [0, 1, 0]}, "must be one, or 5"),
        ({"condition": {"d": 1.0}}, "no column 'd'|no 'd'"),
        ({"condition": {}}, "lacks 'c'"),
        ({"condition": [1.0, 2.0]}, "condition must hold finite numbers"),
        ({"condition": [math.nan]}, "condition must hold finite numbers"),
        ({"guidance_scale": math.inf}, "finite"),
        ({"known": [1.0, 2.0]}, "known must have the shape"),
        ({"known": {"x9": 1.0}}, "'x9'"),
        ({"known": [math.inf, 0.0, 0.0]}, "known values must be finite"),
        ({"known": [1.0, 2.0, 3.0], "mask": [1, 0]}, "mask"),
        ({"mask": [1, 0, 0]}, "a mask needs known values"),
        ({"resample": 0}, "resample"),
    ],
)
def test_what_can_not_be_asked_for(fine, asked, message):
    with pytest.raises(ConfigurationError, match=message):
        fine.sample(5, **asked)
    with pytest.raises(ValueError, match=message):
        make_pipeline()(5, **asked)


def test_networks_without_labels_say_so(tmp_path):
    pipeline = DDPMMLPPipeline(MLPModel(), DDPMScheduler())
    sampler = make_bundle(pipeline, tmp_path / "bundle", 4)
    for asked in ({"class_labels": 0}, {"condition": [1.0]}, {"guidance_scale": 2.0}):
        with pytest.raises(ConfigurationError, match=next(iter(asked))):
            sampler.sample(2, **asked)
        with pytest.raises(ValueError, match=next(iter(asked))):
            pipeline(2, **asked)


def stock_network():
    torch.manual_seed(0)
    return UNet2DModel(
        8,
        1,
        1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=4,
        add_attention=False,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )


def test_a_stock_checkpoint_gets_its_null_label_from_the_command(run_forked, tmp_path):
    unet, checkpoint, bundle = stock_network(), tmp_path / "stock", tmp_path / "bundle"
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(checkpoint)
    export = ("export", checkpoint, bundle, "--scheduler", "ddim", "--num_inference_steps", 5)
    assert_one_line_error(run_forked(*export, "--guidance_interval", 900, 300), "needs a guidance_scale")
    for null_label in (4, -1):
        assert_one_line_error(run_forked(*export, "--null_label", null_label), "null_label", "4 labels")
        assert not bundle.exists()
    assert run_forked(*export, "--null_label", 3, "--guidance_scale", 1.5).returncode == 0
    sampler = OnnxSampler(bundle, num_threads=1)
    np.testing.assert_array_equal(
        sampler.sample(2, guidance_scale=1), sampler.sample(2, class_labels=3, guidance_scale=1)
    )
    named = DDPMMLPPipeline(unet, DDIMScheduler(), null_label=3)
    asked = {"class_labels": [1, 2], "guidance_scale": 1.5}
    expected = named(2, None, 5, "np", latents=torch.from_numpy(sampler._latents(range(2), 0)), **asked).images
    sample = ("sample", bundle, "--class_labels", 1, 2, "--num_samples", 1, "--output", tmp_path / "two.npy")
    assert run_forked(*sample).returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), expected, atol=1e-4)
    # Without it, the bundle can be asked for classes alone.
    assert run_forked(*export, "--overwrite").returncode == 0
    assert run_forked(*sample, "--overwrite").returncode == 0
    assert_one_line_error(run_forked(*sample, "--overwrite", "--guidance_scale", 2), "--null_label")
    assert_one_line_error(run_forked(*export, "--overwrite", "--guidance_scale", 2), "null label")
    heart = ("export", pretrained("heart"), tmp_path / "heart", "--null_label", 0)
    assert_one_line_error(run_forked(*heart), "null_label", "knows none")


def test_a_stock_network_needs_a_named_null_label(tmp_path):
    unet = stock_network()
    nameless = DDPMMLPPipeline(unet, DDIMScheduler())
    with pytest.raises(ValueError, match="needs class_labels"):
        nameless(1)
    with pytest.raises(ValueError, match="null label"):
        nameless(1, class_labels=1, guidance_scale=2.0)
    named = DDPMMLPPipeline(unet, DDIMScheduler(), null_label=3)
    named.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        c, null = (unet(latents, 900, class_labels=torch.tensor([i, i])).sample for i in (1, 3))
    seen = named._predict(
        latents,
        torch.tensor(900),
        {"class_labels": torch.tensor([1, 1])},
        {"class_labels": torch.tensor([3, 3])},
        guidance_scale=2.0,
    )
    torch.testing.assert_close(seen, 2 * c - null)
    sampler = make_bundle(named, tmp_path / "bundle", 5)
    expected = named(
        2,
        None,
        5,
        "np",
        latents=torch.from_numpy(sampler._latents(range(2), 0)),
        class_labels=[0, 2],
        guidance_scale=1.5,
    ).images
    np.testing.assert_allclose(sampler.sample(2, class_labels=[0, 2], guidance_scale=1.5), expected, atol=1e-4)


@pytest.mark.parametrize("network", [MLPModel, SmallUNet2DModel])
def test_none_is_a_state_of_the_network(network):
    size = {} if network is MLPModel else {"sample_size": 8, "block_out_channels": (16, 32)}
    unet = random_weights(network(num_class_embeds=3, condition_dim=2, **size))
    x = torch.randn(2, 2) if network is MLPModel else torch.randn(2, 1, 8, 8)
    labels, condition = torch.tensor([3, 3]), torch.full((2, 2), math.nan)
    nothing = unet(x, 5).sample
    torch.testing.assert_close(unet(x, 5, labels, condition).sample, nothing)
    mixed = unet(x, 5, torch.tensor([3, 1]), torch.tensor([[math.nan] * 2, [0.5, 1.0]])).sample
    torch.testing.assert_close(mixed[0], nothing[0])
    assert (mixed[1] - nothing[1]).abs().max() > 1e-3
    mixed.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())
    with pytest.raises(ValueError, match="num_class_embeds"):
        network(**size)(x, 5, labels)


def test_known_parts_of_images(tmp_path):
    torch.manual_seed(0)
    unet = SmallUNet2DModel(sample_size=8, block_out_channels=(16, 32), attention=False)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    pipeline = DDPMMLPPipeline(unet, DDIMScheduler())
    sampler = make_bundle(pipeline, tmp_path / "bundle", 5)
    known, mask = np.random.default_rng(0).uniform(size=(8, 8, 1)), np.zeros((8, 8), dtype=bool)
    mask[:, :4] = True
    for images in (
        sampler.sample(3, known=known, mask=mask, resample=2),
        pipeline(3, None, 5, "np", known=known, mask=mask, resample=2).images,
    ):
        np.testing.assert_allclose(images[:, :, :4], np.broadcast_to(known[:, :4], (3, 8, 4, 1)), atol=1e-6)
        assert np.ptp(images[:, :, 4:], axis=0).max() > 0.05
    for wrong in (mask[:5], mask[0]):
        with pytest.raises(ConfigurationError, match="8×8"):
            sampler.sample(1, known=known, mask=wrong)


def test_a_figure_shows_data_and_samples_of_the_same_conditions():
    c = torch.linspace(-3, 3, 200)[:, None]
    data = Batch(torch.zeros(200, 3), torch.arange(200) % 2, c)
    pipeline = make_pipeline(variance_type="fixed_large")
    shown, drawn = (axes.collections[0] for axes in plot_what_was_asked(pipeline, data).axes)
    for panel in (shown, drawn):
        np.testing.assert_array_equal(panel.get_array(), data.class_labels)
    rest = drawn.get_offsets() - c.numpy() * A[:2] - SHIFTS[data.class_labels][:, :2]
    np.testing.assert_allclose(rest.mean(axis=0), 0, atol=0.25)
    np.testing.assert_allclose(rest.std(axis=0), 1, atol=0.2)


def test_commands_draw_what_is_asked_for(run_forked, tmp_path):
    checkpoint, bundle = tmp_path / "moons", tmp_path / "bundle"
    trained = run_forked(
        *("train_points", "--dataset", "two_moons", "--label_column", "label", "--max_train_steps", 300),
        *("--output_dir", checkpoint, "--no-figures", "--report_to", "none"),
    )
    assert trained.returncode == 0, trained.stderr
    assert run_forked("export", checkpoint, bundle).returncode == 0
    shares = json.loads((bundle / "bundle.json").read_text())["class_shares"]
    names = load_points("two_moons", 100_000, label_column="label").to_pandas()["label"]
    assert shares == [(names == label).mean() for label in (0, 1)]  # lower, upper
    for source, more in ((bundle, ()), (checkpoint, ("--scheduler", "ddim", "--num_inference_steps", 5))):
        argv = ("sample", source, "--num_samples", 9, *more, "--output")
        for batch_size in (4, 9):
            output = (tmp_path / f"{batch_size}.npy", "--overwrite")
            assert run_forked(*argv, *output, "--batch_size", batch_size).returncode == 0
        np.testing.assert_allclose(np.load(tmp_path / "4.npy"), np.load(tmp_path / "9.npy"), atol=1e-5)
        if source == bundle:
            expected = OnnxSampler(bundle).sample(9, class_labels=draw_labels(0, range(9), shares))
            np.testing.assert_allclose(np.load(tmp_path / "9.npy"), expected, atol=1e-5)
    figure = ("--dataset", "two_moons", "--num_samples", 50, "--output", tmp_path / "moons.png")
    assert run_forked("plot", "samples", checkpoint, *figure).returncode == 0
    assert Image.open(tmp_path / "moons.png").width == 800
    asked = ("--class_labels", "upper", 0, "--num_samples", 3, "--guidance_scale", 2)
    assert run_forked("sample", bundle, *asked, "--output", tmp_path / "a.npy").returncode == 0
    expected = OnnxSampler(bundle).sample(6, class_labels=["upper"] * 3 + ["lower"] * 3, guidance_scale=2.0)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)

    (tmp_path / "known.csv").write_text("y,x\n,0.5\n0.25,\n")
    for source, more in ((bundle, ()), (checkpoint, ("--scheduler", "ddim", "--num_inference_steps", 5))):
        output = tmp_path / f"{source.name}.npy"
        asked = ("--known", tmp_path / "known.csv", "--resample", 2, "--num_samples", 2)
        result = run_forked("sample", source, *asked, "--output", output, *more)
        assert result.returncode == 0, result.stderr
        points = np.load(output)
        np.testing.assert_allclose(points[:2, 0], 0.5, atol=1e-6)
        np.testing.assert_allclose(points[2:, 1], 0.25, atol=1e-6)

    (tmp_path / "bad.csv").write_text("x,y\n1,two\n")
    for wrong in (["--class_labels", "left"], ["--known", tmp_path / "bad.csv"], ["--condition", "c=1"]):
        assert_one_line_error(run_forked("sample", bundle, *wrong, "--output", tmp_path / "no.npy"))
    assert not (tmp_path / "no.npy").exists()
