"""Images from a folder to samples by onnxruntime: train, plot, export and sample, as a user runs them."""

import json

import forked
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from helpers import ROOT, assert_one_line_error
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, SmallUNet2DModel
from ddpm_mlp_pipeline.commands.presets import parse_options
from ddpm_mlp_pipeline.figures import draw_training_run, reverse_process
from ddpm_mlp_pipeline.training.options import PRESETS, ImageTrainingArguments

SCRIPT = ROOT / "train_scripts" / "train_images.py"
SMALL = ("--block_out_channels", "16,32", "--train_batch_size", 16, "--ddpm_num_steps", 20, "--lr_warmup_steps", 2)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A folder of grey 11 × 9 images, each with a bright rectangle on black."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for i in range(70):
        pixels = np.zeros((9, 11), dtype=np.uint8)
        x, y = rng.integers(6), rng.integers(5)
        pixels[y : y + 4, x : x + 4] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "squares"
    argv = ("--dataset_name", squares, "--output_dir", folder, *SMALL, "--num_epochs", 4)
    argv += ("--save_samples_epochs", 2, "--ddpm_num_inference_steps", 5, "--snr_gamma", 5, "--random_flip")
    result = forked.Command("train_images", [str(word) for word in argv], folder.parent).wait()
    assert result.returncode == 0, result.stderr
    return folder


def test_training_leaves_checkpoint_figures_and_samples(trained):
    assert {path.name for path in trained.iterdir()} == {
        *("model_index.json", "pipeline.py", "unet", "scheduler", "logs", "samples"),
        *("loss.png", "forward_process.png", "samples.png", "process.gif", "README.md"),
    }
    assert {path.name for path in (trained / "samples").iterdir()} == {"epoch-0002.png", "epoch-0004.png"}
    assert (trained / "unet" / "unet.py").exists()
    pipeline = DDPMMLPPipeline.from_pretrained(trained)
    assert pipeline.sample_shape == (1, 9, 11)
    assert pipeline(2, num_inference_steps=3).images[0].size == (11, 9)


def test_the_figures_take_few_calls_of_the_network(tmp_path):
    """They must not take minutes after a training of three steps: 64 images and 1,000 steps would be 64,000 calls."""
    unet = SmallUNet2DModel(sample_size=8, block_out_channels=(8, 8), attention=False)
    args = ImageTrainingArguments(output_dir=str(tmp_path), dataset_name="")
    pipeline, calls = DDPMMLPPipeline(unet, DDPMScheduler()), []
    pipeline.set_progress_bar_config(disable=True)
    unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    draw_training_run(pipeline, torch.rand(64, 1, 8, 8), [1.0], tmp_path, 0, args.ddpm_num_inference_steps)
    assert 1_000 < sum(calls) <= 1_500
    with Image.open(tmp_path / "process.gif") as film:
        assert film.n_frames > 60


def test_frames_are_of_the_nearest_steps():
    pipeline = DDPMMLPPipeline(SmallUNet2DModel(8, block_out_channels=(8, 8), attention=False), DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    assert list(reverse_process(pipeline, 1, timesteps=[0, 52, 800, 1000], num_inference_steps=10)) == [
        1000,
        801,
        101,
        0,
    ]
    every = list(reverse_process(pipeline, 1, timesteps=range(1001)))
    assert every == list(range(1000, -1, -1))


def test_export_and_every_output(trained, run, run_forked, tmp_path):
    bundle = tmp_path / "bundle"
    result = run_forked("export", trained, bundle, "--scheduler", "ddpm", "--num_inference_steps", 10)
    assert result.returncode == 0, result.stderr
    for batch_size, name in ((4, "images.npy"), (10, "again.npy"), (4, "grid.png"), (4, "folder")):
        argv = ("--num_samples", 10, "--batch_size", batch_size, "--output", tmp_path / name)
        result = run("ddpm-sample", bundle, *argv)
        assert result.returncode == 0, result.stderr
    images = np.load(tmp_path / "images.npy")
    assert images.shape == (10, 9, 11, 1)
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), images, atol=1e-4)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert grid.shape == (3 * 9, 4 * 11)
    np.testing.assert_allclose(grid[9:18, 11:22], images[5, ..., 0] * 255, atol=1)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i}.png" for i in range(10)]
    np.testing.assert_allclose(np.asarray(Image.open(files[7])).astype(int), images[7, ..., 0] * 255, atol=1)
    assert_one_line_error(run("ddpm-sample", bundle, "--output", tmp_path / "images.csv"), ".csv holds points")
    argv = ("--num_samples", 10**9, "--output", tmp_path / "large.png")
    assert_one_line_error(run("ddpm-sample", bundle, *argv), "a grid holds", "images of this size at most")


def test_sampling_from_the_checkpoint(trained, run_forked, tmp_path):
    argv = ("--num_samples", 4, "--num_inference_steps", 5, "--output", tmp_path / "images.npy")
    assert run_forked("sample", trained, *argv).returncode == 0
    assert np.load(tmp_path / "images.npy").shape == (4, 9, 11, 1)


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("samples", "a.png", ()),
        ("forward", "a.png", ("--dataset",)),
        ("reverse", "a.png", ("--timesteps", 19, 10, 0)),
        ("animation", "a.gif", ()),
    ],
)
def test_every_picture_from_a_checkpoint(trained, squares, run_forked, tmp_path, kind, name, options):
    options = (*options, squares) if options == ("--dataset",) else options
    result = run_forked("plot", kind, trained, "--output", tmp_path / name, "--num_samples", 4, *options)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / name) as picture:
        assert getattr(picture, "n_frames", 1) >= (10 if kind == "animation" else 1)


def test_comparing_schedulers(trained, squares, run_forked, tmp_path):
    output = tmp_path / "rows.json"
    argv = ("compare", trained, "--dataset", squares, "--split", "train", "--num_samples", 70, "--output", output)
    argv += ("--num_inference_steps", 2, 4, "--schedulers", "ddpm", "euler", "edm")
    assert_one_line_error(run_forked(*argv), "scheduler must be one of")
    options = ("dpmsolver_multistep:solver_order=3", "--figure", tmp_path / "figure.png")
    result = run_forked(*argv[:-1], *options)
    assert result.returncode == 0, result.stderr
    rows = {(row["scheduler"], row["num_inference_steps"]): row for row in json.loads(output.read_text())}
    assert len(rows) == 6
    assert all(row["frechet_distance"] > 0 and row["ms_per_sample"]["1"] > 0 for row in rows.values())
    assert rows["ddpm", 4]["network_calls"] == 4
    # An existing row is reused, except for its time; with another number of samples, it is measured again.
    output.write_text(output.read_text().replace(str(rows["ddpm", 4]["frechet_distance"]), "123.2"))
    again = run_forked(*argv[:-2])
    assert "ddpm, 4 steps: 123.2" in again.stdout
    one = argv[: argv.index("--num_inference_steps")]
    measured = run_forked(*one[:7], 71, *one[8:], "--num_inference_steps", 4, "--schedulers", "ddpm")
    assert measured.returncode == 0, measured.stderr
    assert "ddpm, 4 steps: 123.2" not in measured.stdout
    assert_one_line_error(run_forked(*argv[:-1], "ddim:eta"), "NAME=VALUE")
    output.write_text('{"a": 1}')
    assert_one_line_error(run_forked(*argv[:-1]), "does not hold what ddpm-compare writes")
    assert "solver_order=3" in result.stdout
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size == (800, 500)


def test_a_picture_of_a_bundles_coefficients(ddim_bundle, run_forked, tmp_path):
    result = run_forked("plot", "table", ddim_bundle, "--output", tmp_path / "table.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "table.png") as picture:
        # the lines of ε and x̂_0
        colors = {color for _, color in picture.convert("RGB").getcolors(2**24)}
        assert {(255, 127, 14), (44, 160, 44)} <= colors


def test_wrong_plots_end_in_one_line(trained, run_forked, tmp_path):
    for argv, fragment in [
        (("samples", trained, "--output", tmp_path / "a.gif"), ".png"),
        (("animation", trained, "--output", tmp_path / "a.png"), ".gif or .mp4"),
        (("forward", trained, "--output", tmp_path / "a.png"), "--dataset"),
        (("reverse", trained, "--output", tmp_path / "a.png", "--timesteps", 21), "from 0 to 20"),
        (("samples", tmp_path, "--output", tmp_path / "a.png"), "not a checkpoint"),
        (("table", trained, "--output", tmp_path / "a.png"), "lacks its step table"),
    ]:
        assert_one_line_error(run_forked("plot", *argv), fragment)


def test_wrong_trainings_end_in_one_line(squares, run_forked, tmp_path):
    output = ("--output_dir", tmp_path / "run")
    for argv, fragment in [
        ((), "--dataset_name"),
        (("--dataset_name", tmp_path / "nowhere"), "neither a folder nor a data set"),
        (("--dataset_name", squares, "--train_batch_size", 71), "larger than the data set, which holds 70"),
        (("--dataset_name", squares, "--block_out_channels", "12,32"), "norm_num_groups"),
        (("--dataset_name", squares, "--block_out_channels", "wide"), "'wide'"),
        (("--dataset_name", squares, "--channels", 2), "channels"),
        (("--dataset_name", squares, "--model", "stock", "--block_out_channels", "32,32"), "multiples of 2"),
    ]:
        assert_one_line_error(run_forked("train_images", *output, *argv), fragment)


def test_the_stock_model_trains(squares, run_forked, tmp_path):
    argv = ("--dataset_name", squares, "--output_dir", tmp_path / "run", *SMALL, "--max_train_steps", 2)
    argv += ("--model", "stock", "--resolution", 8, "--block_out_channels", "32,32", "--no-figures")
    result = run_forked("train_images", *argv)
    assert result.returncode == 0, result.stderr
    pipeline = DDPMMLPPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.unet) is UNet2DModel
    assert pipeline(1, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.slow
def test_a_way_of_training_is_measured(squares, run_forked, tmp_path):
    """Measure a light variant of a user's preset, in bfloat16, on data whose test set is the training set."""
    preset = tmp_path / "squares.yaml"
    preset.write_text(f"dataset_name: {squares}\ntrain_batch_size: 16\nddpm_num_steps: 20\nlr_warmup_steps: 2\n")
    narrow = f"{preset} --no-attention --block_out_channels 8,8 --mixed_precision bf16"
    argv = (narrow, "--num_images", 90, "--repeats", 1, "--split", "train")
    argv += ("--num_samples", 70, "--num_inference_steps", 5, "--output_dir", tmp_path / "runs")
    result = run_forked("benchmark_training", *argv)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "runs" / "benchmark.json").read_text())
    pipeline = DDPMMLPPipeline.from_pretrained(tmp_path / "runs" / "0")
    assert pipeline.unet.config.block_out_channels == [8, 8]
    assert (row["variant"], row["parameters"], row["steps"]) == (narrow, pipeline.unet.num_parameters(), 6)
    assert row["frechet_distance"] > 0
    assert row["images_per_second"] > 0
    assert min(row["memory_mib"]) > 300


def test_an_empty_label_column_undoes_a_presets():
    argv = ["--config", "mnist", "--output_dir", "run"]
    assert parse_options(ImageTrainingArguments, argv, "", PRESETS).label_column == "label"
    assert parse_options(ImageTrainingArguments, [*argv, "--label_column="], "", PRESETS).label_column is None
