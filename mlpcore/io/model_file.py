"""Networks and trainers as safetensors files: flat vectors and a header, without pickle.

    tensors:   "parameters" (size,), a trainer's optimizer state, and what the caller adds
    metadata:  "mlpcore" = JSON {"version": 1, "sizes": …, "activations": [{"name": …}, …], …}
               "digest"  = SHA-256 of that text and of all tensors

A trainer's long lists are tensors. Files are written atomically (`atomic.replacing`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.checks import values
from mlpcore.io.atomic import replacing

VERSION = 1  # of the format
LARGEST = 100_000_000  # largest header in bytes that the safetensors library reads
DEEPEST = 100  # deepest nesting of a header: JSON parsers are limited by the stack
TYPES = {
    "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16", "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    keep: int = 1,
    owner: object = None,
) -> None:
    """Write a model file atomically, without the copies that the safetensors library would make.

    Args:
        path: path of the file.
        header: entries that JSON can hold and `read` returns unchanged; see `as_json`.
        tensors: arrays by name.
        keep, owner: as in `atomic.replacing`.

    Raises:
        OSError: the file cannot be written; the existing file is left intact.
        TypeError, ValueError: a tensor's name or dtype, or an entry of the header, cannot be
            stored, or the header has more than 100,000,000 bytes. Nothing is written then.
    """
    values.path(path)
    text = as_json({"version": VERSION, **header}, "about, and all else in the header,")
    for name in tensors:
        require_text(name, "tensors: the name")
        if name == "__metadata__":
            raise ValueError(f"tensors: the name {name!r} is reserved; choose another")
    entries, arrays = _lay_out(tensors)
    digest = _digest(text, dict(zip(entries, arrays, strict=True)))
    head = json.dumps({"__metadata__": {"mlpcore": text, "digest": digest}, **entries}).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > LARGEST:
        limit = f"a file that can be read again has at most {LARGEST:,}"
        raise ValueError(f"about, and all else in the header, has {len(head):,} bytes; {limit}")
    with replacing(path, keep, owner) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays:
            file.write(_bytes(array))


def _lay_out(
    tensors: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Return the tensors' header entries, and the tensors in the layout and order of the file.

    Tensors with the largest items come first, so that all are aligned.
    """
    entries: dict[str, Any] = {}
    arrays, offset = [], 0
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, array in order:
        if array.dtype.name not in TYPES:
            raise TypeError(
                f"tensors[{name!r}] of dtype {array.dtype} cannot be stored; known: "
                f"{', '.join(TYPES)}"
            )
        if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
            advice = "fill them first, e.g. with .filled(0)"
            raise TypeError(f"tensors[{name!r}] has masked entries; {advice}")
        whole = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        arrays.append(whole)
        place = [offset, offset + whole.nbytes]
        entries[name] = {
            "dtype": TYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": place,
        }
        offset += whole.nbytes
    return entries, arrays


def as_json(value: Any, name: str) -> str:
    """Return a value as JSON text that restores it unchanged, except that tuples become lists.

    Raises:
        TypeError: JSON would not restore the value, such as a dict whose keys are not text, or it
            is nested deeper than 100 levels; names it by `name`.
    """
    try:
        text = json.dumps(value)
        _require_equal(value, json.loads(text), DEEPEST)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} must be what JSON can hold: {error}") from None
    return text


def _require_equal(given: Any, found: Any, levels: int) -> None:
    """Raise a ValueError unless JSON has restored a value, nested at most `levels` deep."""
    if isinstance(given, Mapping | list | tuple) and not levels:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if isinstance(given, Mapping):
        for key, value in given.items():
            if key not in found:
                raise ValueError(f"the key {key!r:.100} is not text")
            _require_equal(value, found[key], levels - 1)
    elif isinstance(given, list | tuple):
        for one, other in zip(given, found, strict=True):
            _require_equal(one, other, levels - 1)
    elif given != found and given == given:  # NaN
        raise ValueError(f"{given!r:.100} comes back as {found!r:.100}")


def require_text(value: object, name: str) -> None:
    """Raise a TypeError or ValueError, which names the value, unless it is valid UTF-8 text."""
    if not isinstance(value, str):
        raise TypeError(f"{name} {value!r:.100} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        reason = "is not text that UTF-8 can hold: it has a lone surrogate"
        raise ValueError(f"{name} {value!r:.100} {reason}") from None


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        hashed.update(json.dumps([name, TYPES[array.dtype.name], array.shape]).encode())
        hashed.update(_bytes(array))
    return hashed.hexdigest()


class NewerVersion(ValueError):
    """An error for a file whose format is newer than this mlpcore."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the header and the tensors of a model file.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        ValueError: it is not an mlpcore file, is damaged, or comes from a newer version; the
            message says which.
    """
    metadata, tensors = _read_file(path, tensors=True)
    header = parse_header(path, metadata)
    if metadata.get("digest") != _digest(metadata["mlpcore"], tensors):
        raise ValueError(f"{str(path)!r} is damaged: its digest does not match what it holds")
    return header, tensors


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file, without its tensors; raise as `read` does."""
    return _read_file(path, tensors=False)[0]


def _read_file(
    path: str | os.PathLike[str], tensors: bool
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return the metadata of a safetensors file and, if requested, its tensors."""
    from safetensors import SafetensorError, safe_open

    place = Path(values.path(path))
    if not place.is_file():
        folder = " (a folder)" if place.is_dir() else ""
        raise FileNotFoundError(f"model file {str(path)!r} does not exist{folder}")
    with open(place, "rb"):  # raises the PermissionError that safetensors turns into "no such file"
        pass
    try:
        with safe_open(str(path), "numpy") as file:
            names = file.keys() if tensors else ()
            found = {name: np.asarray(file.get_tensor(name), order="C") for name in names}
            return file.metadata() or {}, found
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a safetensors file, or is damaged: {error}"
        ) from None


def parse_header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header from a file's metadata.

    Raises:
        NewerVersion: the file comes from a newer mlpcore.
        ValueError: it is not an mlpcore file, or its header is damaged; the message says which.
    """
    if "mlpcore" not in metadata:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not one of mlpcore's")
    try:
        header: dict[str, Any] = json.loads(metadata["mlpcore"])
        version = values.positive_integer(header["version"], "version")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} has a damaged header: {error!r}") from None
    if version > VERSION:
        known = f"this mlpcore reads up to {VERSION}: upgrade it"
        raise NewerVersion(f"{str(path)!r} has version {version}; {known}")
    return header
