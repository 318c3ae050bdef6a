"""Tables with named columns, CSV or Parquet: what each column is taken as, and the scikit-learn pipeline that follows.

    number     standardised; a missing value becomes the median of the training rows, and a column says so
    category   one column a value; missing is a value like another; rare values share a column, with those never seen
    left out   dates, row numbers, one value only, no value at all, another text in nearly every row

Arrow reads (its types tell integers with gaps from floats), the pipeline is scikit-learn's, and skops writes it without pickle.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.core.errors import unknown
from mlpcore.data import Dataset

try:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc
    import sklearn
    import skops.io
    from pyarrow import csv, parquet
    from sklearn.compose import ColumnTransformer
    from sklearn.exceptions import InconsistentVersionWarning
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
except ImportError as error:
    raise ImportError(f'tables need {error.name}: pip install "mlpcore[cli]"') from error

__all__ = ["SUFFIXES", "Column", "Table", "Transformer", "describe", "load"]

Array = NDArray[Any]
SUFFIXES = (".csv", ".tsv", ".parquet", ".pq")
KINDS = ("number", "category", "out")
MOST_CLASSES = 20  # a target of whole numbers with more values is a quantity
MOST_CATEGORIES = 100  # columns that one category may become
LEAST_ROWS = 5  # of a value that gets a column of its own
_SEPARATE = "separate columns by commas (.csv) or tabs (.tsv)"
_DAY = "(0?[1-9]|[12][0-9]|3[01])"  # or a month
_TIME = "[ T]+[0-9]{1,2}(:[0-9]{2}){0,2}([.,][0-9]+)?( ?[AaPp][Mm])?( ?(Z|UTC|[+-][0-9]{2}(:?[0-9]{2})?))?"
_DATE = (  # 2021-02-14, 2021/02/14, 14/02/2021, 2/14/21, 14.02.2021, 14-02-2021, with or without a time
    f"^([0-9]{{4}}-{_DAY}-{_DAY}|[0-9]{{4}}/{_DAY}/{_DAY}|{_DAY}/{_DAY}/([0-9]{{2}}){{1,2}}"
    f"|{_DAY}[.]{_DAY}[.][0-9]{{4}}|{_DAY}-{_DAY}-[0-9]{{4}})({_TIME})?$"
)
_CHUNK_ROWS = 16_384
_MOST_BYTES = 256 << 20  # of a pipeline in a model file


@dataclass(frozen=True)
class Column:
    """What a column of the file is taken as: "number", "category" or "boolean"; "" where it is left out. `note` says why."""

    name: str
    kind: str
    note: str = ""


@dataclass(frozen=True)
class Table(Dataset):
    """A `Dataset` whose `X` is a frame: float64 numbers with NaN, texts with None, one column for each of `columns` in use."""

    columns: tuple[Column, ...] = ()
    dropped: int = 0

    @property
    def rows(self) -> int:
        """That have a target."""
        return len(self.X)

    def prepare(self, rows: Array) -> Transformer:
        """The transformer of these training rows."""
        return Transformer.fit(self.X, rows, self.columns)


# -- reading ---------------------------------------------------------------------------------------------------------------


def read(path: str | Path, texts: Sequence[str] = ()) -> pa.Table:
    """The table of a file, `.csv`, `.tsv` or Parquet; columns named in `texts` are read as text ("007" stays what it is).

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is not such a file, has no rows, two columns of one name, or lines of unequal length.
    """
    source = require_file(path)
    try:
        table = _read_csv(source, texts) if source.suffix.lower() in (".csv", ".tsv") else parquet.ParquetFile(source).read()
        names = table.column_names
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from None
    except (ValueError, NotImplementedError, OSError) as error:  # Arrow's errors are such
        hint = f"; {_SEPARATE}" if _separated_otherwise(source) else ""
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}{hint}") from None
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: {names.count(name)} columns are named {name!r}; which one is meant?")
    for field in table.schema:
        if source.suffix.lower() in (".csv", ".tsv") and pa.types.is_binary(field.type):
            raise ValueError(f"{path}: column {field.name!r} is not UTF-8 text; save the file as UTF-8")
    if not table.num_rows:
        raise ValueError(f"{path}: has a header ({', '.join(names[:5])}) and no rows")
    return table


def require_file(path: str | Path) -> Path:
    """The path of a file that is there; FileNotFoundError where it is not, or a folder."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"{path}: " + ("is a folder; name a file" if source.is_dir() else "no such file"))
    return source


def _read_csv(source: Path, texts: Sequence[str]) -> pa.Table:
    size = source.stat().st_size
    if not size:
        raise ValueError("the file is empty")
    if size >= (1 << 31) - 1:
        raise ValueError(f"{size:,} bytes of text; from 2 GiB on, write Parquet")
    return csv.read_csv(
        source,
        read_options=csv.ReadOptions(use_threads=False, block_size=size + 1),  # types from all rows, not from the first ones
        parse_options=csv.ParseOptions(delimiter=_delimiter(source), newlines_in_values=True),
        convert_options=csv.ConvertOptions(strings_can_be_null=True, column_types=dict.fromkeys(texts, pa.string())),
    )


def _separated_otherwise(source: Path) -> bool:
    """Whether the header of a text file has more semicolons, or the like, than what separates columns."""
    if source.suffix.lower() not in (".csv", ".tsv"):
        return False
    with open(source, encoding="utf-8", errors="replace") as file:
        header = file.readline(1 << 16)
    mine = _delimiter(source)
    return any(header.count(mark) > header.count(mine) for mark in ",;\t|" if mark != mine)


def _delimiter(source: Path) -> str:
    return "\t" if source.suffix.lower() == ".tsv" else ","


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without dictionary encoding; a text of no characters is a missing one, as in CSV."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if _is_text(values.type):
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
    return values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether an Arrow type is one of numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _numbers(values: pa.ChunkedArray) -> Array:
    """float64 (m,); NaN where there is no finite number."""
    values = _plain(values)
    if _is_text(values.type):
        numbers = pd.to_numeric(values.to_pandas(), errors="coerce").to_numpy(np.float64, na_value=np.nan)
    elif is_number(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type):
        numbers = values.cast(pa.float64(), safe=False).to_numpy()
    else:
        numbers = np.full(len(values), np.nan)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def as_texts(values: pa.ChunkedArray) -> Array:
    """Strings (m,), None where there is none; 3 and 3.0 are both "3", whichever file they come from."""
    values = _plain(values)
    if pa.types.is_boolean(values.type):
        values = pc.if_else(values, "True", "False")
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
    texts = np.empty(len(values), object)
    texts[:] = values.cast(pa.string()).to_pylist()
    return texts


def as_frame(table: pa.Table, columns: Sequence[Column]) -> pd.DataFrame:
    """The columns as their kinds: float64 with NaN, or Python strings with None."""
    arrays = {c.name: (_numbers if c.kind == "number" else as_texts)(table.column(c.name)) for c in columns}
    return pd.DataFrame({name: pd.Series(array, dtype=array.dtype) for name, array in arrays.items()})


# -- what a column is taken as ---------------------------------------------------------------------------------------------


def _take(name: str, values: pa.ChunkedArray, wish: str | None) -> Column:
    """The kind of one column, from its type and values, or as wished."""
    values = _plain(values)
    kind, rows = values.type, len(values)
    known_rows = rows - values.null_count
    if wish == "out":
        return Column(name, "", "as asked")
    if pa.types.is_null(kind) or not known_rows:
        return Column(name, "", "no value in any row")
    if wish is None and _is_text(kind):
        dates = values.filter(pc.match_substring_regex(values.cast(pa.string()), _DATE))
        if len(dates) >= 0.95 * known_rows:
            return Column(name, "", f"dates as text, such as {str(dates[0])!r}")
    if not (_is_text(kind) or is_number(kind) or pa.types.is_boolean(kind)):
        what = "a date or time" if pa.types.is_temporal(kind) else f"of type {kind}"
        if wish:
            raise ValueError(f"--as {name}={wish}: the column is {what}")
        return Column(name, "", what)
    if wish == "category":
        return _category(name, "category", as_texts(values))
    numbers = _numbers(values) if wish or not pa.types.is_boolean(kind) else np.full(rows, np.nan)
    known = np.isfinite(numbers)
    if known.any() and (wish or is_number(kind) or known.sum() >= 0.95 * known_rows):
        return _number(name, numbers, values, wish)
    if wish:
        raise ValueError(f"--as {name}=number: the column holds no number: the first value is {str(values.drop_null()[0])!r}")
    if is_number(kind):
        return Column(name, "", "no finite number in any row")
    return _category(name, "boolean" if pa.types.is_boolean(kind) else "category", as_texts(values), names_rows=True)


def _number(name: str, numbers: Array, values: pa.ChunkedArray, wish: str | None) -> Column:
    known = np.isfinite(numbers)
    low, high = numbers[known].min(), numbers[known].max()
    if known.all() and low == high:
        return Column(name, "", f"{low:.6g} in every row")
    if (
        not wish
        and pa.types.is_integer(values.type)
        and known.all()
        and len(numbers) > 9
        and np.mean(np.diff(numbers) == 1) > 0.8
    ):
        return Column(name, "", f"counts the rows, {low:.0f} to {high:.0f}")
    note = f"{low:.6g} to {high:.6g}"
    if not known.all():
        note += f"; {np.sum(~known):,} missing"
    wrong = pc.filter(values, pc.and_kleene(pc.is_valid(values), pa.array(~known)))
    if len(wrong):
        what = f"text such as {str(wrong[0])!r}" if _is_text(values.type) else "infinite or NaN"
        note += f", {'all' if len(wrong) == np.sum(~known) else f'{len(wrong):,}'} of them {what}"
    return Column(name, "number", note)


def _category(name: str, kind: str, texts: Array, names_rows: bool = False) -> Column:
    counts = pd.Series(texts).value_counts()
    missing = len(texts) - int(counts.sum())
    if len(counts) == 1 and not missing:
        return Column(name, "", f"{counts.index[0]!r} in every row")
    if names_rows and len(counts) > max(2, counts.sum() / 2):
        return Column(name, "", f"text with {len(counts):,} values in {counts.sum():,} rows")
    note = f"{len(counts):,} value{'s' if len(counts) > 1 else ''}"
    apart = int(np.sum(counts >= LEAST_ROWS)) + (missing >= LEAST_ROWS)
    if not apart:
        return Column(name, "", f"{note}, none of them in {LEAST_ROWS} rows")
    if len(counts) <= 4:
        note += ": " + ", ".join(map(str, sorted(counts.index)))
    elif apart > MOST_CATEGORIES:
        note += f", the {MOST_CATEGORIES - 1} most frequent apart"
    elif apart < len(counts):
        note += f", those in {LEAST_ROWS} training rows apart, {apart} at most"
    return Column(name, kind, note + (f"; {missing:,} missing" if missing else ""))


def describe(columns: Sequence[Column], most: int = 60) -> str:
    """The columns as lines of name, kind and note, at most so many."""
    wide = min(32, max(len(column.name) for column in columns))
    lines = [
        f"  {column.name or '(no name)':<{wide}}  {column.kind or 'left out':<9} {column.note}" for column in columns[:most]
    ]
    if len(columns) > most:
        rest = [column.kind or "left out" for column in columns[most:]]
        lines.append(f"  and {len(rest):,} more: " + ", ".join(f"{rest.count(k):,} {k}" for k in dict.fromkeys(rest)))
    return "\n".join(lines)


# -- a table to train on ---------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    target: str,
    task: str | None = None,
    groups: str | None = None,
    wishes: Mapping[str, str] | None = None,
) -> Table:
    """A table with its target; rows without a target are dropped and counted.

    Args:
        path: a `.csv`, `.tsv` or Parquet file.
        target: the column to predict.
        task: "classification" or "regression"; None tells it from the target: text, booleans and at most 20 different whole
            numbers are classes, other numbers a quantity.
        groups: a column whose values must not be split between training and test.
        wishes: column: "number", "category" or "out", where the choice made from the values does not suit.

    Raises:
        FileNotFoundError, OSError, ValueError: names the file or the column, what was expected and what came.
    """
    as_text = [name for name, wish in (wishes or {}).items() if wish == "category"]
    return take(read(path, as_text), path, target, task, groups, wishes)


def take(
    table: pa.Table, path: str | Path, target: str, task: str | None, groups: str | None, wishes: Mapping[str, str] | None
) -> Table:  # fmt: skip
    """`load`, of a table that has been read; `path` is for messages."""
    wishes = wishes or {}
    names = table.column_names
    for argument, name in (("--target", target), ("--groups", groups), *(("--as", name) for name in wishes)):
        if name is not None and name not in names:
            raise _no_column(f"{path}: {argument}", name, names)
    for name, wish in wishes.items():
        if wish not in KINDS:
            raise unknown(f"--as {name}", wish, KINDS)
    if groups == target:
        raise ValueError(f"{path}: --groups and --target both name {target!r}")
    Y, classes, kept = _target(table.column(target), target, task)
    table = table.filter(pa.array(kept))
    codes = None if groups is None else _groups(table.column(groups), groups)
    columns = tuple(
        Column(name, "", "groups") if name == groups else _take(name, table.column(name), wishes.get(name))
        for name in names
        if name != target
    )
    frame = as_frame(table, [column for column in columns if column.kind])
    if not frame.shape[1]:
        why = "; ".join(f"{c.name} is left out ({c.note})" for c in columns[:5]) or "there is no other"
        raise ValueError(f"{path}: no column is left to predict {target!r} from: {why}")
    return Table(
        frame, Y, tuple(frame.columns), classes, codes, unit=f"groups of {groups}", columns=columns, target=target,
        dropped=int(np.sum(~kept)),
    )  # fmt: skip


def _no_column(where: str, name: str, names: Sequence[str]) -> ValueError:
    if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
        return ValueError(f"{where} {name!r}: the header is one column, {names[0]!r}; {_SEPARATE}")
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = [*near, *(other for other in names if other not in near)]
    more = ", …" if len(names) > 10 else ""
    return ValueError(f"{where}: there is no column {name!r}{hint} There are {', '.join(listed[:10])}{more}")


def _target(values: pa.ChunkedArray, name: str, task: str | None) -> tuple[Array, tuple[str, ...], Array]:
    """Y, class names, and which rows have a target. Y holds the kept rows only."""
    values = _plain(values)
    if not (
        _is_text(values.type) or is_number(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)
    ):
        raise ValueError(f"--target {name!r} holds {values.type}; expected numbers, text or booleans")
    numbers, texts = _numbers(values), as_texts(values)
    filled = pd.notna(texts)
    if not filled.any():
        raise ValueError(f"--target {name!r} has no value in any row")
    known = numbers[filled & np.isfinite(numbers)]
    if task is None:
        whole = is_number(values.type) and (known == np.rint(known)).all()
        few = whole and len(np.unique(known)) <= min(MOST_CLASSES, len(known) / 5 + 2)
        task = "classification" if few or not is_number(values.type) else "regression"
    if task == "regression":
        wrong = np.flatnonzero(filled & ~np.isfinite(numbers))
        if len(wrong):
            raise ValueError(f"--target {name!r} of a regression must be numbers; row {wrong[0] + 1} has {texts[wrong[0]]!r}")
        Y = numbers[filled]
        if Y.min() == Y.max():
            raise ValueError(f"--target {name!r} is {Y[0]:.6g} in every row; nothing to learn")
        if np.abs(Y).max() > np.finfo(np.float32).max:
            raise ValueError(f"--target {name!r} must fit float32; got {Y[np.abs(Y).argmax()]:.6g}")
        return Y[:, None].astype(np.float32), (), filled
    labels, first, Y = np.unique(texts[filled].astype(str), return_index=True, return_inverse=True)
    if len(labels) == 1:
        raise ValueError(f"--target {name!r} is {str(labels[0])!r} in every row; nothing to tell apart")
    if len(labels) > max(2, len(Y) / 2):
        hint = "is it a quantity (--task regression)?" if len(known) == len(Y) else "it looks like an identifier"
        raise ValueError(f"--target {name!r}: {len(labels):,} classes in {len(Y):,} rows; {hint}")
    if is_number(values.type):  # 2 before 10
        order = np.argsort(numbers[filled][first])
        labels, Y = labels[order], np.argsort(order)[Y]
    return Y.astype(np.int64), tuple(labels.tolist()), filled


def _groups(values: pa.ChunkedArray, name: str) -> Array:
    if values.null_count:
        raise ValueError(f"--groups {name!r} has no value in {values.null_count:,} row(s)")
    codes, _ = pd.factorize(values.to_pandas())
    return np.asarray(codes, np.int64)


def targets(values: pa.ChunkedArray, classes: Sequence[str]) -> tuple[Array, Array]:
    """Y of the rows that have one, as a model with these classes counts it, and which rows these are (m,)."""
    if classes:
        index = {name: i for i, name in enumerate(classes)}
        codes = np.array([index.get(text, -1) for text in as_texts(values)], np.int64)
        return codes[codes >= 0], codes >= 0
    numbers = _numbers(values)
    return numbers[np.isfinite(numbers), None].astype(np.float32), np.isfinite(numbers)


# -- the pipeline ----------------------------------------------------------------------------------------------------------


class Transformer:
    """Makes the network's float32 input of a frame: scikit-learn's `ColumnTransformer`, by chunks of rows."""

    def __init__(self, pipeline: ColumnTransformer, columns: Sequence[Column]):
        self.pipeline, self.columns = pipeline, tuple(columns)

    @classmethod
    def fit(cls, X: pd.DataFrame, rows: Array, columns: Sequence[Column]) -> Transformer:
        """Medians, means, deviations and categories of the given rows; a category that is rare values only is left out.

        Raises:
            ValueError: no column is left.
        """
        used = [column for column in columns if column.kind == "number" or (column.kind and _tells(X[column.name].iloc[rows]))]
        if not used:
            raise ValueError(f"no column is left to predict from: no value of any is in {LEAST_ROWS} training rows")
        number = Pipeline([
            ("impute", SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)),
            ("scale", StandardScaler()),
        ])  # fmt: skip
        category = OneHotEncoder(
            handle_unknown="infrequent_if_exist", min_frequency=LEAST_ROWS, max_categories=MOST_CATEGORIES,
            sparse_output=False, dtype=np.float32,
        )  # fmt: skip
        parts = [
            ("numbers", number, [column.name for column in used if column.kind == "number"]),
            ("categories", category, [column.name for column in used if column.kind != "number"]),
        ]
        pipeline = ColumnTransformer([part for part in parts if part[2]], sparse_threshold=0)
        with np.errstate(all="ignore"):  # numbers too large are reported by apply
            pipeline.fit(X.iloc[rows])
        return cls(pipeline, used)

    def apply(self, X: pd.DataFrame) -> Array:
        """(m, n_0) float32. ValueError where a number is too large to be standardised."""
        out = np.empty((len(X), self.width), np.float32)
        for start in range(0, len(X), _CHUNK_ROWS):
            with np.errstate(all="ignore"):
                out[start : start + _CHUNK_ROWS] = self.pipeline.transform(X.iloc[start : start + _CHUNK_ROWS])
        bad = np.argwhere(~np.isfinite(out))
        if len(bad):
            row, column = bad[0]
            raise ValueError(
                f"row {row + 1}: {self.names[column]!r} is too far from the other rows to be standardised in float32"
            )
        return out

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns it makes, in order."""
        return tuple(name.split("__", 1)[1] for name in self.pipeline.get_feature_names_out())

    @property
    def width(self) -> int:
        """How many columns it makes."""
        return len(self.pipeline.get_feature_names_out())

    @property
    def tensors(self) -> dict[str, Array]:
        """What a model file keeps: the pipeline as skops writes it."""
        return {"pipeline": np.frombuffer(skops.io.dumps(self.pipeline), np.uint8)}

    @property
    def about(self) -> dict[str, Any]:
        """And what it says of it in its header."""
        columns = {column.name: column.kind for column in self.columns}
        return {"features": self.names, "columns": columns, "scikit-learn": sklearn.__version__}

    @classmethod
    def restore(cls, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> tuple[Transformer, str]:
        """The transformer of a model file, and a remark ("" or that scikit-learn is another version).

        Raises:
            ValueError: the bytes are no such pipeline, or would make anything but the few types that one consists of.
        """
        columns = [Column(name, kind) for name, kind in about["columns"].items()]
        here = cls(_unpack(tensors["pipeline"].tobytes()), columns)
        try:  # of a row in which everything is missing
            here.apply(as_frame(pa.table({column.name: pa.nulls(1) for column in columns}), columns))
        except _DAMAGE as error:
            raise ValueError(f"the pipeline does not work with scikit-learn {sklearn.__version__}: {error!r}") from None
        then = about["scikit-learn"]
        other = f"made with scikit-learn {then}, used with {sklearn.__version__}: compare a few predictions"
        return here, "" if then == sklearn.__version__ else other

    def read(self, path: str | Path) -> tuple[pd.DataFrame, pa.Table, list[str]]:
        """The frame of another file, the file's table, and remarks: columns not used, values never seen in training.

        Raises:
            ValueError: a column is missing; and as `tables.read`.
        """
        table = read(path, [column.name for column in self.columns if column.kind == "category"])
        lacking = [column.name for column in self.columns if column.name not in table.column_names]
        if lacking:
            raise _no_column(f"{path}: the model needs a column", lacking[0], table.column_names)
        frame = as_frame(table, self.columns)
        return frame, table, list(self._remarks(frame, table))

    def _remarks(self, frame: pd.DataFrame, table: pa.Table) -> Iterator[str]:
        for column in self.columns:
            if column.kind == "number":
                lost = int(frame[column.name].isna().sum()) - _plain(table.column(column.name)).null_count
                if lost:
                    yield f"{column.name}: {lost:,} row(s) hold no finite number: taken as missing"
        if "categories" in self.pipeline.named_transformers_:
            encoder = self.pipeline.named_transformers_["categories"]
            for name, known in zip(encoder.feature_names_in_, encoder.categories_, strict=True):
                new = frame.loc[~frame[name].isin(known), name]
                if len(new):
                    such = "no value" if new.iloc[0] is None else f"such as {new.iloc[0]!r}"
                    yield f"{name}: {len(new):,} row(s) hold what training never saw, {such}: taken as rare"


def _tells(values: pd.Series[Any]) -> bool:
    """Whether a value gets a column of its own."""
    return bool(values.value_counts(dropna=False).iloc[0] >= LEAST_ROWS)


# -- without pickle --------------------------------------------------------------------------------------------------------

# what skops and scikit-learn raise over a file that was tampered with
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, OSError, EOFError, MemoryError,
    ArithmeticError, zipfile.BadZipFile,
)  # fmt: skip
_NUMBERS = {f"numpy.{name}" for name in ("float32", "float64", "int32", "int64", "bool", "bool_")}
_TYPES = {  # what a file may make, by the part of skops that makes it
    "ObjectNode": {
        "sklearn.compose._column_transformer.ColumnTransformer",
        "sklearn.impute._base.MissingIndicator",
        "sklearn.impute._base.SimpleImputer",
        "sklearn.pipeline.Pipeline",
        "sklearn.preprocessing._data.StandardScaler",
        "sklearn.preprocessing._encoders.OneHotEncoder",
    },
    "NdArrayNode": {"numpy.ndarray", *_NUMBERS},
    "DTypeNode": {"numpy.dtype"},
    "TypeNode": {"builtins.str", "builtins.int", "builtins.float", *_NUMBERS},
    "DictNode": {"builtins.dict"},
    "ListNode": {"builtins.list"},
    "TupleNode": {"builtins.tuple"},
    "SliceNode": {"builtins.slice"},
    "JsonNode": {"builtins.str"},
}


def _unpack(data: bytes) -> ColumnTransformer:
    """The pipeline that skops wrote; ValueError unless it consists of `_TYPES` and sizes are what they say."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its parts are compressed, which skops's are not")  # so no bomb: sizes are real
            if sum(entry.file_size for entry in entries) > min(len(data), _MOST_BYTES):
                raise ValueError(f"its parts claim to be larger than it is, or than {_MOST_BYTES:,} bytes")
            for entry in entries:
                if entry.filename != "schema.json":
                    _check_array(archive.read(entry))
            _check_types(json.loads(archive.read("schema.json")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InconsistentVersionWarning)  # `restore` says it in its own words
            pipeline = skops.io.loads(data, trusted=["numpy.dtype"])
    except _DAMAGE as error:
        raise ValueError(f"the pipeline is damaged: {error if type(error) is ValueError else repr(error)}") from None
    if not isinstance(pipeline, ColumnTransformer):
        raise ValueError(f"the pipeline is damaged: it is a {type(pipeline).__name__}")
    return pipeline


def _check_types(schema: object) -> None:
    """ValueError where a node anywhere in the schema would make something else than `_TYPES`."""
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            if "__loader__" in node or "__class__" in node:
                name, loader = f"{node.get('__module__')}.{node.get('__class__')}", node.get("__loader__")
                if name not in _TYPES.get(str(loader), ()):
                    raise ValueError(f"it would make a {name} ({loader}), which no pipeline of mlpcore holds")
            left += node.values()
        elif isinstance(node, list):
            left += node


def _check_array(data: bytes) -> None:
    """ValueError where an .npy header promises other than the bytes that follow, before NumPy allocates by it."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another format than NumPy writes")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array says {dtype} of shape {shape} and has {len(data) - file.tell()} bytes")
