"""Settings that suit a data set, and those that a user writes as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings that suit a data set; each can be overruled on the command line."""

    hidden: str = "64,64"
    activation: str = "relu"
    epochs: int = 30
    batch: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    patience: int = 5


RECIPES = {
    "flights": Recipe(hidden="128,64", epochs=6, batch=512, weight_decay=1.0, patience=6),
    "digits": Recipe(hidden="256", epochs=60, batch=32, learning_rate=2e-3, weight_decay=0.5, patience=20),
}


def suited(rows: int) -> Recipe:
    """For a table: a small net, small batches and many epochs where there are few rows (docs/tables.md)."""
    batch = min(512, max(16, 1 << (rows // 50).bit_length()))
    epochs = min(300, max(20, 3000 * batch // max(rows, 1)))
    hidden = "64" if rows < 5000 else "128,64"
    return Recipe(hidden, epochs=epochs, batch=batch, learning_rate=2e-3, weight_decay=1.0, patience=max(5, epochs // 5))


def widths(text: str, argument: str) -> list[int]:
    """Return the widths that an option lists; raise a ValueError that names it otherwise."""
    try:
        return [] if text == "none" else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{argument} must be widths such as 128,64; got {text!r}") from None
