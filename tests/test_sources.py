"""Sources of samples to evaluate: files and folders."""

import numpy as np
import pytest
from PIL import Image

from ddpm_mlp_pipeline.errors import ConfigurationError, DatasetError
from ddpm_mlp_pipeline.judge.sources import open_source


def test_images_are_the_same_in_every_form(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(6, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "integers.npy", pixels)
    np.save(tmp_path / "floats.npy", pixels / 255)
    np.save(tmp_path / "halves.npy", (pixels / 255).astype(np.float16))
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    for name in ("integers.npy", "floats.npy", "halves.npy", "folder"):
        source = open_source(tmp_path / name)
        assert source.shape == (3, 4, 5)
        images = source.draw(6, seed=3)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, pixels.transpose(0, 3, 1, 2)[np.random.default_rng(3).permutation(6)])
        assert source.draw(2, seed=0).shape == (2, 3, 4, 5)
        with pytest.raises(DatasetError, match="holds 6 samples, fewer than the 7 asked for"):
            source.draw(7, seed=0)


def test_points_are_drawn_without_repetition(tmp_path):
    points = np.random.default_rng(0).standard_normal((30, 3))
    np.save(tmp_path / "points.npy", points)
    np.savetxt(tmp_path / "points.csv", points, delimiter=",")
    for name in ("points.npy", "points.csv"):
        source = open_source(tmp_path / name)
        assert source.shape == (3,)
        np.testing.assert_allclose(np.sort(source.draw(30, 0), axis=0), np.sort(points, axis=0))


def test_drawing_from_a_sampler_shows_its_progress(ddim_bundle, capsys):
    open_source(ddim_bundle).draw(10, seed=0)
    assert "sampling: 100%" in capsys.readouterr().err


IMAGES = np.full((4, 2, 2, 1), 0.5)
WITH_NAN = np.where(np.arange(4)[:, None, None, None] == 2, np.nan, IMAGES)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (2 * IMAGES - 1.5, r"values from -0.5 to -0.5, but images are in \[0, 1\], or uint8"),
        (IMAGES * 255, "values from 127.5 to 127.5"),
        ((IMAGES * 255).astype(np.int64), "values from 127 to 127"),
        (WITH_NAN, "image 2 of .* holds nan or infinity"),
        (IMAGES[..., 0], r"of the shape \(4, 2, 2\): samples are"),
        (IMAGES + 0j, "holds complex128"),
        (WITH_NAN[..., 0, 0], "nan, or an empty cell, in row 3, column 'x'"),
        (np.zeros((0, 2)), r"it holds float64 of the shape \(0, 2\), not numbers"),
        (IMAGES[:0], r"it holds float64 of the shape \(0, 2, 2, 1\), not numbers"),
        (np.array([[None]]), "can't read .* Python objects"),
    ],
)
def test_files_that_are_not_samples_are_refused(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DatasetError, match=message):
        open_source(tmp_path / "a.npy").draw(4, 0)


def test_broken_files_and_strange_requests(tmp_path):
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("text")
    for name in ("empty.npy", "text.npy"):
        with pytest.raises(DatasetError, match=f"can't read .*{name}"):
            open_source(tmp_path / name)
    np.savez(tmp_path / "several.npz", a=IMAGES, b=IMAGES)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(DatasetError, match=r"can.t read .*several\.npy"):
        open_source(tmp_path / "several.npy")
    with pytest.raises(ConfigurationError, match="are for a checkpoint"):
        open_source(tmp_path / "text.npy", scheduler="ddim")
    with pytest.raises(ConfigurationError, match="is no file of samples"):
        open_source((tmp_path / "text.npy").rename(tmp_path / "text.txt"))
