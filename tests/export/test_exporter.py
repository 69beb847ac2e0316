"""Exported networks agree with torch. A network that does not agree is not exported."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers import random_weights
from safetensors.torch import load_file, save_file

from ddpm_mlp_pipeline import (
    DDPMMLPPipeline,
    MLPModel,
    OnnxSampler,
    SmallUNet2DModel,
    StepTable,
    compile_scheduler,
    export_bundle,
    pretrained,
)
from ddpm_mlp_pipeline.errors import (
    CheckpointError,
    ConfigurationError,
    DivergenceError,
    OutputExistsError,
    ParityError,
)
from ddpm_mlp_pipeline.export.parity import compare


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 1), ("ddim", 50), ("ddpm", 1000)])
def test_parity_with_the_torch_pipeline_at_every_step(tmp_path, scheduler, steps):
    report = export_bundle(pretrained("swiss_roll"), tmp_path / "bundle", scheduler, steps)
    assert report.parity.differences.keys() == {1, 3, 8}
    for difference in report.parity.differences.values():
        assert difference.shape == (steps,)
        assert difference[-1] < 1e-5
    assert f"{steps:>6}" in str(report)


def test_an_image_mlp_exports(tmp_path):
    torch.manual_seed(0)
    model = MLPModel(3, (6, 5), hidden_dim=16)
    DDPMMLPPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "checkpoint")
    report = export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "ddpm", 20)
    assert report.parity.ok
    images = OnnxSampler(tmp_path / "bundle").sample(7)
    assert images.shape == (7, 6, 5, 3)
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_bundle_says_what_it_is_and_names_nothing_of_this_machine(ddim_bundle, tmp_path):
    info = json.loads((ddim_bundle / "bundle.json").read_text())
    assert info["sample_shape"] == [2]
    assert info["provenance"]["unet"] == "MLPModel"
    assert info["provenance"]["num_parameters"] == 39_426
    assert {file.name for file in ddim_bundle.iterdir()} == {"unet.onnx", "step_table.json", "bundle.json"}
    for file in ddim_bundle.iterdir():
        assert b"site-packages" not in file.read_bytes()
        assert str(tmp_path.parent).encode() not in file.read_bytes()


def test_the_network_takes_any_batch_and_one_timestep(ddim_bundle):
    graph = onnx.load(ddim_bundle / "unet.onnx").graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)}
    assert shapes["sample"][0].dim_param == shapes["out_sample"][0].dim_param != ""
    assert len(shapes["timestep"]) == 0


def test_a_bundle_that_differs_is_not_left_behind(tmp_path):
    with pytest.raises(ParityError, match="differs from the pipeline") as error:
        export_bundle(pretrained("heart"), tmp_path / "bundle", "ddim", 5, tolerance=0.0)
    assert not error.value.report.ok
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sample_between_two_outcomes_is_no_reason_to_refuse_a_bundle(tmp_path):
    """One MNIST sample magnifies rounding a hundred times as much as its neighbours, also in torch. A different
    network is still detected."""
    assert export_bundle(pretrained("mnist"), tmp_path / "bundle", "ddim", 50).parity.ok  # as `compare` finds it
    pipeline = DDPMMLPPipeline.from_pretrained(pretrained("mnist"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with torch.no_grad():
        pipeline.unet.conv_out.bias += 0.01
    assert not compare(pipeline, tmp_path / "bundle", 50, 1e-4).ok


def test_points_are_clipped_by_default(heart, tmp_path):
    heart.save_pretrained(tmp_path / "heart")
    export_bundle(tmp_path / "heart", tmp_path / "bundle")
    assert OnnxSampler(tmp_path / "bundle").table.summary.startswith("DDIMScheduler, 50 network calls, x̂_0 clipped")


def test_options_of_the_steps(tmp_path):
    """DDIM with η = 1 draws noise, in torch and in the runtime."""
    report = export_bundle(pretrained("heart"), tmp_path / "bundle", "ddim", 10, scheduler_options={"eta": 1.0})
    assert report.parity.ok
    assert OnnxSampler(tmp_path / "bundle").table.is_stochastic.sum() == 9


def test_nan_is_no_parity(tmp_path, heart):
    assert export_bundle(pretrained("heart"), tmp_path / "bundle", "ddim", 5).parity.ok
    heart.scheduler = DDIMScheduler.from_config(heart.scheduler.config)
    with torch.no_grad():
        for block in heart.unet.blocks:
            block.linear.weight.mul_(1e12)  # whose products are beyond float32
    assert not compare(heart, tmp_path / "bundle", 5, 1e-4).ok


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {"timestep_spacing": "trailing", "clip_sample": False}),
        ("dpmsolver_multistep", {"timestep_spacing": "trailing"}),
        ("dpmsolver_singlestep", {}),
    ],
)
def test_a_sampler_that_blows_up_is_refused(tmp_path, scheduler, options):
    """With a cosine schedule, ᾱ_T is nearly 0, and a solver that starts there divides by it."""
    with pytest.raises(DivergenceError, match="diverges"):
        export_bundle(pretrained("heart"), tmp_path / "bundle", scheduler, 20, scheduler_options=options)
    assert not list(tmp_path.iterdir())


def test_nan_is_a_blow_up(tmp_path, heart):
    with torch.no_grad():
        for block in heart.unet.blocks:
            block.linear.weight.mul_(1e12)  # whose products are beyond float32
    heart.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(DivergenceError):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "ddim", 5)


@pytest.fixture
def hardly_trained(tmp_path):
    """A checkpoint of an untrained network for images."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    DDPMMLPPipeline(MLPModel(1, 8, hidden_dim=32), scheduler).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_where_the_default_blows_up_ddpm_takes_its_place(run_forked, hardly_trained, tmp_path):
    result = run_forked("export", hardly_trained, tmp_path / "bundle")
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert "DPMSolverMultistepScheduler with 20 network evaluations diverges: 100% of its samples" in warning
    assert "the bundle uses ddpm with 50 steps instead" in warning
    assert "DDPMScheduler, 50 network calls, x̂_0 clipped" in result.stdout.splitlines()[-1]
    provenance = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["provenance"]
    assert (provenance["scheduler"], provenance["num_inference_steps"]) == ("DDPMScheduler", 50)
    assert np.abs(OnnxSampler(tmp_path / "bundle").sample(20) - 0.5).max() <= 0.5

    export_bundle(hardly_trained, tmp_path / "bundle", num_inference_steps=7, overwrite=True)
    assert len(OnnxSampler(tmp_path / "bundle")) == 7


def test_a_requested_scheduler_is_not_replaced(hardly_trained, tmp_path):
    for arguments in (
        {"scheduler": "dpmsolver_multistep"},
        {"scheduler_options": {"solver_order": 3}},
    ):
        with pytest.raises(DivergenceError, match=r"DPMSolver.* diverges"):
            export_bundle(hardly_trained, tmp_path / "bundle", **arguments)
    assert export_bundle(pretrained("heart"), tmp_path / "bundle").warning is None


def test_where_ddpm_blows_up_as_well_there_is_no_bundle(hardly_trained, tmp_path):
    path = hardly_trained / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    with pytest.raises(DivergenceError, match="DDPMScheduler with 50 network evaluations diverges"):
        export_bundle(hardly_trained, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_points_network_with_a_learned_variance_exports(tmp_path):
    torch.manual_seed(0)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False)
    DDPMMLPPipeline(MLPModel(2, hidden_dim=8, out_channels=4), scheduler).save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(DivergenceError, match="DDPMScheduler with 50 network evaluations diverges"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")


def test_few_strays_are_reported(tmp_path):
    report = export_bundle(pretrained("heart"), tmp_path / "bundle", "euler", 30)
    assert "the data's range" not in str(dataclasses.replace(report, strays=0.0))
    assert "0.2% of the samples exceed 2 times the data's range" in str(dataclasses.replace(report, strays=1 / 512))


def test_a_table_need_not_be_compiled_just_now(heart, tmp_path):
    table = compile_scheduler(heart.scheduler, 10)
    table.save(tmp_path / "table.json")
    heart.save_pretrained(tmp_path / "heart")
    export_bundle(tmp_path / "heart", tmp_path / "given", table=StepTable.load(tmp_path / "table.json"))
    export_bundle(pretrained("heart"), tmp_path / "compiled", "ddpm", 10)
    given, compiled = (OnnxSampler(tmp_path / name).sample(20, seed=3) for name in ("given", "compiled"))
    np.testing.assert_array_equal(given, compiled)
    wrong = dataclasses.replace(table, to_next=table.to_next * 1.001)
    with pytest.raises(ParityError, match="differs from the pipeline"):
        export_bundle(tmp_path / "heart", tmp_path / "wrong", table=wrong)
    with pytest.raises(ConfigurationError, match="checkpoint's own scheduler"):
        export_bundle(tmp_path / "heart", tmp_path / "both", "ddim", table=table)
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "heart", "given", "compiled"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_step(tmp_path, precision):
    report = export_bundle(pretrained("heart"), tmp_path / "bundle", "ddim", 1, precision=precision, sampler="float32")
    assert report.sampler_difference < 1e-4
    with pytest.raises(ConfigurationError, match="fp32, fp16 or int8, got 'bf16'"):
        export_bundle(pretrained("heart"), tmp_path / "bundle", precision="bf16")


def test_a_bundle_is_replaced_and_anything_else_is_left_alone(ddim_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    for steps in (5, 6):
        export_bundle(pretrained("heart"), bundle, "ddim", steps, overwrite=steps == 6)
        assert len(OnnxSampler(bundle).table) == steps
    with pytest.raises(OutputExistsError, match="bundle exists and isn't empty"):
        export_bundle(pretrained("heart"), bundle, "ddim", 7)
    assert len(OnnxSampler(bundle).table) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(OutputExistsError, match="left alone"):
        export_bundle(pretrained("heart"), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.tex").exists()


def test_a_users_file_in_the_bundle_is_not_lost(tmp_path):
    bundle = tmp_path / "bundle"
    export_bundle(pretrained("heart"), bundle, "ddim", 5)
    (bundle / "heart.png").touch()
    with pytest.raises(OutputExistsError, match="left alone"):
        export_bundle(pretrained("heart"), bundle, "ddim", 5, overwrite=True)


def test_weights_that_lack_a_tensor_are_refused(heart, tmp_path):
    heart.save_pretrained(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["proj_out.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lack"):
        export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")


def small_unet(channels, size):
    return random_weights(SmallUNet2DModel(size, channels, block_out_channels=(16, 32)))


def image_mlp(channels, size):
    return random_weights(MLPModel(channels, size, hidden_dim=32, pixel_posterior=True))


def stock_unet(channels, size):
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        pytest.param(small_unet, 1, 28, id="SmallUNet2DModel, grey"),
        pytest.param(small_unet, 3, 32, id="SmallUNet2DModel, colour"),
        pytest.param(image_mlp, 1, 28, id="MLPModel, grey"),
        pytest.param(image_mlp, 3, 32, id="MLPModel, colour"),
        pytest.param(stock_unet, 3, 32, id="UNet2DModel"),
    ],
)
def test_image_networks_agree_with_torch(tmp_path, make, channels, size):
    """Stock DDPMPipeline folders are included."""
    torch.manual_seed(0)
    network = make(channels, size).eval()
    pipeline = DDPMPipeline if isinstance(network, UNet2DModel) else DDPMMLPPipeline
    predicted = "sample" if isinstance(network, MLPModel) else "epsilon"
    pipeline(network, DDPMScheduler(prediction_type=predicted)).save_pretrained(tmp_path / "checkpoint")
    assert export_bundle(tmp_path / "checkpoint", tmp_path / "bundle", "ddim", 4).parity.ok
    sampler = OnnxSampler(tmp_path / "bundle")
    for batch_size in (1, 7, 64):
        x = torch.randn(batch_size, channels, size, size)
        with torch.no_grad():
            expected = network(x, 321).sample
        np.testing.assert_allclose(sampler.predict(x.numpy(), 321), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(tmp_path, steps):
    with pytest.raises(ConfigurationError, match="from 1 to 1000"):
        export_bundle(pretrained("heart"), tmp_path / "bundle", "ddpm", steps)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("model_index.json", None),
        ("scheduler/scheduler_config.json", None),
        ("unet/config.json", None),
        ("unet/diffusion_pytorch_model.safetensors", None),
        ("model_index.json", 100),
        ("unet/config.json", 30),
        ("unet/diffusion_pytorch_model.safetensors", 5000),
        ("unet/diffusion_pytorch_model.safetensors", 4),
    ],
)
def test_damaged_checkpoints_are_refused(heart, tmp_path, name, keep):
    folder = tmp_path / "checkpoint"
    heart.save_pretrained(folder)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if keep is not None:
        (folder / name).write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="checkpoint"):
        export_bundle(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_float32_is_enough_for_the_first_steps(heart):
    """√ᾱ_t is 5e-5 at the cosine schedule's end: only the clip range keeps the prediction of x_0 in bounds."""
    limit = heart.scheduler.config.clip_sample_range * np.array(heart.config.data_std)
    points = heart(500, torch.Generator().manual_seed(0), 1000).points - heart.config.data_mean
    assert (np.abs(points) <= limit + 1e-4).all()
