"""`ddpm-evaluate` and its distance; the shipped checkpoints against their data."""

import json

import numpy as np
import pytest
from helpers import MNIST, assert_one_line_error
from PIL import Image
from scipy import stats

from ddpm_mlp_pipeline import export_bundle, load_images, pretrained
from ddpm_mlp_pipeline.metrics import sliced_wasserstein_distance


def test_the_distance_of_a_shift_is_its_closed_form():
    """Moved by v, every projection moves by v · u, and the mean of (v · u)² over directions is |v|² / d."""
    x = np.random.default_rng(0).standard_normal((500, 2))
    distance = sliced_wasserstein_distance(x, x + np.array([3, 4]), num_projections=5000)
    assert distance == pytest.approx(5 / 2**0.5, rel=0.03)


def test_in_one_dimension_it_is_the_wasserstein_distance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 1)), 2 * rng.standard_normal((400, 1)) + 1
    quantiles = np.sort(x, axis=0) - np.sort(y, axis=0)
    assert sliced_wasserstein_distance(x, y) == pytest.approx(np.sqrt((quantiles**2).mean()))
    assert sliced_wasserstein_distance(x, y) >= stats.wasserstein_distance(x[:, 0], y[:, 0])


def test_the_command_prints_and_writes_distance_and_floor(run, ddim_bundle, tmp_path):
    argv = ("--dataset", "heart", "--num_samples", 500, "--repeats", 2, "--output", tmp_path / "report.json")
    result = run("ddpm-evaluate", ddim_bundle, *argv)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["distances"]) == len(report["floors"]) == 2
    assert report["ratio"] == pytest.approx(np.mean(report["distances"]) / np.mean(report["floors"]))
    assert result.stdout.splitlines()[-1].split() == ["ratio", f"{report['ratio']:.2f}"]


def test_samples_from_a_file(run, tmp_path):
    np.save(tmp_path / "far.npy", np.random.default_rng(0).standard_normal((400, 2)) + 100)
    result = run("ddpm-evaluate", tmp_path / "far.npy", "--dataset", "heart", "--num_samples", 400)
    assert float(result.stdout.split()[-1]) > 100
    result = run("ddpm-evaluate", tmp_path / "far.npy", "--dataset", tmp_path / "far.npy", "--num_samples", 200)
    assert float(result.stdout.split()[-1]) < 2
    argv = ("--dataset", tmp_path / "far.npy", "--num_samples", 300)
    assert_one_line_error(run("ddpm-evaluate", tmp_path / "far.npy", *argv), "too few for two sets of 300")
    argv = (tmp_path / "far.npy", "--dataset", "heart")
    assert_one_line_error(run("ddpm-evaluate", *argv), "holds 400 points, fewer than the 10000")
    assert_one_line_error(run("ddpm-evaluate", tmp_path / "none.npy", "--dataset", "heart"), "none.npy")
    assert_one_line_error(run("ddpm-evaluate", *argv[:2], "hart"), "unknown data set")


@pytest.mark.skipif(not MNIST.exists(), reason="needs MNIST")
def test_images_from_a_file_and_from_a_folder(run, tmp_path):
    """The same pictures are as far from the data in either form; digits are as far as the floor, noise is not."""
    digits = load_images(MNIST, "train", number=500, seed=7)
    np.save(tmp_path / "digits.npy", digits.permute(0, 2, 3, 1).numpy() / np.float32(255))
    (tmp_path / "folder").mkdir()
    for i, digit in enumerate(digits):
        Image.fromarray(digit[0].numpy()).save(tmp_path / "folder" / f"{i}.png")
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).random((500, 28, 28, 1), dtype=np.float32))
    reports = {}
    for name in ("digits.npy", "folder", "noise.npy"):
        argv = ("--dataset", MNIST, "--num_samples", 500, "--output", tmp_path / "report.json")
        result = run("ddpm-evaluate", tmp_path / name, *argv)
        assert result.returncode == 0, result.stderr
        reports[name] = json.loads((tmp_path / "report.json").read_text())
    assert reports["folder"]["distances"] == pytest.approx(reports["digits.npy"]["distances"], rel=1e-6)
    assert 0.5 < reports["folder"]["ratio"] < 2
    assert reports["noise.npy"]["ratio"] > 100

    argv = ("--dataset", MNIST, "--num_samples", 501)
    assert_one_line_error(
        run("ddpm-evaluate", tmp_path / "digits.npy", *argv), "holds 500 samples, fewer than the 501"
    )
    argv = ("--dataset", MNIST, "--split", "train")
    assert_one_line_error(run("ddpm-evaluate", tmp_path / "digits.npy", *argv), "must share no image")
    np.save(tmp_path / "colour.npy", np.zeros((2, 8, 8, 3), dtype=np.float32))
    argv = ("--dataset", MNIST, "--num_samples", 2)
    assert_one_line_error(run("ddpm-evaluate", tmp_path / "colour.npy", *argv), "3 channels", "--features")
    argv = (*argv, "--features", tmp_path)
    assert_one_line_error(run("ddpm-evaluate", tmp_path / "digits.npy", *argv), "can't load the feature network")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heart", "swiss_roll"])
def test_shipped_checkpoints_are_within_twice_the_floor(run, tmp_path, name):
    """With 1,000 steps of the torch pipeline, and with 50 DDIM steps of the bundle."""
    export_bundle(pretrained(name), tmp_path / "bundle", "ddim", 50)
    for samples in (pretrained(name), tmp_path / "bundle"):
        argv = ("--dataset", name, "--repeats", 3, "--output", tmp_path / "report.json")
        assert run("ddpm-evaluate", samples, *argv).returncode == 0
        assert json.loads((tmp_path / "report.json").read_text())["ratio"] <= 2


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason="needs MNIST")
def test_shipped_digits_hold_their_distance(run, tmp_path):
    """The bundle that ddpm-export makes of them by itself: ddpm-compare measured 10.0, and a floor of 3.3."""
    result = run("ddpm-export", pretrained("mnist"), tmp_path / "bundle")
    assert "DPMSolverMultistepScheduler, 20 network calls" in result.stdout
    argv = ("--dataset", MNIST, "--output", tmp_path / "report.json")
    assert run("ddpm-evaluate", tmp_path / "bundle", *argv).returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["distances"][0] < 10.7
    assert 3 < report["floors"][0] < 3.5
