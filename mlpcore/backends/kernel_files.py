"""Finding and reading `kernels/`: inside the installed package, or next to it in a clone."""

import re
from collections.abc import Mapping
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")


def folder() -> Path:
    """Return the folder of the kernels' sources."""
    for place in _PLACES:
        if (place / "numbers.cuh").is_file():
            return place
    raise FileNotFoundError(
        f"the folder 'kernels' of mlpcore is missing: looked in {', '.join(map(str, _PLACES))}"
    )


def read(name: str) -> str:
    """Return the text of a file in the folder, e.g. `read("updates.cu")`."""
    return (folder() / name).read_text(encoding="utf-8")


def inlined(file: str, seen: set[str], generated: Mapping[str, str]) -> str:
    """Return a file with its headers inlined; `#line` keeps messages' line numbers correct.

    Args:
        file: the file's name.
        seen: files that are inlined already and left out; this file and its headers are added.
        generated: texts of headers that are not in the folder, by name.
    """
    if file in seen:
        return ""
    seen.add(file)
    lines = []
    for number, line in enumerate((generated.get(file) or read(file)).splitlines(), 1):
        include = re.match(r'#include "(.+)"', line)
        if include:
            text = inlined(include[1], seen, generated)
            lines += [text, f'#line {number + 1} "{file}"']
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join([f'#line 1 "{file}"', *lines])
