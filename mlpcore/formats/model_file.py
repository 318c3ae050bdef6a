"""Networks as safetensors files: the flat parameters, and a header that says how they are cut. No pickle.

    tensors:   "parameters" (size,), and what the caller adds (a standardiser's mean and scale)
    metadata:  "mlpcore" = JSON {"version": 1, "sizes": …, "bias": …, "activations": [{"name": …, "value": …}, …], …}
               version 2 adds "tied": {"4": "1.T"}

Written to a temporary file beside the target and renamed, so that a file is whole or not there.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # the newest that is read; files without tied layers are still written as version 1


def write(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
    """Write a model file, atomically. Raises OSError if the folder is missing or cannot be written."""
    from safetensors.numpy import save

    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: the folder {str(target.parent)!r} does not exist")
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # safetensors corrupts others silently
    data = save(whole, {"mlpcore": json.dumps({"version": 1, **header})})
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and tensors of a model file.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is no model file of mlpcore, or one of a newer version; says which.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"model file {str(path)!r} does not exist" + (" (a folder)" if Path(path).is_dir() else ""))
    try:
        with safe_open(str(path), "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file, or a damaged one: {error}") from None
    if "mlpcore" not in metadata:
        raise ValueError(f"{str(path)!r} is a safetensors file, but not one of mlpcore's")
    try:
        header = json.loads(metadata["mlpcore"])
        version = header["version"]
        newer = version > VERSION
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} has a damaged header: {error!r}") from None
    if newer:
        raise ValueError(f"{str(path)!r} has version {version}; this mlpcore reads up to {VERSION}: upgrade it")
    return header, tensors
