"""The codec of tables: rows survive coding, the coordinates mean what FORMAT.md says, and bad input is refused."""

import copy
import datetime
import json
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.runtime.columns import TableCodec, normal_ranks
from ddpm_mlp_pipeline.runtime.dates import is_date_format, read_date, write_date

JUMPS = {"z": [-1.0, -1.0, 0.5, 0.5], "values": [10, 20, 20, 40]}  # 10, 20 and 40, with the shares Φ(−1), …
AGE = {"name": "age", "kind": "integer", **JUMPS, "has_missing": True}
PRICE = {"name": "price", "kind": "number", "z": [-2.0, 0.0, 2.0], "values": [0.5, 1.0, 9.0], "decimals": 2}
DAY = {"name": "day", "kind": "date", **JUMPS, "format": "%d/%m/%Y", "unit": "D", "has_missing": True}
COLOR = {"name": "color", "kind": "category", "values": ["D", 'a "b", é'], "coding": "one_hot", "has_missing": True}
CITY = {"name": "city", "kind": "category", "values": [0, 1, 2, 3, 4], "coding": "ranks", "z": [-1.0, -0.5, 0.0, 0.7]}
SOLD = {"name": "sold", "kind": "boolean", "values": [False, True], "coding": "one_hot"}
COLUMNS = [COLOR, AGE, CITY, PRICE, SOLD, DAY]
ROWS = {
    "color": ["D", 'a "b", é', None, "D"],
    "age": [10, 20, None, 40],
    "city": [0, 4, 3, 1],
    "price": [0.5, 0.75, 9.0, 1.08],
    "sold": [True, False, True, True],
    "day": [None, *map(datetime.date.fromisoformat, ["1970-01-11", "1970-01-21", "1970-02-10"])],
}


@pytest.fixture
def codec():
    return TableCodec(copy.deepcopy(COLUMNS))


def as_lists(table):
    return {name: [None if pd.isna(v) else v for v in values.tolist()] for name, values in table.items()}


def test_coordinates_are_in_the_order_of_the_format(codec):
    assert codec.names == ["color", "age", "city", "price", "sold", "day"]
    assert codec.num_numbers == 4
    assert codec.width == 11
    assert codec.coordinate_names == [
        *("age", "city", "price", "day", "color=D", 'color=a "b", é', "color is missing", "age is missing"),
        *("sold=false", "sold=true", "day is missing"),
    ]
    points = codec.encode(ROWS)
    assert points.shape == (4, codec.width)
    np.testing.assert_array_equal(points[2, codec.coordinate_names.index("age")], 0)
    np.testing.assert_array_equal(points[:, codec.coordinate_names.index("age is missing")], [-1, -1, 1, -1])
    assert 0.7 < points[1, codec.coordinate_names.index("city")] < np.inf
    assert set(np.unique(points[:, codec.num_numbers :])) == {-1, 1}


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)])
def test_rows_survive(codec, rng):
    decoded = codec.decode(codec.encode(ROWS, rng=rng))
    assert list(decoded) == codec.names
    assert as_lists(decoded) == ROWS
    types = {name: values.dtype.str[1:] for name, values in decoded.items()}
    assert types == {"color": "O", "age": "f8", "city": "i8", "price": "f8", "sold": "b1", "day": "M8[D]"}


def test_text_survives(codec):
    texts = list(codec.format(codec.decode(codec.encode(ROWS))))
    assert texts[0] == ["D", "10", "0", "0.5", "true", ""]
    assert texts[1] == ['a "b", é', "20", "4", "0.75", "false", "11/01/1970"]
    assert texts[2] == ["", "", "3", "9", "true", "21/01/1970"]
    again = codec.encode(dict(zip(codec.names, zip(*texts, strict=True), strict=True)))
    np.testing.assert_array_equal(again, codec.encode(ROWS))


def test_cells_of_many_types(codec):
    expected = codec.encode(ROWS)
    frame = pd.DataFrame(ROWS).assign(day=pd.to_datetime(pd.Series(ROWS["day"])))
    np.testing.assert_array_equal(codec.encode(frame), expected)
    frame = frame.convert_dtypes()  # pandas.NA for missing values
    np.testing.assert_array_equal(codec.encode(frame), expected)
    iso = ROWS | {"day": ["", "1970-01-11", "1970-01-21T00:00:00", np.datetime64("1970-02-10")]}
    np.testing.assert_array_equal(codec.encode(iso | {"sold": ["True", "FALSE", True, 1]}), expected)
    np.testing.assert_array_equal(codec.encode(ROWS | {"age": ["10", "20", "NA", "40.0"]}), expected)


def test_unknown_values_are_nan(codec):
    points = codec.encode({"age": [None, 20], "color": ["", "D"]}, empty="unknown")
    is_known = ~np.isnan(points)
    known = [name.startswith(("age", "color")) for name in codec.coordinate_names]
    np.testing.assert_array_equal(is_known, [[False] * codec.width, known])


def test_a_value_is_coded_by_the_middle_of_its_ranks(codec):
    normal = NormalDist()
    z = codec.encode(ROWS)[[0, 1, 3], 0]
    low, high = normal.cdf(-1), normal.cdf(0.5)
    expected = [normal.inv_cdf(p) for p in (low / 2, (low + high) / 2, (high + 1) / 2)]
    np.testing.assert_allclose(z, expected, atol=1e-6)


def test_values_between_and_beyond(codec):
    table = {"age": [15, -5, 100], "price": [0.777, 0.1, 99]}
    decoded = codec.decode(np.nan_to_num(codec.encode(table, empty="unknown"), nan=-1))
    assert decoded["age"].tolist() == [20, 10, 40]  # a number that the data don't hold lies at the jump
    assert decoded["price"].tolist() == [0.78, 0.5, 9]


def test_interpolation_by_hand(codec):
    points = np.zeros((4, codec.width)) - 1
    points[:, 2] = [-5, -1, 1, 2]
    points[:, 0] = [-1.0000001, -1, 0.4999, 0.5]
    decoded = codec.decode(points)
    assert decoded["price"].tolist() == [0.5, 0.75, 5, 9]
    assert decoded["age"].tolist() == [10, 20, 20, 40]


@given(st.integers(2, 70), st.integers(0, 2**32 - 1))
def test_ranks_decode_to_the_shares_of_the_states(num_states, seed):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(num_states))
    z = stats.norm.ppf(np.cumsum(shares)[:-1]).tolist()
    values = list(range(num_states))
    codec = TableCodec([{"name": "c", "kind": "category", "values": values, "coding": "ranks", "z": z}])
    assert codec.width == codec.num_numbers == 1
    u = (np.arange(2000) + 0.5) / 2000
    states = codec.decode(stats.norm.ppf(u)[:, None])["c"]
    np.testing.assert_array_equal(states, np.searchsorted(np.cumsum(shares)[:-1], u, side="right"))
    for points in (codec.encode({"c": values}), codec.encode({"c": values}, rng=rng)):
        wide = shares > 1e-4  # ranges that are wider than the interpolation of Φ is exact
        np.testing.assert_array_equal(codec.decode(points)["c"][wide], np.array(values)[wide])


@given(st.floats(-7, 7), st.floats(0, 1))
def test_normal_ranks(x, p):
    scipy_stats = pytest.importorskip("scipy.stats")
    z, ranks = normal_ranks()
    assert np.interp(x, z, ranks) == pytest.approx(scipy_stats.norm.cdf(x), abs=1e-6)
    if 1e-9 < p < 1 - 1e-9:
        assert np.interp(p, ranks, z) == pytest.approx(scipy_stats.norm.ppf(p), abs=1e-4)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"colour": ["D"]}, "no column 'colour', only 'color', 'age'"),
        ({"color": ["D", "purple"]}, "row 2, column 'color': 'purple' is not one of its values, 'D'"),
        ({"color": [["D"]]}, "row 1, column 'color'"),
        ({"city": [7]}, r"row 1, column 'city': 7 is not one of its values, 0, 1, 2, 3, 4$"),
        ({"age": [1, 2, "old"]}, "row 3, column 'age': 'old' is not a finite number"),
        ({"age": ["1_0"]}, "'1_0' is not a finite number"),
        ({"age": np.array([1, np.inf])}, "row 2, column 'age': inf"),
        ({"price": [True]}, "True is not a finite number"),
        ({"price": [np.datetime64("2020-01-01")]}, "is not a finite number"),
        ({"price": pd.to_datetime(["2020-01-01"])}, "is not a finite number"),
        ({"price": [10**400]}, "is not a finite number"),
        ({"day": ["01/01/1970", "31/02/1970"]}, "row 2, column 'day': '31/02/1970' is not a date such as 31/12/2024"),
        ({"day": [5]}, "5 is not a date"),
        ({"sold": ["maybe"]}, "'maybe' is not one of its values, False, True"),
        ({"age": [1], "price": [1, 2]}, "different lengths: 1, 2"),
        ({"age": "12"}, "must be a list"),
        ({"age": 12}, "must be a list"),
        ({"age": np.ones((2, 2))}, "must be a list"),
    ],
)
def test_bad_cells_are_refused(codec, table, message):
    with pytest.raises(ConfigurationError, match=message) as raised:
        codec.encode(table, empty="unknown")
    assert "\n" not in str(raised.value)


def test_what_is_never_missing_is_refused(codec):
    with pytest.raises(ConfigurationError, match="row 2, column 'price' is empty"):
        codec.encode(ROWS | {"price": [1, None, 1, 1]})
    with pytest.raises(ConfigurationError, match="row 1, column 'sold' is empty"):
        codec.encode(ROWS | {"sold": ["", True, True, True]})
    with pytest.raises(ConfigurationError, match="lacks the column 'day'"):
        codec.encode({name: values for name, values in ROWS.items() if name != "day"})


def test_bad_points_are_refused(codec):
    for points in (np.zeros((2, codec.width + 1)), np.zeros(codec.width), np.full((1, codec.width), np.nan)):
        with pytest.raises(ConfigurationError):
            codec.decode(points)


def test_json_survives(codec):
    again = TableCodec(json.loads(json.dumps(codec.to_json())))
    assert again.columns == codec.columns
    np.testing.assert_array_equal(again.encode(ROWS), codec.encode(ROWS))
    codec.to_json()[1]["values"].append(1)
    assert again.columns == codec.columns


HUGE = list(range(2**16 + 1))


@pytest.mark.parametrize(
    "columns",
    [
        *([], {}, None, "x", [1], [None], [{}], [AGE, AGE], [COLOR] * 2**17),
        *([AGE | {"name": name}] for name in ("", 3, None, "\ud800")),
        *([AGE | {"kind": kind}] for kind in ("text", None, ["integer"], {})),
        *([AGE | {"z": z}] for z in ([], [0.0], [0, -1, 1, 2], [0, 0, 0, float("nan")], [0, 0, 0, 10**400])),
        *([AGE | {"z": z}] for z in ("0123", None, [0, 0, 0, "1"], [0, 0, 0, True], [0, 0, 0, float("inf")], HUGE)),
        *([AGE | {"values": values}] for values in ([1, 2, 3, 2], [1, 2, 3, 4.5], [1, 2, 3, 2**60], 5)),
        *([AGE | {"has_missing": flag}] for flag in (1, None, "no")),
        *([PRICE | {"decimals": decimals}] for decimals in (-1, 16, 2.0, True, "2")),
        [PRICE | {"digits": 99}],
        *(
            [DAY | {"format": text}]
            for text in (None, "", "%Y", "%Y-%m-%d %Z", "%Y-%m-%d%", "%Y%Y%m%d", "\ud800%Y%m%d")
        ),
        *([DAY | {"unit": unit}] for unit in (None, "ns", [])),
        [DAY | {"values": [0, 0, 0, 10**10]}],
        *(
            [COLOR | {"values": values}]
            for values in ([], ["a", "a"], ["a", 1], [1, 1.0], [True, False], "ab", [[], []])
        ),
        *(
            [COLOR | {"values": values}]
            for values in (["", "a"], [float("nan"), 1.0], [2**60, 1], ["\ud800", "a"], HUGE)
        ),
        *([COLOR | {"coding": coding}] for coding in (None, "one-hot", ["ranks"], "ranks")),
        [COLOR | {"values": ["a"], "has_missing": False}],
        *([SOLD | {"values": values}] for values in ([0, 1], ["no", "yes"])),
        *([SOLD | {"text": text}] for text in (["a"], ["a", "a"], [1, 2], "no", ["", "x"])),
        [COLOR | {"name": str(i), "values": HUGE[:-2]} for i in range(2)],
    ],
)
def test_hostile_json_is_refused(columns):
    with pytest.raises(ConfigurationError) as raised:
        TableCodec(columns)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_json_is_read_or_refused(value):
    for column in (AGE, PRICE, DAY, COLOR, SOLD):
        for key in column:
            try:
                codec = TableCodec([column | {key: value}])
            except ConfigurationError:
                continue
            assert len(codec.decode(np.zeros((2, codec.width)))) == 1


@given(st.datetimes(datetime.datetime(1969, 1, 1), datetime.datetime(2068, 12, 31)))
def test_dates_are_written_as_the_standard_library_writes_them(date):
    date = date.replace(microsecond=0)
    for date_format in ("%Y-%m-%dT%H:%M:%S", "%d-%b-%y at %H:%M:%S", "%b %d, %Y %H:%M:%S"):
        assert is_date_format(date_format)
        assert write_date(date, date_format) == date.strftime(date_format)
        assert read_date(date.strftime(date_format), date_format) == date


def test_long_texts_and_floats():
    values = ["x" * 100, "y\0"]
    codec = TableCodec(
        [
            {"name": "a", "kind": "category", "values": values, "coding": "ranks", "z": [0.0]},
            {"name": "b", "kind": "category", "values": [0.1, 2.0], "coding": "one_hot", "has_missing": True},
            {"name": "c", "kind": "number", "z": [0.0, 1.0], "values": [0.0, 1 / 3], "decimals": None},
            {"name": "d", "kind": "number", "z": [0.0], "values": [2.5], "decimals": 1, "digits": 2},
        ]
    )
    rows = {"a": values, "b": [0.1, None], "c": [0.1, 0.2], "d": [2.5, 2.5]}
    decoded = codec.decode(codec.encode(rows))
    assert decoded["a"].tolist() == values
    assert decoded["b"].tolist() == [0.1, None]
    np.testing.assert_allclose(decoded["c"], [0.1, 0.2], rtol=1e-9)
    assert list(codec.format(decoded))[1] == ["y\0", "", "0.2", "2.50"]
    assert codec.encode({"b": ["2", "0.1", "2.0"]}, empty="unknown")[
        :, codec.coordinate_names.index("b=2")
    ].tolist() == [*(1, -1, 1)]


def test_it_needs_numpy_only():
    code = (
        "import sys; import ddpm_mlp_pipeline.runtime.columns; "
        "print([name for name in ('torch', 'pandas', 'scipy', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
