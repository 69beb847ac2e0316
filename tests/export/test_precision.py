"""Networks in fewer bits: file sizes and errors."""

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_mlp_pipeline import DDPMMLPPipeline, OnnxSampler, SmallUNet2DModel, export_bundle
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.export.precision import reduce_precision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    unet = SmallUNet2DModel(16, block_out_channels=(32, 64))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("precision") / "checkpoint"
    DDPMMLPPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint):
    export_bundle(checkpoint, checkpoint.parent / "fp32", "ddim", 10)
    return OnnxSampler(checkpoint.parent / "fp32")


@pytest.mark.parametrize(("precision", "size", "error"), [("fp16", 0.6, 5e-3), ("int8", 0.5, 0.1)])
def test_fewer_bits_are_a_smaller_file_of_about_the_same_network(checkpoint, expected, precision, size, error):
    bundle = checkpoint.parent / precision
    report = export_bundle(checkpoint, bundle, "ddim", 10, precision=precision, sampler="uint8")
    assert (bundle / "unet.onnx").stat().st_size < size * (expected.folder / "unet.onnx").stat().st_size
    assert 0 < report.precision_error < error
    x = np.random.default_rng(0).standard_normal((5, 1, 16, 16)).astype(np.float32)
    outputs = [sampler.predict(x, 800) for sampler in (OnnxSampler(bundle), expected)]
    assert np.square(outputs[0] - outputs[1]).mean() < (2 * error) ** 2 * np.square(outputs[1]).mean()
    session = ort.InferenceSession(bundle / "sampler.onnx", providers=["CPUExecutionProvider"])
    samples = session.run(None, {"seed": np.array(5), "num_samples": np.array(3)})[0] / 255
    assert np.abs(samples - OnnxSampler(bundle).sample(3, seed=5)).mean() < 0.02


def test_int8_is_in_the_convolutions(checkpoint, expected, tmp_path):
    export_bundle(checkpoint, tmp_path / "bundle", "ddim", 5, precision="int8")
    model = onnx.load(tmp_path / "bundle" / "unet.onnx")
    of_int8 = {out for node in model.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(set(node.input[:2]) <= of_int8 for node in convolutions)


@pytest.mark.parametrize("class_shares", [None, [0.5, 0.25, 0.25]])
def test_int8_of_a_network_with_labels(checkpoint, tmp_path, class_shares):
    unet = SmallUNet2DModel(16, block_out_channels=(32, 64), num_class_embeds=3)
    with torch.no_grad():
        unet.load_state_dict(DDPMMLPPipeline.from_pretrained(checkpoint).unet.state_dict(), strict=False)
        unet.class_embedding.weight.normal_()
    pipeline = DDPMMLPPipeline(unet, DDPMScheduler(), class_names=["a", "b", "c"], class_shares=class_shares)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    assert (
        0
        < export_bundle(tmp_path / "checkpoint", tmp_path / "int8", "ddim", 5, precision="int8").precision_error
        < 0.1
    )


def test_a_network_without_convolutions_has_no_int8(ddim_bundle, tmp_path):
    shutil.copytree(ddim_bundle, tmp_path / "bundle")
    with pytest.raises(ConfigurationError, match="convolutions"):
        reduce_precision(tmp_path / "bundle", "int8")
