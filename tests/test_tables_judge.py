"""The judge of tables, on tables whose scores are known."""

import json

import numpy as np
import pandas as pd
import pytest
from measure_tables import read_table
from sklearn.metrics import r2_score

from ddpm_mlp_pipeline.errors import DatasetError
from ddpm_mlp_pipeline.judge import tables
from ddpm_mlp_pipeline.judge.tables import (
    align,
    classifier_auc,
    fill_iterative,
    fill_mean_mode,
    hide_cells,
    judge_gaps,
    judge_table,
    predict_target,
    score_gaps,
    share_closer,
)

COLUMNS = [
    {"name": "height", "kind": "number"},
    {"name": "weight", "kind": "number"},
    {"name": "born", "kind": "date", "format": "%Y-%m-%d", "unit": "D"},
    {"name": "size", "kind": "category"},
]


def people(number, seed):
    """Height is uniform, weight is 2 · height + noise of 0.3, size is height's third; a tenth lacks born."""
    rng = np.random.default_rng(seed)
    height = rng.uniform(-(3**0.5), 3**0.5, number)  # of the variance 1
    born = pd.Series((np.datetime64("1980-01-01") + rng.integers(0, 9000, number)).astype(str))
    return pd.DataFrame(
        {
            "height": height,
            "weight": 2 * height + 0.3 * rng.standard_normal(number),
            "born": born.mask(rng.random(number) < 0.1),
            "size": np.array(["small", "medium", "large"])[np.digitize(height, [-(3**-0.5), 3**-0.5])],
            "name": [f"person {seed} {i}" for i in range(number)],
        }
    )


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(tables, "ROUNDS", 30)  # enough for small tables


@pytest.fixture(scope="module")
def train():
    return people(600, 0)


@pytest.fixture(scope="module")
def held_out():
    return people(300, 1)


def shuffled(table):
    """Break each column's relation to the others."""
    rng = np.random.default_rng(2)
    return pd.DataFrame({name: rng.permutation(table[name].to_numpy(object)) for name in table}).infer_objects()


def test_fresh_rows_of_the_same_distribution_are_at_the_floor(train, held_out):
    report = judge_table(train, held_out, people(300, 3), COLUMNS, "weight")
    json.dumps(report)
    assert report["rows"] == {"train": 600, "held_out": 300, "synthetic": 300}
    assert report["target"] == {"column": "weight", "score": "r2"}
    measures = report["measures"]
    for name, expected, tolerance in (
        ("column_shapes", 0.95, 0.04),
        ("column_pair_trends", 0.9, 0.06),
        ("gap_shares", 0.99, 0.02),
        ("auc", 0.5, 0.06),
        ("closer_to_training", 0.5, 0.08),
        ("exact_copies", 0, 0),
        ("target", 0.977, 0.03),  # 1 − 0.09 / 4.09, less what the trees don't learn
    ):
        assert measures[name]["samples"] == pytest.approx(expected, abs=tolerance), name
        assert measures[name]["floor"] == pytest.approx(expected, abs=tolerance), name
    assert measures["quality"]["samples"] == pytest.approx(
        (measures["column_shapes"]["samples"] + measures["column_pair_trends"]["samples"]) / 2
    )


def test_shuffled_columns_keep_their_shapes_and_lose_their_relations(train, held_out):
    measures = judge_table(train, held_out, shuffled(people(300, 3)), COLUMNS, "weight")["measures"]
    assert measures["column_shapes"]["samples"] == pytest.approx(measures["column_shapes"]["floor"], abs=0.03)
    assert measures["column_pair_trends"]["samples"] < measures["column_pair_trends"]["floor"] - 0.1
    assert measures["auc"]["samples"] > 0.9
    assert measures["target"]["samples"] < 0.4


def test_copies_of_training_rows_are_found(train, held_out):
    copies = train.sample(300, random_state=0)
    measures = judge_table(train, held_out, copies, COLUMNS)["measures"]
    assert measures["exact_copies"] == {"samples": 1, "floor": 0}
    # Half of the training rows are searched: their copies are closer, the others' are so by chance.
    assert measures["closer_to_training"]["samples"] == pytest.approx(0.75, abs=0.06)
    assert "target" not in measures
    half = pd.concat([copies[:150], people(150, 3)])
    half["height"] += 1e-12  # less than nine digits show
    assert judge_table(train, held_out, half, COLUMNS)["measures"]["exact_copies"]["samples"] == 0.5


def test_the_distance_of_rows_is_that_of_a_loop(monkeypatch):
    rng = np.random.default_rng(0)
    columns = [{"name": name, "kind": "number"} for name in "ab"] + [{"name": "c", "kind": "category"}]

    def draw(number):
        table = pd.DataFrame({"a": rng.standard_normal(number), "b": rng.integers(3, size=number).astype(float)})
        table["c"] = rng.choice(["x", "y"], number)
        return align(columns, table.mask(rng.random(table.shape) < 0.2))[0]

    train, held_out, rows = draw(40), draw(30), draw(20)
    unit = {name: train[name].quantile(0.75) - train[name].quantile(0.25) for name in "ab"}

    def distance(x, y):
        parts = [abs(x[k] - y[k]) / unit[k] if pd.notna(x[k]) and pd.notna(y[k]) else None for k in "ab"]
        gaps = [float(pd.isna(x[k]) != pd.isna(y[k])) for k in "ab"]
        return sum(g if p is None else p for p, g in zip(parts, gaps, strict=True)) + (x["c"] != y["c"])

    def nearest(x, reference):
        return min(distance(x, y) for _, y in reference.iterrows())

    expected = []
    for _, x in rows.iterrows():
        of_train, of_held_out = nearest(x, train[:30]), nearest(x, held_out)
        expected.append(0.5 if np.isclose(of_train, of_held_out, atol=1e-6) else of_train < of_held_out)
    assert share_closer(rows, train, held_out, columns) == pytest.approx(np.mean(expected))
    monkeypatch.setattr(tables, "CHUNK", 100)  # a few rows at a time
    assert share_closer(rows, train, held_out, columns) == pytest.approx(np.mean(expected))


def test_the_auc_of_shifted_gaussians_is_its_closed_form():
    """Φ(d / √2) for a shift of d standard deviations: 0.921 for two."""
    rng = np.random.default_rng(0)
    x, y = (pd.DataFrame({"x": rng.normal(mean, size=2000)}) for mean in (0, 2))
    assert classifier_auc(x, y, [{"name": "x", "kind": "number"}]) == pytest.approx(0.921, abs=0.015)


def test_the_classifier_sees_gaps_and_takes_many_categories():
    rng = np.random.default_rng(0)
    columns = [{"name": "x", "kind": "number"}, {"name": "city", "kind": "category"}]
    x, y = (pd.DataFrame({"x": rng.normal(size=1000), "city": rng.integers(600, size=1000)}) for _ in "xy")
    assert classifier_auc(*align(columns, x, y), columns) == pytest.approx(0.5, abs=0.05)
    y["x"] = y["x"].mask(rng.random(1000) < 0.5)
    assert classifier_auc(*align(columns, x, y), columns) == pytest.approx(0.75, abs=0.04)  # half are recognised


def test_a_target_of_categories_has_an_accuracy(train, held_out):
    real, fresh = align(COLUMNS, train, held_out)
    accuracy, score = predict_target(real, fresh, COLUMNS, "size")
    assert score == "accuracy"
    assert accuracy > 0.95
    real["size"] = "small"  # nothing to learn
    assert predict_target(real, fresh, COLUMNS, "size")[0] == (fresh["size"] == "small").mean()
    real["size"] = None
    assert predict_target(real, fresh, COLUMNS, "size") == (None, "accuracy")
    with pytest.raises(DatasetError, match="'name' is no column"):
        predict_target(real, fresh, COLUMNS, "name")


def test_tables_are_brought_to_one_form(tmp_path):
    columns = [
        {"name": "year", "kind": "date", "format": "%Y", "unit": "D"},
        {"name": "code", "kind": "category"},
        {"name": "text", "kind": "category"},
        {"name": "flag", "kind": "boolean"},
    ]
    (tmp_path / "a.csv").write_text("year,code,text,flag\n1971,3,None,True\n,,NA,\n")
    (tmp_path / "b.csv").write_text("year,code,text,flag\n1971,3.0,None,True\n1972,2.5,7,FALSE\n")
    a, b = align(columns, read_table(tmp_path / "a.csv"), read_table(tmp_path / "b.csv"))
    assert a["year"].tolist() == pytest.approx([365, np.nan], nan_ok=True)
    assert a["code"].tolist() == ["3.0", None]
    assert a["text"].tolist() == ["None", "NA"]
    assert a["flag"].tolist() == ["true", None]
    assert b.loc[0].tolist() == a.loc[0].tolist()
    for column, message in (
        ({"name": "text", "kind": "number"}, "'None' in the column 'text' is not a number"),
        ({"name": "code", "kind": "date", "format": "%Y-%m-%d"}, "in the column 'code' is not a date"),
        ({"name": "age", "kind": "number"}, "a table has no column 'age'"),
    ):
        with pytest.raises(DatasetError, match=message):
            align([column], read_table(tmp_path / "a.csv"))
    with pytest.raises(DatasetError, match=r"none\.csv can't be read"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DatasetError, match="'train' has 2 rows"):
        judge_table(*[read_table(tmp_path / "a.csv")] * 3, columns)


def test_as_many_cells_are_hidden_as_asked_for_and_always_the_same(held_out):
    gaps, hidden = hide_cells(held_out, COLUMNS, 0.3, seed=5)
    known = held_out[[c["name"] for c in COLUMNS]].notna().to_numpy()
    assert hidden.sum() / known.sum() == pytest.approx(0.3, abs=0.03)
    assert not (hidden & ~known).any()
    assert (gaps["name"] == held_out["name"]).all()
    assert (gaps[[c["name"] for c in COLUMNS]].isna().to_numpy() == (hidden | ~known)).all()
    assert (hide_cells(held_out, COLUMNS, 0.3, seed=5)[1] == hidden).all()
    assert (hide_cells(held_out, COLUMNS, 0.3, seed=6)[1] != hidden).any()


def test_gaps_have_the_errors_of_the_best_guesses(train, held_out):
    """A mean errs by the standard deviation. Weight given height errs by 0.3, of 2.02, where height is known."""
    columns = [COLUMNS[0], COLUMNS[1], COLUMNS[3]]
    truth = [held_out.copy()]
    report = judge_gaps(train, held_out, columns, {"truth": lambda gaps: truth}, share=0.2)
    assert report["truth"] | {"columns": None} == {
        "numbers": 0, "categories": 0, "overall": 0, "coverage": None, "columns": None,
    }  # fmt: skip
    assert report["mean_mode"]["numbers"] == pytest.approx(1, abs=0.15)
    assert report["mean_mode"]["categories"] == pytest.approx(2 / 3, abs=0.1)
    assert report["mean_mode"]["coverage"] is None
    iterative, draws = report["iterative"], report["iterative_draws"]
    # Of the hidden weights, a fifth has a hidden height, too, of which only the size is known.
    assert iterative["numbers"] < 0.5
    assert report["trees"]["numbers"] < 0.35
    assert report["trees"]["categories"] < 0.2
    assert draws["overall"] == pytest.approx(iterative["overall"], abs=0.1)
    assert 0.8 < draws["coverage"] <= 1
    assert iterative["overall"] == pytest.approx(np.mean([*iterative["columns"].values()]))


@pytest.mark.parametrize("decimals", [6, 0], ids=["numbers that differ", "numbers of few values"])
def test_draws_are_averaged_and_their_intervals_measured(train, decimals):
    rng = np.random.default_rng(0)
    columns = [COLUMNS[0], COLUMNS[3]]
    train, held_out = (table.round({"height": decimals}) for table in (train, people(1000, 1)))

    def draw(gaps):  # from the columns' own distributions, independent of the rest
        other = people(1000, rng.integers(10, 10**6)).round({"height": decimals})
        return gaps.assign(**{name: gaps[name].where(gaps[name].notna(), other[name]) for name in ("height", "size")})

    gaps, hidden = hide_cells(held_out, columns)
    one, many = (score_gaps(train, held_out, hidden, [draw(gaps) for _ in range(n)], columns) for n in (1, 40))
    assert one["numbers"] == pytest.approx(2**0.5, rel=0.1)  # the difference of two draws
    assert many["numbers"] == pytest.approx(1, rel=0.1)
    assert one["coverage"] is None
    assert many["coverage"] == pytest.approx(0.9, abs=0.04)
    assert one["categories"] == pytest.approx(2 / 3, abs=0.08)
    # A draw that leaves a cell empty gets the mean.
    empty, means = (
        score_gaps(train, held_out, hidden, draws, columns) for draws in ([gaps], fill_mean_mode(train, gaps))
    )
    assert empty == means
    with pytest.raises(DatasetError, match="has 3 rows, but there are 1000"):
        score_gaps(train, held_out, hidden, [gaps[:3]], columns)
    with pytest.raises(DatasetError, match="no table was filled"):
        score_gaps(train, held_out, hidden, [], columns)


def test_the_iterative_imputer_is_a_linear_regression():
    rng = np.random.default_rng(0)
    columns = [{"name": name, "kind": "number"} for name in "xy"] + [{"name": "empty", "kind": "category"}]
    x = rng.standard_normal(1000)
    train = pd.DataFrame({"x": x, "y": 10 - 3 * x + rng.standard_normal(1000), "empty": None})
    slope, offset = np.polyfit(train["x"], train["y"], 1)
    gaps = pd.DataFrame({"x": np.linspace(-1.5, 1.5, 50), "y": np.nan, "empty": None})
    (filled,) = fill_iterative(*align(columns, train, gaps), columns)
    assert r2_score(offset + slope * gaps["x"], filled["y"]) > 0.98
    assert filled["x"].tolist() == pytest.approx(gaps["x"].tolist())
