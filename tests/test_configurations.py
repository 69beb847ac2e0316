"""Train any small configuration for two steps, save, load, export, and sample it with torch and with the bundle.

`CONFIGURATIONS=50 pytest tests/test_configurations.py` tries more configurations.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import Phase, given, settings, strategies as st

from ddpm_mlp_pipeline import (
    DDPMMLPPipeline,
    MLPModel,
    OnnxSampler,
    SmallUNet2DModel,
    TrainingArguments,
    export_bundle,
    load_checkpoint,
    train,
)
from ddpm_mlp_pipeline.data.batches import TensorBatches
from ddpm_mlp_pipeline.errors import ConfigurationError, DivergenceError, UnsupportedSchedulerError
from ddpm_mlp_pipeline.export.compile import make_scheduler

sizes = st.tuples(st.integers(4, 12), st.integers(4, 12))
channels = st.sampled_from([1, 3])
widths = st.lists(st.sampled_from([8, 16]), min_size=1, max_size=2).map(tuple)
NETWORKS = {
    "points": st.builds(
        MLPModel,
        in_channels=st.integers(1, 4),
        embedding_dim=st.sampled_from([4, 8, 16]),
        hidden_dim=st.integers(1, 24),
        num_hidden_layers=st.integers(1, 3),
    ),
    "images by an MLP": st.builds(MLPModel, in_channels=channels, sample_size=sizes, hidden_dim=st.integers(4, 24)),
    "images": st.builds(
        SmallUNet2DModel,
        sample_size=sizes | st.integers(4, 12),
        in_channels=channels,
        patch_size=st.integers(1, 3),
        block_out_channels=widths,
        layers_per_block=st.integers(1, 2),
        attention=st.booleans(),
        attention_head_dim=st.sampled_from([4, 8]),
        time_conditioning=st.sampled_from(["every_block", "once"]),
        skip_connections=st.sampled_from(["add", "concat"]),
        norm_num_groups=st.sampled_from([2, 8]),
    ),
    "images by a stock U-Net": st.builds(
        lambda size, channels, attention: UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("AttnDownBlock2D" if attention else "DownBlock2D",),
            up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",),
        ),
        size=st.sampled_from([4, 8]),
        channels=channels,
        attention=st.booleans(),
    ),
}
trainings = st.builds(
    dict,
    ddpm_num_steps=st.sampled_from([20, 1000]),
    ddpm_beta_schedule=st.sampled_from(["linear", "squaredcos_cap_v2"]),
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    use_ema=st.booleans(),
    snr_gamma=st.sampled_from([None, 5.0]),
)
samplers = st.sampled_from(["ddim", "ddpm", "dpmsolver_multistep", "unipc", "heun", "euler_ancestral"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@settings(
    max_examples=int(os.environ.get("CONFIGURATIONS", 2)),
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],  # no shrinking: an example takes seconds
)
@given(data=st.data(), training=trainings, scheduler=samplers, steps=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_a_configuration_goes_the_whole_way(kind, data, training, scheduler, steps, seed):
    torch.manual_seed(seed)
    network = data.draw(NETWORKS[kind], label="network")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        args = TrainingArguments(
            output_dir=str(checkpoint), train_batch_size=4, max_train_steps=2, report_to="none", **training
        )
        pipeline = DDPMMLPPipeline(network, args.make_scheduler(clip_sample_range=1.0))
        if pipeline.is_points:
            dimension = pipeline.sample_shape[0]
            pipeline.register_to_config(data_mean=[0.5] * dimension, data_std=[2.0] * dimension)
        assert np.isfinite(
            train(pipeline, TensorBatches(torch.randn(8, *pipeline.sample_shape).clip(-1, 1)), args)
        ).all()

        loaded = load_checkpoint(checkpoint)
        for name, tensor in pipeline.unet.state_dict().items():
            assert torch.equal(loaded.unet.state_dict()[name], tensor), name

        loaded.scheduler = make_scheduler(scheduler, loaded.scheduler)
        try:
            report = export_bundle(checkpoint, bundle, scheduler, steps)
        except (ConfigurationError, DivergenceError, UnsupportedSchedulerError):
            assert scheduler not in ("ddim", "ddpm")  # others can't predict x_0, or diverge with an untrained network
            return
        assert report.parity.ok
        sampler = OnnxSampler(bundle)
        if not sampler.table.is_stochastic.any():
            latents = torch.randn(3, *pipeline.sample_shape)
            expected = loaded(3, None, steps, "np", latents=latents, return_dict=False)[0]
            *_, last = sampler.steps(3, latents=latents.numpy())
            tolerance = max(1e-4, *report.parity.amplifications.values()) * (2 if pipeline.is_points else 1)
            np.testing.assert_allclose(sampler.to_data_units(last.sample), expected, atol=tolerance)
        assert np.isfinite(sampler.sample(5, seed)).all()
