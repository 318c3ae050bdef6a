"""Finds and reads the folder `kernels/`: inside the installed package, else beside it (a clone, an
editable install).
"""

from pathlib import Path

_PLACES = (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "kernels")


def folder() -> Path:
    """The folder that holds the formula sheets and the CUDA sources."""
    for place in _PLACES:
        if (place / "activations.def").is_file():
            return place
    raise FileNotFoundError(
        f"the folder 'kernels' of mlpcore is missing: looked in {', '.join(map(str, _PLACES))}"
    )


def read(name: str) -> str:
    """The text of one file of the folder, e.g. `read("activations.def")`."""
    return (folder() / name).read_text(encoding="utf-8")
