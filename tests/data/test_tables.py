"""Tables of any columns: the kinds that are found, what is left out, and that the coded data are as promised."""

import csv
import datetime
import decimal
import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from ddpm_mlp_pipeline.data.tables import Table, describe, load_table, make_codec
from ddpm_mlp_pipeline.errors import DatasetError
from ddpm_mlp_pipeline.runtime.columns import TableCodec

COLUMNS = ["name", "amount", "size", "whole", "day", "time", "word", "town", "flag", "code", "two"]


def mixed(num_rows=3000, seed=0):
    """Return the text of a CSV file of columns of all kinds, with gaps."""
    rng = np.random.default_rng(seed)
    day = np.datetime64("2019-12-30") + rng.integers(0, 400, num_rows)
    time = np.datetime64("2020-01-01T00:00:00") + rng.integers(0, 10**8, num_rows)
    return pd.DataFrame(
        {
            "name": [f"person {i}" for i in range(num_rows)],
            "amount": [f"{x:.2f}" for x in np.exp(rng.normal(3, 1, num_rows))],
            "size": rng.normal(170, 10, num_rows).round(3).astype(str),
            "whole": np.where(rng.random(num_rows) < 0.2, "", rng.integers(0, 90, num_rows).astype(str)),
            "day": np.where(rng.random(num_rows) < 0.1, "", day.astype(str)),
            "time": np.char.replace(time.astype(str), "T", " "),
            "word": rng.choice(
                ["naïve, “x”", 'a "quoted" word', "NA", "", "雪"], num_rows, p=[0.5, 0.2, 0.1, 0.1, 0.1]
            ),
            "town": [f"town {i}" for i in rng.geometric(0.05, num_rows).clip(max=60)],
            "flag": rng.choice(["TRUE", "FALSE"], num_rows),
            "code": [f"{i:03}" for i in rng.integers(0, 30, num_rows)],
            "two": rng.choice(["0", "1"], num_rows, p=[0.9, 0.1]),
        }
    ).to_csv(index=False)


def read(path, text, **options):
    path = path / "table.csv"
    path.write_text(text, encoding="utf-8")
    return load_table(path, **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return read(tmp_path_factory.mktemp("table"), mixed())


def kinds(table):
    return {column["name"]: column["kind"] for column in table.codec.columns}


def equal(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return (a == b) | (pd.isna(a) & pd.isna(b))


def test_kinds_are_found(table):
    assert isinstance(table, Table)
    assert kinds(table) == {
        **{"amount": "number", "size": "number", "whole": "integer", "day": "date", "time": "date"},
        **{"word": "category", "town": "category", "flag": "boolean", "code": "category", "two": "category"},
    }
    assert list(table.left_out) == ["name"]
    columns = {column["name"]: column for column in table.codec.columns}
    assert columns["word"]["values"] == sorted(["naïve, “x”", 'a "quoted" word', "NA", "雪"])
    assert [columns[name]["coding"] for name in ("word", "town", "code")] == ["one_hot", "ranks", "ranks"]
    assert [name for name, column in columns.items() if column["has_missing"]] == ["whole", "day", "word"]
    assert columns["two"]["values"] == [0, 1]
    assert (columns["day"]["unit"], columns["time"]["unit"]) == ("D", "s")


@pytest.mark.parametrize("seed", [0, 1])
def test_training_rows_decode_to_the_data(table, seed):
    decoded = table.codec.decode(table.points(np.random.default_rng(seed)))
    for name in table.codec.names:
        assert equal(decoded[name], table.frame[name]).all(), name


def test_text_is_that_of_the_file(table):
    rows = list(csv.reader(io.StringIO(mixed())))
    assert rows[0] == COLUMNS
    points = table.codec.encode(dict(zip(rows[0][1:], list(zip(*rows[1:], strict=True))[1:], strict=True)))
    assert list(table.codec.format(table.codec.decode(points))) == [row[1:] for row in rows[1:]]
    np.testing.assert_array_equal(points, table.codec.encode({name: table.frame[name] for name in table.codec.names}))


def test_json_survives(table):
    again = TableCodec(json.loads(json.dumps(table.codec.to_json())))
    assert again.columns == table.codec.columns


def test_coded_numbers_are_standard_normal(table):
    stats = pytest.importorskip("scipy.stats")
    points = table.points(np.random.default_rng(0))
    for j in range(table.codec.num_numbers):
        name = table.codec.coordinate_names[j]
        z = points[~table.frame[name].isna().to_numpy(), j]
        # Drawn uniformly by rank, z is even closer to the normal distribution than a sample of it.
        assert stats.kstest(z, "norm").pvalue > 0.05, name
        assert z.std() == pytest.approx(1, abs=0.03)


def test_noise_decodes_to_the_shares_of_the_data(table):
    rng = np.random.default_rng(0)
    decoded = table.codec.decode(rng.normal(size=(200_000, table.codec.width)))
    whole = table.frame["whole"].dropna()
    shares = pd.Series(decoded["whole"]).value_counts(normalize=True)
    expected = whole.value_counts(normalize=True)
    assert set(shares.index) == set(expected.index)
    assert (shares - expected).abs().max() < 0.002
    for name in ("amount", "size"):
        at = np.linspace(0, 1, 21)
        quantiles = [np.quantile(values, at) for values in (decoded[name], table.frame[name])]
        np.testing.assert_allclose(*quantiles, rtol=0.05)
        assert quantiles[0][0] == quantiles[1][0]
        assert quantiles[0][-1] == quantiles[1][-1]


def test_a_frequent_number_among_many_keeps_its_share(tmp_path):
    rng = np.random.default_rng(0)
    gain = np.where(rng.random(5000) < 0.7, 0.0, rng.uniform(100, 9000, 5000).round(1))
    codec = read(tmp_path, pd.DataFrame({"gain": gain}).to_csv(index=False)).codec
    decoded = codec.decode(rng.normal(size=(100_000, 1)))["gain"]
    assert (decoded == 0).mean() == pytest.approx((gain == 0).mean(), abs=0.005)
    assert not ((decoded > 0) & (decoded < 100)).any()
    assert np.median(decoded[decoded > 0]) == pytest.approx(4550, rel=0.05)


def test_gaussian_data_are_only_standardised():
    values = np.random.default_rng(0).normal(5, 2, 20_000).round(4)
    codec = make_codec(pd.DataFrame({"x": values}))
    assert codec.columns[0]["values"] == [values.min(), values.max()]
    np.testing.assert_allclose(codec.encode({"x": [3.0, 5.0, 7.0]})[:, 0], [-1, 0, 1], atol=0.05)


cells = st.sampled_from(["a", "b,c", 'd"', "é\n", "", "007", "1.5", "2020-01-02", "true", "12", "-3", "NA"])


@settings(max_examples=60)
@given(st.lists(st.tuples(cells, cells), min_size=2, max_size=30))
def test_any_file_is_refused_or_survives(tmp_path_factory, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("first", "second"), *rows])
    try:
        table = read(tmp_path_factory.getbasetemp(), text.getvalue())
    except DatasetError:
        return
    points = table.points(np.random.default_rng(0))
    assert np.isfinite(points).all()
    decoded = table.codec.decode(points)
    assert all(equal(decoded[name], table.frame[name]).all() for name in decoded)
    positions = [["first", "second"].index(name) for name in table.codec.names]
    for written, row in zip(table.codec.format(decoded), rows, strict=True):
        for text, position in zip(written, positions, strict=True):
            assert text == row[position] or (text == "" and row[position] == "NA")


def test_types_of_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame(
        {
            "day": [datetime.date(2020, 1, i % 9 + 1) for i in range(30)],
            "time": pd.date_range("2020-01-01 05:30", periods=30, freq="h", tz="Europe/Paris"),
            "flag": [True, False, None] * 10,
            "whole": pd.array([1, 2, None] * 9 + [7, 8, 9], dtype="Int64"),
            "gaps": [1.0, 2.0, np.nan] * 9 + [7.0, 8.0, 9.0],
            "exact": [decimal.Decimal("1.50"), decimal.Decimal("2.25"), decimal.Decimal("3.25")] * 10,
            "class": pd.Categorical(["c", "a", "b"] * 10),
            "text": ["007", "8", ""] * 10,
            "empty": [None] * 30,
        }
    )
    frame.to_parquet(tmp_path / "table.parquet")
    table = load_table(tmp_path / "table.parquet")
    assert table.left_out == {"empty": "empty"}
    assert kinds(table) == {
        **{"day": "date", "time": "date", "flag": "boolean", "whole": "integer", "gaps": "integer"},
        **{"exact": "number", "class": "category", "text": "category"},
    }
    first = next(table.codec.format(table.codec.decode(table.points(np.random.default_rng(0)))))
    assert first == ["2020-01-01", "2020-01-01 04:30:00", "true", "1", "1", "1.5", "c", "007"]
    frame["list"] = [[1]] * 30
    frame.to_parquet(tmp_path / "table.parquet")
    with pytest.raises(DatasetError, match="'list' holds values that can't be learned"):
        load_table(tmp_path / "table.parquet")


def test_dates_as_objects():
    zone = datetime.timezone(datetime.timedelta(hours=2))
    dates = [datetime.datetime(9999, 12, 31, 23, 59, 59, 5), None, datetime.datetime(2020, 1, 1, 2, tzinfo=zone)]
    codec = make_codec(pd.DataFrame({"t": pd.Series(dates, dtype=object)}))
    assert codec.columns[0]["has_missing"]
    decoded = codec.decode(codec.encode({"t": dates}))["t"]
    assert decoded.tolist() == [datetime.datetime(9999, 12, 31, 23, 59, 59), None, datetime.datetime(2020, 1, 1)]


def test_typed_categories_of_numbers():
    frame = pd.DataFrame({"class": pd.Categorical([3, 1, 2] * 10), "text": ["1", "2", "3"] * 10})
    codec = make_codec(frame, {"text": "category"})
    assert [(column["kind"], column["values"]) for column in codec.columns] == [
        ("category", [1, 2, 3]),
        ("category", ["1", "2", "3"]),
    ]
    assert make_codec(frame.assign(text=[1, 2, 3] * 10), {"text": "number"}).columns[1]["kind"] == "number"


def test_kinds_can_be_given(tmp_path):
    text = "zip,n,ok,year,when\n" + "".join(
        f"{i % 5},{i % 7}.0,{'ny'[i % 2]},{i},{i % 9 + 1}-Jan-20\n" for i in range(40)
    )
    asked = {"zip": "category", "n": "integer", "ok": "boolean", "year": "integer"}
    table = read(tmp_path, text, column_kinds=asked)
    assert kinds(table) == asked | {"when": "date"}
    assert table.codec.columns[2]["text"] == ["n", "y"]
    assert table.codec.columns[0]["values"] == list("01234")
    assert read(tmp_path, text).left_out == {"year": "an identifier: all values differ"}


@pytest.mark.parametrize(
    ("column", "is_identifier"),
    [
        ("years," + ",".join(map(str, range(2001, 2031))), False),
        ("row," + ",".join(map(str, range(2001, 2031))), True),
        ("PassengerId," + ",".join(map(str, range(5, 300, 10))), True),
        ("paid," + ",".join(map(str, range(5, 300, 10))), False),
        ("n," + ",".join(map(str, range(30))), True),
        ("n," + ",".join(map(str, range(10))), False),
        ("n," + ",".join(f"w{i}" for i in range(10)), True),
    ],
)
def test_identifiers_are_left_out(tmp_path, column, is_identifier):
    name, *values = column.split(",")
    table = read(tmp_path, f"{name},b\n" + "".join(f"{value},{i % 4}\n" for i, value in enumerate(values)))
    assert (name in table.left_out) == is_identifier


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2\n1\n3,4\n", {}, "line 3 has 1 field, but the first line has 2"),
        ("a,b\n1,2\n1,2,3\n", {}, "Expected 2 fields in line 3, saw 3"),
        ('a,b\n1,"2\n2,3\n', {}, "EOF inside string"),
        ("a,b\n1,2\n", {}, "holds 1 rows: at least 2"),
        ("", {}, "No columns"),
        ("a,b\n", {}, "holds 0 rows"),
        ("a,a\n1,2\n3,4\n", {}, "two columns named 'a'"),
        ("a,b\n1,x\n1,x\n", {}, r"no column to learn.*a: a single value"),
        ("a,b\n1,x\nfoo,y\n3,x\n5,y\n", {}, r"'foo' in row 2: correct the file, or pass --column_kinds a=category"),
        ("a,b\n1,2\n2,inf\n3,3\n", {}, "'b' holds inf in row 2"),
        ("a,b\n1,2\n2,1e300\n3,3\n", {}, r"'b' holds 1e\+300 in row 2"),
        ("a,b\n1,2\n2.5,3\n", {"column_kinds": {"a": "integer"}}, "2.5 in row 2, which is not a whole number"),
        ("a,b\n1,2\nx,3\n", {"column_kinds": {"a": "number"}}, "'x' in row 2"),
        ("a,b\n1,2\nx,3\n", {"column_kinds": {"a": "date"}}, "none of the known formats"),
        ("a,b\n2020-01-01,2\n2020-02-31,3\n", {"column_kinds": {"a": "date"}}, "'2020-02-31' in row 2"),
        ("a,b\n1,2\nx,3\n", {"column_kinds": {"a": "boolean"}}, "'a' can't be boolean"),
        ("a,b\n1,2\nx,3\n", {"column_kinds": {"a": "text"}}, "can't be of the kind 'text', only number"),
        ("a,b\n1,2\nx,3\n", {"column_kinds": {"c": "date"}}, "no column 'c' to give a kind, only 'a', 'b'"),
        ("a,b\n1,2\nx,3\n", {"exclude": ["c"]}, "no column 'c' to exclude"),
        ("a,b\n1,2\nx,3\n", {"num_samples": 3}, "holds 2 rows"),
        ("a,b\n1,2\nx,3\n", {"num_samples": 2, "seed": -1}, "seed"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, options, message):
    with pytest.raises(DatasetError, match=message) as raised:
        read(tmp_path, text, **options)
    assert "\n" not in str(raised.value)


def test_too_many_texts_and_coordinates(tmp_path):
    rng = np.random.default_rng(0)
    many = rng.integers(2000, size=(3000, 2))
    text = "Title,Ticket No,n\n" + "".join(f"t{a},u{b},{a % 9}\n" for a, b in many)
    with pytest.raises(DatasetError, match=r"'Title' holds 1,[0-9]+ different texts; .*--exclude Title 'Ticket No'$"):
        read(tmp_path, text)
    assert kinds(read(tmp_path, text, exclude=["Title", "Ticket No"])) == {"n": "integer"}
    wide = [",".join(f"c{i}" for i in range(20))]
    wide += [",".join(f"x{v}" for v in row) for row in rng.integers(20, size=(200, 20))]
    with pytest.raises(DatasetError, match=r"400 coordinates, more than 300; the widest are 'c0' \(20\)"):
        read(tmp_path, "\n".join(wide))


def test_rows_are_chosen_by_seed(tmp_path):
    text = mixed(300)
    a, b, c = (read(tmp_path, text, num_samples=100, seed=seed) for seed in (1, 1, 2))
    assert len(a.frame) == 100
    assert a.frame.equals(b.frame)
    assert not a.frame.equals(c.frame)


def test_describe(table):
    lines = describe(table).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0].split() == ["column", "kind", "values", "missing", "coordinates"]
    whole = next(line for line in lines if line.startswith("whole"))
    assert whole.split() == ["whole", "integer", "0", "to", "89", f"{table.frame['whole'].isna().mean():.1%}", "2"]
    assert lines[-2] == f"3,000 rows, 10 columns, {table.codec.width} coordinates"
    assert lines[-1] == "left out: name (an identifier: all values differ)"


def test_full_precision_is_written_with_nine_digits(tmp_path):
    values = np.random.default_rng(0).gamma(2, size=600)
    table = read(tmp_path, pd.DataFrame({"x": values}).to_csv(index=False))
    decoded = table.codec.decode(table.points(np.random.default_rng(0)))
    np.testing.assert_allclose(decoded["x"], values, rtol=2e-8)
    assert next(table.codec.format({"x": [1 / 3]})) == ["0.333333333"]


def test_decimals_are_written_as_in_the_file(tmp_path):
    table = read(tmp_path, "price,size\n0.50,160.0\n12.00,161.25\n3.25,1.5\n")
    rows = list(table.codec.format(table.codec.decode(table.codec.encode(dict(table.frame)))))
    assert rows == [["0.50", "160.0"], ["12.00", "161.25"], ["3.25", "1.5"]]
