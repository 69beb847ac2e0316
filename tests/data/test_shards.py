"""Images that are read from Parquet files while they are trained on."""

import shutil

import datasets
import forked
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import assert_one_line_error
from PIL import Image
from small_training import training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel, train as training
from ddpm_mlp_pipeline.data import shards as shards_module
from ddpm_mlp_pipeline.data.images import load_labelled_images, to_network_units
from ddpm_mlp_pipeline.data.shards import ImageShards, WindowSampler
from ddpm_mlp_pipeline.errors import DatasetError

open_file = shards_module._open
SHARDS, IMAGES, GROUP = 2, 90, 20
NAMES = ["cat", "dog", "ship"]


def write_shards(folder, pictures, split="train"):
    """Write pictures and labels as the hub has them, in row groups."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(np.arange(len(pictures)), SHARDS)):
        rows = {"image": [pictures[j] for j in part], "label": [int(j) % 3 for j in part]}
        path = folder / f"{split}-{i:05}-of-{SHARDS:05}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=GROUP)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "pictures"
    pixels = np.random.default_rng(0).integers(256, size=(SHARDS * IMAGES, 8, 8, 3), dtype=np.uint8)
    write_shards(folder, [Image.fromarray(picture) for picture in pixels])
    return folder


def test_the_images_are_those_in_memory(shards):
    streamed = ImageShards(shards, "label")
    images, labels, names = load_labelled_images(shards, "label")
    assert (len(streamed), streamed.sample_shape, streamed.class_names) == (180, (3, 8, 8), names)
    batch = streamed.__getitems__([179, 3, 88, 3, 91])
    torch.testing.assert_close(batch.x_0, to_network_units(images[[179, 3, 88, 3, 91]]), atol=0, rtol=0)
    assert batch.class_labels.tolist() == labels[[179, 3, 88, 3, 91]].tolist()
    assert ImageShards(shards, None, resolution=4, channels=1).__getitems__([0]).x_0.shape == (1, 1, 4, 4)


def test_memory_holds_two_windows(shards):
    streamed = ImageShards(shards, None)
    streamed.sampler.window = GROUP
    for row in streamed.sampler:
        streamed.__getitems__([row])
        assert sum(map(len, streamed.cache.values())) <= 4 * GROUP


def test_a_group_is_read_once_an_epoch_however_long_it_is(tmp_path, monkeypatch):
    pictures, reads = tmp_path / "pictures", []
    pictures.mkdir()
    for i, number in enumerate((5, 40, 7, 30, 1)):
        rows = {"image": [Image.new("L", (4, 4), row) for row in range(number)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(pictures / f"train-{i}.parquet", batch_size=99)
    streamed = ImageShards(pictures, None)
    streamed.sampler.window = 10
    monkeypatch.setattr(shards_module, "_open", lambda file, *more: reads.append(file) or open_file(file, *more))
    streamed.cache.clear()
    rows = list(streamed.sampler)
    for i in range(0, len(rows), 4):
        streamed.__getitems__(rows[i : i + 4])
    assert len(reads) == 5


def test_each_epoch_has_its_order(shards, tmp_path):
    """Accelerate tells the sampler the epoch."""

    class Recorded(ImageShards):
        def __getitems__(self, indices):
            seen.append(indices)
            return super().__getitems__(indices)

    seen, streamed = [], Recorded(shards, None)
    args = training_options(tmp_path, train_batch_size=60, max_train_steps=6)
    unet = MLPModel(3, (8, 8), hidden_dim=8, num_hidden_layers=1)
    training(DDPMMLPPipeline(unet, DDPMScheduler()), streamed, args)
    for epoch in range(2):
        streamed.sampler.set_epoch(epoch)
        assert [row for batch in seen[3 * epoch : 3 * epoch + 3] for row in batch] == list(streamed.sampler)


def test_an_epoch_has_each_row_once_and_stays_in_its_window():
    sizes, window = [7] * 30, 50
    sampler = WindowSampler(sizes, seed=1, window=window)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second) == list(range(210))
    for i in range(0, 210, 56):  # eight groups are the first to hold 50 rows
        groups = np.unique(np.array(first[i : i + 56]) // 7)
        assert len(groups) <= 8
    assert first[:56] != sorted(first[:56])


def train(folder, *argv):
    argv = ("--label_column", "label", "--block_out_channels", "16,32", "--train_batch_size", 16, *argv)
    argv += ("--max_train_steps", 24, "--checkpointing_steps", 12, "--lr_warmup_steps", 2, "--no-figures")
    argv += ("--streaming", "--output_dir", folder, "--resume_from_checkpoint", "latest", "--report_to", "none")
    return forked.Command("train_images", [str(word) for word in argv], folder.parent).wait()


def test_a_resumed_run_ends_bit_for_bit_where_it_would_have_ended(shards, tmp_path):
    """Its first state lies in the second epoch."""
    (tmp_path / "resumed").mkdir()
    result = train(tmp_path / "whole", "--dataset_name", shards)
    assert result.returncode == 0, result.stderr
    assert "180 images, 8×8, channels: 3, classes: 3" in result.stdout
    shutil.copytree(tmp_path / "whole" / "checkpoint-12", tmp_path / "resumed" / "checkpoint-12")
    result = train(tmp_path / "resumed", "--dataset_name", shards)
    assert "resuming at step 12" in result.stdout
    whole, resumed = (
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "resumed")
    )
    assert whole == resumed


def test_what_can_not_be_streamed_is_refused(shards, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "0.png")
    assert_one_line_error(train(tmp_path / "run", "--dataset_name", pictures), "does not consist of Parquet files")
    assert_one_line_error(train(tmp_path / "run", "--dataset_name", shards, "--skip_corrupt"), "streaming")
    assert not (tmp_path / "run").exists()
    for arguments, message in (
        ((tmp_path / "nowhere", None), "is neither a folder nor a data set on the hub"),
        ((shards, None, "test"), "no split 'test', only train"),
        ((next(shards.iterdir()), None, "test"), "no split 'test', only train"),
        ((shards, "species"), "no column 'species' of labels, only image, label"),
    ):
        with pytest.raises(DatasetError, match=message):
            ImageShards(*arguments)


def test_a_wrong_image_is_named(tmp_path):
    images = [Image.new("L", (8, 8)), Image.new("L", (8, 9)), {"bytes": b"no picture", "path": None}]
    write_shards(tmp_path / "sizes", images[:2])
    write_shards(tmp_path / "broken", images[::2])
    with pytest.raises(DatasetError, match=r"row 1 of .*sizes is 8×9 pixels, but the first image is 8×8"):
        ImageShards(tmp_path / "sizes", None).__getitems__([1])
    with pytest.raises(DatasetError, match=r"row 1 of .*broken can't be decoded"):
        ImageShards(tmp_path / "broken", None).__getitems__([1])


def test_files_that_do_not_fit_each_other_are_named(shards, tmp_path):
    pictures = shutil.copytree(shards, tmp_path / "pictures")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    rows = {"image": [Image.new("RGB", (8, 8))], "label": [1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(pictures / "train-00009-of-00009.parquet")
    with pytest.raises(DatasetError, match=r"columns image and label of .*train-00009.* differ from those of"):
        ImageShards(pictures, "label")
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    for file in damaged.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"can't read .*damaged/train-00000.*\.parquet"):
        ImageShards(damaged, None)
    empty = tmp_path / "empty"
    write_shards(empty, [Image.new("RGB", (8, 8))] * 4)
    features["label"] = datasets.ClassLabel(names=NAMES)
    none = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    none.to_parquet(empty / "train-0.parquet")
    assert len(ImageShards(empty, "label")) == 4
