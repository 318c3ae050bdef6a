"""Print requirements with the lowest versions of pyproject.toml: `python tests/lowest.py`."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("cli", "sklearn", "parquet", "onnx", "bench", "test")
UNUSED = ("mlpcore", "mypy", "ruff", "cuda-bindings", "nvidia-cuda-nvrtc")


def lowest(project):
    """Return {name: version}; several bounds of one package count by their highest."""
    extras = project["optional-dependencies"]
    found = {}
    for requirement in [
        *project["dependencies"],
        *(line for name in EXTRAS for line in extras[name]),
    ]:
        name, version = re.match(r"([\w-]+)(?:\[.*\])?(?:[>=]=([\d.]+))?", requirement).groups()
        if name not in UNUSED:
            key = [int(part) for part in (version or "0").split(".")]
            found[name] = max(found.get(name, [0]), key)
    return {name: ".".join(map(str, parts)) for name, parts in found.items()}


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, version in lowest(tomllib.loads(text)["project"]).items():
        print(name if version == "0" else f"{name}=={version}")
