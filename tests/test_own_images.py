"""A user's pictures from training to sampling: in subfolders, of many sizes, corrupt, huge, grey or animated."""

import json

import numpy as np
import pytest
from helpers import assert_one_line_error
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline
from ddpm_mlp_pipeline.commands import bound, compare, doctor, evaluate
from ddpm_mlp_pipeline.data.images import usual_resolution
from ddpm_mlp_pipeline.training.options import ImageTrainingArguments
from ddpm_mlp_pipeline.training.pipelines import make_image_pipeline


@pytest.fixture
def pictures(tmp_path):
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(150):
            height, width = rng.integers(24, 64, 2)
            left, right = rng.integers(256, size=(2, 3))
            ramp = np.linspace(0, 1, width)[None, :, None]
            pixels = (left * (1 - ramp) + right * ramp).repeat(height, axis=0).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    path = folder / "dogs" / "007.png"
    Image.open(path).convert("L").save(path)
    Image.fromarray(rng.integers(2**16, size=(30, 30), dtype=np.uint16)).save(folder / "dogs" / "008.png")
    path = folder / "cats" / "099.png"
    path.write_bytes(path.read_bytes()[:70])
    Image.new("1", (20_000, 20_000)).save(folder / "dogs" / "huge.png")  # a few kB, and 400 million pixels
    frames = [Image.new("P", (40, 40), i) for i in range(3)]
    frames[0].save(folder / "dogs" / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.slow
def test_own_pictures_go_the_whole_way(pictures, run_forked, capsys, tmp_path):
    """The preset chooses the sizes; commands name missing options, and take the rest from checkpoint and bundle."""
    train = ("--config", "folder", "--dataset_name", pictures, "--output_dir", tmp_path / "run")
    train += ("--max_resolution", 18, "--block_out_channels", "16,32", "--train_batch_size", 16)
    train += ("--max_train_steps", 5, "--lr_warmup_steps", 2, "--ddpm_num_steps", 20, "--no-figures")
    assert_one_line_error(run_forked("train_images", *train), "row 99 of", "cats/099.png", "--skip_corrupt")
    result = run_forked("train_images", *train, "--skip_corrupt")
    assert result.returncode == 0, result.stderr
    assert "left out 2 images:" in result.stderr
    assert "cats/099.png) can't be decoded" in result.stderr
    assert "dogs/huge.png) can't be decoded: Image size (400000000 pixels) exceeds limit" in result.stderr
    assert "300 images, 16×16, channels: 3, classes: 2" in result.stdout
    assert DDPMMLPPipeline.from_pretrained(tmp_path / "run").class_names == ["cats", "dogs"]
    bundle, data = tmp_path / "bundle", ("--dataset", pictures, "--skip_corrupt")
    page = ("--scheduler", "ddpm", "--web", tmp_path / "page")
    assert run_forked("export", tmp_path / "run", bundle, *page).returncode == 0
    assert (tmp_path / "page" / "index.html").is_file()
    draw = ("--num_samples", 4, "--class_labels", "cats", "--output", tmp_path / "grid.png")
    assert run_forked("sample", bundle, *draw).returncode == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "RGB"

    def printed(main, *argv):  # in this process, since starting another takes seconds
        main([str(word) for word in argv])
        return capsys.readouterr().out

    output = printed(evaluate.main, bundle, *data, "--output", tmp_path / "report.json")
    assert "random halves of split 'train', since there is no other; 16×16, channels: 3; features: " in output
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_samples"], report["num_references"]) == (150, 150)
    assert report["features"].endswith("cifar10_features")
    distance = report["measures"]["frechet_distance"]
    assert distance["samples"][0] > 5 * np.std(distance["floor"])  # it has hardly been trained

    output = printed(bound.main, tmp_path / "run", *data, "--num_samples", 20, "--timestep_stride", 20)
    assert "on 20 samples of" in output
    assert "(split 'train')" in output
    with pytest.raises(SystemExit):  # with findings: it has hardly been trained
        printed(doctor.main, tmp_path / "run", *data, "--num_samples", 100)
    assert "the images' sizes differ, with widths from 24 to 63" in " ".join(capsys.readouterr().out.split())
    options = ("--schedulers", "ddpm", "--num_inference_steps", 5, "--num_samples", 20)
    output = printed(compare.main, tmp_path / "run", *data, *options, "--output", tmp_path / "rows.json")
    assert "squared energy distance to 300 images" in output


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((3, 32, 32), [96, 160, 192]),
        ((3, 64, 48), [48, 96, 160, 192]),
        ((1, 28, 28), [32, 64, 128]),
        ((1, 8, 8), [128]),
    ],
)
def test_a_network_is_as_deep_as_the_pictures_need(shape, widths):
    args = ImageTrainingArguments(dataset_name="", output_dir="")
    assert make_image_pipeline(args, shape).unet.config.block_out_channels == tuple(widths)


def test_the_stock_network_has_widths_that_its_norms_divide():
    args = ImageTrainingArguments(dataset_name="", output_dir="", model="stock")
    assert make_image_pipeline(args, (3, 64, 64)).unet.config.block_out_channels == (32, 64, 128)


def test_pictures_of_one_size_keep_it(tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 12), (i, 0, 0)).save(tmp_path / f"{i}.png")
    assert usual_resolution(tmp_path, "train", 64) is None
    assert usual_resolution(tmp_path, "train", 18) == 16  # the median of 12 and 20
    Image.new("RGB", (100, 80)).save(tmp_path / "3.png")
    Image.new("RGB", (100, 80)).save(tmp_path / "4.png")
    assert usual_resolution(tmp_path, "train", 64) == 20  # of three times 12 and 20, twice 80 and 100
