"""Compiled schedulers against the papers' formulas, and against the stock schedulers on a nonlinear network."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from ddpm_mlp_pipeline import compile_scheduler
from ddpm_mlp_pipeline.errors import ConfigurationError, UnsupportedSchedulerError

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
    np.testing.assert_allclose(table.to_next[:, 3], noise, rtol=1e-3)
    if clip_sample:
        np.testing.assert_allclose(table.to_x_0, x_0, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 2], of_x_0, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 0], of_x, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 1], 0, atol=1e-9)
    else:
        np.testing.assert_allclose(table.to_next[:, 0], of_x_0 * x_0[:, 0] + of_x, rtol=1e-3)
        np.testing.assert_allclose(table.to_next[:, 1], of_x_0 * x_0[:, 1], rtol=1e-3)
    assert not table.is_stochastic[-1]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_is_equation_12_of_song_et_al(steps):
    scheduler = DDIMScheduler(clip_sample=True, set_alpha_to_one=True)
    table = compile_scheduler(scheduler, steps)
    timesteps = (np.arange(steps) * (1000 // steps))[::-1]
    alphas_cumprod = scheduler.alphas_cumprod.double().numpy()
    before = np.array([alphas_cumprod[t] if t >= 0 else 1.0 for t in timesteps - 1000 // steps])
    np.testing.assert_array_equal(table.timesteps, timesteps)
    np.testing.assert_allclose(table.to_next[:, 2], np.sqrt(before), rtol=1e-5)
    np.testing.assert_allclose(table.to_next[:, 1], np.sqrt(1 - before), rtol=1e-3, atol=1e-9)
    assert not table.to_next[:, 0].any()
    assert not table.is_stochastic.any()


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "trailing"}])
def test_table_replays_the_scheduler_on_a_nonlinear_network(cls, beta_schedule, clip_sample, options):
    if beta_schedule == "squaredcos_cap_v2" and not clip_sample and options.get("timestep_spacing") == "trailing":
        pytest.skip("divides by √ᾱ_T = 5e-5 without clipping: no sampler makes sense of it")
    scheduler = cls(beta_schedule=beta_schedule, clip_sample=clip_sample, clip_sample_range=1.5, **options)
    table = compile_scheduler(scheduler, 10)
    scheduler.set_timesteps(10)
    generator, again = torch.Generator().manual_seed(0), torch.Generator()
    x = torch.randn(1, 100, generator=generator, dtype=torch.float64)
    mine = x.numpy()
    for k, t in enumerate(scheduler.timesteps):
        again.set_state(generator.get_state())
        x = scheduler.step(torch.tanh(x + float(t) / 1000), t, x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=again, dtype=torch.float64).numpy()
        rows = [mine, np.tanh(mine + float(t) / 1000)]
        x_0 = np.clip(np.tensordot(table.to_x_0[k], rows, 1), *((-1.5, 1.5) if clip_sample else (0, 0)))
        mine = np.tensordot(table.to_next[k], [*rows, x_0, z], 1)
        np.testing.assert_allclose(mine, x.numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DDPMScheduler(thresholding=True), "DDPMScheduler with thresholding"),
        (DDPMScheduler(variance_type="learned_range"), "DDPMScheduler with a learned variance"),
        (PNDMScheduler(), "PNDMScheduler can't be compiled"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler can't be compiled"),
    ],
)
def test_what_can_not_be_compiled_is_refused_by_name(scheduler, reason):
    with pytest.raises(UnsupportedSchedulerError, match=reason):
        compile_scheduler(scheduler, 10)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ConfigurationError, match="from 1 to 1000"):
        compile_scheduler(DDPMScheduler(), steps)
