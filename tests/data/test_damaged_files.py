"""Damaged .npz and Parquet files are errors that name the file; columns that cannot be used, errors
that name the column.
"""

import contextlib
import io
import warnings
import zipfile
from datetime import date, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.cli import main
from mlpcore.data import row_groups
from mlpcore.data.open import open_stream
from mlpcore.data.streams import Block
from mlpcore.engine import plan
from mlpcore.tables import arrow, files
from mlpcore.tables import datasets as data
from mlpcore.tables import streamed as big_tables
from mlpcore.tables import table as tables

ROWS = 120


def refuses(function, path, most=700):
    """Return True if it raises a ValueError or OSError that names the file, False if it ends."""
    error = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            function(path)
        except (ValueError, OSError) as raised:
            error = raised
    if error is None:
        return False
    assert not isinstance(error, pa.ArrowException)
    sound = isinstance(error, ValueError) and any(
        word in str(error) for word in ("column '", "too far", "--target")
    )
    assert str(path) in str(error) or sound, error  # sound, but no table to learn from
    assert len(str(error)) < most + len(str(path))
    return True


def bent(rng, raw, first=0, last=None):
    """The bytes with one to three of them changed, or cut short."""
    changed = bytearray(raw)
    if rng.random() < 0.2:
        return changed[: rng.integers(len(raw))]
    for place in rng.integers(first, last or len(raw), rng.integers(1, 4)):
        changed[place] = (
            rng.integers(256) if rng.random() < 0.5 else changed[place] ^ (1 << rng.integers(8))
        )
    return changed


# -- .npz


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, X=np.random.default_rng(0).normal(size=(40, 3)), Y=np.array(["a", "b"] * 20))
    return path


def header(shape, descr="<f8", rest=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + rest


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of one name
        for name, held in members.items():
            for content in held if isinstance(held, list) else [held]:
                new.writestr(f"{name}.npy", content)


def encrypted(raw):
    """The bytes of a zip file that says its members are encrypted."""
    changed = bytearray(raw)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = changed.find(mark)
        while at >= 0:
            changed[at + place] |= 1
            at = changed.find(mark, at + 4)
    return bytes(changed)


SOUND = header((40, 3), rest=np.zeros((40, 3)).tobytes())
MANGLED = {
    "an array that promises 10^12 rows": lambda path, raw: zipped(
        path, X=header((10**12, 3), rest=b"0" * 960)
    ),
    "an array of no size": lambda path, raw: zipped(path, X=header((40, 3))),
    "more than the array": lambda path, raw: zipped(path, X=SOUND + b"0"),
    "a negative shape": lambda path, raw: zipped(path, X=header((-40, -3), rest=b"0" * 960)),
    "a header that is no dict": lambda path, raw: zipped(
        path, X=b"\x93NUMPY\1\0\6\0[[[[[\n" + b"0" * 960
    ),
    "a header that does not end": lambda path, raw: zipped(
        path, X=b"\x93NUMPY\1\0\6\0{'de'\n" + b"0" * 960
    ),
    "a header of uneven lines": lambda path, raw: zipped(
        path, X=b"\x93NUMPY\1\0\x0e\0if a:\n  b\n c\n" + b"0" * 960
    ),
    "a header of 10^9 bytes": lambda path, raw: zipped(
        path, X=b"\x93NUMPY\2\0\0\0\0\x40" + b"0" * 960
    ),
    "another version": lambda path, raw: zipped(path, X=SOUND.replace(b"NUMPY\1", b"NUMPY\7")),
    "no array": lambda path, raw: zipped(path, X=b"some text"),
    "nothing": lambda path, raw: zipped(path, X=b""),
    "two arrays of one name": lambda path, raw: zipped(path, X=[SOUND, SOUND]),
    "Python objects": lambda path, raw: np.savez(path, X=np.array([[1, "a"]], object)),
    "records": lambda path, raw: np.savez(path, X=np.zeros((3, 2), "i4,f8")),
    "a damaged byte": lambda path, raw: path.write_bytes(raw.replace(SOUND[-9:], b"12345678")),
    "the first half": lambda path, raw: path.write_bytes(raw[: len(raw) // 2]),
    "all but the last byte": lambda path, raw: path.write_bytes(raw[:-1]),
    "an encrypted archive": lambda path, raw: path.write_bytes(encrypted(raw)),
    "a .npy file": lambda path, raw: path.write_bytes(SOUND),
    "a file of zeros": lambda path, raw: path.write_bytes(bytes(500)),
    "an empty file": lambda path, raw: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of three columns."""
    folder = tmp_path_factory.mktemp("model")
    np.savez(folder / "m.npz", X=np.random.default_rng(0).normal(size=(40, 3)), Y=["a", "b"] * 20)
    call = ["train", str(folder / "m.npz"), "--epochs", "1", "--hidden", "2", "--quiet"]
    assert main([*call, "--out", str(folder)]) == 0
    return folder / "m.safetensors"


@pytest.mark.parametrize("what", MANGLED)
def test_an_archive_with_it_is_one_line_that_names_the_file(what, archive, model, tmp_path, capsys):
    zipped(archive, X=SOUND)
    MANGLED[what](archive, archive.read_bytes())
    capsys.readouterr()
    for call in (
        ["train", archive, "--out", tmp_path / "o"],
        ["predict", model, archive, "--out", tmp_path / "p.csv"],
        ["check", model, archive],
    ):
        assert main([str(part) for part in call]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"mlpcore: {archive}: ")
        assert error.count("\n") == 1
        assert len(error) < 500 + len(str(archive))


def test_an_archive_that_claims_more_than_it_can_hold_takes_no_memory(archive):
    """Sizes in the directory agree with the array's header; the bytes are not there."""
    size = 10**12
    claimed = header((size // 8,))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("X.npy", claimed + bytes(1000))
    raw = bytearray(archive.read_bytes())
    at = raw.find(b"PK\1\2")
    raw[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match=r"t\.npz: .*cannot be 4,294,967,280 bytes"):
        data.load_npz(archive)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_random_damages_of_an_archive_are_found_or_harmless(save, archive):
    rng = np.random.default_rng(0)
    X = np.random.default_rng(0).normal(size=(40, 3))
    save(archive, X=X, Y=np.array(["a", "b"] * 20))
    raw, found = archive.read_bytes(), 0
    for _ in range(300):
        archive.write_bytes(bent(rng, raw))
        found += refuses(
            lambda path: np.testing.assert_array_equal(data.load_npz(path).X, X), archive
        )
        refuses(lambda path: data.load_truth(path, 40, ("a", "b"), "text", 2), archive)
    assert 150 < found < 300


# -- Parquet


def sound(path, **options):
    rng = np.random.default_rng(0)
    columns = {
        "a": rng.normal(size=ROWS),
        "b": rng.integers(0, 9, ROWS),
        "y": rng.normal(size=ROWS),
    }
    words = {
        "s": rng.choice(["p", "q"], ROWS),
        "k": pa.array(rng.choice(["x", "y"], ROWS)).dictionary_encode(),
    }
    parquet.write_table(
        pa.table(columns), path.with_name("numbers.parquet"), row_group_size=20, **options
    )
    parquet.write_table(pa.table({**columns, **words}), path, row_group_size=20, **options)
    return path


def in_pieces(path):
    stream = open_stream(*big_tables.stream_table(path, "y").split(0).training)
    arrays = plan.allocate(NumpyOps(), stream.buffers(16))
    for _ in stream.epoch(16, None, 0, arrays):
        pass


def trained(path):
    net = mc.MLP([2, 1])
    mc.Trainer(net, "squared_error", mc.SGD(1e-3)).fit(
        mc.Parquet(path, "y"), epochs=1, batch_size=16, progress=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
def test_random_damages_of_a_parquet_file_are_errors_that_name_it(codec, tmp_path):
    rng = np.random.default_rng(0)
    path = sound(tmp_path / "t.parquet", compression=codec, write_page_checksum=codec == "none")
    made = tables.load_table(path, "y").prepare(np.arange(ROWS))
    readers = [
        (path, lambda path: tables.load_table(path, "y")),
        (path, lambda path: made.apply(made.read(path)[0])),
        (path, in_pieces),
        (path.with_name("numbers.parquet"), trained),
    ]
    raw = {file: file.read_bytes() for file, _ in readers}
    found = 0
    for turn in range(80):
        file, reader = readers[turn % 4]
        footer = len(raw[file]) - 8 - int.from_bytes(raw[file][-8:-4], "little")
        first, last = ((4, footer), (footer, len(raw[file])))[turn // 4 % 2]
        file.write_bytes(bent(rng, raw[file], first, last))
        with contextlib.suppress(mc.NonFiniteLoss):  # a number that is another one now
            found += refuses(reader, file)
    assert found > 40


def test_pages_are_compared_with_their_checksums(tmp_path):
    """One bit of a number: no reader would see it without."""
    path = sound(
        tmp_path / "t.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    for file, reader in (
        (path, lambda path: files.read_table(path)),
        (path, in_pieces),
        (path.with_name("numbers.parquet"), trained),
    ):
        raw = bytearray(file.read_bytes())
        place = raw.find(np.random.default_rng(0).normal(size=ROWS)[:20].tobytes())
        raw[place + 3] ^= 1
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=rf"{file.name}.*damaged.*(checksum|CRC)"):
            reader(file)


def test_rows_that_are_promised_and_not_there_are_missed(tmp_path):
    """The footer of a longer file on the pages of a shorter one; pyarrow reads fewer rows, and says
    nothing.
    """
    path = sound(tmp_path / "t.parquet")
    with (
        parquet.ParquetFile(path) as file,
        pytest.raises(ValueError, match="20 rows fewer than its footer promises"),
    ):
        for _ in row_groups.read_batches(_Short(file), "t.parquet", 64, 0, ["a"]):
            pass


class _Short:
    """A file of which nothing is read."""

    def __init__(self, file):
        self.metadata = file.metadata

    def iter_batches(self, *_):
        return iter(())


def test_a_run_that_meets_a_damaged_file_keeps_the_parameters_of_its_last_step(tmp_path):
    sound(
        tmp_path / "t.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    path = tmp_path / "numbers.parquet"
    raw = bytearray(path.read_bytes())
    place = raw.find(files.read_table(path).column("y").to_numpy()[80:100].tobytes())
    net = mc.MLP([2, 1])
    trainer = mc.Trainer(net, "squared_error", mc.SGD(1e-3))

    def batches(harm=True):
        for first in range(0, ROWS, 20):
            X, Y = np.empty((20, 2)), np.empty(20)
            mc.Parquet(path, "y").reader()(first, first + 20, Block(X, Y))
            yield X, Y
            if harm and first == 20:  # the disk fails while the run is under way
                raw[place + 3] ^= 1
                path.write_bytes(raw)

    with pytest.raises(ValueError, match=r"numbers\.parquet.*damaged"):
        trainer.fit(batches, epochs=1, progress=False)
    twin = mc.MLP([2, 1])
    other = mc.Trainer(twin, "squared_error", mc.SGD(1e-3))
    raw[place + 3] ^= 1
    path.write_bytes(raw)
    for X, Y in list(batches(harm=False))[: trainer.progress.step]:
        other.step(X, Y)
    assert 2 <= trainer.progress.step <= 4
    np.testing.assert_array_equal(net.parameters, twin.parameters)


DAY, MOMENT = date(2024, 1, 1), datetime(2024, 1, 1, 10)
TYPES = {
    "string_view": pa.array(["x", "y", None] * 40, pa.string_view()),
    "large_string": pa.array(["x", "y", None] * 40, pa.large_string()),
    "binary": pa.array([b"x", b"y", None] * 40),
    "binary_view": pa.array([b"x", b"y", None] * 40, pa.binary_view()),
    "list": pa.array([[1], [2], None] * 40),
    "large_list": pa.array([[1], [2], None] * 40, pa.large_list(pa.int64())),
    "list_view": pa.array([[1], [2], None] * 40, pa.list_view(pa.int64())),
    "struct": pa.array([{"a": 1}, {"a": 2}, None] * 40),
    "map": pa.array([[("a", 1)], [("b", 2)], None] * 40, pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(ROWS),
    "category": pa.array(["x", "y", None] * 40).dictionary_encode(),
    "half": pa.array([np.float16(1.5), np.float16(2.5), None] * 40, pa.float16()),
    "decimal64": pa.array([Decimal("1.5"), Decimal("2.5"), None] * 40).cast(pa.decimal128(15, 2)),
    "decimal256": pa.array([Decimal("1.5"), Decimal("2.5"), None] * 40, pa.decimal256(60, 2)),
    "duration": pa.array([1, 2, None] * 40, pa.duration("s")),
    "time": pa.array([1, 2, None] * 40, pa.time32("s")),
    "date": pa.array([DAY, DAY, None] * 40),
    "zone": pa.array([MOMENT, datetime(2024, 1, 2), None] * 40, pa.timestamp("us", "Nowhere/Town")),
}
if hasattr(pa, "decimal64"):
    TYPES["decimal64"] = TYPES["decimal64"].cast(pa.decimal64(15, 2))


@pytest.mark.parametrize("kind", TYPES)
def test_a_column_of_any_type_is_used_left_out_or_refused_by_name(kind, tmp_path):
    columns = {"cc": TYPES[kind], "a": np.arange(float(ROWS)) ** 2, "y": np.arange(ROWS) / 7}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=20)
    path, texts, numbers = (
        tmp_path / "t.parquet",
        tmp_path / "texts.parquet",
        tmp_path / "numbers.parquet",
    )
    parquet.write_table(pa.table({"cc": ["x", "y"] * 60, "y": columns["y"]}), texts)
    parquet.write_table(pa.table({"cc": columns["a"], "y": columns["y"]}), numbers)
    taken = {column.name: column for column in tables.load_table(path, "y").columns}
    assert taken["cc"].note
    in_pieces(path)
    used = 0
    for wish in ("number", "category"):
        used += attempt(
            lambda wish=wish: tables.load_table(path, "y", wishes={"cc": wish}).prepare(
                np.arange(ROWS)
            )
        )
    used += attempt(lambda: tables.load_table(path, "cc", "classification"))
    used += attempt(lambda: big_tables.stream_table(path, "cc"))
    used += attempt(lambda: tables.load_table(path, "y", groups="cc"))
    for other in (texts, numbers):
        made = tables.load_table(other, "y").prepare(np.arange(ROWS))
        attempt(lambda made=made: made.apply(made.read(path)[0]))
    attempt(lambda: mc.Parquet(path, "y"))
    assert bool(used) == (
        kind
        in (
            "string_view",
            "large_string",
            "category",
            "half",
            "decimal64",
            "decimal256",
            "date",
            "zone",
            "null",
        )
    )


def attempt(function):
    """Return True if it ends, False if it raises an error that names the column."""
    error = None
    try:
        function()
    except (ValueError, TypeError) as raised:
        error = raised
    assert not isinstance(error, pa.ArrowException)
    assert error is None or "cc" in str(error), error
    return error is None


def test_categories_whose_texts_are_views_are_categories(tmp_path):
    coded = pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None], pa.int32()), pa.array(["x", "y"], pa.string_view())
    )
    table = files.without_views(pa.table({"c": coded}))
    assert pa.types.is_dictionary(table.schema.field("c").type)
    assert arrow.plain(table.column("c")).to_pylist() == ["x", "y", None]


# -- messages


LONG = "n" * 40_000


@pytest.mark.parametrize(
    ("names", "call"),
    [
        ([LONG, "y"], ["--target", "z"]),
        ([LONG, "y"], ["--target", LONG + "z"]),
        ([LONG, "y"], ["--target", "y", "--as", f"{LONG}=numbr"]),
        ([LONG, "y"], ["--target", "y", "--as", f"{LONG}=number"]),
        ([LONG, "y"], ["--target", LONG, "--task", "regression"]),
        ([LONG, "y"], ["--target", LONG]),
        ([LONG, "y"], ["--target", LONG, "--groups", LONG]),
        ([LONG, LONG, "y"], ["--target", "y"]),
        ([f"{LONG}{i}" for i in range(20)], ["--target", "y"]),
        ([f"c{i}" for i in range(8000)], ["--target", "y"]),
    ],
)
def test_messages_are_short_however_long_names_and_values_are(names, call, tmp_path, capsys):
    path = tmp_path / "t.csv"
    rows = [
        ",".join(f"{LONG}{i}{k}" if i < 1 else str(k * k) for i in range(len(names)))
        for k in range(12)
    ]
    path.write_text("\n".join([",".join(names), *rows]) + "\n")
    assert main(["train", str(path), *call, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert len(said.err) < 900 + len(str(path))
    assert len(said.out) < 900 + len(str(path))


def test_what_is_said_in_training_and_predicting_is_short_too(tmp_path, capsys):
    values = [f"{LONG}{i % 3}" for i in range(90)]
    parquet.write_table(
        pa.table({f"{LONG}k": values, "same": [LONG] * 90, "y": np.arange(90) / 7}),
        tmp_path / "t.parquet",
    )
    assert (
        main(
            [
                "train",
                str(tmp_path / "t.parquet"),
                "--target",
                "y",
                "--epochs",
                "1",
                "--quiet",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    for value in (LONG, None):
        parquet.write_table(
            pa.table({f"{LONG}k": pa.array([value] * 3, pa.string())}), tmp_path / "new.parquet"
        )
        new, out = str(tmp_path / "new.parquet"), str(tmp_path / "p.csv")
        assert main(["predict", str(tmp_path / "t.safetensors"), new, "--out", out]) == 0
    parquet.write_table(pa.table({f"{LONG}l": [1.0]}), tmp_path / "new.parquet")
    assert main(["predict", str(tmp_path / "t.safetensors"), new, "--out", out]) == 2
    said = capsys.readouterr()
    assert len(said.out) + len(said.err) < 4000 + 10 * len(str(tmp_path))
