"""`MLPModel`: its interface with diffusers, and its embedding against the paper's formula."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel
from ddpm_mlp_pipeline.models.mlp import FourierFeatures, PixelPosterior


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (2,)),
        ({"in_channels": 5, "embedding_dim": 8}, (5,)),
        ({"in_channels": 1, "sample_size": 28}, (1, 28, 28)),
        ({"in_channels": 3, "sample_size": (8, 12), "num_hidden_layers": 1, "pixel_posterior": True}, (3, 8, 12)),
    ],
)
def test_every_form_of_timestep_gives_the_same_prediction(config, shape):
    model, x = MLPModel(**config).eval(), torch.randn(4, *shape)
    with torch.no_grad():
        expected = model(x, 7).sample
        assert expected.shape == x.shape
        for timestep in (torch.tensor(7), torch.full((4,), 7), 7.0):
            torch.testing.assert_close(model(x, timestep).sample, expected)
        torch.testing.assert_close(model(x, 7, return_dict=False)[0], expected)
        mixed = model(x, torch.tensor([7, 8, 9, 7])).sample
        torch.testing.assert_close(mixed[[0, 3]], expected[[0, 3]])
        assert not torch.allclose(mixed[1], expected[1])


def test_coordinates_are_embedded_as_in_tancik_et_al():
    v = np.array([[0.3, -1.2], [2.0, 0.0]])
    frequencies = 0.16 * 100 ** (np.arange(4) / 3)  # geometric, from 0.16 to 16
    angles = v[:, :, None] * frequencies
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=2).reshape(2, -1)
    embedded = FourierFeatures(2, 8)(torch.from_numpy(v).float())
    np.testing.assert_allclose(embedded, expected, atol=1e-5)


def test_images_have_no_coordinate_embedding():
    assert MLPModel(1, 28, hidden_dim=16).proj_in.in_features == 28 * 28
    assert MLPModel(2, None, embedding_dim=32).proj_in.in_features == 2 * 32


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    model, x = MLPModel(3), torch.randn(5, 3)
    model.save_pretrained(tmp_path)
    again = MLPModel.from_pretrained(tmp_path)
    assert again.config.in_channels == 3
    torch.testing.assert_close(again(x, 3).sample, model(x, 3).sample)


def test_it_drops_into_the_stock_pipeline():
    model = MLPModel(1, 8)
    images = [
        cls(model, DDPMScheduler())(2, torch.Generator().manual_seed(0), 5, "np").images
        for cls in (DDPMPipeline, DDPMMLPPipeline)
    ]
    np.testing.assert_array_equal(*images)


def test_what_a_pixel_says_of_itself_is_bayes_rule():
    """Of pixels −1 and 1 with probabilities, the mean given x_t is that by the densities of x_t."""
    alpha_cumprod = DDPMScheduler().alphas_cumprod[300].item()
    posterior, x_t = PixelPosterior(4, 5), torch.linspace(-3, 3, 5)[None]
    p = torch.tensor([[0.1, 0.3, 0.5, 0.8, 0.99]])  # of a 1
    with torch.no_grad():
        posterior.of_timestep.bias[:5] = -50  # no pixel passes the gate
        posterior.of_timestep.bias[6] = math.log(math.sqrt(alpha_cumprod) / (1 - alpha_cumprod))
        output = torch.cat([torch.logit(p) / 2, torch.zeros(1, 5)], dim=1)
        found = posterior(x_t, output, torch.randn(1, 4))
    means = math.sqrt(alpha_cumprod) * torch.tensor([[1.0], [-1.0]])
    densities = torch.distributions.Normal(means, math.sqrt(1 - alpha_cumprod))
    up, down = densities.log_prob(x_t).exp() * torch.cat([p, 1 - p])
    torch.testing.assert_close(found[0], (up - down) / (up + down))


def test_an_image_network_runs_in_half_precision():
    model = MLPModel(1, 8, hidden_dim=16, pixel_posterior=True).to(torch.bfloat16)
    images = DDPMMLPPipeline(model, DDPMScheduler(prediction_type="sample"))(2, None, 3, "np").images
    assert np.isfinite(images).all()


def test_a_grey_pixel_passes_the_gate():
    posterior, x_t = PixelPosterior(4, 3), torch.tensor([[0.2, -0.4, 0.0]])
    output = torch.tensor([[5.0, 5.0, 5.0, 50.0, 50.0, 50.0]])
    torch.testing.assert_close(posterior(x_t, output, torch.zeros(1, 4)), x_t)


@pytest.mark.parametrize(
    "config",
    [
        {"embedding_dim": 7},
        {"embedding_dim": 2},
        {"hidden_dim": 0},
        {"in_channels": 0},
        {"num_hidden_layers": 0},
        {"pixel_posterior": True},
        {"pixel_posterior": True, "sample_size": 8, "out_channels": 4},
    ],
)
def test_impossible_sizes_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        MLPModel(**config)


def test_gradients_reach_every_parameter():
    model = MLPModel()
    model(torch.randn(8, 2), torch.arange(8)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
