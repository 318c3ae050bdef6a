"""Finding and reading `kernels/`: inside the installed package, or next to it in a clone."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
_PLACES = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")


def folder() -> Path:
    """Return the folder of the CUDA sources."""
    for place in _PLACES:
        if (place / "numbers.cuh").is_file():
            return place
    raise FileNotFoundError(
        f"the folder 'kernels' of mlpcore is missing: looked in {', '.join(map(str, _PLACES))}"
    )


def read(name: str) -> str:
    """Return the text of a file in the folder, e.g. `read("updates.cu")`."""
    return (folder() / name).read_text(encoding="utf-8")
