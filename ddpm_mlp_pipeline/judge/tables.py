"""Judge synthetic tables against real ones, and the filling of gaps against the hidden values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DatasetError, explain_missing_extra

if TYPE_CHECKING:
    import pandas as pd

    Columns = Sequence[Mapping[str, Any]]
    Fill = Callable[[pd.DataFrame], Sequence[pd.DataFrame]]

NUMBER_KINDS = ("number", "integer", "date")
MAX_ROWS = 10_000  # of each table in a measure, unless told otherwise
MIN_ROWS = 20  # of each table
MAX_QUERIES = 5_000  # rows whose nearest neighbours are searched: the share's standard error is then at most 0.007
MAX_CODES = 254  # categories that scikit-learn's boosted trees take; rarer ones share a code
MAX_PREDICTED = 30  # categories of a column that boosted trees predict: each has its own trees
FOLDS = 5
ROUNDS = 100  # of boosting, scikit-learn's default
CHUNK = 2**23  # pairwise distances in memory at once
DIGITS = 9  # significant digits in which an exact copy agrees
INTERVAL = (0.05, 0.95)  # quantiles of the draws; the interval between them should cover 90 % of the hidden numbers
MIN_DRAWS = 20  # fewer have no quantiles at 5 % and 95 %
SHARE_HIDDEN = 0.2


def align(columns: Columns, *tables: pd.DataFrame) -> list[pd.DataFrame]:
    """Bring tables to one form, with the given columns only.

    Args:
        columns: mappings with `name`, `kind` and, for dates, `format` and `unit`, as `columns` of `bundle.json`.
        tables: rows as read from files or drawn by a sampler.

    Returns:
        A table for each: float64 with NaN for numbers (dates: days or seconds since 1970), and strings with `None` for
        categories. Categories that are numbers in all tables are compared as numbers: 3 and 3.0 are equal.

    Raises:
        DatasetError: if a table lacks a column, or a cell is not of the column's kind.
    """
    import pandas as pd

    for table in tables:
        if lacking := [column["name"] for column in columns if column["name"] not in table.columns]:
            raise DatasetError(f"a table has no column {lacking[0]!r}")
    aligned: list[dict[str, pd.Series]] = [{} for _ in tables]
    for column in columns:
        name = column["name"]
        found = [table[name].reset_index(drop=True) for table in tables]
        if column["kind"] in NUMBER_KINDS:
            found = [_read_numbers(column, values) for values in found]
        else:
            if column["kind"] == "boolean":  # true, True and TRUE are equal
                found = [values.astype(str).str.lower().where(values.notna(), None) for values in found]
            found = _read_categories(found)
        for into, values in zip(aligned, found, strict=True):
            into[name] = values
    return [pd.DataFrame(table) for table in aligned]


def _read_numbers(column: Mapping[str, Any], values: pd.Series) -> pd.Series:
    import pandas as pd

    cells, is_missing = values, values.isna()
    if column["kind"] == "date":
        if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
            values = values.astype("Int64")  # such as years, in a column with gaps
        if not pd.api.types.is_datetime64_any_dtype(values):
            values = pd.to_datetime(values.astype(str), format=column.get("format"), errors="coerce")
        unit = pd.Timedelta(1, "s" if column.get("unit") == "s" else "D")
        numbers = ((values - pd.Timestamp(0)) / unit).astype("float64").mask(is_missing)
    else:
        numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    wrong = ~is_missing & ~np.isfinite(numbers)
    if wrong.any():
        raise DatasetError(f"{cells[wrong].iloc[0]!r} in the column {column['name']!r} is not a {column['kind']}")
    return numbers


def _read_categories(found: list[pd.Series]) -> list[pd.Series]:
    import pandas as pd

    numbers = [pd.to_numeric(values.astype(object), errors="coerce") for values in found]
    if all(number.notna().equals(values.notna()) for number, values in zip(numbers, found, strict=True)):
        found = [number.astype("float64") for number in numbers]
    return [
        values.astype(object).where(values.isna(), values.astype(str)).where(values.notna(), None) for values in found
    ]


def judge_table(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    synthetic: pd.DataFrame,
    columns: Columns,
    target: str | None = None,
    *,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare synthetic rows with real ones. Each measure comes with its floor: the same measure of held-out rows.

    The measures:

    - `column_shapes`, `column_pair_trends`, `quality`: the scores of sdmetrics' `QualityReport` against the training
      rows, from 0 to 1 (best). `quality` is the mean of the two. For the trends, sdmetrics cuts each table's numbers
      into ten bins of its own, so that a few outliers lower the score even of real rows: compare with the floor.
    - `gap_shares`: sdmetrics' `MissingValueSimilarity`, the mean over columns of 1 − |difference of the shares of
      missing cells|.
    - `auc`: how well boosted trees tell synthetic rows from training rows, in cross-validation. 0.5 is the ideal; 1
      means that each row is recognised.
    - `closer_to_training`: see `share_closer`. 0.5 is the ideal, more means copying. If less than half of the real
      rows are held out, the effect of copies is diluted, so look at `exact_copies`, too.
    - `exact_copies`: share of the rows that equal a training row in every column, to nine digits. Its floor is not 0
      where real rows repeat.
    - `target`, if asked for: accuracy or R² of boosted trees that predict that column of the held-out rows, trained on
      synthetic rows. Its floor is that of as many training rows.

    Args:
        train, held_out, synthetic: rows with the same columns. `held_out` must share no row with `train` by origin.
        columns: as for `align`. Columns that are not listed, such as free text, don't count.
        target: name of the column to predict.
        max_rows: maximum number of rows of a table in a measure; they are chosen at random.
        seed: seed of each random choice.

    Returns:
        `{"rows", "measures": {name: {"samples", "floor"}}, "columns": {name: column shape}}`; with a target, also
        `"target": {"column", "score"}`. A measure that is not defined for the table is `None`.

    Raises:
        DatasetError: if tables don't fit the columns, or have too few rows.
        MissingExtraError: if sdmetrics or scikit-learn is not installed.
    """
    with explain_missing_extra("judging tables"):
        import pandas  # noqa: F401
        import sdmetrics  # noqa: F401
        import sklearn  # noqa: F401

    tables = dict(zip(("train", "held_out", "synthetic"), align(columns, train, held_out, synthetic), strict=True))
    for name, table in tables.items():
        if len(table) < MIN_ROWS:
            raise DatasetError(f"the table {name!r} has {len(table)} rows, fewer than {MIN_ROWS}")
    real, fresh, drawn = (_choose(table, max_rows, seed + i) for i, table in enumerate(tables.values()))
    n = min(len(fresh), len(drawn))  # the scores depend on the number of rows, so the floor has equally many
    scores, floors = _quality(real, drawn[:n], columns), _quality(real, fresh[:n], columns)
    shapes = scores.pop("columns")
    floors.pop("columns")
    scores["auc"], floors["auc"] = (classifier_auc(real, rows, columns, seed) for rows in (drawn, fresh))
    scores["closer_to_training"] = share_closer(drawn, real, fresh, columns)
    # The neighbours of each half of the held-out rows are sought in the other half.
    halves = fresh[: len(fresh) // 2], fresh[len(fresh) // 2 :]
    shares = [share_closer(queries, real, rest, columns) for queries, rest in (halves, halves[::-1])]
    floors["closer_to_training"] = float(np.mean(shares))
    of_training = _keys(tables["train"])
    for into, rows in ((scores, tables["synthetic"]), (floors, tables["held_out"])):
        into["exact_copies"] = float(np.isin(_keys(rows), of_training).mean())
    report: dict[str, Any] = {"rows": {name: len(table) for name, table in tables.items()}}
    if target is not None:
        m = min(len(real), len(drawn))
        scores["target"], score = predict_target(drawn[:m], fresh, columns, target, seed)
        floors["target"], _ = predict_target(real[:m], fresh, columns, target, seed)
        report["target"] = {"column": target, "score": score}
    report["measures"] = {key: {"samples": scores[key], "floor": floors[key]} for key in scores}
    return {**report, "columns": shapes}


def _choose(table: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Return at most `number` rows in random order."""
    return table.iloc[np.random.default_rng(seed).permutation(len(table))[:number]].reset_index(drop=True)


def _quality(real: pd.DataFrame, rows: pd.DataFrame, columns: Columns) -> dict[str, Any]:
    from sdmetrics.reports.single_table import QualityReport
    from sdmetrics.single_column import MissingValueSimilarity

    kinds = {c["name"]: {"sdtype": "numerical" if c["kind"] in NUMBER_KINDS else "categorical"} for c in columns}
    report = QualityReport()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant columns, whose score is left out
        report.generate(real, rows, {"columns": kinds}, verbose=False)
        parts = dict(report.get_properties().itertuples(index=False))
        scores = {
            "column_shapes": _finite(parts["Column Shapes"]),
            "column_pair_trends": _finite(parts["Column Pair Trends"]),
            "quality": _finite(report.get_score()),
            "gap_shares": float(np.mean([MissingValueSimilarity.compute(real[name], rows[name]) for name in real])),
        }
    details = report.get_details("Column Shapes")
    return {**scores, "columns": {k: _finite(v) for k, v in zip(details["Column"], details["Score"], strict=True)}}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _encode(columns: Columns, *tables: pd.DataFrame) -> tuple[list[np.ndarray], list[bool]]:
    """Return arrays `[rows, columns]` for boosted trees, NaN where missing, and which columns are categories."""
    import pandas as pd

    encoded = [np.empty((len(table), len(columns))) for table in tables]
    for i, column in enumerate(columns):
        values = [table[column["name"]] for table in tables]
        if column["kind"] not in NUMBER_KINDS:
            by_frequency = pd.concat(values).value_counts().index
            codes = {category: min(code, MAX_CODES - 1) for code, category in enumerate(by_frequency)}
            values = [of_table.map(codes).astype("float64") for of_table in values]
        for array, of_table in zip(encoded, values, strict=True):
            array[:, i] = of_table
    return encoded, [column["kind"] not in NUMBER_KINDS for column in columns]


def classifier_auc(real: pd.DataFrame, rows: pd.DataFrame, columns: Columns, seed: int = 0) -> float:
    """Return the area under the ROC curve of boosted trees that tell `rows` from real ones.

    It is measured on rows that the trees were not trained on, in five-fold cross-validation. Of both tables equally
    many rows are used. 0.5 means that the rows can't be told apart.

    Args:
        real, rows: from `align`.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    n = min(len(real), len(rows))
    (x, y), categorical = _encode(columns, real[:n], rows[:n])
    trees = HistGradientBoostingClassifier(max_iter=ROUNDS, categorical_features=categorical, random_state=seed)
    labels = np.repeat([0, 1], n)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    chances = cross_val_predict(trees, np.concatenate([x, y]), labels, cv=folds, method="predict_proba")
    return float(roc_auc_score(labels, chances[:, 1]))


def predict_target(
    rows: pd.DataFrame, held_out: pd.DataFrame, columns: Columns, target: str, seed: int = 0
) -> tuple[float | None, str]:
    """Train boosted trees on `rows` to predict a column from the others, and test them on the held-out rows.

    Rows without a value in the column are left out.

    Args:
        rows, held_out: from `align`.

    Returns:
        The score, and its name: `"accuracy"` for a category, `"r2"` for a number. The score is `None` if no row is
        left to learn from.

    Raises:
        DatasetError: if the column is not listed, or no held-out row has a value in it.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    kinds = {column["name"]: column["kind"] for column in columns}
    if target not in kinds or len(kinds) < 2:
        raise DatasetError(f"the target {target!r} is no column, or the only one, of {list(kinds)}")
    rows, held_out = (table[table[target].notna()] for table in (rows, held_out))
    if not len(held_out):
        raise DatasetError(f"no held-out row has a value in the column {target!r}")
    is_number = kinds[target] in NUMBER_KINDS
    score = "r2" if is_number else "accuracy"
    if len(rows) < 2:
        return None, score
    (x, x_test), categorical = _encode([c for c in columns if c["name"] != target], rows, held_out)
    model: Any = HistGradientBoostingRegressor if is_number else HistGradientBoostingClassifier
    trees = model(max_iter=ROUNDS, categorical_features=categorical, random_state=seed, early_stopping=False)
    if not is_number and rows[target].nunique() == 1:
        trees = DummyClassifier(strategy="most_frequent")
    return float(trees.fit(x, rows[target]).score(x_test, held_out[target])), score


def share_closer(rows: pd.DataFrame, train: pd.DataFrame, held_out: pd.DataFrame, columns: Columns) -> float:
    """Return the share of rows that lie closer to their nearest training row than to their nearest held-out row.

    Equally many training rows and held-out rows are used, so that the share is 0.5 for rows that were drawn without a
    look at either; a tie counts half. If there are k times as many training rows as are used, a table of copies of
    random training rows has about 0.5 + 0.5 / k.

    The distance of two rows is the sum over the columns of |difference| / interquartile range for numbers (standard
    deviation where that range is 0), and of 1 for different categories, and for a missing cell beside one that is not.

    Args:
        rows, train, held_out: from `align`, in random order.
    """
    n, rows = min(len(train), len(held_out)), rows[:MAX_QUERIES]
    queries, *references = _scale(columns, train, rows, train[:n], held_out[:n])
    of_train, of_held_out = (_nearest(queries, reference) for reference in references)
    return float(np.mean((of_train < of_held_out) + 0.5 * (of_train == of_held_out)))


def _scale(columns: Columns, train: pd.DataFrame, *tables: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each table's numbers, in units of the training rows' spread, and its categories' codes (−1: missing)."""
    import pandas as pd

    names = [column["name"] for column in columns if column["kind"] in NUMBER_KINDS]
    others = [column["name"] for column in columns if column["kind"] not in NUMBER_KINDS]
    spread = train[names].quantile(0.75) - train[names].quantile(0.25)
    spread = spread.where(spread > 0, train[names].std(ddof=0)).replace(0, 1).fillna(1)
    centre = train[names].median().fillna(0)
    numbers = [((table[names] - centre) / spread).to_numpy(np.float32) for table in tables]
    codes = [np.empty((len(table), len(others)), np.int32) for table in tables]
    for i, name in enumerate(others):
        found, _ = pd.factorize(pd.concat([table[name] for table in tables]))
        edges = np.cumsum([len(table) for table in tables])[:-1]
        for array, of_table in zip(codes, np.split(found, edges), strict=True):
            array[:, i] = of_table
    return list(zip(numbers, codes, strict=True))


def _nearest(queries: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return each query's distance to its nearest row."""
    (q_numbers, q_codes), (numbers, codes) = queries, rows
    size = max(1, CHUNK // len(numbers))
    nearest = []
    for start in range(0, len(q_numbers), size):
        part = slice(start, start + size)
        total = np.zeros((len(q_numbers[part]), len(numbers)), np.float32)
        for q, r in zip(q_numbers[part].T, numbers.T, strict=True):
            difference = np.abs(q[:, None] - r)
            q_gaps, r_gaps = np.isnan(q), np.isnan(r)
            difference[q_gaps], difference[:, r_gaps] = 1, 1
            difference[np.ix_(q_gaps, r_gaps)] = 0
            total += difference
        for q, r in zip(q_codes[part].T, codes.T, strict=True):
            total += q[:, None] != r
        nearest.append(total.min(axis=1))
    return np.concatenate(nearest)


def _keys(table: pd.DataFrame) -> np.ndarray:
    """Return a hash of each row. Numbers count to `DIGITS` significant digits."""
    import pandas as pd

    keys = {}
    for name in table:
        values = table[name]
        if values.dtype == np.float64:
            exponents = np.floor(np.log10(np.abs(values.where(values != 0, 1).fillna(1))))
            scale = 10.0 ** (DIGITS - 1 - exponents)
            values = (values * scale).round() / scale + 0.0  # −0 is 0
        keys[name] = values
    return np.asarray(pd.util.hash_pandas_object(pd.DataFrame(keys), index=False))


def hide_cells(
    rows: pd.DataFrame, columns: Columns, share: float = SHARE_HIDDEN, seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Hide cells at random.

    Args:
        rows: the table as read.
        columns: as for `align`; only their cells are hidden.
        share: chance of each cell that is not missing anyway.

    Returns:
        The table with missing values in place of the hidden ones, and which cells these are: booleans,
        `[rows, columns]`, in the order of `columns`.
    """
    names = [column["name"] for column in columns]
    hidden = (np.random.default_rng(seed).random((len(rows), len(names))) < share) & rows[names].notna().to_numpy()
    gaps = rows.reset_index(drop=True)
    for i, name in enumerate(names):
        gaps[name] = gaps[name].mask(hidden[:, i])
    return gaps, hidden


def judge_gaps(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    columns: Columns,
    methods: Mapping[str, Fill],
    *,
    share: float = SHARE_HIDDEN,
    max_rows: int = MAX_ROWS,
    comparisons: bool = True,
    num_draws: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Hide cells of held-out rows, let methods fill them in, and measure the errors.

    A number's error is the root of the mean square, in standard deviations of the training rows' column; a category's
    is the share of wrong ones. If a method returns several draws, the mean of a number's draws and the most frequent
    of a category's count. From 20 draws on, `coverage` is the share of the hidden numbers between the 5 % and the 95 %
    quantile of the draws; 0.9 is the ideal. A hidden cell that a draw leaves empty is filled as `mean_mode` does.

    Args:
        train, held_out: rows as read.
        columns: as for `align`.
        methods: functions that take the held-out rows with gaps and return one or more filled tables. Cells that are
            missing in the data are gaps, too, but don't count.
        share: share of the cells to hide.
        max_rows: maximum number of training rows that the comparisons are fitted to.
        comparisons: measure `mean_mode`, `iterative`, `iterative_draws` and `trees`, too: see `fill_mean_mode`,
            `fill_iterative` and `fill_trees`.
        num_draws: number of draws of `iterative_draws`.
        seed: seed of the hidden cells and of the comparisons.

    Returns:
        For each method `{"numbers", "categories", "overall", "coverage", "columns": {name: error}}`. `numbers` and
        `categories` are means over the columns of a kind, `overall` over all. What is not defined is `None`.

    Raises:
        DatasetError: if a table doesn't fit the columns, or a method changes the number of rows.
        MissingExtraError: if pandas or scikit-learn is not installed.
    """
    with explain_missing_extra("judging gaps"):
        import pandas  # noqa: F401
        import sklearn  # noqa: F401

    gaps, hidden = hide_cells(held_out, columns, share, seed)
    report = {name: score_gaps(train, held_out, hidden, fill(gaps), columns) for name, fill in methods.items()}
    if comparisons:
        real, truth, open_gaps = align(columns, train, held_out, gaps)
        some = _choose(real, max_rows, seed)
        filled = {
            "mean_mode": fill_mean_mode(real, open_gaps),
            "iterative": fill_iterative(some, open_gaps, columns, seed=seed),
            "iterative_draws": fill_iterative(some, open_gaps, columns, num_draws, seed=seed),
            "trees": fill_trees(some, open_gaps, columns, seed),
        }
        report |= {name: _score_gaps(real, truth, hidden, draws, columns) for name, draws in filled.items()}
    return report


def score_gaps(
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    hidden: np.ndarray,
    draws: Sequence[pd.DataFrame],
    columns: Columns,
) -> dict[str, Any]:
    """Measure the errors of filled tables. The arguments and the result are as for `judge_gaps` and `hide_cells`."""
    if not draws:
        raise DatasetError("no table was filled")
    if wrong := [len(draw) for draw in draws if len(draw) != len(held_out)]:
        raise DatasetError(f"a filled table has {wrong[0]} rows, but there are {len(held_out)} to fill")
    train, held_out, *draws = align(columns, train, held_out, *draws)
    return _score_gaps(train, held_out, hidden, draws, columns)


def _score_gaps(
    train: pd.DataFrame, held_out: pd.DataFrame, hidden: np.ndarray, draws: Sequence[pd.DataFrame], columns: Columns
) -> dict[str, Any]:
    """Measure the errors of filled tables, all of them from one call of `align`."""
    fallback = _means_and_modes(train)
    errors: dict[str, float] = {}
    numbers, inside = [], []
    for i, column in enumerate(columns):
        name, cells = column["name"], hidden[:, i]
        if not cells.any():
            continue
        filled = np.array([draw[name].where(draw[name].notna(), fallback[name])[cells] for draw in draws])
        truth = held_out[name][cells].to_numpy()
        if column["kind"] not in NUMBER_KINDS:
            errors[name] = float(np.mean([_mode(cell) != value for cell, value in zip(filled.T, truth, strict=True)]))
            continue
        numbers.append(name)
        std = float(train[name].std(ddof=0)) or 1.0
        errors[name] = float(np.sqrt(np.mean((filled.mean(axis=0) - truth) ** 2)) / std)
        if len(draws) >= MIN_DRAWS:
            inside.append(_coverage(filled, truth))
    return {
        "numbers": _mean(errors[name] for name in numbers),
        "categories": _mean(error for name, error in errors.items() if name not in numbers),
        "overall": _mean(errors.values()),
        "coverage": _mean(inside),
        "columns": errors,
    }


def _coverage(draws: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of numbers, `[cells]`, in the interval of their draws, `[draws, cells]`.

    A number that equals some draws could have any rank among them. It counts by the share of these ranks that the
    interval holds: the randomised probability integral transform (Czado, Gneiting and Held 2009, "Predictive model
    assessment for count data"), averaged. Otherwise, intervals of a column of few values would cover too much.
    """
    low, high = INTERVAL
    below, at_most = (draws < truth).mean(axis=0), (draws <= truth).mean(axis=0)
    ties = at_most - below
    common = np.clip(np.minimum(at_most, high) - np.maximum(below, low), 0, None)
    inside = np.where(ties > 0, common / np.where(ties > 0, ties, 1), (low <= below) & (below <= high))
    return float(inside.mean())


def _mean(values: Any) -> float | None:
    return float(np.mean(found)) if (found := [*values]) else None


def _mode(values: np.ndarray) -> str:
    """Return the most frequent value, the first in the alphabet of equally frequent ones."""
    found, numbers = np.unique(values.astype(str), return_counts=True)
    return str(found[numbers.argmax()])


def _means_and_modes(train: pd.DataFrame) -> dict[str, Any]:
    fallback: dict[str, Any] = {}
    for name in train:
        known = train[name].dropna()
        if train[name].dtype == np.float64:
            fallback[name] = known.mean() if len(known) else 0.0
        else:
            fallback[name] = known.mode().iloc[0] if len(known) else ""
    return fallback


def fill_mean_mode(train: pd.DataFrame, gaps: pd.DataFrame) -> list[pd.DataFrame]:
    """Fill each column with the mean, or the most frequent category, of the training rows. Tables are from `align`."""
    return [gaps.fillna(_means_and_modes(train))]


def fill_iterative(
    train: pd.DataFrame, gaps: pd.DataFrame, columns: Columns, num_draws: int | None = None, seed: int = 0
) -> list[pd.DataFrame]:
    """Fill gaps by scikit-learn's `IterativeImputer`: each column is a linear regression on all others, in turn.

    Categories are numbers in the order of their frequency, and predictions are rounded. One-hot codes would not do:
    each is 1 minus the sum of the others, which are gaps, too, so the imputer never leaves the shares it starts from.
    The imputer is fitted to training rows in which as many cells are hidden, so that it learns from rows with gaps.

    Args:
        train, gaps: from `align`.
        num_draws: number of draws from the regressions' posterior. By default, one table of the regressions' means.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    coding = _LinearCoding(train, columns)
    imputer = IterativeImputer(
        sample_posterior=num_draws is not None,
        random_state=seed,
        min_value=coding.low,
        max_value=coding.high,
        keep_empty_features=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ten rounds didn't converge
        imputer.fit(coding.encode(_with_as_many_gaps(train, gaps, columns, seed)))
        encoded = coding.encode(gaps)
        return [coding.decode(imputer.transform(encoded), gaps) for _ in range(num_draws or 1)]


def _with_as_many_gaps(train: pd.DataFrame, gaps: pd.DataFrame, columns: Columns, seed: int) -> pd.DataFrame:
    """Hide the share of the training rows' cells by which `gaps` has more of them missing."""
    known, known_of_train = (float(table.notna().to_numpy().mean()) for table in (gaps, train))
    return hide_cells(train, columns, min(max(1 - known / max(known_of_train, 1e-9), 0.01), 0.9), seed)[0]


class _LinearCoding:
    """A table as numbers for linear regressions, in standard deviations: see `fill_iterative`.

    Attributes:
        low, high: range of each column.
    """

    def __init__(self, train: pd.DataFrame, columns: Columns):
        self.names = [column["name"] for column in columns]
        self.categories = {
            column["name"]: [*train[column["name"]].value_counts().index]
            for column in columns
            if column["kind"] not in NUMBER_KINDS
        }
        codes = self._codes(train)
        self.low, self.high = np.zeros(len(columns)), np.ones(len(columns))
        self.means, self.stds = np.zeros(len(columns)), np.ones(len(columns))
        for i, column in enumerate(codes.T):
            if len(known := column[~np.isnan(column)]):
                self.means[i], self.stds[i] = known.mean(), known.std() or 1.0
                self.low[i], self.high[i] = ((known.min(), known.max()) - self.means[i]) / self.stds[i]
        self.low, self.high = self.low - 1e-6, self.high + 1e-6  # constant columns have a range, too

    def _codes(self, table: pd.DataFrame) -> np.ndarray:
        codes = np.empty((len(table), len(self.names)))
        for i, name in enumerate(self.names):
            values = table[name]
            if name in self.categories:
                values = values.map({category: code for code, category in enumerate(self.categories[name])})
            codes[:, i] = values.astype("float64")
        return codes

    def encode(self, table: pd.DataFrame) -> np.ndarray:
        """Return the numbers, `[rows, columns]`, NaN where missing and for unknown categories."""
        return (self._codes(table) - self.means) / self.stds

    def decode(self, encoded: np.ndarray, gaps: pd.DataFrame) -> pd.DataFrame:
        """Return the table with its gaps filled."""
        filled = gaps.copy()
        for i, name in enumerate(self.names):
            values: Any = encoded[:, i] * self.stds[i] + self.means[i]
            if name in self.categories:
                if not self.categories[name]:
                    continue
                codes = values.round().astype(int).clip(0, len(self.categories[name]) - 1)
                values = np.array(self.categories[name], object)[codes]
            filled[name] = gaps[name].where(gaps[name].notna(), values)
        return filled


def fill_trees(train: pd.DataFrame, gaps: pd.DataFrame, columns: Columns, seed: int = 0) -> list[pd.DataFrame]:
    """Fill gaps by boosted trees: for each column, trees of its own predict it from the known cells of the others.

    They learn from training rows in which as many cells are hidden. The error of each cell is hard to beat, but the
    cells of a row need not fit together. Of a column's categories, the 30 most frequent are predicted.

    Args:
        train, gaps: from `align`.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    with_gaps, filled = _with_as_many_gaps(train, gaps, columns, seed), gaps.copy()
    for column in columns:
        name, is_number = column["name"], column["kind"] in NUMBER_KINDS
        of_column, others = train[name], [other for other in columns if other["name"] != name]
        known = of_column.notna()
        if not is_number:
            known &= of_column.isin(of_column.value_counts().index[:MAX_PREDICTED])
        if of_column[known].nunique() < 2 or not others or gaps[name].notna().all():
            continue  # the mean or the only category is as good
        (x, x_gaps), categorical = _encode(others, with_gaps[known], gaps[gaps[name].isna()])
        model: Any = HistGradientBoostingRegressor if is_number else HistGradientBoostingClassifier
        trees = model(max_iter=ROUNDS, categorical_features=categorical, random_state=seed, early_stopping=False)
        filled.loc[gaps[name].isna(), name] = trees.fit(x, of_column[known]).predict(x_gaps)
    return [filled]
