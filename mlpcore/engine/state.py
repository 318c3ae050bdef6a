"""The gradient and the optimizer's state: flat vectors, and counts of updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlpcore.core.ops import Array, Buffer
from mlpcore.core.optimizers import Layer, Segment, segments
from mlpcore.core.program import program
from mlpcore.core.sheet import UPDATES
from mlpcore.engine.problem import Problem

PREFIX = "state "  # prefix of the names of state vectors, in plans and files


class State:
    """Gradient and optimizer state of a step.

    Attributes:
        gradient: ∂J/∂parameters of the last batch, flat.
        vectors: the state vectors by name, `"state m"`.
        rule: name of the sheet's update that they belong to; "" before the first step.
        layers: layer settings that the update was recorded for.
        reach: bound of the first state vector's entries.
        rate: the last nonzero learning rate.
        done: number of updates known to the host.
        kept: for each frozen layer, number of updates that its state has seen.
        missed: for each thawed layer, number of updates missed while it was frozen, if the rule
            reads t.
        torn: number of the step whose update has begun but not ended, else 0.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.gradient: Array = None
        self.vectors: dict[str, Array] = {}
        self.rule = ""
        self.layers: dict[int, Layer] = {}
        self.reach = self.rate = 0.0
        self.done = self.torn = 0
        self.kept: dict[int, int] = {}
        self.missed: dict[int, int] = {}

    def buffers(self) -> list[Buffer]:
        """List the gradient and the state vectors, including those of a former rule."""
        size, dtype = self.problem.layout.size, self.problem.dtype
        own = (f"{PREFIX}{name}" for name in self.problem.optimizer.states)
        return [
            Buffer("gradient", (size,), dtype, "dW and db of a batch, flat"),
            *(
                Buffer(name, (size,), dtype, "optimizer state")
                for name in dict.fromkeys([*own, *self.vectors])
            ),
        ]

    def begin(self, arrays: dict[str, Array]) -> None:
        """Use these arrays, with a state of zeros; `rule` is set after everything is bound."""
        self.gradient = arrays.pop("gradient")
        for vector in arrays.values():
            vector[...] = 0
        self.vectors, self.layers = arrays, dict(self.problem.optimizer.layers)

    @property
    def own(self) -> dict[str, Array]:
        """Vectors that the optimizer's rule reads, by the rule's names for them."""
        return {name: self.vectors[f"{PREFIX}{name}"] for name in self.problem.optimizer.states}

    @property
    def segments(self) -> list[Segment]:
        """Parts of the flat vectors that are updated alike."""
        return segments(self.problem.layout, self.layers, self.missed)

    @property
    def frozen(self) -> list[Segment]:
        """Segments that are not updated."""
        return [part for part in self.segments if part.layer.frozen] if self.layers else []

    @property
    def outdated(self) -> bool:
        """True if the optimizer's rule or layer settings differ from those of the vectors."""
        optimizer = self.problem.optimizer
        return self.rule != optimizer.row or self.layers != optimizer.layers

    def require_whole(self) -> None:
        """Raise a RuntimeError if an update, or a change of the vectors, was interrupted."""
        self.problem.store.require_whole(self.torn)

    def require_valid(self) -> None:
        """Raise an error if the state is torn, or the optimizer does not fit the network."""
        self.require_whole()
        self.problem.optimizer.require_epsilon(self.problem.dtype)
        if self.layers != self.problem.optimizer.layers:
            self.problem.optimizer.require_layers(self.problem.layout.layers)

    @contextlib.contextmanager
    def replaced(self, vectors: Mapping[str, Array]) -> Iterator[None]:
        """Let the block allocate and fill vectors of these names; the state is torn meanwhile."""
        self.torn = self.done + 1
        self.vectors = {f"{PREFIX}{name}": vector for name, vector in vectors.items()}
        yield
        self.torn = 0

    # -- files --

    def facts(self, updates: int) -> dict[str, Any]:
        """Return the state besides the vectors that a checkpoint stores, for JSON."""
        counts = {"kept": [*self.kept.items()], "missed": [*self.missed.items()]}
        return {"rule": self.rule, "rate": self.rate, "updates": updates, **counts}

    def read(self, vectors: Mapping[str, Array], facts: Mapping[str, Any]) -> dict[str, Array]:
        """Take over the counts of a snapshot; return its vectors converted to the optimizer's rule.

        Raises:
            ValueError: it does not belong to this step.
        """
        rows = UPDATES
        row, known = rows[facts["rule"]], {name for row in rows.values() for name in row.states}
        found = {name.removeprefix(PREFIX): vector for name, vector in vectors.items()}
        size = self.problem.layout.size
        fit = {*row.states} <= {*found} <= known
        if not fit or any(vector.shape != (size,) for vector in found.values()):
            raise ValueError(
                f"{facts['rule']} needs the state vectors {sorted(row.states)} of {size} numbers; "
                f"got {sorted(found)}"
            )
        self.rate = float(facts["rate"])
        self.count(facts["updates"], dict(facts["kept"]), dict(facts["missed"]))
        return found if facts["rule"] == self.problem.optimizer.row else self._carried_over(found)

    def fill(self, vectors: Mapping[str, Array], xp: Any) -> None:
        """Fill the state's vectors, arrays of `xp`, with these vectors from the host."""
        for name, vector in vectors.items():
            self.vectors[f"{PREFIX}{name}"][...] = xp.asarray(vector)
        first = [vectors[name] for name in self.problem.optimizer.states[:1] if name in vectors]
        self.reach = max((float(abs(vector).max()) for vector in first), default=0.0)

    def count(self, updates: int, kept: Mapping[int, int], missed: Mapping[int, int]) -> None:
        """Set the counts of updates, and those that layers miss, for the currently frozen layers.

        Raises:
            ValueError: no run can have such counts.
        """
        counts = [updates, *kept, *missed, *kept.values(), *missed.values()]
        most = max([0, *kept.values(), *missed.values()])
        if not all(isinstance(n, int) and n >= 0 for n in counts) or updates < most:
            raise ValueError(
                f"after {updates} updates, layers have seen {kept} and missed {missed}: no count "
                "of a layer may exceed the run's"
            )
        optimizer = self.problem.optimizer
        frozen = [l for l, layer in optimizer.layers.items() if layer.frozen]
        thawed = {
            l: updates - seen for l, seen in kept.items() if l not in frozen and seen < updates
        }
        live = {l: n for l, n in missed.items() if l not in frozen}
        self.done, self.kept = updates, {l: kept.get(l, updates - missed.get(l, 0)) for l in frozen}
        scalars = frozenset({"rate", "t", *optimizer.constants()})
        self.missed = live | thawed if "t" in program(optimizer.statements, scalars).reads else {}

    def _carried_over(self, vectors: dict[str, Array]) -> dict[str, Array]:
        """Return another rule's vectors as the optimizer's, each segment by its learning rate."""
        optimizer, layout = self.problem.optimizer, self.problem.layout
        parts = [
            optimizer.carry_over(
                {name: vector[part.start : part.stop] for name, vector in vectors.items()},
                self.rate * part.layer.rate,
            )
            for part in segments(layout, self.layers or optimizer.layers)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
