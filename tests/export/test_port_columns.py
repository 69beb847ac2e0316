"""Tables in JavaScript, in Node: the cells' texts are Python's to the last digit, and so are the known cells."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, assert_one_line_error

from ddpm_mlp_pipeline import OnnxSampler
from ddpm_mlp_pipeline.errors import ConfigurationError
from ddpm_mlp_pipeline.runtime.columns import TableCodec
from ddpm_mlp_pipeline.writers import find_writer
from export.golden import COLUMNS

COLUMNS_JS = ROOT / "ddpm_mlp_pipeline" / "export" / "web" / "columns.js"
SAMPLE = ROOT / "export" / "ports" / "sample.mjs"
PRICE, _, AGE, BORN, _, COUNTRY, _, CITY, MEMBER, _ = COLUMNS
SCRIPT = """
    const { TableCodec } = await import(process.argv[1]);
    import { readFileSync } from "node:fs";
    const attempt = (get) => { try { return get(); } catch (error) { return `${error.name}: ${error.message}`; } };
    const results = JSON.parse(readFileSync(0, "utf-8")).map(({ columns, points, rows }) => attempt(() => {
      const codec = new TableCodec(columns), numRows = codec.numRows(points);
      return {
        coordinates: codec.coordinateNames,
        texts: Array.from({ length: numRows }, (_, row) => codec.texts(points, row)),
        cells: Array.from({ length: numRows }, (_, row) => codec.cells(points, row)),
        csv: codec.toCsv(points),
        known: rows.map((row) => attempt(() => Array.from(codec.encode(row)))),
      };
    }));
    console.log(JSON.stringify(results));
"""


@pytest.fixture
def in_javascript(run, node):
    """Let `columns.js` decode points and encode rows, of several tables: what it returns, or an error's message."""

    def in_javascript(*tables):
        given = [
            {"columns": columns, "points": np.ravel(points).tolist(), "rows": rows} for columns, points, rows in tables
        ]
        argv = (node, "--input-type=module", "-e", SCRIPT, COLUMNS_JS.as_uri())
        result = run(*argv, input=json.dumps(given))
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return in_javascript


def random_columns(rng):
    """Make columns of all kinds: knots at any scale with jumps and ties, all decimals and date formats."""

    def knots(values):
        z = np.sort(rng.normal(size=len(values)).round(rng.integers(1, 7)))
        return {"z": z.tolist(), "values": sorted(values), "has_missing": bool(rng.random() < 0.5)}

    columns = []
    for decimals in (None, None, None, None, *range(16)):
        values = rng.normal(size=rng.integers(1, 40)) * 10.0 ** rng.integers(-8, 15)
        values = (2 * values).round() / 2 if rng.random() < 0.3 else values
        columns.append({"kind": "number", **knots(values.tolist()), "decimals": decimals})
        columns[-1] |= {"digits": int(rng.integers(6))} if rng.random() < 0.5 else {}
    for power in range(1, 15, 4):
        values = rng.normal(size=20) * 10.0**power
        columns.append({"kind": "integer", **knots(values.astype(int).tolist())})
    ends = {"D": (-719162, 2932896), "s": (-62135596800, 253402300799)}  # of the years 1 to 9999
    for date_format in ("%Y-%m-%d", "%d/%m/%y %H:%M:%S", "%b %d, %Y", "x%dy%m-%YT%H (%M).%S $1 $&", "%d.%b.%y"):
        for unit, (first, last) in ends.items():
            values = [first, *rng.integers(first, last, size=20).tolist(), last]
            columns.append({"kind": "date", **knots(values), "format": date_format, "unit": unit})
    for values in (["a", 'b,"c"', " ", "Köln 🌱"], [1e16, 1e-5, 0.1, 2.0, 1e22, -1e-7, 1e-4, -0.0], [3, -1, 2**53]):
        for has_missing in (False, True):
            column = {"kind": "category", "values": values, "has_missing": has_missing}
            z = np.sort(rng.normal(size=len(values) + has_missing - 1)).tolist()
            columns += [column | {"coding": "one_hot"}, column | {"coding": "ranks", "z": z}]
    columns.append({"kind": "boolean", "values": [True, False], "coding": "one_hot", "text": ["yes", "no"]})
    columns.append({"kind": "boolean", "values": [False, True], "coding": "ranks", "z": [0.1]})
    return [{"name": f"column {i}", **column} for i, column in enumerate(columns)]


def test_texts_and_known_cells_are_pythons(in_javascript):
    rng = np.random.default_rng(0)
    codec = TableCodec(random_columns(rng))
    points = rng.normal(size=(600, codec.width)).astype(np.float32).astype(np.float64)
    points[:100] = points[:100].round(1)  # some on the knots, and some equal
    texts = list(codec.format(codec.decode(points)))
    rows = [{name: text for name, text in zip(codec.names, row, strict=True) if text} for row in texts[::20]]
    (found,) = in_javascript((codec.to_json(), points, rows))
    assert found["coordinates"] == codec.coordinate_names
    for name, mine, pythons in zip(codec.names, np.transpose(found["texts"]), np.transpose(texts), strict=True):
        assert mine.tolist() == pythons.tolist(), name
    known = [codec.encode({name: [text] for name, text in row.items()}, empty="unknown")[0] for row in rows]
    np.testing.assert_allclose(np.array(found["known"], dtype=float), known, atol=1e-9)
    again = list(csv.reader(io.StringIO(found["csv"], newline="")))
    assert again == [codec.names, *texts]


def test_numbers_between_two_decimals_get_the_even_one_as_in_python(in_javascript):
    cases = [
        *((value, decimals, 0) for value in (0.5, 1.5, 2.5, -2.5, 0.125, 0.375, 1e22, -0.004) for decimals in (0, 2)),
        *((value, None, 0) for value in (100000000.5, 100000001.5, 999999999.5, 1000000005, 1000000015, -1e-5, 1e-4)),
        *((value, None, 0) for value in (12345678.25, 0.0001220703125, 3.0517578125e-05, 1e100, 123456789, 1e9, 0)),
        *((value, 0, 2) for value in (3, 1e21, 2.0**70)),
        *((2.0**k + 0.25, 1, 0) for k in (45, 48, 49, 50)),  # whose tenths are no doubles
    ]
    columns = [
        {"name": f"{i}", "kind": "number", "z": [0], "values": [value], "decimals": decimals, "digits": digits}
        for i, (value, decimals, digits) in enumerate(cases)
    ]
    codec = TableCodec(columns)
    (found,) = in_javascript((columns, np.zeros((1, len(cases))), []))
    assert found["texts"] == list(codec.format(codec.decode(np.zeros((1, len(cases))))))


def test_a_row_of_one_missing_cell_is_not_an_empty_line(in_javascript):
    (found,) = in_javascript(([AGE], [[0, 1], [0, -1]], []))
    assert found["csv"] == 'age\n""\n30\n'
    assert found["cells"] == [[None], [30]]


# Known cells that are written in other ways than the data's, or wrong. (Python also names the row.)
ROWS = [
    *({"age": text} for text in ("25", "-5", " 1e2 ", "30.0", "1_0", "0x10", "inf", "nan", "old", " ", "")),
    *({name: text} for name in ("age", "price", "born", "country") for text in ("NA", "n/a", "?", "-", "Na")),
    *({"born": text} for text in ("Jan 11, 1970", "jan 1, 1970", "1970-01-21", "1970-01-21 10:00:00")),
    *({"born": text} for text in ("Feb 31, 1970", "1970-02-31", "Jan 32, 1970", "11/01/1970", "5")),
    *({"seen": text} for text in ("29/02/00 11:59:59", "2025-01-01T12:30", "29/02/01 11:59:59", "29/02/00 25:59:59")),
    *({"member": text} for text in ("yes", "TRUE", "no", "false", "1", "maybe")),
    *({"grade": text} for text in ("2.0", "0.00001", "7", "x")),
    *({"country": text} for text in ("DE", "de", 'the "rest"')),
    *({"city": text} for text in ("Bonn", "Köln", "Ulm", "Rome")),
    *({"price": text} for text in ("0.777", "99", "2.2")),
    {"colour": "D"},
    {"age": "30", "country": "NL", "born": ""},
]


def test_known_cells_are_read_or_refused_as_in_python(in_javascript):
    codec = TableCodec(COLUMNS)
    (found,) = in_javascript((COLUMNS, [], ROWS))
    for row, known in zip(ROWS, found["known"], strict=True):
        if isinstance(known, str):
            with pytest.raises(ConfigurationError):
                codec.encode({name: [text] for name, text in row.items()}, empty="unknown")
            (name,) = row
            assert known.startswith((f'RangeError: column "{name}"', f'RangeError: there is no column "{name}"'))
            assert "\n" not in known
        else:
            (expected,) = codec.encode({name: [text] for name, text in row.items()}, empty="unknown")
            np.testing.assert_allclose(np.array(known, dtype=float), expected, atol=1e-9, err_msg=str(row))


HUGE = [*range(2**16 + 1)]
HOSTILE = [
    *([], {}, "x", [1], [None], [{}], [[]], [AGE, AGE], [COUNTRY] * 2**17),
    *([AGE | {"name": name}] for name in ("", 3, None, "\ud800")),
    *([AGE | {"kind": kind}] for kind in ("text", None, ["integer"], {})),
    *([AGE | {"z": z}] for z in ([], [0.0], [0, -1, 1, 2], "0123", None, [0, 0, 0, "1"], [0, 0, 0, True], HUGE)),
    *([AGE | {"z": [0, 0, 0, 1e101]}], [AGE | {"values": [1, 2, 3, 2]}], [AGE | {"values": [1, 2, 3, 4.5]}]),
    *([AGE | {"values": values}] for values in ([1, 2, 3, 2**60], 5)),
    *([AGE | {"has_missing": flag}] for flag in (1, None, "no")),
    *([PRICE | {"decimals": decimals}] for decimals in (-1, 16, 2.5, True, "2")),
    [PRICE | {"digits": 99}],
    *([BORN | {"format": text}] for text in (None, "", "%Y", "%Y-%m-%d %Z", "%Y-%m-%d%", "%Y%Y%m%d", "\ud800%Y%m%d")),
    *([BORN | {"unit": unit}] for unit in (None, "ns", [], ["D"])),
    [BORN | {"values": [0, 10**10]}],
    *(
        [COUNTRY | {"values": values}]
        for values in ([], ["a", "a"], ["a", 1], [True, False], "ab", [[], []], ["", "a"])
    ),
    *([COUNTRY | {"values": values}] for values in ([1e101, 1], ["\ud800", "a"], HUGE)),
    *([COUNTRY | {"coding": coding}] for coding in (None, "one-hot", ["ranks"], "ranks")),
    *([CITY | {"z": z}] for z in ([0, 1], [0, 2, 1], None)),
    [COUNTRY | {"values": ["a"], "has_missing": False}],
    *([MEMBER | {"values": values}] for values in ([0, 1], ["no", "yes"])),
    *([MEMBER | {"text": text}] for text in (["a"], ["a", "a"], [1, 2], "no", ["", "x"])),
    [COUNTRY | {"name": str(i), "values": HUGE[:-2]} for i in range(2)],
]


def test_columns_that_python_refuses_are_refused_in_one_line(in_javascript):
    for columns, found in zip(HOSTILE, in_javascript(*((columns, [], []) for columns in HOSTILE)), strict=True):
        with pytest.raises(ConfigurationError):
            TableCodec(columns)
        assert isinstance(found, str), str(columns)[:200]
        assert found.startswith("RangeError: "), found
        assert "\n" not in found
        assert len(found) < 300


def written_by_python(sampler, number, seed, folder, **asked):
    """Return what `ddpm-sample` writes to a .csv file."""
    path = folder / "python.csv"
    find_writer(sampler, ".csv", number)(path, [sampler.sample(number, seed, **asked)], number, sampler)
    return path.read_bytes().decode()


def test_cells_are_quoted_as_in_python(in_javascript, tmp_path):
    texts = ["a\rb", "a\nb", "a,b", 'a"b', " ab", "a'b", "#"]
    columns = [COUNTRY | {"name": "a\rname", "values": texts, "has_missing": False}]
    codec = TableCodec(columns)
    points = codec.encode({"a\rname": texts})
    (found,) = in_javascript((columns, points, []))
    sampler = SimpleNamespace(sample_shape=(codec.width,), codec=codec)
    path = tmp_path / "texts.csv"
    find_writer(sampler, ".csv", len(texts))(path, [points], len(texts), sampler)
    assert found["csv"] == path.read_bytes().decode()
    with path.open(newline="", encoding="utf-8") as file:
        assert [*csv.reader(file)] == [["a\rname"], *([text] for text in texts)]


def test_sample_mjs_writes_the_rows_that_python_writes(run, node, node_folder, table_bundle, tmp_path):
    sampler = OnnxSampler(table_bundle)
    argv = (node, SAMPLE, table_bundle, "--num_samples", 40, "--seed", 3)
    result = run(*argv, cwd=node_folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == written_by_python(sampler, 40, 3, tmp_path)

    known = ("--condition", "age=30", "--condition", "born=1970-01-03", "--condition", "country=NL")
    result = run(*argv, *known, "--output", tmp_path / "rows.json", cwd=node_folder)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    cells = sampler.codec.encode({"age": [30], "born": ["1970-01-03"], "country": ["NL"]}, empty="unknown")
    header, *expected = csv.reader(io.StringIO(written_by_python(sampler, 40, 3, tmp_path, known=cells)))
    assert header == [column["name"] for column in COLUMNS]
    assert {tuple(row[2:4] + row[5:6]) for row in rows} == {(30, "Jan 03, 1970", "NL")}
    types = {"number": float, "integer": int, "boolean": {"no": False, "yes": True, "false": False, "true": True}.get}
    for i, column in enumerate(COLUMNS):
        read = float if column["name"] == "grade" else types.get(column["kind"], str)
        assert [row[i] for row in rows] == [read(row[i]) if row[i] else None for row in expected], column["name"]


def test_wrong_known_cells_end_in_one_line(run, node, node_folder, table_bundle):
    for argv, message in {
        ("--condition", "country=FR"): 'column "country": "FR" is not one of its values, "DE", "NL"',
        ("--known", "age=old"): 'column "age": "old" is not a finite number',
        ("--condition", "born=1970"): 'column "born": "1970" is not a date such as Dec 31, 2024',
        ("--condition", "income=9"): 'there is no column "income", only "price", "weight, kg", "age"',
        ("--condition", "age"): 'known cells are NAME=VALUE, not "age"',
        ("--condition", "age=9", "--known", "age=9"): "give one of them",
    }.items():
        assert_one_line_error(run(node, SAMPLE, table_bundle, *argv, cwd=node_folder), message)
