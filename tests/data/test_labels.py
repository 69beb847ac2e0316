"""Labels and conditions on their way from the data to the loss."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import MNIST, needs_mnist
from PIL import Image
from small_training import training_options

from ddpm_mlp_pipeline import DDPMMLPPipeline, train
from ddpm_mlp_pipeline.data.batches import Batch, TensorBatches
from ddpm_mlp_pipeline.data.images import load_labelled_images
from ddpm_mlp_pipeline.data.normalized import load_normalized
from ddpm_mlp_pipeline.data.points import load_points, split_columns
from ddpm_mlp_pipeline.errors import DatasetError
from ddpm_mlp_pipeline.models.mlp import MLPModel
from ddpm_mlp_pipeline.training.options import PointTrainingArguments
from ddpm_mlp_pipeline.training.pipelines import make_point_pipeline

TABLE = pd.DataFrame(
    {
        "x": [1.0, 2.0, 3.0, 4.0, 6.0],
        "kind": ["b", "a", "b", "c, d", "a"],
        "t": [10.0, 20.0, 30.0, 40.0, 50.0],
        "y": [0.0, 1.0, 0.0, 1.0, 3.0],
        "id": [10, 9, 10, 9, 2],
    }
)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_files_labels_and_conditions(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    TABLE.to_csv(path, index=False) if suffix == ".csv" else TABLE.to_parquet(path)
    args = PointTrainingArguments(
        dataset=str(path), label_column="kind", condition_columns=["t"], exclude=["id"], output_dir="none"
    )
    pipeline, data = make_point_pipeline(args)
    assert pipeline.class_names == ["a", "b", "c, d"]
    assert pipeline.data_columns == ["x", "y"]
    assert pipeline.null_label == 3
    assert pipeline.condition_columns == ["t"]
    assert pipeline.config.class_shares is None  # a label without a condition is never trained
    torch.testing.assert_close(data.class_labels, torch.tensor([1, 0, 1, 2, 0]))
    torch.testing.assert_close(data.condition[:, 0] * np.std(TABLE["t"]) + 30, torch.tensor(TABLE["t"]).float())
    # As the judging commands load it
    folder = tmp_path / "checkpoint"
    pipeline.save_pretrained(folder)
    again = load_normalized(DDPMMLPPipeline.from_pretrained(folder), str(path))
    for name in ("samples", "class_labels", "condition"):
        torch.testing.assert_close(getattr(again, name), getattr(data, name))


def test_the_shares_of_the_classes_are_recorded(tmp_path):
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    args = PointTrainingArguments(dataset=str(tmp_path / "data.csv"), label_column="kind", output_dir="none")
    make_point_pipeline(args)[0].save_pretrained(tmp_path / "checkpoint")
    assert DDPMMLPPipeline.from_pretrained(tmp_path / "checkpoint").config.class_shares == [0.4, 0.4, 0.2]
    unlabelled, _ = make_point_pipeline(dataclasses.replace(args, label_column=None, exclude=["kind"]))
    assert unlabelled.config.class_shares is None


def test_whole_numbers_are_labels_in_their_order(tmp_path):
    TABLE.to_csv(tmp_path / "data.csv", index=False)
    dataset = load_points(tmp_path / "data.csv", label_column="id", exclude=["kind"])
    *_, labels, names = split_columns(dataset, "id")
    assert names == ["2", "9", "10"]
    assert labels.tolist() == [2, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "nothing"}, "no column 'nothing'"),
        ({"condition_columns": ["kind"]}, "'b' in row 1, column 'kind'"),
        ({"condition_columns": ["nothing"]}, "no column 'nothing'"),
        ({"label_column": "half", "exclude": ["kind"]}, "whole numbers"),
        ({"label_column": "gap", "exclude": ["kind", "half"]}, "no label in row 2"),
    ],
)
def test_what_can_not_be_a_label_or_a_condition(tmp_path, options, message):
    TABLE.assign(half=TABLE["x"] / 2 + 0.25, gap=["a", None, "b", "b", "b"]).to_csv(tmp_path / "data.csv", index=False)
    with pytest.raises(DatasetError, match=message):
        load_points(tmp_path / "data.csv", **options)


def test_the_sets_own_labels_and_angles():
    dataset = load_points("eight_gaussians", 500, noise=0.0, label_column="label")
    points, conditions, labels, names = split_columns(dataset, "label")
    assert conditions.shape == (500, 0)
    angle = np.array(names, dtype=int)[labels] * math.pi / 4
    np.testing.assert_allclose(points, np.stack([np.cos(angle), np.sin(angle)], axis=1), atol=1e-12)
    points, theta, *_ = split_columns(
        load_points("swiss_roll", 500, noise=0.0, condition_columns=["angle"]), None, ["angle"]
    )
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), theta[:, 0] / (4.5 * math.pi))
    np.testing.assert_array_equal(points, split_columns(load_points("swiss_roll", 500, noise=0.0))[0])


def test_subfolders_are_labels_and_stay_with_their_pictures(tmp_path):
    for label, grey in (("dark", 10), ("light", 200)):
        (tmp_path / label).mkdir()
        for i in range(3):
            Image.new("L", (4, 4), grey + i).save(tmp_path / label / f"{i}.png")
    (tmp_path / "dark" / "1.png").write_bytes(b"broken")
    left_out = []
    images, labels, names = load_labelled_images(tmp_path, "label", on_corrupt=left_out.append)
    assert len(left_out) == 1
    assert names == ["dark", "light"]
    assert [(names[label], image.max() < 100) for image, label in zip(images, labels, strict=True)] == [
        (name, name == "dark") for name in ["dark"] * 2 + ["light"] * 3
    ]
    with pytest.raises(DatasetError, match="no column 'class'"):
        load_labelled_images(tmp_path, "class")


@needs_mnist
def test_digits_keep_their_labels_when_some_are_chosen():
    images, labels, names = load_labelled_images(MNIST, "label", "test", number=50, seed=3)
    everything, of_everything, _ = load_labelled_images(MNIST, "label", "test")
    rows = np.random.default_rng(3).permutation(len(everything))[:50]
    assert names == list("0123456789")
    torch.testing.assert_close(images, everything[rows])
    torch.testing.assert_close(labels, of_everything[rows])


SEEN = []


class Recorded(MLPModel):
    """Records what it is told."""

    def forward(self, sample, timestep, class_labels=None, condition=None, return_dict=True):
        if self.training:
            SEEN.append((class_labels.clone(), condition.isnan().any(dim=1)))
        return super().forward(sample, timestep, class_labels, condition, return_dict)


def train_labelled(folder, **changes):
    args = training_options(folder, label_dropout=0.25, **changes)
    torch.manual_seed(0)
    pipeline = DDPMMLPPipeline(
        Recorded(hidden_dim=8, num_hidden_layers=1, num_class_embeds=3, condition_dim=1),
        args.make_scheduler(clip_sample_range=3.0),
    )
    SEEN.clear()
    data = torch.randn(150, 2, generator=torch.Generator().manual_seed(1))
    losses = train(pipeline, TensorBatches(data, torch.arange(150) % 3, data[:, :1]), args)
    return pipeline, losses


def test_labels_are_dropped_and_runs_resume_bit_for_bit(tmp_path):
    pipeline, losses = train_labelled(tmp_path / "whole", checkpointing_steps=4)
    labels, is_nothing = (torch.cat(seen) for seen in zip(*SEEN, strict=True))
    torch.testing.assert_close(labels == 3, is_nothing)  # both go together
    assert abs(is_nothing.float().mean() - 0.25) < 4 * (0.25 * 0.75 / len(labels)) ** 0.5
    for state in ("checkpoint-8", "checkpoint-4"):
        (tmp_path / "whole" / state).rename(tmp_path / state)
        folder = tmp_path / f"from-{state}"
        folder.mkdir()
        (tmp_path / state).rename(folder / state)
        resumed, again = train_labelled(folder, checkpointing_steps=4, resume_from_checkpoint="latest")
        assert again == losses
        for name, values in resumed.unet.state_dict().items():
            torch.testing.assert_close(values, pipeline.unet.state_dict()[name], rtol=0, atol=0)


def test_what_is_forgotten():
    batch = Batch(torch.zeros(2, 1), torch.tensor([1, 2]), torch.ones(2, 2))
    forgotten = batch.forget(torch.tensor([True, False]), null_label=5)
    assert forgotten.class_labels.tolist() == [5, 2]
    assert forgotten.condition.isnan().tolist() == [[True, True], [False, False]]
    # A stock network without a null label keeps its labels.
    assert batch.forget(torch.tensor([True, True]), null_label=None).class_labels.tolist() == [1, 2]
