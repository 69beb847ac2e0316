"""Tables, from training to rows without PyTorch: columns, kinds, known cells, and input that can't be used."""

import json

import forked
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from helpers import assert_one_line_error

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.data.batches import Batch
from ddpm_mlp_pipeline.errors import BundleError
from ddpm_mlp_pipeline.models.mlp import MLPModel
from ddpm_mlp_pipeline.runtime.bundle import read_info
from ddpm_mlp_pipeline.runtime.columns import TableCodec
from ddpm_mlp_pipeline.training.losses import loss_of_unknown
from ddpm_mlp_pipeline.training.pipelines import conceal_columns
from ddpm_mlp_pipeline.writers import find_writer


def people(number: int, seed: int = 0) -> pd.DataFrame:
    """Rows in which age decides whether there is an income, and the country the height."""
    rng = np.random.default_rng(seed)
    country = rng.choice(["NL", "PE", "Côte d'Ivoire"], number, p=[0.6, 0.3, 0.1])
    age = rng.integers(1, 90, number)
    height = rng.normal(np.where(country == "NL", 182.0, 165.0), 2.0).round(1)
    income = np.where(age < 18, np.nan, np.exp(rng.normal(10, 0.5, number)).round(2))
    joined = pd.Timestamp("2020-01-01") + pd.to_timedelta(rng.integers(0, 1500, number), "D")
    names = {"country": country, "age": age, "height": height, "income": income, "is_member": rng.random(number) < 0.5}
    return pd.DataFrame({**names, "joined": joined.strftime("%Y-%m-%d"), "id": np.arange(number)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a table, a checkpoint and a bundle."""
    folder = tmp_path_factory.mktemp("people")
    people(3000).to_csv(folder / "people.csv", index=False)
    options = ["--max_train_steps", "1500", "--hidden_dim", "128", "--train_batch_size", "256", "--no-figures"]

    def run_forked(*words):
        command, *argv = map(str, words)
        return forked.Command(command, argv, folder).wait()

    run = run_forked("train_table", "--dataset", folder / "people.csv", "--output_dir", folder / "people", *options)
    assert run.returncode == 0, run.stderr
    assert "id" in run.stdout.split("left out")[-1]
    export = run_forked("export", folder / "people", folder / "people-onnx", "--num_inference_steps", "20")
    assert export.returncode == 0, export.stderr
    return folder


@pytest.mark.slow
def test_samples_have_the_columns_types_and_relations_of_the_file(trained, run_forked, tmp_path):
    bundle = trained / "people-onnx"
    for suffix in ("csv", "parquet"):
        drawn = run_forked("sample", bundle, "--num_samples", "2000", "--output", tmp_path / f"new.{suffix}")
        assert drawn.stdout.endswith("new." + suffix + ": 2000 rows\n"), drawn.stderr
    real, new = people(3000).drop(columns="id"), pd.read_csv(tmp_path / "new.csv")
    parquet = pd.read_parquet(tmp_path / "new.parquet")
    assert list(new) == list(parquet) == list(real)
    assert set(new["country"]) == set(real["country"])
    assert pd.api.types.is_integer_dtype(new["age"])
    assert new["age"].equals(parquet["age"])
    assert new["is_member"].dtype == parquet["is_member"].dtype == bool
    assert new["joined"].tolist() == pd.to_datetime(parquet["joined"]).dt.strftime("%Y-%m-%d").tolist()
    assert parquet["income"].isna().equals(new["income"].isna())
    # What the table holds: half of a percent of the shares, and relations that a product of the columns has not
    assert abs((new["country"] == "NL").mean() - 0.6) < 0.06
    assert abs(new["income"].isna().mean() - real["income"].isna().mean()) < 0.05
    assert ((new["age"] < 18) == new["income"].isna()).mean() > 0.9
    assert new.groupby("country")["height"].mean()["NL"] > new.groupby("country")["height"].mean()["PE"] + 10


@pytest.mark.slow
def test_known_cells_stay_and_decide_the_others(trained, run_forked, tmp_path):
    (tmp_path / "gaps.csv").write_text("id,height,age,country\n7,182.3,NA,\n8,164.7,10,\n9,,,PE\n", encoding="utf-8")
    asked = ["--known", tmp_path / "gaps.csv", "--num_samples", "100", "--seed", "3"]
    for source, name in ((trained / "people-onnx", "bundle.csv"), (trained / "people", "torch.csv")):
        of_checkpoint = ["--scheduler", "ddim", "--num_inference_steps", "20"] if name == "torch.csv" else []
        run = run_forked("sample", source, *asked, *of_checkpoint, "--output", tmp_path / name)
        assert run.returncode == 0, run.stderr
        assert "gaps.csv: the table has no column 'id': ignored" in run.stderr
    first, second, third = (pd.read_csv(tmp_path / "bundle.csv").iloc[i : i + 100] for i in (0, 100, 200))
    assert (first["height"] == 182.3).all()
    assert (first["country"] == "NL").mean() > 0.85
    assert (second["age"] == 10).all()
    assert second["income"].isna().mean() > 0.85
    assert (third["country"] == "PE").all()
    assert abs(third["height"].mean() - 165) < 1.5
    bundle, checkpoint = (pd.read_csv(tmp_path / name) for name in ("bundle.csv", "torch.csv"))
    np.testing.assert_allclose(bundle["income"], checkpoint["income"], rtol=1e-3)
    others = bundle.columns.drop("income")
    assert (bundle[others] != checkpoint[others]).any(axis=1).sum() <= 3  # rounding may turn a cell
    one = run_forked("sample", trained / "people-onnx", "--condition", "country=NL", "--output", tmp_path / "one.csv")
    assert one.returncode == 0, one.stderr
    assert pd.read_csv(tmp_path / "one.csv")["country"].tolist() == ["NL"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--condition", "country=FR"], "'FR' is not one of its values, "),
        (["--condition", "city=Lima"], "there is no column 'city', only 'country', 'age'"),
        (["--condition", "age=old"], "column 'age': 'old' is not a finite number"),
        (["--condition", "NL"], "known cells are NAME=VALUE, or a .csv file, got 'NL'"),
        (["--condition", "age=3", "--known", "age=4"], "are the same: give one of them"),
    ],
)
def test_what_cannot_be_known_is_refused_in_one_line(trained, run_forked, tmp_path, asked, message):
    run = run_forked("sample", trained / "people-onnx", *asked, "--output", tmp_path / "new.csv")
    assert_one_line_error(run, message)
    assert not (tmp_path / "new.csv").exists()


@pytest.mark.slow
def test_the_doctor_knows_that_a_table_keeps_its_whole_numbers(trained, run_forked):
    run = run_forked("doctor", trained / "people", "--dataset", trained / "people.csv")
    assert "whole numbers" not in run.stdout
    assert "conventions: prediction_type v_prediction" in run.stdout, run.stderr


@pytest.mark.slow
def test_a_table_is_judged_beside_held_out_rows(trained, run_forked, tmp_path):
    people(1000, seed=1).to_csv(tmp_path / "held_out.csv", index=False)
    asked = ["--dataset", trained / "people.csv", "--num_samples", "1000"]
    run = run_forked("evaluate", trained / "people-onnx", *asked)
    assert_one_line_error(run, "name their file, --held_out")
    report = tmp_path / "report.json"
    more = ["--held_out", tmp_path / "held_out.csv", "--target", "height", "--output", report]
    run = run_forked("evaluate", trained / "people-onnx", *asked, *more)
    assert run.returncode == 0, run.stderr
    measures = json.loads(report.read_text())["measures"]
    assert measures["auc"]["floor"][0] < 0.6
    assert measures["quality"]["samples"][0] > 0.85
    assert measures["target"]["samples"][0] > 0.5 * measures["target"]["floor"][0] > 0.4


@pytest.mark.slow
def test_a_table_can_be_fitted_and_guided(trained, run_forked, tmp_path):
    rows = people(3000, seed=2).astype({"income": object})
    rows.loc[rows["income"].isna(), "income"] = "NA"  # another way to write a gap
    rows.to_csv(tmp_path / "rows.csv", index=False)
    fit = ["fit", trained / "people", tmp_path / "fit", "--dataset", tmp_path / "rows.csv", "--num_calls", "3", "2"]
    run = run_forked(*fit, "--steps", "3", "--batch_size", "64")
    assert run.returncode == 0, run.stderr
    asked = ["--sampler", "--sampler_takes_known", "--guidance_scale", "2"]
    run = run_forked("export", tmp_path / "fit", tmp_path / "fit-onnx", *asked)
    assert run.returncode == 0, run.stderr  # sampler.onnx agrees with the runtime
    assert list(OnnxSampler(tmp_path / "fit-onnx").tables) == [3, 2]


@pytest.mark.slow
def test_other_programs_find_the_columns_in_the_bundle(trained):
    sampler = OnnxSampler(trained / "people-onnx")
    points = sampler.sample(5)
    assert points.shape == (5, len(sampler.data_columns))
    assert sampler.codec.names == ["country", "age", "height", "income", "is_member", "joined"]
    info = json.loads((trained / "people-onnx" / "bundle.json").read_text())
    assert info["columns"] == sampler.codec.columns
    assert [*sampler.codec.decode(points)] == sampler.codec.names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3,4,5\n", "line 3"),
        ("a,b\n1,x\n2,3\n3,4\n4,5\n", "--column_kinds"),
        ("a,b\n1,2\n", "at least 2"),
        ("", "can't read"),
        ("a\n" + "\n".join(f"name {i % 2000}" for i in range(4000)), "--exclude a"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(run_forked, tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    run = run_forked("train_table", "--dataset", tmp_path / "bad.csv", "--output_dir", tmp_path / "run")
    assert_one_line_error(run, message)
    assert not (tmp_path / "run").exists()


def test_parquet_columns_have_their_type_where_all_cells_are_missing(tmp_path):
    number = {"z": [-1.0, 1.0], "values": [0.0, 1.0], "decimals": 1, "has_missing": True}
    word = {"values": ["a", "b"], "coding": "one_hot", "has_missing": True}
    columns = [{"name": "n", "kind": "number", **number}, {"name": "w", "kind": "category", **word}]

    class Missing:
        sample_shape, codec = (5,), TableCodec(columns)

    points = Missing.codec.encode({"n": [None, None], "w": [None, None]})
    find_writer(Missing, ".parquet", 2)(tmp_path / "gaps.parquet", iter([points]), 2, Missing)
    schema = pyarrow.parquet.read_schema(tmp_path / "gaps.parquet")
    assert [str(field.type) for field in schema] == ["double", "string"]


def test_a_bundle_whose_columns_are_not_its_coordinates_is_refused(tmp_path):
    column = {"name": "n", "kind": "number", "z": [-1.0, 1.0], "values": [0.0, 1.0], "decimals": 1}
    data = {"data_mean": [0.0], "data_std": [1.0], "data_columns": ["m"]}
    info = {"format": "ddpm-bundle", "version": 2, "sample_shape": [1], **data, "columns": [column]}
    (tmp_path / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(BundleError, match="the coordinates of columns are not the data_columns"):
        read_info(tmp_path / "bundle.json")
    (tmp_path / "bundle.json").write_text(json.dumps(info | {"columns": [{"name": "n"}]}))
    with pytest.raises(BundleError, match="column 'n' is of the kind None"):
        read_info(tmp_path / "bundle.json")


def test_the_network_sees_known_coordinates_and_not_their_noise():
    torch.manual_seed(0)
    unet = MLPModel(4, hidden_dim=8, condition_dim=4, takes_known=True, num_embedded=2)
    x, t = torch.randn(3, 4), torch.tensor(7)
    known = torch.tensor([[0.3, float("nan"), 1.0, float("nan")]]).expand(3, 4)
    other = torch.where(known.isnan(), x, torch.randn(3, 4))
    torch.testing.assert_close(unet(x, t, condition=known).sample, unet(other, t, condition=known).sample)
    assert not torch.allclose(unet(x, t, condition=known).sample, unet(x, t).sample)
    nothing = torch.full((3, 4), float("nan"))
    torch.testing.assert_close(unet(x, t, condition=nothing).sample, unet(x, t).sample)


def test_columns_are_concealed_whole_and_known_ones_have_no_loss():
    x_0 = torch.randn(2000, 5)
    numbers = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    draws = iter([numbers[:, :3], numbers[:, 3:]])
    batch = conceal_columns([0, 1, 2, 2, 2])(Batch(x_0), lambda *shape: next(draws))
    is_known = ~batch.condition.isnan()
    assert (is_known[:, 2:] == is_known[:, 2:3]).all()  # the third column has three coordinates
    assert torch.equal(batch.condition[is_known], x_0[is_known])
    assert abs(is_known[:, :3].float().mean() - 0.5) < 0.03
    assert not torch.equal(is_known[:, 0], is_known[:, 1])

    class Zero:
        def __call__(self, x_t, t, condition):
            return type("Output", (), {"sample": torch.zeros_like(x_t)})

    from diffusers import DDPMScheduler

    eps = torch.randn(2000, 5)
    losses = loss_of_unknown(DDPMScheduler(), Zero(), batch, torch.full((2000,), 10), eps)
    expected = torch.nan_to_num(torch.where(is_known, torch.nan, eps).square().nanmean(dim=1))
    torch.testing.assert_close(losses, expected)
