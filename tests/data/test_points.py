"""The point sets satisfy their formulas. Files are read, or refused with row and column."""

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import assume, example, given, strategies as st

from ddpm_mlp_pipeline import load_points
from ddpm_mlp_pipeline.data.points import POINT_SETS, check_columns, to_array, warn_of_columns
from ddpm_mlp_pipeline.errors import DatasetError
from ddpm_mlp_pipeline.writers import csv_header


def points(*args, **kwargs):
    return to_array(load_points(*args, **kwargs))


@pytest.mark.parametrize("name", POINT_SETS)
def test_size_noise_and_seed(name):
    dataset = load_points(name, 500, noise=0.0, seed=1)
    assert isinstance(dataset, Dataset)
    assert dataset.column_names == ["x", "y"]
    clean = to_array(dataset)
    assert clean.shape == (500, 2)
    np.testing.assert_array_equal(clean, points(name, 500, noise=0.0, seed=1))
    assert not np.array_equal(clean, points(name, 500, noise=0.0, seed=2))
    noise = points(name, 500, noise=0.2, seed=1) - clean
    assert noise.std() == pytest.approx(0.2, rel=0.1)
    assert np.abs(clean).max() < 2.1


def test_the_clean_sets_satisfy_their_equations():
    def radius(name):
        return np.hypot(*points(name, 1000, noise=0).T)

    x, y = points("heart", 1000, noise=0).T
    cos = np.sqrt(1 - np.cbrt(x) ** 2)
    branches = [
        (13 * c - 5 * (2 * c**2 - 1) - 2 * (4 * c**3 - 3 * c) - (8 * c**4 - 8 * c**2 + 1)) / 16 for c in (cos, -cos)
    ]
    assert np.minimum(*np.abs(np.array(branches) - y)).max() < 1e-6

    np.testing.assert_allclose(radius("eight_gaussians"), 1)
    np.testing.assert_allclose(np.unique(radius("circles").round(9)), [0.5, 1])
    x, y = points("swiss_roll", 1000, noise=0).T
    np.testing.assert_allclose(np.exp(1j * np.hypot(x, y) * 4.5 * np.pi), (x + 1j * y) / np.hypot(x, y), atol=1e-9)
    x, y = points("checkerboard", 4000, noise=0).T
    assert not ((np.floor(2 * x) + np.floor(2 * y)) % 2).any()
    x, y = points("two_moons", 1000, noise=0).T
    distance = np.minimum(np.abs(np.hypot(x, y) - 1), np.abs(np.hypot(x - 1, y - 0.5) - 1))
    assert distance.max() < 1e-9
    x, y = points("spiral", 1000, noise=0).T
    np.testing.assert_allclose(
        np.exp(2j * np.hypot(x, y) * 3 * np.pi), ((x + 1j * y) / np.hypot(x, y)) ** 2, atol=1e-6
    )


TABLE = pd.DataFrame({"height": [1.5, 1.75, 2.0], "weight": [60, 70, 80], "age": [30.0, 40.0, 50.5]})


def write(path):
    if path.suffix == ".npy":
        np.save(path, TABLE.to_numpy())
    elif path.suffix == ".csv":
        TABLE.to_csv(path, index=False)
    else:
        TABLE.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
def test_files_of_numeric_columns(tmp_path, suffix):
    dataset = load_points(write(tmp_path / f"data{suffix}"))
    assert dataset.column_names == (["x0", "x1", "x2"] if suffix == ".npy" else list(TABLE.columns))
    np.testing.assert_array_equal(to_array(dataset), TABLE.to_numpy())


def test_a_csv_without_a_header_keeps_its_first_point(tmp_path):
    np.savetxt(tmp_path / "data.csv", [[1.5, 2], [3, 4]], delimiter=",")
    dataset = load_points(tmp_path / "data.csv")
    assert dataset.column_names == ["x", "y"]
    np.testing.assert_array_equal(to_array(dataset), [[1.5, 2], [3, 4]])


def test_equal_numbers_in_the_first_line_are_a_point_too(tmp_path):
    (tmp_path / "data.csv").write_text("0.5,0.5\n1,2\n")
    np.testing.assert_array_equal(points(tmp_path / "data.csv"), [[0.5, 0.5], [1, 2]])


def test_some_points_of_a_file(tmp_path):
    chosen = points(write(tmp_path / "data.csv"), 2, seed=1)
    assert len(np.unique(chosen, axis=0)) == 2
    assert all(row in TABLE.to_numpy().tolist() for row in chosen.tolist())


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("a,b\n1,2\n3,four\n", ["row 2", "'b'", "'four'"]),
        ("a,b\n1,2\n,4\n", ["row 2", "'a'", "nan"]),
        ("a,b\n1,inf\n3,4\n", ["row 1", "'b'", "inf"]),
        ("a,b\n1,2,3,4\n1,2\n5,6,7,8,9,9\n", ["can't read"]),
        ("a,b\n1,2,3\n4,5,6\n", ["can't read", "names 2 columns", "3 fields", "quotes"]),
        ("price, EUR,count\n1.5,3\n2.5,4\n", ["can't read", "names 3 columns", "2 fields", "quotes"]),
        ("a\n0,5\n1,6\n", ["can't read", "names 1 columns", "2 fields"]),  # numbered rows, as R writes them
        ("a,b,a\n1,2,3\n4,5,6\n", ["two columns named 'a'"]),
        ("a,b,c d,e\n1,x,,3\n,y,z,4\n", ["row 2, column 'a'", "'x' in row 1, column 'b'", "--exclude a b 'c d'"]),
        ("", ["can't read"]),
        ("a,b\n", ["0 points"]),
    ],
)
def test_a_bad_csv_is_refused_with_its_place(tmp_path, content, fragments):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(DatasetError) as error:
        load_points(path)
    for fragment in ["bad.csv", *fragments]:
        assert fragment in str(error.value)


def test_bad_arrays_are_refused(tmp_path):
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "objects.npy", np.array([[{}, 1], [2, 3]], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(write(tmp_path / "data.npy").read_bytes()[:100])
    (tmp_path / "cut.parquet").write_bytes(write(tmp_path / "data.parquet").read_bytes()[:100])
    np.savez(tmp_path / "several.npz", np.zeros((3, 2)), np.zeros((3, 2)))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("flat.npy", "objects.npy", "cut.npy", "cut.parquet", "several.npy"):
        with pytest.raises(DatasetError, match=f"can't read .*{name}"):
            load_points(tmp_path / name)


@pytest.mark.parametrize("values", [pd.to_datetime(["2020-01-01", "2020-01-02"]), np.array([1 + 2j, 3])])
def test_what_only_looks_like_numbers_is_refused(tmp_path, values):
    table = pd.DataFrame({"a": [1.0, 2.0], "b": values})
    if values.dtype == complex:
        np.save(tmp_path / "data.npy", table.to_numpy(dtype=complex))
        path, message = tmp_path / "data.npy", "complex128"
    else:
        table.to_parquet(tmp_path / "data.parquet")
        path, message = tmp_path / "data.parquet", "row 1, column 'b' is not a finite number"
    with pytest.raises(DatasetError, match=message):
        load_points(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hart",), "unknown data set 'hart': pass one of heart, swiss_roll"),
        (("none.csv",), "no file none.csv"),
        (("heart", 0), "at least 1"),
        (("heart", -5), "at least 1"),
        (("heart", 10, -0.1), "noise"),
        (("heart", 10, float("nan")), "noise"),
        (("heart", 10, None, -1), "seed"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(DatasetError, match=message):
        load_points(*arguments)


@pytest.mark.parametrize("names", [["a", "b", "label"], ["label", "b", "a"]])
def test_columns_are_left_out_or_chosen_by_name(tmp_path, names):
    values = {"a": [1.0, 2.0], "b": [3.0, 4.0], "label": ["no", None]}
    path = tmp_path / "data.csv"
    pd.DataFrame({name: values[name] for name in names}).to_csv(path, index=False)
    assert load_points(path, exclude=["label"]).column_names == [name for name in names if name != "label"]
    np.testing.assert_array_equal(points(path, columns=["b", "a"]), [[3, 1], [4, 2]])
    with pytest.raises(DatasetError, match="no column 'c', only 'a', 'b'" if names[0] == "a" else "no column 'c'"):
        load_points(path, columns=["a", "c"])
    with pytest.raises(DatasetError, match="no column 'c' to exclude, only"):
        load_points(path, exclude=["c"])
    with pytest.raises(DatasetError, match=r"all columns of .* are excluded"):
        load_points(path, exclude=names)


def test_numbered_columns_have_no_names_to_choose_by(tmp_path):
    np.save(tmp_path / "data.npy", TABLE.to_numpy())
    np.testing.assert_array_equal(points(tmp_path / "data.npy", columns=list(TABLE)), TABLE.to_numpy())
    write(tmp_path / "data.csv")
    np.testing.assert_array_equal(points(tmp_path / "data.csv", columns=["x0", "x1", "x2"]), TABLE.to_numpy())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\r\t")), min_size=1))
@example(["price, EUR", "count"])
@example(["2019", "2020"])
@example(["TRUE"])
@example(["nan"])
@example(["inf", "NA"])
@example([" a", "b ", 'say "x"', "a\nb", "c\r\nd", "nan", "-1"])
def test_the_names_in_a_csv_come_back(names):
    names = [name or "empty" for name in dict.fromkeys(names)]
    assume(len(set(names)) == len(names))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.csv"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(csv_header(names) + "\n")
            np.savetxt(file, np.arange(2 * len(names)).reshape(2, -1), delimiter=",")
        dataset = load_points(path)
    assert dataset.column_names == names
    np.testing.assert_array_equal(to_array(dataset), np.arange(2 * len(names)).reshape(2, -1))


@pytest.mark.parametrize("number", [100, 5000, 50_000])
def test_tails_heavier_than_an_exponentials_are_reported(tmp_path, number):
    rng = np.random.default_rng(0)
    fine = [rng.normal(size=number), rng.uniform(size=number), rng.exponential(size=number)]
    heavy = [rng.lognormal(0, 3, number), rng.standard_cauchy(number)] if number > 100 else []
    np.save(tmp_path / "a.npy", np.stack(fine + heavy, axis=1))
    found = list(check_columns(tmp_path / "a.npy"))
    assert [warning.check for warning in found] == (["heavy tails"] if heavy else [])
    for i in range(5):
        assert (f"'x{i}' (" in "".join(warning.message for warning in found)) == (i >= 3 and bool(heavy))


def test_training_warns_of_whole_numbers(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("count,size\n" + "".join(f"{i % 7},{i / 9}\n" for i in range(50)))
    warn_of_columns(tmp_path / "a.csv")
    assert capsys.readouterr().err.startswith("warning: whole numbers: in 'count', which")
    warn_of_columns("heart")
    assert capsys.readouterr().err == ""
