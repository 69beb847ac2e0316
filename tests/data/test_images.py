"""Images of every kind are converted to one form, or refused with their row."""

from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import MNIST, needs_mnist
from PIL import Image

from ddpm_mlp_pipeline import DDPMMLPPipeline, SmallUNet2DModel, load_images
from ddpm_mlp_pipeline.data.images import (
    HELD_OUT_SPLITS,
    ImageBatches,
    _allocate,
    choose_split,
    mirror_half,
)
from ddpm_mlp_pipeline.data.normalized import load_normalized
from ddpm_mlp_pipeline.errors import DatasetError


def picture(mode, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """A folder of grey 12 × 10 images."""
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
    picture("RGB", 12, 10).convert("P").save(folder / "4.png")
    picture("RGBA", 12, 10).save(folder / "5.png")
    images = load_images(folder, channels=channels)
    assert images.shape == (6, channels, 10, 12)
    expected = np.asarray(Image.open(folder / "4.png").convert(mode)).reshape(10, 12, channels)
    np.testing.assert_array_equal(images[4].permute(1, 2, 0), expected)


def test_transparent_parts_show_white_where_there_is_no_alpha(tmp_path):
    pixels = np.array([[[0, 0, 0, 0], [200, 40, 0, 255], [100, 100, 100, 51]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = [[255, 255, 255], [200, 40, 0], [224, 224, 224]]  # 0.2 · 100 + 0.8 · 255
    np.testing.assert_allclose(load_images(tmp_path, channels=3)[0, :, 0].T, expected, atol=1)
    np.testing.assert_array_equal(load_images(tmp_path)[0, :, 0].T, pixels[0])


def test_transparency_of_palettes_and_of_grey_is_kept(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 8, 7, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.gif", transparency=0)
    Image.new("LA", (2, 1), (60, 0)).save(tmp_path / "b.png")
    images = load_images(tmp_path)
    assert images[0, 3].tolist() == [[0, 255]]
    assert images[1, 3].tolist() == [[0, 0]]
    grey, _ = load_images(tmp_path, channels=1)
    assert grey[0, 0].tolist() == [255, 150]  # white; pure green has a luminance of 0.587


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_the_upper_8(tmp_path, suffix):
    pixels = np.array([[0, 255, 256, 0x8042, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert load_images(tmp_path).tolist() == [[[[0, 0, 1, 0x80, 0xFF]]]]
    colour = load_images(tmp_path, channels=3)
    assert (colour[:, :1] == colour).all()
    assert colour[0, 0].tolist() == [[0, 0, 1, 0x80, 0xFF]]


def test_floats_in_the_unit_interval_are_scaled_and_others_are_refused_by_name(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert load_images(tmp_path).tolist() == [[[[0, 128, 255]]]]
    Image.fromarray(np.array([[0, 0.5, 1.5]], dtype=np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(DatasetError, match=r"row 1 .*b\.tif\) .*floats are from 0 to 1\.5: scale them to \[0, 1\]"):
        load_images(tmp_path)
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DatasetError, match=r"b\.tif\) .*integers are from 0 to 70000: scale them to 16 bits"):
        load_images(tmp_path)


@pytest.mark.parametrize(("mode", "colour", "channels"), [("1", 1, 1), ("CMYK", (0, 0, 0, 0), 3), ("P", 0, 3)])
def test_white_is_white_in_every_mode(tmp_path, mode, colour, channels):
    image = Image.new(mode, (4, 3), colour)
    if mode == "P":
        image.putpalette([255] * 3)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    images = load_images(tmp_path)
    assert images.shape == (1, channels, 3, 4)
    assert (images == 255).all()


def test_programs_that_draw_are_refused_before_they_run(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.eps")
    with pytest.raises(DatasetError, match=r"a\.eps\) .*EPS files can run code"):
        load_images(tmp_path)


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_images(tmp_path, channels=3)[0, :, 0, 0].tolist() == [255, 0, 0]


def test_images_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    picture("RGB", 6, 4).save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(np.asarray(picture("RGB", 6, 4)), -1)
    np.testing.assert_array_equal(load_images(tmp_path)[0].permute(1, 2, 0), expected)


def test_height_and_width_may_differ(folder):
    images = load_images(folder, resolution=(14, 20), fit="pad")
    assert images.shape == (4, 1, 14, 20)
    torch.testing.assert_close(images[:, :, 2:12, 4:16], load_images(folder))
    assert load_images(folder, resolution=(5, 8)).shape == (4, 1, 5, 8)


def test_several_processes_of_a_machine_share_its_memory(monkeypatch):
    shape = (psutil.virtual_memory().available // 3,)  # between a quarter and a half; no page is touched
    assert not isinstance(_allocate(shape, None), np.memmap)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(_allocate(shape, None), np.memmap)


def test_a_point_set_is_told_from_images_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("points.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DatasetError, match="heart is a point set: pass a folder of images"):
        load_images("heart")
    with pytest.raises(DatasetError, match=r"points\.csv is a point set: pass"):
        load_images("points.csv")
    Path("heart").mkdir()
    picture("L", 4, 4).save("heart/a.png")
    assert len(load_images("heart")) == 1


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


def test_a_data_set_without_images_is_refused(tmp_path):
    features = datasets.Features({"n": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"n": [5, 6, 7], "kind": [1, 0, 1]}, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match="no column of images, only n, kind"):
        load_images(tmp_path)


def test_resizing_keeps_a_constant_image_constant(tmp_path):
    Image.new("L", (9, 5), 77).save(tmp_path / "a.png")
    assert (load_images(tmp_path, resolution=8) == 77).all()


def test_batches_are_floats_in_the_networks_range():
    images = torch.tensor([[[[0, 255]]], [[[255, 0]]]], dtype=torch.uint8)
    batches = ImageBatches(images)
    torch.testing.assert_close(batches.__getitems__([1, 0]).x_0.flatten(), torch.tensor([1.0, -1, -1, 1]))


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
    with pytest.raises(DatasetError, match=r"row 3 .*/3\.png\) can't be decoded.*--skip_corrupt"):
        load_images(folder)
    with pytest.raises(DatasetError, match=r"row 3 .*/3\.png"):  # the row in the data set, not in the sample
        load_images(folder, number=4, seed=1)


def test_corrupt_images_can_be_left_out_and_are_named(folder):
    whole = load_images(folder)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "2.png").write_bytes(b"")
    left_out = []
    images = load_images(folder, on_corrupt=left_out.append)
    torch.testing.assert_close(images, whole[[0, 3]])
    assert [f"{i}.png" in message for message, i in zip(left_out, (1, 2), strict=True)] == [True, True]
    for i in (0, 3):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="none of the 4 images"):
        load_images(folder, on_corrupt=left_out.append)


def test_what_holds_no_images_is_refused(tmp_path):
    datasets.Dataset.from_dict({"a": [1, 2], "b": [3, 4]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match="no column of images, only a, b"):
        load_images(tmp_path)
    with pytest.raises(DatasetError, match="neither a folder nor a data set on the hub"):
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


def test_the_default_split_is_one_that_exists(folder):
    assert choose_split(folder, HELD_OUT_SPLITS) == "train"
    (folder / "test").mkdir()
    for i in (2, 3):
        (folder / f"{i}.png").rename(folder / "test" / f"{i}.png")
    (folder / "train").mkdir()
    for i in (0, 1):
        (folder / f"{i}.png").rename(folder / "train" / f"{i}.png")
    assert choose_split(folder, HELD_OUT_SPLITS) == "test"
    assert choose_split(folder, ["validation"]) == "train"


def test_data_are_resized_for_a_network_that_is_not_square(folder):
    pipeline = DDPMMLPPipeline(SmallUNet2DModel(sample_size=(8, 16), in_channels=3, out_channels=3), DDPMScheduler())
    assert load_normalized(pipeline, folder).__getitems__([0, 1]).x_0.shape == (2, 3, 8, 16)
