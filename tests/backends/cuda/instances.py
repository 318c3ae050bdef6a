"""Every kernel instance that the CUDA backend may ask for: (source, name)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlpcore.backends import formula_text
from mlpcore.backends.cuda import source as cuda_source
from mlpcore.core import activations, dropout, losses, sheet
from mlpcore.core.activations import Activation
from mlpcore.core.losses import Objective
from mlpcore.core.program import program

STORAGE = {"float": 4, "double": 8, "half_t": 2, "bfloat16_t": 2}  # bytes of an entry
COMPUTE = ("float", "double")
SOURCES = list(cuda_source.TYPES.values())
SIZES = {
    name: np.dtype("uint16" if dtype == "bfloat16" else dtype).itemsize
    for dtype, name in cuda_source.TYPES.items()
}
OPTIONS = (  # of binary cross-entropy
    {"pos_weight": tuple(0.5 * i for i in range(16)), "label_smoothing": 0.2},
    {"class_weight": (0.5, 2.0), "pos_weight": 3.0},
)  # fmt: skip
SETTINGS = ("rate", "l1", "l2", "decay", "momentum", "beta1", "beta2", "alpha", "epsilon")


def widths(entry: int) -> tuple[int, int]:
    """The vector widths in use: that of a 16-byte access, and 1."""
    return 16 // entry, 1


def every_activation() -> list[Activation]:
    return [activations.resolve(name) for name in activations.names()]


def dropped_activations() -> list[Activation]:
    """Activations with dropout behind them, of each kind: slopes in z̃, in its sign, in s, in both,
    and the longest one.
    """
    some = [activations.resolve(name) for name in ("relu", "sigmoid", "elu", "hard_tanh", "mish")]
    some.insert(4, Activation("silu in both", "s * sigmoid(s)", "z + sigmoid(s) * (1 - z)"))
    return [sigma for sigma in dropout.with_dropout((None, *some), (0.4,) * len(some), 7) if sigma]


def learned_activations() -> list[Activation]:
    """Activations on a learned parameter: whose formulas are straight lines, a user's, and one with
    dropout behind it.
    """
    slope = "a * (1 - tanh(a * s) * tanh(a * s)) + a * a"
    own = Activation("own", "tanh(a * s) + a * a * s", slope, 1.0, learned="per output")
    some = [
        activations.resolve("prelu"),
        own,
        dropout.with_dropout((None, activations.resolve("prelu")), (0.4,), 7)[1],
    ]
    return [sigma.bound(np.full(1, sigma.parameter)) for sigma in some if sigma]


def every_objective() -> list[Objective]:
    """Each elementwise loss after each output that matches it, and after one that does not."""
    found = [
        losses.pair(losses.resolve(name), activations.resolve(output))
        for name, output in sheet.MATCHED
    ]
    found += [losses.pair(losses.resolve(name), None) for name in losses.names(rowwise=False)]
    for options in OPTIONS:
        loss = losses.with_options(losses.resolve("binary_cross_entropy"), **options)
        own = Activation("own", activations.resolve("sigmoid").value, "z * (1 - z)", 1.0)
        found += [losses.pair(loss, activations.resolve(("sigmoid", 1.5))), losses.pair(loss, own)]
    return [objective for i, objective in enumerate(found) if objective not in found[:i]]


def compute(T: str) -> str:
    """The type that T is computed in."""
    return "double" if T == "double" else "float"


def elementwise_loss(T: str, V: int, Y: str = "", W: str = "") -> str:
    """The instance for layers of type T, targets Y and row weights W, the computing type where they
    are not given.
    """
    return f"elementwise_loss<{T}, {Y or compute(T)}, {W or compute(T)}, Formula, {V}, 256>"


def cross_entropy(T: str, Y: str, W: str = "", mixes: bool = False) -> str:
    """The instance of softmax with cross-entropy for such types; `mixes`: of targets that are
    smoothed or weighed by class.
    """
    return f"softmax_cross_entropy<{T}, {Y}, {W or compute(T)}{', true' if mixes else ''}>"


def update_source(name: str) -> str:
    """The source of updates.cu for a row of the sheet, its scalars read from the slot in the
    order of SETTINGS.
    """
    row = sheet.UPDATES[name]
    compiled = program(row.statements, frozenset((*SETTINGS, "t")))
    formula = formula_text.update(
        compiled, ["w", "g", *row.states], SETTINGS, ("decay",), "g", row.bounds
    )
    return cuda_source.text("updates.cu", formula)


def every_instance() -> Iterator[tuple[str, str]]:
    for sigma in (*every_activation(), *dropped_activations(), *learned_activations()):
        learned = "_learned" if sigma.a is not None else ""
        behind = learned + ("_dropout" if isinstance(sigma, dropout.Dropped) else "")
        formula = formula_text.activation(sigma)
        value, gradient = (
            cuda_source.text(file, formula)
            for file in ("bias_activation.cu", "activation_gradient.cu")
        )
        for T, entry in STORAGE.items():
            for V in widths(entry):
                yield gradient, f"activation_gradient{learned}<{T}, Formula, {V}, 256>"
                for keep in {False, sigma.slope_reads_s}:
                    yield value, f"bias_activation{behind}<{T}, Formula, {V}, {str(keep).lower()}>"
    for objective in every_objective():
        for T, entry in STORAGE.items():
            for V in widths(entry):
                yield (
                    cuda_source.text("losses.cu", formula_text.loss(objective)),
                    elementwise_loss(T, V),
                )
    any_loss = cuda_source.text("losses.cu", formula_text.loss(every_objective()[0]))
    for source in SOURCES:
        yield any_loss, elementwise_loss("float", 4, source)
        yield any_loss, cross_entropy("float", source)
    for weight in COMPUTE:
        yield any_loss, elementwise_loss("bfloat16_t", 8, "float", weight)
        yield any_loss, cross_entropy("bfloat16_t", "int", weight)
    for T in STORAGE:
        yield from (
            (any_loss, cross_entropy(T, Y, mixes=mixes))
            for Y in {"long long", compute(T)}
            for mixes in (False, True)
        )
        for name in ("softmax", "softmax_gradient", "log_softmax", "log_softmax_gradient"):
            yield cuda_source.text("softmax.cu"), f"{name}<{T}>"
    for name in sheet.UPDATES:
        for C in COMPUTE:
            for V in widths(STORAGE[C]):
                yield update_source(name), f"update<{C}, half_t, Formula, {V}>"
            yield update_source(name), f"prepare_update<{C}, Formula>"
    updates, gather = update_source("sgd"), cuda_source.text("gather.cu")
    yield from ((updates, f"recast<float, {low}>") for low in ("half_t", "bfloat16_t"))
    yield from ((updates, f"update<float, bfloat16_t, Formula, {V}>") for V in widths(4))
    for C in COMPUTE:
        yield updates, f"set_slot<{C}>"
        yield from ((gather, f"sum_weights<{source}, {C}>") for source in SOURCES)
    yield from ((updates, f"randomize<{T}>") for T in STORAGE)
    for target in STORAGE:
        for source in SOURCES:
            for V in sorted({16 // max(SIZES[source], SIZES[target]), 1}):
                yield gather, f"gather<{source}, {target}, {V}>"
