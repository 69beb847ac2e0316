"""`sampler.onnx`, a whole sampler in one graph: against the numpy runtime, and by itself."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, OnnxSampler, SmallUNet2DModel, export_bundle, pretrained
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export.parity import compare_sampler
from ddpm_mlp_pipeline.export.sampler_graph import build_sampler


def draw(bundle, num_samples, seed):
    session = ort.InferenceSession(bundle / "sampler.onnx", providers=["CPUExecutionProvider"])
    (samples,) = session.run(["samples"], {"seed": np.array(seed), "num_samples": np.array(num_samples)})
    return samples


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {}),
        ("ddpm", {}),
        ("ddpm", {"clip_sample": False}),
        ("pndm", {}),  # has the longest history of all
        ("heun", {}),
        ("euler_ancestral", {}),
        ("dpmsolver_multistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("sasolver", {}),  # uses the noise of earlier steps
    ],
)
def test_it_draws_the_runtimes_samples(tmp_path, scheduler, options):
    bundle = tmp_path / "b"
    export_bundle(pretrained("swiss_roll"), bundle, scheduler, 12, sampler="float32", scheduler_options=options)
    runtime = OnnxSampler(tmp_path / "b")
    for num_samples, seed in ((1, 0), (7, 2**63 - 1), (3000, 2**32)):  # 3,000: noise is drawn for 10 steps at once
        expected = runtime.sample(num_samples, seed)
        samples = draw(tmp_path / "b", num_samples, seed)
        assert samples.dtype == np.float32
        assert samples.shape == expected.shape
        differences = np.abs(samples - expected) / runtime.info["data_std"]
        assert np.quantile(differences, 1.0 if num_samples < 10 else 0.99) < 1e-4  # some samples magnify rounding


@pytest.mark.parametrize(
    "unet",
    [
        pytest.param(lambda: MLPModel(1, (9, 7), hidden_dim=16), id="mlp"),
        pytest.param(lambda: SmallUNet2DModel((9, 7), 3, block_out_channels=(8, 32)), id="unet"),
        pytest.param(
            lambda: UNet2DModel(
                8,
                1,
                1,
                down_block_types=("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",),
                block_out_channels=(32,),
                layers_per_block=1,
            ),
            id="stock",
        ),
    ],
)
def test_images(tmp_path, unet):
    torch.manual_seed(0)
    unet = unet()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = DDPMPipeline if isinstance(unet, UNet2DModel) else DDPMMLPPipeline
    pipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    report = export_bundle(tmp_path / "checkpoint", bundle, "ddpm", 5, sampler="float32")
    assert report.sampler_difference < 1e-4
    expected = OnnxSampler(bundle).sample(7, seed=3)
    assert expected.std() > 0.1
    np.testing.assert_allclose(draw(bundle, 7, 3), expected, atol=1e-4)
    onnx.save(build_sampler(bundle, "uint8"), bundle / "sampler.onnx")
    samples = draw(bundle, 7, 3)
    assert samples.dtype == np.uint8
    assert samples.shape == expected.shape
    np.testing.assert_allclose(samples, 255 * expected, atol=0.53)
    assert compare_sampler(bundle) < 1e-4


def test_it_needs_onnxruntime_and_numpy_only(tmp_path):
    export_bundle(pretrained("heart"), tmp_path / "b", "ddim", 10, sampler="float32")
    script = """
import sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1])
samples, = session.run(None, {"seed": np.array(7), "num_samples": np.array(3)})
assert not {"torch", "onnx", "diffusers", "ddpm_mlp_pipeline"} & set(sys.modules)
print(samples.tolist())
"""
    runs = [
        subprocess.run([sys.executable, "-c", script, tmp_path / "b" / "sampler.onnx"], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    np.testing.assert_allclose(eval(runs[0].stdout), OnnxSampler(tmp_path / "b").sample(3, seed=7), atol=1e-4)


def test_the_graph_is_standard_onnx(ddpm_bundle):
    model = build_sampler(ddpm_bundle)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert [value.name for value in model.graph.input] == ["seed", "num_samples"]
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    (samples,) = inferred.graph.output
    assert [dim.dim_value for dim in samples.type.tensor_type.shape.dim][1:] == [2]


def test_it_does_not_embed_the_timestep_again(ddim_bundle):
    """The file holds the timestep's embedding, and leaves out the layers that computed it."""
    weights = {initializer.name for initializer in onnx.load(ddim_bundle / "unet.onnx").graph.initializer}
    (loop,) = [node for node in build_sampler(ddim_bundle).graph.node if node.op_type == "Loop"]
    kept = {initializer.name for initializer in loop.attribute[0].g.initializer}
    assert any("time_embedding" in name for name in weights)
    assert not any("time_embedding" in name for name in kept)
    assert any("proj_out" in name for name in kept)


def test_points_have_no_bytes(ddim_bundle):
    with pytest.raises(ConfigurationError, match="float32"):
        build_sampler(ddim_bundle, "uint8")


def test_the_command(run_forked, tmp_path):
    result = run_forked("export", pretrained("heart"), tmp_path / "b", "--num_inference_steps", 4, "--sampler")
    assert result.returncode == 0, result.stderr
    assert "between sampler.onnx and the runtime" in result.stdout
    assert draw(tmp_path / "b", 2, 0).shape == (2, 2)
