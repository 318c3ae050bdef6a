"""The files that a command writes, checked before any work.

A file of another kind, or from another call, is not overwritten unless --force is given. A
command's own input is never overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mlpcore.checks import values
from mlpcore.cli.messages import empty, printable
from mlpcore.io import model_file
from mlpcore.io.atomic import replacing
from mlpcore.io.kinds import VACANT, Kind, kind

Call = Mapping[str, Any]
KEY = "mlpcore"  # keyword of the text in a picture
ANOTHER_FOLDER = "name another folder with --out"
_MOST = 1 << 20  # most bytes of that text
_BATCH = 1024  # lines written at once


# -- files that may be replaced


def require_distinct(argument: str, path: str | Path, others: Mapping[str, str | Path]) -> None:
    """Raise a ValueError if a path leads to one of the others, under any name or link."""
    values.path(path, argument)
    for what, other in others.items():
        if _is_one_file(path, other):
            raise ValueError(
                f"{argument} {printable(str(path))} is where {what}; name another file"
            )


def _is_one_file(one: str | Path, other: str | Path) -> bool:
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samestat(_status(one), os.stat(other))
    except (OSError, ValueError, AttributeError):  # as in `is_standard_output`
        return False


def _status(path: str | Path) -> os.stat_result:
    """Return the status of a file, or of standard output for "-"."""
    return os.fstat(sys.stdout.fileno()) if path == "-" else os.stat(path)


def require_folder(out: Path, name: str) -> None:
    """Raise an OSError that begins with `name` unless a folder can be written or created."""
    place = next((place for place in (out, *out.parents) if os.path.lexists(place)), Path())
    if place.is_symlink() and not place.exists():
        raise NotADirectoryError(
            f"{name}: {printable(str(place))} is a broken link; name another folder"
        )
    if not place.is_dir():
        raise NotADirectoryError(f"{name}: {printable(str(place))} is a file; name a folder")
    if not os.access(
        place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        raise PermissionError(
            f"{name}: the folder {printable(str(place))} is not writable; name another one"
        )


def require_model_place(path: Path, call: Call, force: bool) -> None:
    """Raise a ValueError if the file at `path` is not a model that this call made."""
    found = _looked_at(path, "a model", force)
    if found is None:
        return
    if found.name != "model":
        _refuse(path, found.text, ANOTHER_FOLDER)
    _require_call(path, "a model", saved_call(path), call)


def require_picture_place(path: Path, call: Call, force: bool) -> None:
    """Raise a ValueError if the file at `path` is not a picture that this call drew."""
    found = _looked_at(path, "a picture", force)
    if found is None:
        return
    drawn = _parsed(_note_in_picture(path))
    if drawn is None:
        _refuse(path, found.text, ANOTHER_FOLDER)
    _require_call(path, "a picture", drawn, call)


def require_table_place(path: str, header: str, force: bool) -> None:
    """Raise a ValueError if the file at `path` does not begin with the header of predictions."""
    found = _looked_at(path, "predictions", force)
    if found is None:
        return
    first = _encoded(header).rstrip()
    with open(path, "rb") as file:
        line = file.read(len(first) + 2)
    if line.rstrip(b"\r\n") != first and line[: len(first) + 1] != first + b"\n":
        _refuse(path, f"{found.text}, not predictions of this model")


def require_onnx_place(path: str, about: Mapping[str, Any], force: bool) -> None:
    """Raise a ValueError if the file at `path` is not an ONNX file of this model."""
    found = _looked_at(path, "an ONNX file", force)
    if found is None:
        return
    if found.name != "onnx":
        _refuse(path, found.text)
    import onnx
    from google.protobuf.message import DecodeError

    try:
        notes = {
            note.key: note.value
            for note in onnx.load(path, load_external_data=False).metadata_props
        }
    except DecodeError:
        _refuse(path, "a damaged ONNX file")
    if "call" not in about or _parsed(notes.get("call")) != about["call"]:
        _refuse(path, "an ONNX file of another model")


def _looked_at(path: str | Path, what: str, force: bool) -> Kind | None:
    """Return the kind of the file at `path`, or None if it may be replaced."""
    found = kind(path)
    if found.name == "folder":
        raise IsADirectoryError(
            f"{printable(str(path))}: is a folder, where {what} would be written; name a file"
        )
    if force or found.name in VACANT:
        return None
    require_writable(path, found)
    return found


def require_writable(path: str | Path, found: Kind) -> None:
    """Raise a ValueError if a file of this kind is read-only for everybody."""
    if found.name not in VACANT and not os.stat(path).st_mode & 0o222:
        _refuse(path, f"{found.text}, marked read-only")


def _require_call(path: Path, what: str, before: Call | None, call: Call) -> None:
    if before is None:
        _refuse(path, f"{what} not made by this version of mlpcore train", ANOTHER_FOLDER)
    other = difference(before, call)
    if other:
        _refuse(path, f"{what} from another call of mlpcore train: {other}", ANOTHER_FOLDER)


def _refuse(path: str | Path, there: str, remedy: str = "name another file") -> NoReturn:
    raise ValueError(
        f"{printable(str(path))} is not overwritten: it is {there}; {remedy}, or use --force"
    )


# -- the calls that made the files


def _header(path: Path) -> dict[str, Any]:
    return model_file.parse_header(path, model_file.metadata(path))


def saved_call(path: Path) -> Call | None:
    """Return the call that made a model or a checkpoint; None if it is not recorded."""
    about = _header(path).get("about")
    call = about.get("call") if isinstance(about, dict) else None
    return call if isinstance(call, dict) else None


def difference(before: Call, call: Call) -> str:
    """Return the first known difference from an earlier call, in words; "" if there is none."""
    for name, value in json.loads(json.dumps(call)).items():
        if before.get(name) != value:
            was = f"was {before.get(name)!r:.100} and is {value!r:.100}"
            return printable(f"{name} {was}" if name.startswith("--") else f"{name} differ")
    return ""


def _parsed(text: str | None) -> Call | None:
    try:
        call = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return call if isinstance(call, dict) else None


def _note_in_picture(path: Path) -> str | None:
    """Return the text that mlpcore left in a PNG file, or None."""
    key = KEY.encode() + b"\0"
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
            size = int.from_bytes(head[:4], "big")
            text = file.read(size) if head[4:] == b"tEXt" and size < _MOST else b""
            if text.startswith(key):
                return text[len(key) :].decode("latin-1")
            file.seek(size - len(text) + 4, os.SEEK_CUR)
    return None


# -- standard output, and tables as text


def is_standard_output(path: str) -> bool:
    """Return True if a path is "-" or leads to the file or device of standard output."""
    if path == "-":
        return True
    try:
        return os.path.samestat(os.stat(path), _status("-"))
    except (OSError, ValueError, AttributeError):
        # no such file; standard output without a file, or none at all
        return False


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Write lines as UTF-8 to standard output or, completely or not at all, to a file.

    Raises:
        OSError: it cannot be written; the message names the path.
    """
    with _standard_output(path) if is_standard_output(path) else replacing(path) as file:
        batch: list[str] = []
        for line in lines:
            batch.append(line)
            if len(batch) == _BATCH:
                file.write(_encoded("".join(batch)))
                batch.clear()
        file.write(_encoded("".join(batch)))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


class _AsText:
    """A text stream without bytes underneath, such as io.StringIO, written as if it had them."""

    def __init__(self, stream: Any):
        self.write = lambda data: stream.write(data.decode("utf-8"))
        self.flush = stream.flush


@contextlib.contextmanager
def _standard_output(path: str) -> Iterator[Any]:
    stream = sys.stdout
    if stream is None:
        raise OSError(f"--out {path}: there is no standard output; name a file")
    try:
        stream.flush()
        file = getattr(stream, "buffer", None) or _AsText(stream)
        yield file
        file.flush()
    except OSError as error:
        empty(stream)
        raise type(error)(
            error.errno, f"--out {path}: cannot write to standard output: {error.strerror}"
        ) from None


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_SPECIAL = frozenset(',;|"\t\r\n')


def cell(text: str) -> str:
    """Return a text as a CSV cell that no spreadsheet takes for a formula.

    Following OWASP's page on CSV injection, a quote mark precedes anything that could begin a
    formula, and text with a separator of any country is quoted.
    """
    if text.lstrip("\0\ufeff").startswith(_FORMULA) and not _NUMBER.fullmatch(text):
        text = f"'{text}"
    return '"' + text.replace('"', '""') + '"' if _SPECIAL & set(text) else text
