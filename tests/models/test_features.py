"""Feature networks: the shipped one, the training of others, and Inception from a file of weights."""

import sys

import datasets
import numpy as np
import pytest
import torch
from helpers import CIFAR10, MNIST, Payload, needs_cifar10, needs_mnist

from ddpm_mlp_pipeline.checkpoints import FEATURES
from ddpm_mlp_pipeline.commands import train_features
from ddpm_mlp_pipeline.data.images import load_images, load_labelled_images
from ddpm_mlp_pipeline.errors import CheckpointError, MissingExtraError
from ddpm_mlp_pipeline.judge.features import FeatureNetwork, load_features
from ddpm_mlp_pipeline.judge.metrics import frechet_distance, image_features


def test_images_of_any_size_have_features():
    network = FeatureNetwork(in_channels=3).eval()
    images = torch.randint(256, (2, 3, 40, 31), dtype=torch.uint8)
    assert network(images).shape == (2, 64)


@needs_mnist
def test_the_shipped_network_knows_digits_and_tells_data_from_noise():
    features = load_features(FEATURES[1])
    assert sum(file.stat().st_size for file in FEATURES[1].iterdir()) < 1e6
    images, labels, _ = load_labelled_images(MNIST, "label", "test", number=4000)
    blurred = torch.nn.functional.avg_pool2d(images[:2000].float(), 3, 1, 1).to(torch.uint8)
    y, x, fresh = (image_features([some], features) for some in (images, blurred, load_images(MNIST, number=2000)))
    assert (features.classify(y) == labels).float().mean() > 0.99
    assert 10 * frechet_distance(fresh, y) < frechet_distance(x, y)


@needs_cifar10
def test_the_shipped_network_knows_the_classes_of_cifar10():
    features = load_features(FEATURES[3])
    assert sum(file.stat().st_size for file in FEATURES[3].iterdir()) < 2e6
    images, labels, _ = load_labelled_images(CIFAR10, "label", "test", number=4000)
    x = image_features([images], features)
    torch.testing.assert_close(image_features([images[:100].flip(-1)], features), x[:100])
    assert (features.classify(x) == labels).float().mean() > 0.88


def test_a_folder_that_holds_no_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="can't load the feature network"):
        load_features(tmp_path)


def test_a_file_of_weights_runs_no_code(tmp_path):
    torch.save({"weights": Payload(tmp_path / "was here")}, tmp_path / "intruder.pth")
    (tmp_path / "empty.pth").touch()
    for name in ("intruder.pth", "empty.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: it is no PyTorch file of tensors alone"):
            load_features(tmp_path / name)
    assert not (tmp_path / "was here").exists()


def test_inception_without_its_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(MissingExtraError, match=r"pip install 'ddpm-mlp-pipeline\[inception\]'"):
        load_features(tmp_path / "weights.pth")


def test_inception_is_torch_fidelitys(tmp_path, monkeypatch):
    """The weights are random, since the real ones are not available. Grey images are repeated in three channels."""
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="needs torch-fidelity: pip install -e '.[inception]'"
    )
    theirs = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # it would download its weights
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(theirs, "load_state_dict", lambda *args: None)
        expected = theirs("inception-v3-compat", ["2048"])
    torch.save(expected.state_dict(), tmp_path / "weights.pth")
    grey = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    features = image_features([grey], load_features(tmp_path / "weights.pth"))
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features.float(), expected(grey.repeat(1, 3, 1, 1))[0])
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="are not those of torch-fidelity's Inception"):
        load_features(tmp_path / "weights.pth")


def test_training_one(run_forked, tmp_path):
    """The classes are easy to tell: bright above, or bright below."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["above", "below"])})
    for split, number in (("train", 200), ("test", 60)):
        labels = rng.integers(2, size=number)
        pixels = rng.integers(100, size=(number, 16, 16), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[8 * label : 8 * label + 8] += 120
        rows = datasets.Dataset.from_dict({"image": list(pixels), "label": labels}, features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    argv = ("--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "net", "--train_batch_size", 20)
    argv += ("--layers_per_block", 2, "--block_out_channels", "8,16", "--random_flip", "--mixed_precision", "bf16")
    result = run_forked("train_features", *argv)
    assert result.returncode == 0, result.stderr
    assert "60 of 60 test images" in result.stdout
    network = load_features(tmp_path / "net")
    assert network.config.num_classes == 2
    assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 4


def test_each_image_is_shifted_on_its_own():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (400, 3, 6, 5), dtype=torch.uint8)
    shifted = train_features.shift(images, 2)
    moves = {}
    for image, moved in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = {(i, j): padded[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)}
        (place,) = (place for place, window in windows.items() if torch.equal(window, moved))
        moves[place] = moves.get(place, 0) + 1
    assert len(moves) == 25
    assert max(moves.values()) < 4 * 400 / 25
