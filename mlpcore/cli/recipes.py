"""Settings that suit a data set, and the parsing of a user's settings."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from mlpcore.checks import values
from mlpcore.engine.plan import parse_bytes

MOST = 1 << 63
MOST_LAYERS = 1000  # planning this many takes about a second


@dataclass(frozen=True)
class Recipe:
    """Settings that suit a data set; the command line can override each."""

    hidden: str = "64,64"
    activation: str = "relu"
    epochs: int = 30
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    patience: int = 5


RECIPES = {
    "flights": Recipe(hidden="128,64", epochs=6, batch=512, weight_decay=1.0, patience=6),
    "digits": Recipe(
        hidden="256", epochs=60, batch=32, learning_rate=2e-3, weight_decay=0.5, patience=20
    ),
}


def suited(rows: int) -> Recipe:
    """Return a recipe for a table: fewer rows, smaller network and batches (docs/tables.md)."""
    batch = min(512, max(16, 1 << (rows // 50).bit_length()))
    epochs = min(300, max(20, 3000 * batch // max(rows, 1)))
    hidden = "64" if rows < 5000 else "128,64"
    return Recipe(
        hidden,
        epochs=epochs,
        batch=batch,
        learning_rate=2e-3,
        weight_decay=1.0,
        patience=max(5, epochs // 5),
    )


def widths(text: str, argument: str) -> list[int]:
    """Return the widths listed in an option; raise a ValueError that names it if malformed."""
    parts = [] if text == "none" else text.split(",")
    if len(parts) > MOST_LAYERS:
        raise ValueError(f"{argument} takes at most {MOST_LAYERS:,} widths; got {len(parts):,}")
    if not all(part.strip().isdecimal() and len(part) < 30 for part in parts):
        raise ValueError(f"{argument} must be widths such as 128,64; got {text!r:.100}")
    found = [int(part) for part in parts]
    for width in found:
        if not 0 < width < MOST:
            raise ValueError(f"{argument}: a layer has 1 to {MOST - 1:,} units; got {width:,}")
    return found


def require_settings(options: argparse.Namespace) -> None:
    """Raise a ValueError that names the first impossible option, before any work."""
    for name in ("epochs", "batch", "patience", "splits", "seed"):
        require_count(getattr(options, name), f"--{name}", least=0 if name == "seed" else 1)
    for name in ("learning_rate", "weight_decay"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{option} must be finite and not negative; got {value}")
    if options.hidden is not None:
        widths(options.hidden, "--hidden")
    # free memory is checked later
    parse_bytes(options.memory_limit, "--memory-limit", lambda: 1 << 60)
    values.path(options.out, "--out")
    if options.out == "-" or Path(options.out).suffix.lower() in (".safetensors", ".png", ".csv"):
        raise ValueError(
            f"--out must be a folder for the model and the picture; got {options.out!r}"
        )


def require_count(value: int | None, option: str, least: int = 1) -> None:
    """Raise a ValueError that names the option unless a number is None or `least` … 2^63 - 1."""
    if value is not None and value < least:
        raise ValueError(f"{option} must be at least {least}; got {value}")
    if value is not None and value >= MOST:
        raise ValueError(f"{option} must be less than 2^63; got {value}")
