"""`DDPMMLPPipeline` against the stock pipeline, and the two ways to load its checkpoints."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel
from ddpm_mlp_pipeline.checkpoints import shipped


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=(8, 12),
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize("scheduler", [DDPMScheduler(), DDIMScheduler()])
def test_a_stock_unet_gives_the_stock_pipelines_images(unet, scheduler, output_type):
    ours, stock = (
        cls(unet, scheduler)(2, generators([1])[0], 6, output_type).images for cls in (DDPMMLPPipeline, DDPMPipeline)
    )
    if output_type == "pt" and not torch.is_tensor(stock):  # before diffusers 0.41, "pt" returned the same as "np"
        stock = np.moveaxis(stock, 3, 1)
    for a, b in zip(ours, stock, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "cls",
    [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler],
)
def test_any_scheduler_swaps_in_and_draws_a_heart(heart, cls):
    heart.scheduler = cls.from_config(heart.scheduler.config)
    points = heart(400, generators([0])[0], 50).points
    # Distance to the heart curve: the noise of the data is 0.03 in each coordinate.
    theta = np.linspace(0, 2 * np.pi, 2000)
    y = (13 * np.cos(theta) - 5 * np.cos(2 * theta) - 2 * np.cos(3 * theta) - np.cos(4 * theta)) / 16
    curve = np.stack([np.sin(theta) ** 3, y], axis=1)
    distance = np.linalg.norm(points[:, None] - curve, axis=2).min(axis=1)
    assert np.median(distance) < 0.06
    assert (distance < 0.3).mean() > 0.95


def test_points_are_in_the_datas_units(heart):
    pipeline = DDPMMLPPipeline(heart.unet, heart.scheduler, data_mean=[100.0, -5.0], data_std=[10.0, 0.1])
    plain = DDPMMLPPipeline(heart.unet, heart.scheduler)
    points, normalised = (pipe(50, generators([3])[0], 10).points for pipe in (pipeline, plain))
    np.testing.assert_allclose(points, normalised * [10, 0.1] + [100, -5], rtol=1e-5)
    assert points.shape == (50, 2)
    assert points.dtype == np.float32


def test_one_generator_for_each_sample(heart):
    together = heart(3, generators([5, 6, 7]), 20).points
    alone = [heart(1, generators([seed]), 20).points[0] for seed in (5, 6, 7)]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_latents_take_the_place_of_the_first_draw(heart):
    heart.scheduler = DDIMScheduler.from_config(heart.scheduler.config)
    latents = torch.randn(4, 2, generator=generators([8])[0])
    np.testing.assert_array_equal(
        heart(4, num_inference_steps=10, latents=latents).points, heart(4, generators([8])[0], 10).points
    )


def test_the_latents_set_the_batch_size(heart):
    latents = torch.randn(5, 2)
    assert heart(num_inference_steps=3, latents=latents).points.shape == (5, 2)
    assert heart(num_inference_steps=3).points.shape == (1, 2)
    for options in ({"batch_size": 3, "latents": latents}, {"latents": latents[0]}, {"latents": latents[:0]}):
        with pytest.raises(ValueError, match=r"batch_size must be at least 1|latents must have the shape"):
            heart(num_inference_steps=3, **options)


def test_the_callback_sees_and_changes_the_sample(heart):
    seen = []

    def callback(pipe, step, t, tensors):
        seen.append((pipe, step, int(t), tensors["latents"].shape))
        return {"latents": torch.zeros(2, 2)} if step == 9 else {}

    points = heart(2, num_inference_steps=10, callback_on_step_end=callback).points
    assert seen == [(heart, i, t, (2, 2)) for i, t in enumerate(range(900, -1, -100))]
    np.testing.assert_allclose(points, [heart.config.data_mean] * 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"batch_size": 2, "latents": torch.zeros(3, 2)}, "latents"),
        ({"num_inference_steps": 1001}, "1000"),
    ],
)
def test_wrong_arguments_are_refused(heart, arguments, message):
    with pytest.raises(ValueError, match=message):
        heart(**arguments)


def test_a_checkpoint_keeps_everything(heart, tmp_path):
    heart.save_pretrained(tmp_path)
    again = DDPMMLPPipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(5, generators([0])[0], 10).points, heart(5, generators([0])[0], 10).points)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DDPMMLPPipeline"]
    assert index["unet"] == ["mlp", "MLPModel"]
    assert index["data_columns"] == [["x", "y"]]
    assert again.data_columns == ["x", "y"]
    assert str(tmp_path) not in json.dumps(index)
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        *("model_index.json", "pipeline.py", "mlp.py", "config.json", "scheduler_config.json"),
        "diffusion_pytorch_model.safetensors",
    }


LOAD = """
import sys
{prelude}
import torch
pipeline = {load}
print(pipeline(2, torch.Generator().manual_seed(0), 10, "np")[0].tolist())
print(type(pipeline).__module__, type(pipeline.unet).__module__)
"""
WITHOUT_PLUGIN = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ddpm_mlp_pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from diffusers import DiffusionPipeline
"""


def load_in_a_process(run, load, prelude, folder, tmp_path):
    code = LOAD.format(prelude=prelude, load=load)
    result = run(sys.executable, "-c", code, folder, env={"PATH": "", "HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_checkpoint_loads_both_ways_each_in_a_process(heart, run, tmp_path):
    folder = tmp_path / "checkpoint"
    heart.save_pretrained(folder)
    expected = str(heart(2, generators([0])[0], 10).points.tolist())
    load = "DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)"
    points, modules = load_in_a_process(run, load, WITHOUT_PLUGIN, folder, tmp_path)
    assert points == expected
    assert modules == "diffusers_modules.local.pipeline diffusers_modules.local.mlp"

    # With the plugin, no code in the folder runs: this code would fail.
    for file in ("pipeline.py", "unet/mlp.py"):
        (folder / file).write_text("raise SystemExit('code from the folder ran')")
    load = "DDPMMLPPipeline.from_pretrained(sys.argv[1])"
    prelude = "from ddpm_mlp_pipeline import DDPMMLPPipeline"
    points, modules = load_in_a_process(run, load, prelude, folder, tmp_path)
    assert points == expected
    assert modules == "ddpm_mlp_pipeline.pipeline ddpm_mlp_pipeline.models.mlp"


def test_a_pipeline_of_carried_code_saves_that_code_again(run, heart, tmp_path):
    heart.save_pretrained(tmp_path / "first")
    load = "DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)"
    again = f"{load}; pipeline.save_pretrained(r'{tmp_path / 'second'}')"
    load_in_a_process(run, again, WITHOUT_PLUGIN, tmp_path / "first", tmp_path)
    points, _ = load_in_a_process(run, load, WITHOUT_PLUGIN, tmp_path / "second", tmp_path)
    assert points == str(heart(2, generators([0])[0], 10).points.tolist())


def test_a_checkpoints_code_does_not_run_unasked(heart, tmp_path):
    from diffusers import DiffusionPipeline

    heart.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_model_index_can_not_name_a_module_to_import(heart, tmp_path):
    heart.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["unet"] = ["antigravity", "MLPModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="antigravity"):
        DDPMMLPPipeline.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules


def test_a_stock_pipelines_checkpoint_of_ours_loads(tmp_path):
    unet = MLPModel(1, 6, hidden_dim=8)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)  # writes the module's full name
    again = DDPMMLPPipeline.from_pretrained(tmp_path).unet
    assert type(again) is MLPModel
    torch.testing.assert_close(again.state_dict(), unet.state_dict())


def test_shipped_checkpoints_load_with_diffusers_too(tmp_path, run):
    """Each in turn, in one process: the code that a folder names is the package's own."""
    code = """
import sys, torch
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipeline.unet.dtype == torch.float32
    assert len(pipeline(2, torch.Generator().manual_seed(0), None, "np")[0]) == 2
    print(type(pipeline).__module__, type(pipeline.unet).__module__)
"""
    networks = {name: "unet" if name in ("cifar10", "mnist", "mnist_1") else "mlp" for name in shipped()}
    result = run(sys.executable, "-c", code, *shipped().values(), env={"PATH": "", "HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        f"ddpm_mlp_pipeline.pipeline ddpm_mlp_pipeline.models.{network}" for network in networks.values()
    ]


def test_an_image_checkpoint_round_trips(tmp_path):
    pipeline = DDPMMLPPipeline(MLPModel(1, (6, 5), hidden_dim=8), DDPMScheduler())
    pipeline.save_pretrained(tmp_path)
    again = DDPMMLPPipeline.from_pretrained(tmp_path)
    images = [pipe(2, generators([0])[0], 5, "np").images for pipe in (pipeline, again)]
    assert images[0].shape == (2, 6, 5, 1)
    np.testing.assert_allclose(*images, atol=1e-5)
