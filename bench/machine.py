"""The machine, packages and sources of a result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import threadpoolctl

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100  # columns of a line of JSON
# removed from the environment of every measuring process
PINS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
PACKAGES = (
    *("numpy", "torch", "jax", "jaxlib", "scikit-learn", "warp-nn", "warp-lang"),
    *("cupy-cuda12x", "cupy-cuda13x", "nvmath-python"),
)


def versions() -> dict[str, str]:
    """Return the versions of the packages involved that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources() -> str:
    """Return a hash of the engine's and the suite's sources, equal for equal code."""
    digest = hashlib.sha256()
    for folder, pattern in (("mlpcore", "*.py"), ("kernels", "*"), ("bench", "*.py")):
        for file in sorted((ROOT / folder).rglob(pattern)):
            if file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Return MLPCORE_COMMIT, else the checkout's commit ("+": files differ), else "unknown"."""
    if named := os.environ.get("MLPCORE_COMMIT"):
        return named
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return "unknown"

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "mlpcore", "kernels", "bench")
    return git("rev-parse", "HEAD") + ("+" if changed else "") or "unknown"


def blas() -> list[dict[str, Any]]:
    """Return every loaded BLAS and OpenMP: library, version, kernel family, threads, no paths."""
    keys = ("internal_api", "version", "architecture", "num_threads")
    return [
        {"file": Path(pool["filepath"]).name} | {key: pool.get(key) for key in keys}
        for pool in threadpoolctl.threadpool_info()
    ]


def describe(device: str) -> dict[str, Any]:
    """Return the machine as mlpcore reports it, and the GPU as NVML does."""
    import mlpcore as mc

    found = {key: value for key, value in mc.info().items() if key != "blas"} | {"blas": blas()}
    if device == "cuda" and importlib.util.find_spec("pynvml"):
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
        found["gpu"] = {
            "name": name,
            "driver": driver,
            "bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        }
    return found


def available_bytes() -> int:
    """Return the memory that can still be allocated; 2^63 if the system does not tell."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 63
    )


def write(result: dict[str, Any], file: Path) -> None:
    """Write JSON atomically: a reader sees the old result or the new one."""
    from mlpcore.io.atomic import replacing

    plain = json.loads(json.dumps(result))  # turn tuples into lists and keys into text
    with replacing(file) as opened:
        opened.write((layout(plain) + "\n").encode())


def layout(value: Any, indent: int = 0, taken: int = 0) -> str:
    """Return JSON with each list or object on one line if it fits 100 columns.

    Args:
        indent: the depth of the line on which the value begins.
        taken: the columns before the value on that line, and after it.
    """
    line = json.dumps(value)
    if not value or not isinstance(value, dict | list) or taken + len(line) <= COLUMNS:
        return line
    space = "\n" + " " * (indent + 1)
    if isinstance(value, dict):
        begin, end = "{", "}"
        names = {key: f"{json.dumps(key)}: " for key in value}
        parts = [n + layout(value[k], indent + 1, indent + 2 + len(n)) for k, n in names.items()]
    elif any(isinstance(item, dict | list | str) for item in value):
        begin, end = "[", "]"
        parts = [layout(item, indent + 1, indent + 2) for item in value]
    else:  # as many numbers per line as fit
        filled = textwrap.fill(line[1:-1], COLUMNS - indent - 1, break_on_hyphens=False)
        return f"[{space}{filled.replace(chr(10), space)}{space[:-1]}]"
    return f"{begin}{space}{(',' + space).join(parts)}{space[:-1]}{end}"


def save(folder: Path | None, name: str, device: str, found: Any) -> None:
    """Write a script's results, with machine and commit, as `name`.json into a folder, if given."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write({"machine": describe(device), "commit": commit(), name: found}, folder / f"{name}.json")
