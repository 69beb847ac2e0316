"""Images of every kind are brought to one form, or refused by row."""

import datasets
import numpy as np
import pytest
import torch
from helpers import MNIST, needs_mnist
from PIL import Image

from ddpm_mlp_pipeline import load_images
from ddpm_mlp_pipeline.data.images import ImageBatches, _allocate, load_labels, mirror_half
from ddpm_mlp_pipeline.errors import DatasetError


def picture(mode, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """A folder of images, all grey and 12 × 10."""
    for i in range(4):
        picture("L", 12, 10, seed=i).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_folder_of_images(folder):
    images = load_images(folder)
    assert images.shape == (4, 1, 10, 12)
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images[2, 0], np.asarray(Image.open(folder / "2.png")))


def test_the_image_column_is_found_by_its_type(tmp_path):
    pictures = [picture("RGB", 6, 6, seed=i) for i in range(3)]
    rows = datasets.Dataset.from_dict({"label": [0, 1, 2], "weird name": pictures}).cast_column(
        "weird name", datasets.Image()
    )
    rows.to_parquet(tmp_path / "train.parquet")
    images = load_images(tmp_path)
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), np.asarray(pictures[1]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_modes_are_converted(folder, channels, mode):
    picture("P", 12, 10).save(folder / "4.png")
    picture("RGBA", 12, 10).save(folder / "5.png")
    images = load_images(folder, channels=channels)
    assert images.shape == (6, channels, 10, 12)
    expected = np.asarray(Image.open(folder / "5.png").convert(mode)).reshape(10, 12, channels)
    np.testing.assert_array_equal(images[5].permute(1, 2, 0), expected)


def test_padding_centres_on_black_and_changes_no_pixel(folder):
    images = load_images(folder, resolution=16, fit="pad")
    assert images.shape == (4, 1, 16, 16)
    torch.testing.assert_close(images[:, :, 3:13, 2:14], load_images(folder))
    images[:, :, 3:13, 2:14] = 0
    assert not images.any()


def test_what_does_not_fit_in_memory_is_kept_in_a_file(folder):
    assert isinstance(_allocate((4, 1, 10, 12), max_memory=479), np.memmap)  # one byte too few
    assert not isinstance(_allocate((4, 1, 10, 12), max_memory=480), np.memmap)
    torch.testing.assert_close(load_images(folder, max_memory=479), load_images(folder))


def test_some_of_the_images_at_random(folder):
    images = load_images(folder)
    some = load_images(folder, number=3, seed=1)
    rows = [next(i for i in range(4) if torch.equal(image, images[i])) for image in some]
    assert len(set(rows)) == 3
    assert len({load_images(folder, number=2, seed=seed).sum().item() for seed in range(8)}) > 1


def test_labels_are_found_by_their_type(tmp_path):
    features = datasets.Features({"n": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"n": [5, 6, 7], "kind": [1, 0, 1]}, features).to_parquet(tmp_path / "train.parquet")
    assert load_labels(tmp_path).tolist() == [1, 0, 1]
    with pytest.raises(DatasetError, match="no column of images, only n, kind"):
        load_images(tmp_path)


def test_resizing_keeps_a_constant_image_constant(tmp_path):
    Image.new("L", (9, 5), 77).save(tmp_path / "a.png")
    assert (load_images(tmp_path, resolution=8) == 77).all()


def test_batches_are_as_the_network_sees_them():
    images = torch.tensor([[[[0, 255]]], [[[255, 0]]]], dtype=torch.uint8)
    batches = ImageBatches(images)
    torch.testing.assert_close(batches.__getitems__([1, 0]).flatten(), torch.tensor([1.0, -1, -1, 1]))


def test_half_of_the_images_are_mirrored():
    x_0 = torch.arange(12.0).reshape(2, 1, 2, 3)
    mirrored = mirror_half(x_0, torch.tensor([0.49, 0.5]))
    torch.testing.assert_close(mirrored[0], torch.tensor([[[2.0, 1, 0], [5, 4, 3]]]))
    torch.testing.assert_close(mirrored[1], x_0[1])


def test_mixed_sizes_are_refused_by_row(folder):
    picture("L", 7, 8).save(folder / "9.png")
    with pytest.raises(DatasetError, match=r"row 4 .* is 7×8 pixels, but the first image is 12×10"):
        load_images(folder)
    with pytest.raises(DatasetError, match=r"row 0 .* too large to be padded to 9"):
        load_images(folder, resolution=9, fit="pad")
    assert load_images(folder, resolution=9).shape == (5, 1, 9, 9)


def test_a_corrupt_image_is_refused_by_row(folder):
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"row 3 .* no image that can be decoded"):
        load_images(folder)


def test_what_holds_no_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match="no column of images, only a, b"):
        load_images(tmp_path)
    with pytest.raises(DatasetError, match="neither a folder here nor a data set on the hub"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="can't be loaded"):
        load_images(tmp_path / "empty")


@pytest.mark.parametrize(("arguments", "message"), [({"resolution": 0}, "resolution"), ({"channels": 2}, "channels")])
def test_wrong_arguments_are_refused(folder, arguments, message):
    with pytest.raises(DatasetError, match=message):
        load_images(folder, **arguments)


@needs_mnist
def test_the_real_mnist():
    images = load_images(MNIST, "test")
    assert images.shape == (10_000, 1, 28, 28)
    pixels = images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1325, abs=1e-3)  # of the test images
    assert pixels.std().item() == pytest.approx(0.3105, abs=1e-3)
