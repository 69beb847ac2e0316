"""The point sets lie where their formulas say; files are read, or refused with row and column."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from ddpm_mlp_pipeline import load_points
from ddpm_mlp_pipeline.data.points import POINT_SETS, check_columns, to_array, warn_of_columns
from ddpm_mlp_pipeline.errors import DatasetError


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
        ("a,b\n1,2,3\n4,5,6\n", ["can't read", "more fields"]),
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
        (("hart",), "unknown data set 'hart': give one of heart, swiss_roll"),
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


@pytest.mark.parametrize("number", [100, 5000, 50_000])
def test_tails_are_heavy_beyond_those_of_an_exponential(tmp_path, number):
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
