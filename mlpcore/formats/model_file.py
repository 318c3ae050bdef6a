"""Networks and trainers as safetensors files: flat vectors, and a header that says what they are. No pickle.

    tensors:   "parameters" (size,); of a trainer also its optimizer's state; and what the caller adds
    metadata:  "mlpcore" = JSON {"version": 3, "sizes": …, "bias": …, "activations": [{"name": …, "value": …}, …], …}
               "digest"  = SHA-256 of that text and of all tensors

Versions 1 and 2 (with tied layers) had no digest; they are still read. A file is whole or not there (`atomic.replacing`).
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

from mlpcore.core import inputs
from mlpcore.formats.atomic import replacing

VERSION = 3
TYPES = {
    "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16", "bool": "BOOL",
    **{f"{sign}int{bits}": f"{letter}{bits}" for sign, letter in (("", "I"), ("u", "U")) for bits in (8, 16, 32, 64)},
}  # fmt: skip


def write(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]], keep: int = 1) -> None:
    """Write a model file, atomically, straight from the arrays: the library's writers copy every one of them first.

    Args:
        path: of the file.
        header: what JSON can hold.
        tensors: arrays by name.
        keep: versions to keep, as in `atomic.replacing`.

    Raises:
        OSError: it cannot be written; what was there before is intact.
        TypeError: a tensor's dtype, or something in the header, has no place in such a file.
    """
    inputs.path(path)
    try:
        text = json.dumps({"version": VERSION, **header})
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"about, and all else in the header, must be what JSON can hold: {error}") from None
    entries: dict[str, Any] = {}
    arrays, offset = [], 0
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):  # so that all are aligned
        if array.dtype.name not in TYPES:
            raise TypeError(f"tensors[{name!r}] of dtype {array.dtype} cannot be stored; known: {', '.join(TYPES)}")
        whole = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        arrays.append(whole)
        place = [offset, offset + whole.nbytes]
        entries[name] = {"dtype": TYPES[array.dtype.name], "shape": array.shape, "data_offsets": place}
        offset += whole.nbytes
    digest = _digest(text, dict(zip(entries, arrays, strict=True)))
    head = json.dumps({"__metadata__": {"mlpcore": text, "digest": digest}, **entries}).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path, keep) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays:
            file.write(_bytes(array))


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
    """The refusal of a file whose format this mlpcore does not know yet."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return header and tensors of a model file.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is no model file of mlpcore, a damaged one, or one of a newer version; says which.
    """
    metadata, tensors = _opened(path, tensors=True)
    header = parsed(path, metadata)
    if "digest" in metadata or header["version"] >= 3:
        whole = metadata.get("digest") == _digest(metadata["mlpcore"], tensors)
        if not whole:
            raise ValueError(f"{str(path)!r} is damaged: its digest does not match what it holds")
    return header, tensors


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a safetensors file, without reading its tensors. Raises as `read` does."""
    return _opened(path, tensors=False)[0]


def _opened(path: str | os.PathLike[str], tensors: bool) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return metadata and, where they are wanted, tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    place = Path(inputs.path(path))
    if not place.is_file():
        raise FileNotFoundError(f"model file {str(path)!r} does not exist" + (" (a folder)" if place.is_dir() else ""))
    try:
        with safe_open(str(path), "numpy") as file:
            names = file.keys() if tensors else ()
            return file.metadata() or {}, {name: np.asarray(file.get_tensor(name), order="C") for name in names}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file, or a damaged one: {error}") from None


def parsed(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the header in a file's metadata.

    Raises:
        NewerVersion, ValueError: it is no model file of mlpcore, or its header is damaged; says which.
    """
    if "mlpcore" not in metadata:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not one of mlpcore's")
    try:
        header: dict[str, Any] = json.loads(metadata["mlpcore"])
        version = inputs.positive_integer(header["version"], "version")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} has a damaged header: {error!r}") from None
    if version > VERSION:
        raise NewerVersion(f"{str(path)!r} has version {version}; this mlpcore reads up to {VERSION}: upgrade it")
    return header
