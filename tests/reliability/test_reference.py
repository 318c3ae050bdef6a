"""Several steps of any net, loss, optimizer and limit equal a plain reference; nothing but
documented exceptions comes.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mlpcore as mc
from tests.reliability import reference

EXAMPLES = 150
HIDDEN = ["identity", "sigmoid", "tanh", "relu", "leaky_relu", "softplus", "silu"]
PAIRS = [
    ("identity", "squared_error"), ("identity", "log_cosh"), ("tanh", "huber"),
    ("sigmoid", "binary_cross_entropy"),
    ("softmax", "cross_entropy"), ("exp", "poisson"), ("softplus", "poisson"),
    ("relu", "squared_error"),
]  # fmt: skip
RULES = [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.5, "nesterov": True}),
    ("Adam", {}),
    ("AdamW", {"weight_decay": 0.1}), ("RMSprop", {}), ("Lion", {"weight_decay": 0.1}),
]  # fmt: skip
CASES = st.fixed_dictionaries({
    "rows": st.integers(1, 30),
    "hidden": st.lists(st.tuples(st.sampled_from(HIDDEN), st.integers(1, 6)), max_size=3),
    "pair": st.sampled_from(PAIRS), "rule": st.sampled_from(RULES), "bias": st.booleans(),
    "tie": st.sampled_from(["", "1", "1.T"]),
    "l1": st.sampled_from([0.0, 0.01]), "l2": st.sampled_from([0.0, 0.1]),
    "clip": st.sampled_from([None, 0.05, 1e9]),
    "chunk": st.one_of(st.just("auto"), st.integers(1, 35)), "workers": st.integers(1, 3),
    "limit": st.sampled_from([None, "tight"]), "dropout": st.sampled_from([0.0, 0.4]),
    "zeros": st.booleans(),
    "indexed": st.booleans(), "seed": st.integers(0, 10**6),
    "dtype": st.sampled_from(["float64", "float64", "float32"]),
})  # fmt: skip


def check(case):
    """Three steps of the engine against three of the reference."""
    rng, (output, loss), (rule, given_) = (
        np.random.default_rng(case["seed"]),
        case["pair"],
        case["rule"],
    )
    names = [name for name, _ in case["hidden"]] + [output]
    sizes = [
        int(rng.integers(1, 5)),
        *[n for _, n in case["hidden"]],
        3 if output == "softmax" else int(rng.integers(1, 4)),
    ]
    tied = None
    if case["tie"] and len(sizes) > 2:  # the last layer takes the first one's matrix
        sizes[-2:] = sizes[:2] if case["tie"] == "1" else sizes[1::-1]
        tied = {len(names): int(case["tie"]) if case["tie"] == "1" else case["tie"]}
        if len(names) == 2:
            sizes[1] = sizes[0] if case["tie"] == "1" else sizes[1]
            sizes[2] = sizes[1] if case["tie"] == "1" else sizes[0]
    net = mc.MLP(
        sizes,
        names[:-1],
        output,
        bias=case["bias"],
        tied=tied,
        dtype=case["dtype"],
        device="cpu",
        seed=case["seed"],
    )
    net.parameters[...] += 0.1 * rng.standard_normal(net.layout.size)
    rate, dropout = 0.02, case["dropout"] if case["hidden"] else 0.0
    total = case["rows"] + 4
    X, Y = rng.standard_normal((total, sizes[0])), rng.standard_normal((total, sizes[-1]))
    if loss in ("binary_cross_entropy", "poisson"):
        Y = rng.integers(0, 2, Y.shape).astype(float)
    if loss == "cross_entropy":
        Y = np.eye(sizes[-1])[rng.integers(0, sizes[-1], total)]
    w = rng.uniform(0.5, 2, total)
    if case["zeros"]:
        w[rng.random(total) < 0.5] = 0
    rows = rng.integers(0, total, case["rows"])
    w[rows[0]] = 1
    optimizer = getattr(mc, rule)(rate, **given_)
    more = {
        "l1": case["l1"],
        "l2": case["l2"],
        "clip_norm": case["clip"],
        "dropout": dropout or None,
        "seed": case["seed"],
    }
    trainer = mc.Trainer(
        net, loss, optimizer, chunk_rows=case["chunk"], workers=case["workers"], **more
    )
    if case["limit"]:  # what one row takes, and half of what is beyond
        least = (
            mc.Trainer(net, loss, optimizer, chunk_rows=1, workers=1, **more)
            .plan(case["rows"])
            .total_bytes
            + 4096
        )
        trainer = mc.Trainer(
            net, loss, optimizer, chunk_rows=case["chunk"], memory_limit=least, **more
        )
    p = net.parameters.astype(np.float64)
    state, n = {}, net.layout.weights
    for t in (1, 2, 3):
        picked = rows if case["indexed"] else slice(0, case["rows"])
        W, b = net.layout.views(p)
        kept = reference.masks(dropout, case["seed"], t, case["rows"], sizes)
        w[0] = 1
        with np.errstate(all="ignore"):
            expected, dW, db = reference.gradient(
                W, b, [None, *names], loss, X[picked], Y[picked], w[picked], kept
            )
        assume(abs(expected) < 1e3)  # exp runs away: what comes then is in test_non_finite.py
        J = (
            trainer.step(X, Y, w, rows=rows)
            if case["indexed"]
            else trainer.step(X[picked], Y[picked], w[picked])
        )
        g = np.zeros_like(p)
        gW, gb = net.layout.views(g)
        for l in range(1, len(sizes)):
            gW[l][...] += dW[l]  # a tied one adds up where its owner is
            if case["bias"]:
                gb[l][...] = db[l]
        expected += case["l1"] * abs(p[:n]).sum() + 0.5 * case["l2"] * (p[:n] ** 2).sum()
        g[:n] += case["l1"] * np.sign(p[:n]) + case["l2"] * p[:n]
        norm = np.linalg.norm(g)
        if case["clip"] and norm > case["clip"]:
            g *= case["clip"] / norm
        reference.update(rule, given_, rate, t, p, g, state, np.arange(len(p)) < n)
        rel = 1e-9 if case["dtype"] == "float64" else 2e-3
        assert pytest.approx(expected, rel=rel, abs=rel / 10) == J
    # where rounding decides the sign, these rules follow it
    small = abs(g) < (1e-7 if case["dtype"] == "float64" else 1e-2)
    settled = ~small if rule in ("Adam", "AdamW", "RMSprop", "Lion") else slice(None)
    atol = 1e-9 if case["dtype"] == "float64" else 5e-3
    np.testing.assert_allclose(net.parameters[settled], p[settled], rtol=0, atol=atol)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None)
@given(CASES)
def test_steps_equal_the_plain_reference(case):
    check(case)
