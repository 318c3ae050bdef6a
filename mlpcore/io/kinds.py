"""Kinds of files, recognized by their first bytes, so that no file of another kind is replaced.

Only headers are read, however large the file is; `model_file.read` detects damaged tensors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from mlpcore.io import atomic, model_file, onnx_file

NETWORKS = ("model",)  # kinds that `MLP.save` may replace
CHECKPOINTS = ("checkpoint", "unfinished")  # kinds that `fit` may replace
TRAINERS = ("model", *CHECKPOINTS)  # kinds that `Trainer.save` may replace
VACANT = ("nothing", "empty", "folder", "special")  # nothing is lost; writers refuse a folder
BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "a picture (PNG)"), (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"), (b"RIFF", "a RIFF file, such as a picture (WebP) or sound"),
    (b"%PDF-", "a PDF document"), (b"PAR1", "a Parquet file"), (b"\x1f\x8b", "a gzip file"),
    (b"\x93NUMPY", "an array of NumPy (.npy)"), (b"PK\x03\x04", "a ZIP archive, such as .npz"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"), (b"SQLite format 3\0", "an SQLite database"),
    (b"\x7fELF", "a program"), (b"MZ", "a program"),
    (b"\x80\x04", "a pickle"), (b"\x80\x05", "a pickle"),
)  # fmt: skip
_overwriting: ContextVar[bool] = ContextVar("overwriting", default=False)


class Kind(NamedTuple):
    """The kind of a file.

    Attributes:
        name: "model", "checkpoint" (after a completed run), "unfinished" (a checkpoint whose run
            can be resumed), "newer" (from a newer mlpcore), "damaged" (a truncated safetensors
            file, or an mlpcore file with an invalid header), "safetensors" (of another library),
            "onnx", "other"; "nothing" (no file there), "empty", "folder", "special" (a device, a
            pipe or a socket).
        text: description for messages, with its article: "a picture (PNG)".
        trainer: identifier of an unfinished run's trainer; "" if the file has none.
        where: description of an unfinished run's progress.
    """

    name: str
    text: str
    trainer: str = ""
    where: str = ""


def kind(path: str | os.PathLike[str]) -> Kind:
    """Return the kind of the file at a path, after links.

    Raises:
        OSError: the file cannot be read; names the path.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return Kind("nothing", "no file")
    if stat.S_ISDIR(status.st_mode):
        return Kind("folder", "a folder")
    if not stat.S_ISREG(status.st_mode):
        return Kind("special", "a device, a pipe or a socket")
    if not status.st_size:
        return Kind("empty", "an empty file")
    with open(path, "rb") as file:
        beginning = file.read(4096)
    if beginning[8:9] == b"{":  # after the length of a safetensors header
        return _safetensors(path, beginning)
    if onnx_file.is_onnx(path):
        return Kind("onnx", "an ONNX file")
    for first, text in BEGINNINGS:
        if beginning.startswith(first):
            return Kind("other", text)
    return Kind("other", "text" if _is_text(beginning) else "a file of a kind unknown to mlpcore")


def _safetensors(path: str | os.PathLike[str], beginning: bytes) -> Kind:
    """Return the kind of a file that begins like a safetensors file."""
    try:
        metadata = model_file.metadata(path)
    except ValueError:
        if _is_text(beginning):
            return Kind("other", "text")
        ours = " of mlpcore" if b'"mlpcore"' in beginning else ""
        return Kind("damaged", f"a damaged safetensors file{ours}")
    if "mlpcore" not in metadata:
        return Kind("safetensors", "a safetensors file of another library")
    try:
        header = model_file.parse_header(path, metadata)
    except model_file.NewerVersion:
        return Kind("newer", "a model of a newer mlpcore")
    except ValueError:
        return Kind("damaged", "a damaged model of mlpcore")
    if "trainer" not in header:
        return Kind("model", "a model of mlpcore")
    trainer = header["trainer"]
    run = trainer.get("run") if isinstance(trainer, dict) else {}
    if run is None:
        return Kind("checkpoint", "a checkpoint of mlpcore")
    where = _where(run)
    if not where:
        return Kind("damaged", "a damaged checkpoint of mlpcore")
    text = f"a checkpoint of mlpcore with an unfinished run ({where})"
    return Kind("unfinished", text, str(trainer.get("id", "")), where)


def _where(run: Any) -> str:
    """Return the progress of a run as text; "" if its description is malformed."""
    if not isinstance(run, Mapping):
        return ""
    epochs, epoch, batch = (run.get(name) for name in ("epochs", "epoch", "batch"))
    if not (isinstance(epochs, int) and isinstance(epoch, int) and isinstance(batch, int)):
        return ""
    return progress(epochs, epoch, batch, run.get("ended") is True)


def progress(epochs: int, epoch: int, batch: int, ended: bool = False) -> str:
    """Return as text the progress of a run: completed epochs, and batches of the next one."""
    if ended and epoch < epochs:
        return f"at its end, after {epoch} of {epochs} epochs"
    if epoch >= epochs:
        return f"after the last of {epochs} epochs"
    return f"in epoch {epoch + 1} of {epochs}, after {batch:,} of its batches"


def _is_text(beginning: bytes) -> bool:
    """Return True if the beginning of a file looks like UTF-8 text."""
    try:
        beginning[:-3].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return not any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in beginning)


@contextlib.contextmanager
def overwriting(whatever: bool = True) -> Iterator[None]:
    """Allow files of any kind to be replaced during the block; ask the user first."""
    token = _overwriting.set(whatever)
    try:
        yield
    finally:
        _overwriting.reset(token)


def anything_goes() -> bool:
    """Return True if files of any kind may be replaced."""
    return _overwriting.get()


def require_replaceable(
    path: str | os.PathLike[str], names: tuple[str, ...], keep: int = 1, trainer: str | None = None
) -> None:
    """Raise a FileExistsError unless each file that writing would replace is of one of these kinds.

    Args:
        path: path of the file to be written.
        names: names of kinds that may be replaced, as in `Kind`; `VACANT` kinds always may.
        keep: versions to keep; files with their numbered names are checked as well.
        trainer: identifier of the writing trainer; another trainer's unfinished run is protected.
    """
    if anything_goes():
        return
    with atomic.naming(path):
        for number, place in enumerate(atomic.versions(path, keep)):
            found = kind(place)
            others = found.name == "unfinished" and not number and found.trainer != trainer
            if others or found.name not in (*VACANT, *names):
                what = repr(str(place)) if number else "it"
                advice = "mc.Trainer.load resumes it; " if found.name == "unfinished" else ""
                advice += "delete it, or name another file"
                raise FileExistsError(errno.EEXIST, f"{what} is {found.text}; {advice}")
