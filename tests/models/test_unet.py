"""`SmallUNet2DModel`: any size, any channels, and its interface with diffusers."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from helpers import random_weights

from ddpm_mlp_pipeline import DDPMMLPPipeline, SmallUNet2DModel
from ddpm_mlp_pipeline.training.options import ImageTrainingArguments
from ddpm_mlp_pipeline.training.pipelines import make_image_pipeline

SMALL = {"block_out_channels": (16, 32), "attention_head_dim": 8}


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("size", [(28, 28), (30, 45), (7, 1), (32, 32)])
def test_any_size_and_every_form_of_timestep(channels, size):
    model, x = random_weights(SmallUNet2DModel(size, channels, **SMALL)).eval(), torch.randn(3, channels, *size)
    with torch.no_grad():
        expected = model(x, 7).sample
        assert expected.shape == x.shape
        for timestep in (torch.tensor(7), torch.full((3,), 7), 7.0):
            torch.testing.assert_close(model(x, timestep).sample, expected)
        torch.testing.assert_close(model(x, 7, return_dict=False)[0], expected)
        assert not torch.allclose(model(x, 8).sample, expected)


@pytest.mark.parametrize(
    "config",
    [
        {"time_conditioning": "once"},
        {"skip_connections": "concat"},
        {"skip_connections": "concat", "layers_per_block": 2, "patch_size": 1},
        {"attention": False},
        {"layers_per_block": 2},
        {"block_out_channels": (16, 24, 32)},
        {"block_out_channels": (32,)},
        {"patch_size": 1},
        {"patch_size": 4},
        {"out_channels": 2},
    ],
)
def test_every_option_trains(config):
    model = SmallUNet2DModel(12, 1, **SMALL | config)
    eps = model(torch.randn(4, 1, 12, 12), torch.arange(4)).sample
    assert eps.shape == (4, config.get("out_channels", 1), 12, 12)
    eps.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_untrained_it_predicts_zero():
    """The loss of noise prediction then starts at 1, the variance of ε."""
    assert not SmallUNet2DModel(**SMALL)(torch.randn(2, 1, 28, 28), 5).sample.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norms_see_one_layout(dtype):
    """Channels last, as attention leaves them, torch takes ten times as long for them on a CPU in bfloat16."""
    args = ImageTrainingArguments(dataset_name="", output_dir="", block_out_channels="16,32")
    model, seen = make_image_pipeline(args, (1, 28, 28)).unet, []
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        model(torch.randn(2, 1, 28, 28), 5)
    assert len(seen) == 10
    assert all(seen)


def test_the_timestep_enters_where_the_option_says():
    every, once = (SmallUNet2DModel(**SMALL, time_conditioning=where) for where in ("every_block", "once"))
    names = [name for name, _ in every.named_parameters() if "time_emb_proj" in name]
    assert len(names) == 2 * 2 * 2  # weight and bias, in the down block and the up block, at two resolutions
    assert not [name for name, _ in once.named_parameters() if "time_emb_proj" in name]


def test_concatenated_skips_can_learn_to_be_added():
    """Untrained blocks are their shortcuts, and a shortcut of [I, I] adds both."""
    added, concatenated = (SmallUNet2DModel(**SMALL, skip_connections=how) for how in ("add", "concat"))
    torch.nn.init.normal_(added.conv_out.weight)
    torch.nn.init.normal_(added.mid_attention.to_out[0].weight)
    shapes = {name: weight.shape for name, weight in concatenated.state_dict().items()}
    same = {name: weight for name, weight in added.state_dict().items() if weight.shape == shapes[name]}
    assert concatenated.load_state_dict(same, strict=False).unexpected_keys == []
    x = torch.randn(2, 1, 28, 28)
    assert not torch.allclose(added(x, 3).sample, concatenated(x, 3).sample)
    for block, width in zip(concatenated.up_blocks, (32, 16), strict=True):
        block[0].conv_shortcut.weight.data = torch.eye(width).repeat(1, 2)[:, :, None, None]
        torch.nn.init.zeros_(block[0].conv_shortcut.bias)
    torch.testing.assert_close(added(x, 3).sample, concatenated(x, 3).sample)


def test_it_drops_into_the_stock_pipeline_and_is_saved_with_its_code(tmp_path):
    torch.manual_seed(0)
    model = random_weights(SmallUNet2DModel((9, 10), 3, **SMALL)).eval()
    ours = DDPMMLPPipeline(model, DDPMScheduler())
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "unet" / "unet.py").exists()
    images = [
        pipe(2, torch.Generator().manual_seed(0), 5, "np").images
        for pipe in (ours, DDPMPipeline(model, DDPMScheduler()), DDPMMLPPipeline.from_pretrained(tmp_path))
    ]
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_allclose(images[0], images[2], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"time_conditioning": "sometimes"}, "time_conditioning"),
        ({"skip_connections": "none"}, "skip_connections"),
        ({"block_out_channels": (12, 32)}, "norm_num_groups"),
        ({"block_out_channels": (16, 40), "attention_head_dim": 32}, "attention_head_dim"),
        ({"in_channels": 0}, "in_channels"),
    ],
)
def test_impossible_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SmallUNet2DModel(**config)
