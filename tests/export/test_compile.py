"""Compiled schedulers against the papers' formulas, and against the stock schedulers on a nonlinear network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_mlp_pipeline import DDPMMLPPipeline, compile_scheduler, export_bundle, pretrained
from ddpm_mlp_pipeline.errors import ConfigurationError, UnsupportedSchedulerError
from ddpm_mlp_pipeline.export.compile import make_scheduler
from ddpm_mlp_pipeline.export.exporter import export_network
from ddpm_mlp_pipeline.export.parity import compare
from ddpm_mlp_pipeline.export.schedulers import SCHEDULERS
from ddpm_mlp_pipeline.runtime.bundle import seal

TABLE_HEAD = """\
Every stock scheduler with its options, 10 steps: torch's pipeline with a known network of float32, against the bundle.

calls       of the network
back        over how many calls the table's rows look back
noise       in how many calls noise is drawn
exact       the table is the scheduler, up to rounding; or it is so, and the prediction of x_0 is clipped; or refused
difference  largest one of the final samples (of standard deviation 1), batches of 1, 3 and 8
amplified   how far torch's own samples move when the initial noise is moved by 1e-6

"""
SCHEDULES = ["linear", "squaredcos_cap_v2"]


@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("clip_sample", [True, False])
def test_ddpm_is_equation_7_of_ho_et_al(beta_schedule, clip_sample):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, clip_sample=clip_sample, clip_sample_range=2.0)
    table = compile_scheduler(scheduler, 1000)
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()[::-1]
    before = np.append(alphas_cumprod[1:], 1.0)
    alpha = alphas_cumprod / before
    beta = 1 - alpha
    of_x_0 = np.sqrt(before) * beta / (1 - alphas_cumprod)
    of_x = np.sqrt(alpha) * (1 - before) / (1 - alphas_cumprod)
    x_0 = np.stack([1 / np.sqrt(alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)], axis=1)
    noise = np.sqrt(beta * (1 - before) / (1 - alphas_cumprod))

    # The stock scheduler keeps alphas_cumprod in float32; 1 − ᾱ loses digits where ᾱ is near 1.
    np.testing.assert_array_equal(table.timesteps, np.arange(1000)[::-1])
    np.testing.assert_allclose(table.to_next[:, 0, 3], noise, rtol=1e-3)
    if clip_sample:
        np.testing.assert_allclose(table.to_x_0, x_0, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 0, 2], of_x_0, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 0, 0], of_x, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 0, 1], 0, atol=1e-9)
    else:
        np.testing.assert_allclose(table.to_next[:, 0, 0], of_x_0 * x_0[:, 0] + of_x, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 0, 1], of_x_0 * x_0[:, 1], rtol=1e-3)
    assert not table.is_stochastic[-1]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_is_equation_12_of_song_et_al(steps):
    scheduler = DDIMScheduler(clip_sample=True, set_alpha_to_one=True)
    table = compile_scheduler(scheduler, steps)
    timesteps = (np.arange(steps) * (1000 // steps))[::-1]
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    before = np.array([alphas_cumprod[t] if t >= 0 else 1.0 for t in timesteps - 1000 // steps])
    np.testing.assert_array_equal(table.timesteps, timesteps)
    np.testing.assert_allclose(table.to_next[:, 0, 2], np.sqrt(before), rtol=1e-5)
    np.testing.assert_allclose(table.to_next[:, 0, 1], np.sqrt(1 - before), rtol=1e-3, atol=1e-9)
    assert not table.to_next[:, 0, 0].any()
    assert not table.is_stochastic.any()


def test_dpm_solver_pp_2m_is_algorithm_2_of_lu_et_al():
    """DPM-Solver++(2M), Lu et al. 2022 (https://arxiv.org/abs/2211.01095): two predictions of x_0, extrapolated."""
    scheduler = DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    table = compile_scheduler(scheduler, 20)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double().numpy()
    alpha, sigma = 1 / np.sqrt(1 + sigmas**2), sigmas / np.sqrt(1 + sigmas**2)
    lam = np.log(alpha / sigma)
    k = 7
    h, h_before = lam[k + 1] - lam[k], lam[k] - lam[k - 1]
    of_d = -alpha[k + 1] * np.expm1(-h)
    of_x_0, of_x_0_before = of_d * (1 + h / h_before / 2), -of_d * h / h_before / 2
    x_0 = np.array([1 / alpha, -sigma / alpha])  # coefficients of x and ε
    expected = np.zeros((2, 4))
    expected[0, :2] = of_x_0 * x_0[:, k] + [sigma[k + 1] / sigma[k], 0]
    expected[1, :2] = of_x_0_before * x_0[:, k - 1]
    # x_k is a sum of x_k−1, ε_k−1 and earlier values, so that only one representation is left.
    np.testing.assert_allclose(table.to_next[k], expected, rtol=1e-3, atol=1e-5)
    assert table.history == 2


CASES = {
    "ddpm": [{}, {"clip_sample": True}, {"variance_type": "fixed_large"}, {"timestep_spacing": "trailing"}],
    "ddim": [{}, {"clip_sample": True}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False}],
    "ddim_inverse": [{}, {"clip_sample": True}],
    "pndm": [{}, {"skip_prk_steps": True}, {"timestep_spacing": "trailing"}],
    "ipndm": [{}],
    "lms": [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}],
    "euler": [
        {},
        {"use_karras_sigmas": True},
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"final_sigmas_type": "sigma_min"},
    ],
    "euler_ancestral": [{}, {"timestep_spacing": "trailing"}],
    "heun": [{}, {"use_karras_sigmas": True}, {"clip_sample": True}],
    "kdpm2": [{}, {"use_karras_sigmas": True}],
    "kdpm2_ancestral": [{}, {"use_karras_sigmas": True}],
    "dpmsolver_multistep": [
        {},
        {"algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"solver_order": 3},
        {"solver_order": 1},
        {"solver_type": "heun"},
        {"use_karras_sigmas": True},
        {"euler_at_final": True},
        {"final_sigmas_type": "sigma_min"},
    ],
    "dpmsolver_singlestep": [{}, {"solver_order": 3}, {"use_karras_sigmas": True}],
    "deis": [{}, {"solver_order": 3}, {"use_karras_sigmas": True}],
    "unipc": [
        {},
        {"solver_order": 3},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
    ],
    "sasolver": [{}, {"predictor_order": 3, "corrector_order": 3}],
    "lcm": [{}, {"clip_sample": True}],
    "tcd": [{}, {"clip_sample": True}],
}


NO_X_0_PREDICTION = {"pndm", "euler_ancestral", "kdpm2", "kdpm2_ancestral"}


class KnownNetwork(ModelMixin, ConfigMixin):
    """The best prediction for normal data, so that all samplers stay finite, with a bend that makes it nonlinear."""

    @register_to_config
    def __init__(self, prediction_type: str, in_channels: int = 2, sample_size: int | None = None, std: float = 0.5):
        super().__init__()
        self.bend = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, sample, timestep, return_dict=True):
        t = torch.as_tensor(timestep, dtype=torch.float32)
        alpha_cumprod = torch.exp(-(1e-4 * t + 1e-5 * t**2))  # close to the linear schedule's
        alpha, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod + 1e-4).sqrt()
        variance = alpha**2 * self.config.std**2 + sigma**2
        bend = self.bend * torch.tanh(2 * sample)
        x_0 = alpha * self.config.std**2 / variance * sample + sigma * bend
        eps = sigma / variance * sample - alpha * bend
        output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[
            self.config.prediction_type
        ]
        return UNet2DOutput(sample=output) if return_dict else (output,)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A pipeline and its bundle for each prediction type. The tests set the schedulers."""
    networks = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        bundle = tmp_path_factory.mktemp(kind) / "bundle"
        export_bundle(pretrained("heart"), bundle, "ddpm", 5)
        pipeline = DDPMMLPPipeline(KnownNetwork(kind), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        export_network(pipeline, bundle / "unet.onnx")
        networks[kind] = pipeline, bundle
    return networks


@pytest.fixture(scope="module")
def report():
    """The outcome of each case: `SCHEDULERS_TABLE=docs/schedulers.txt pytest tests/export/test_compile.py`"""
    rows = []
    yield rows
    if path := os.environ.get("SCHEDULERS_TABLE"):
        head = f"{'scheduler':22} {'options':64} {'calls':>5} {'back':>4} {'noise':>5} {'':>7} {'difference':>10}"
        Path(path).write_text(TABLE_HEAD + "\n".join([f"{head} amplified", *rows]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "options", "prediction_type"),
    [
        pytest.param(name, options, prediction_type, id=f"{prediction_type}-{name}-{options}")
        for prediction_type in ("epsilon", "v_prediction", "sample")
        for name, cases in CASES.items()
        for options in cases
        if name != "ipndm" or prediction_type == "epsilon"  # IPNDM has no prediction type
    ],
)
def test_a_table_gives_the_samples_of_the_stock_pipeline(name, options, prediction_type, report, networks):
    """Compare whole runs in float32: torch with the stock scheduler, and ONNX Runtime with the table."""
    if name != "ipndm":
        options = {"prediction_type": prediction_type} | options
    pipeline, bundle = networks[options.get("prediction_type", "epsilon")]
    pipeline.scheduler = make_scheduler(name, DDPMScheduler(clip_sample=False), **options)
    shown = f"{name:22} {', '.join(f'{key}={value}' for key, value in options.items()):64.64}"
    if name in NO_X_0_PREDICTION and prediction_type == "sample":
        with pytest.raises(ConfigurationError, match=type(pipeline.scheduler).__name__):
            compile_scheduler(pipeline.scheduler, 10)
        report.append(f"{shown} refused, as by diffusers")
        return
    if name == "ddim_inverse" and prediction_type == "sample":  # at t = 0, ε = (x − x_0) / 0
        with pytest.raises(UnsupportedSchedulerError, match=r"DDIMInverseScheduler .* by zero"):
            compile_scheduler(pipeline.scheduler, 10)
        report.append(f"{shown} refused: it divides by zero")
        return
    table = compile_scheduler(pipeline.scheduler, 10)
    table.save(bundle / "step_table.json")
    seal(bundle)
    comparison = compare(pipeline, bundle, 10, 1e-4)
    difference = max(steps[-1] for steps in comparison.differences.values())
    kind = "exact" if table.clip_range is None else "clipped"
    report.append(
        f"{shown} {len(table):>5} {table.history:>4} {table.is_stochastic.sum():>5} {kind:>7} {difference:>10.1e}"
        f"{max(comparison.amplifications.values()):>10.1e}"
    )
    assert difference < 1e-4


def test_eta_is_an_option_of_the_step():
    """DDIM with η = 1 is DDPM with the smaller variance (Song et al. 2021, section 4.1)."""
    config = {"clip_sample": False, "timestep_spacing": "trailing"}
    ddim = compile_scheduler(DDIMScheduler(**config), 1000, eta=1.0)
    ddpm = compile_scheduler(DDPMScheduler(**config), 1000)
    np.testing.assert_allclose(ddim.to_next, ddpm.to_next, rtol=1e-4, atol=1e-6)


def test_a_long_table_looks_back_as_little_as_a_short_one():
    assert compile_scheduler(DDPMScheduler(), 1000).history == 1
    assert compile_scheduler(DPMSolverMultistepScheduler(timestep_spacing="trailing"), 1000).history == 2
    assert compile_scheduler(UniPCMultistepScheduler(timestep_spacing="trailing"), 1000).history == 3


@pytest.mark.parametrize(
    ("scheduler", "steps", "reason"),
    [
        (DDPMScheduler(thresholding=True), 10, "DDPMScheduler with thresholding"),
        (DDPMScheduler(variance_type="learned"), 10, "DDPMScheduler with a learned variance"),
        (EDMEulerScheduler(), 10, "EDMEulerScheduler can't be compiled: it is not for DDPM networks"),
        (
            FlowMatchEulerDiscreteScheduler(),
            10,
            "FlowMatchEulerDiscreteScheduler can't be compiled: it is not for DDPM networks",
        ),
        # with this many evenly spaced steps, two are rounded to the same timestep
        (DPMSolverMultistepScheduler(), 1000, "its step at t = 500 divides by zero"),
    ],
)
def test_what_can_not_be_compiled_is_refused_by_name(scheduler, steps, reason):
    with pytest.raises(UnsupportedSchedulerError, match=reason):
        compile_scheduler(scheduler, steps)


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("lcm", 100, {}),  # it has at most 50
        ("ddim", 10, {"timestep_spacing": "magic"}),
        ("ddim", 10, {"prediction_type": "magic"}),
        ("ddim", 10, {"clip_sample_range": "wide"}),
        ("ddim", 10, {"clip_sample_range": 0}),
        ("deis", 10, {"solver_order": "magic"}),
        ("ddpm", 10, {"num_train_timesteps": "many"}),
    ],
)
def test_options_that_make_no_sense_are_refused(name, steps, options):
    like = DDPMScheduler(clip_sample_range=2.0)
    with pytest.raises(ConfigurationError, match=SCHEDULERS[name]):
        compile_scheduler(make_scheduler(name, like, **options), steps)


def test_compiling_leaves_torchs_random_numbers_alone():
    state = torch.get_rng_state()
    compile_scheduler(DDPMScheduler(), 5)
    assert torch.equal(state, torch.get_rng_state())


def test_a_scheduler_that_ignores_the_sample():
    """With a single step, IPNDM ends at 0."""
    assert not compile_scheduler(make_scheduler("ipndm", DDPMScheduler()), 1).to_next.any()


def test_unknown_schedulers_and_options_are_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"scheduler must be one of ddpm, .* got 'magic'"):
        make_scheduler("magic", DDPMScheduler())
    with pytest.raises(ConfigurationError, match="DDIMScheduler has no option magic"):
        make_scheduler("ddim", DDPMScheduler(), magic=True)
    with pytest.raises(ConfigurationError, match="DPMSolverMultistepScheduler: magic"):
        make_scheduler("dpmsolver_multistep", DDPMScheduler(), algorithm_type="magic")
    with pytest.raises(ConfigurationError, match=r"DDPMScheduler\.step has no option eta"):
        compile_scheduler(DDPMScheduler(), 10, eta=1.0)
    with pytest.raises(ConfigurationError, match="LCMScheduler can't take 100 steps with these options"):
        compile_scheduler(LCMScheduler(), 100)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ConfigurationError, match="from 1 to 1000"):
        compile_scheduler(DDPMScheduler(), steps)
