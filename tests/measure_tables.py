"""Train CTGAN and TVAE on a table, as rivals, and judge any synthetic table.

    python tests/measure_tables.py rivals --table diamonds --model tvae --seed 0 --output tvae.csv   train for 180 s
    python tests/measure_tables.py judge --table diamonds tvae.csv ours.csv                          a JSON line each
    python tests/measure_tables.py hide --table diamonds --output gaps.csv                     the test rows with gaps
    python tests/measure_tables.py gaps --table diamonds --filled ours 1.csv 2.csv … --filled … errors of filled tables
    python tests/measure_tables.py draw tvae.pt --number 100000 --output many.csv   seconds and memory of a new process

`--folder` (default: .) holds TABLE.train.csv and TABLE.test.csv. `rivals` and `draw` need ctgan: pip install -c
constraints.txt ctgan sdmetrics. The project doesn't depend on it: its licence, BUSL-1.1, restricts what it may serve.

What the rivals are given, chosen in their favour:

- Their documented defaults, and as many epochs as fit into `--seconds` of one core's time. The clock is the process's
  CPU time, with one thread, so that other work on the machine doesn't shorten the training. It includes the fit of
  their own coding, which comes first.
- Columns of categories are declared as discrete, and so are numbers with at most 20 distinct values.
- They don't take gaps in numbers. A gap is filled with the column's mean, and a discrete column of its own says where
  the gaps are; the drawn rows get their gaps from it. A gap in a category is a category of its own.
- Dates are days since 1970. Numbers are rounded to as many decimals as the data have, and clipped to the data's range,
  as SDV does by default.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ddpm_mlp_pipeline.errors import DatasetError
from ddpm_mlp_pipeline.judge.tables import hide_cells, judge_gaps, judge_table

GAP = "(missing)"
MAX_DISCRETE = 20  # distinct values of a number that the rivals are told is discrete
EPOCH = pd.Timestamp("1970-01-01")
# Columns that are no number though they look like one, dates, what is left out, and the column to predict.
TABLES: dict[str, dict[str, Any]] = {
    "diamonds": {"target": "price"},
    "fair": {"categories": ["occupation", "occupation_husb"], "target": "yrs_married"},
    "movies": {"dates": {"Release Date": "%b %d %Y"}, "drop": ["Title"], "target": "IMDB Rating"},
}


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a `.csv` or `.parquet` file. In a `.csv` file only empty cells are missing values, not words like "None".

    Raises:
        DatasetError: if the file can't be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return pd.read_csv(path, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} can't be read as a table: {' '.join(str(error).split())}") from None


def read_real(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, Any]]]:
    """Return the training rows, the held-out rows and the columns."""
    train, test = (read_table(args.folder / f"{args.table}.{split}.csv") for split in ("train", "test"))
    return train, test, columns_of(args.table, train)


def columns_of(table: str, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the names and kinds of a table's columns, as a bundle's `columns` has them."""
    what, columns = TABLES[table], []
    for name in rows.columns.drop(what.get("drop", [])):
        column = {"name": name, "kind": "category"}
        if name in what.get("dates", {}):
            column |= {"kind": "date", "format": what["dates"][name], "unit": "D"}
        elif pd.api.types.is_numeric_dtype(rows[name]) and name not in what.get("categories", []):
            known = rows[name].dropna()
            column["kind"] = "integer" if (known % 1 == 0).all() else "number"
            column |= {"min": float(known.min()), "max": float(known.max())}
            column["decimals"] = next(d for d in range(20) if np.allclose(known.round(d), known, rtol=0, atol=1e-9))
        columns.append(column)
    return columns


def to_rival(rows: pd.DataFrame, columns: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """Return a table without gaps as the rivals take it, and the names of its discrete columns."""
    table, discrete = {}, []
    for column in columns:
        name, values = column["name"], rows[column["name"]]
        if column["kind"] == "category":
            table[name] = values.astype(object).where(values.notna(), GAP).astype(str)
            discrete.append(name)
            continue
        if column["kind"] == "date":
            values = (pd.to_datetime(values, format=column["format"]) - EPOCH) / pd.Timedelta("1D")
        table[name] = values.astype(float).fillna(values.mean())
        if table[name].nunique() <= MAX_DISCRETE:
            discrete.append(name)
        if values.isna().any():
            table[f"{name} {GAP}"] = values.isna().map({True: "yes", False: "no"})
            discrete.append(f"{name} {GAP}")
    return pd.DataFrame(table), discrete


def from_rival(drawn: pd.DataFrame, columns: list[dict[str, Any]]) -> pd.DataFrame:
    """Undo `to_rival`."""
    table = {}
    for column in columns:
        name, values = column["name"], drawn[column["name"]]
        if column["kind"] == "category":
            table[name] = values.where(values != GAP, None)
            continue
        values = values.astype(float).round(column.get("decimals", 0)).clip(column.get("min"), column.get("max"))
        if column["kind"] == "date":
            values = (EPOCH + pd.to_timedelta(values, unit="D")).dt.strftime(column["format"])
        elif column["kind"] == "integer":
            values = values.astype("Int64")
        gaps = f"{name} {GAP}"
        table[name] = values.mask(drawn[gaps] == "yes") if gaps in drawn else values
    return pd.DataFrame(table)


@contextlib.contextmanager
def epochs_until(model: Any, deadline: float, done: list[float]) -> Iterator[None]:
    """Let the model's loop over epochs end at `deadline`, of the process's CPU time."""
    module = sys.modules[type(model).__module__]
    original = module.tqdm

    def epochs(numbers: range, **_: Any) -> Iterator[int]:
        done.append(time.process_time())
        for i in numbers:
            yield i
            done.append(time.process_time())
            if done[-1] + (done[-1] - done[-2]) / 2 > deadline:
                return

    module.tqdm = epochs
    try:
        yield
    finally:
        module.tqdm = original


def train_rival(args: argparse.Namespace) -> dict[str, Any]:
    import ctgan
    import torch

    torch.set_num_threads(1)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    rows, _, columns = read_real(args)
    table, discrete = to_rival(rows, columns)
    model = {"ctgan": ctgan.CTGAN, "tvae": ctgan.TVAE}[args.model](epochs=10**9, enable_gpu=False)
    model.set_random_state(args.seed)
    wall, start, done = time.perf_counter(), time.process_time(), []
    with epochs_until(model, start + args.seconds, done):
        model.fit(table, discrete)
    report = {
        "table": args.table,
        "model": args.model,
        "seed": args.seed,
        "rows": len(rows),
        "epochs": len(done) - 1,
        "cpu_seconds": time.process_time() - start,
        "of_which_coding": done[0] - start,
        "wall_seconds": time.perf_counter() - wall,
        "output": str(args.output),
    }
    model.save(args.output.with_suffix(".pt"))
    drawn = from_rival(model.sample(len(rows)), columns)
    drawn.to_csv(args.output, index=False)
    args.output.with_suffix(".json").write_text(json.dumps({**report, "columns": columns}, indent=2), encoding="utf-8")
    return report


def draw_here(model_path: Path, number: int, output: Path) -> None:
    """Load a saved rival, draw rows and write them as a CSV file."""
    import ctgan

    columns = json.loads(model_path.with_suffix(".json").read_text(encoding="utf-8"))["columns"]
    model = ctgan.CTGAN.load(model_path)  # the file says which class it is
    from_rival(model.sample(number), columns).to_csv(output, index=False)


def time_draw(args: argparse.Namespace) -> dict[str, Any]:
    """Time a new process that draws, from its start to its end, and take its peak of memory."""
    command = [sys.executable, __file__, "draw", str(args.model), "--number", str(args.number), "--here"]
    start = time.perf_counter()
    subprocess.run([*command, "--output", str(args.output)], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "model": str(args.model),
        "rows": args.number,
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_rss_mib": used.ru_maxrss / 1024,
        "csv_bytes": args.output.stat().st_size,
    }


def judge(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    train, test, columns = read_real(args)
    target = args.target or TABLES[args.table]["target"]
    for path in args.synthetic:
        report = judge_table(train, test, read_table(path), columns, target, max_rows=args.max_rows, seed=args.seed)
        yield {"table": args.table, "synthetic": str(path), **report}


def hide(args: argparse.Namespace) -> dict[str, Any]:
    _, test, columns = read_real(args)
    gaps, hidden = hide_cells(test, columns, seed=args.seed)
    for column in columns:
        if column["kind"] == "integer":  # not 1.0 where a gap made floats of whole numbers
            gaps[column["name"]] = gaps[column["name"]].astype("Int64")
    gaps.to_csv(args.output, index=False)
    return {"table": args.table, "rows": len(gaps), "hidden": int(hidden.sum()), "output": str(args.output)}


def gaps(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the filled tables (of `hide` with the same seed), beside the comparisons."""
    train, test, columns = read_real(args)
    tables = {name: [read_table(Path(path)) for path in paths] for name, *paths in args.filled}
    methods = {name: (lambda _, draws=draws: draws) for name, draws in tables.items()}
    report_of = judge_gaps(
        train, test, columns, methods, seed=args.seed, max_rows=args.max_rows, comparisons=not args.no_comparisons
    )
    for name, report in report_of.items():
        yield {"table": args.table, "method": name, **report}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    rivals = commands.add_parser("rivals")
    rivals.add_argument("--model", choices=["ctgan", "tvae"], required=True)
    rivals.add_argument("--seconds", type=float, default=180, help="of one core (default: 180)")
    rivals.add_argument("--output", type=Path, required=True, help="a .csv file; .pt and .json are put beside it")
    draw = commands.add_parser("draw")
    draw.add_argument("model", type=Path, help="the .pt file of a rival")
    draw.add_argument("--number", type=int, default=100_000)
    draw.add_argument("--output", type=Path, required=True)
    draw.add_argument("--here", action="store_true", help="draw in this process, without a measurement")
    judge = commands.add_parser("judge")
    judge.add_argument("synthetic", type=Path, nargs="+")
    judge.add_argument("--target", help="the column to predict (default: the table's own)")
    hide = commands.add_parser("hide")
    hide.add_argument("--output", type=Path, required=True, help="a .csv file")
    gaps = commands.add_parser("gaps")
    gaps.add_argument("--filled", nargs="+", action="append", default=[], help="a name, and .csv files: one a draw")
    gaps.add_argument("--no_comparisons", action="store_true", help="measure the filled tables only")
    for command in (judge, gaps):
        command.add_argument("--max_rows", type=int, default=10_000, help="of a table in a measure (default: 10000)")
    for command in (rivals, judge, hide, gaps):
        command.add_argument("--table", choices=TABLES, required=True)
        command.add_argument("--folder", type=Path, default=Path(), help="of TABLE.train.csv (default: .)")
        command.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.what == "draw" and args.here:
        draw_here(args.model, args.number, args.output)
        return
    measures = {"rivals": train_rival, "judge": judge, "hide": hide, "gaps": gaps, "draw": time_draw}
    reports = measures[args.what](args)
    for report in [reports] if isinstance(reports, dict) else reports:
        print(json.dumps(report, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
