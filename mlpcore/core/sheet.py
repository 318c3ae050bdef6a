"""The sheet: one row for each built-in activation, loss, penalty and update.

Adding one means adding a row here: NumPy and CUDA compile it, the planner derives from it whether S
must be cached, and the tests compare its slope with differences.

In an activation s is the pre-activation, z = σ(s) the output, a the parameter. σ' is written in z
if possible, so that only Z is cached; a slope that reads s makes the planner keep S; σ'' may read
the variables of σ'. In a loss z is an output, y its target, q the parameter.

positive(x) is 1 if x > 0 and 0 otherwise. maximum and minimum propagate NaN from either side.
sigmoid, softplus, normcdf and normpdf (of the normal distribution) are right for every x
(`special.py`). smooth(x) is x and declares that its pieces meet without a kink. `where` expands
names into their definitions; repeated parts are computed once.

Every formula is right to a few units in the last place for every finite s (docs/accuracy.md). So no
formula subtracts rounded numbers that are nearly equal or produces ∞ / ∞ or 0 · ∞: before exp(s)
overflows, s is cut off at a point where the remaining factor is 1 already. A `second_derivative` is
given if differentiating the slope as written would lose digits. For a slope σ'(z), the condition on
a makes it right (leaky_relu must keep the sign). A learned a can become any number: such formulas
read s, not z.
"""

from __future__ import annotations

from typing import TypeVar

from mlpcore.core.activation import Activation
from mlpcore.core.formulas import where
from mlpcore.core.loss import Loss, Matched
from mlpcore.core.rows import Penalty, Row, Update

_Kind = TypeVar("_Kind", bound=Row | Penalty | Update)


def _by_name(*rows: _Kind) -> dict[str, _Kind]:
    return {row.name: row for row in rows}


_SELU = {"λ": "1.0507009873554805", "λα": "1.7580993408473769"}
# 2 √(2/π) (s + 0.044715 s³) = s (c + d s²), whose slope is c + f s²
_GELU = {"c": "1.5957691216057308", "d": "0.07135481627260025", "f": "0.21406444881780075"}

ACTIVATIONS = _by_name(
    Activation("identity", "s", "1"),
    Activation(
        "sigmoid",
        "sigmoid(a * s)",
        "a * z * (1 - z)",
        parameter=1.0,
        condition="a > 0",
        second_derivative="a * a * z * (1 - z) * (1 - 2 * z)",
    ),
    Activation("tanh", "tanh(s)", "1 - z * z", second_derivative="-2 * z * ((1 - z) * (1 + z))"),
    Activation("relu", "maximum(s, 0)", "positive(z)", init="he"),
    Activation("relu6", "minimum(maximum(s, 0), 6)", "positive(z) * positive(6 - z)", init="he"),
    Activation(
        "leaky_relu",
        "maximum(s, 0) + a * minimum(s, 0)",
        "a + (1 - a) * positive(z)",
        parameter=0.01,
        condition="a >= 0",
        init="he",
    ),
    # He et al. 2015, with their initial slope: the slope below 0 is learned
    Activation(
        "prelu",
        "maximum(s, 0) + a * minimum(s, 0)",
        "positive(s) + a * (1 - positive(s))",
        parameter=0.25,
        learned="per layer",
        init="he",
    ),
    # the slope in s, because z + a has lost the digits of exp(s)
    Activation(
        "elu",
        "maximum(s, 0) + a * expm1(minimum(s, 0))",
        "a * exp(minimum(s, 0)) + (1 - a) * positive(s)",
        parameter=1.0,
        condition="a >= 0",
        init="he",
        second_derivative="a * (1 - positive(s)) * exp(minimum(s, 0))",
    ),
    # Klambauer et al. 2017; λα - λ = 0.7073983534918964
    Activation(
        "selu",
        where("λ * maximum(s, 0) + λα * expm1(minimum(s, 0))", **_SELU),
        where("λα * exp(minimum(s, 0)) - 0.7073983534918964 * positive(s)", **_SELU),
        init="lecun",
        second_derivative=where("λα * (1 - positive(s)) * exp(minimum(s, 0))", **_SELU),
    ),
    Activation(
        "softplus",
        "softplus(s)",
        "-expm1(-z)",
        init="he",
        second_derivative="-expm1(-z) * exp(-z)",
    ),
    # Hendrycks and Gimpel 2016, the tanh form: s q with q = (1 + tanh(√(2/π) (s + 0.044715 s³))) /
    # 2 = e / (1 + e) and e = exp(2 √(2/π) (s + 0.044715 s³)). Slope q (1 + s v / (1 + e)) with v =
    # 2 √(2/π) (1 + 3 · 0.044715 s²), curvature q (1 - q) (2 v + s (v' - (2 q - 1) v²)), where
    # q (1 - q) = r² is even in s. They reach their limits at s = 8 and -30.
    Activation(
        "gelu",
        where("s / (1 + exp(s * (-c - d * (s * s))))", **_GELU),
        where(
            "(w * v / (1 + e) + 1) * (e / (1 + e))",
            e="exp(w * (c + d * (w * w)))",
            v="c + f * (w * w)",
            w="maximum(minimum(s, 8), -30)",
            **_GELU,
        ),
        init="he",
        second_derivative=where(
            "r * (2 * v + w * (2 * f * w - tanh(0.5 * u) * v * v)) * r",
            r="e / (1 + e * e)",
            e="exp(-0.5 * abs(u))",
            u="w * (c + d * (w * w))",
            v="c + f * (w * w)",
            w="maximum(minimum(s, 30), -30)",
            **_GELU,
        ),
    ),
    # Hendrycks and Gimpel 2016, the exact form: s Φ(s), σ' = Φ + s φ, with Φ and φ of the standard
    # normal distribution
    Activation(
        "gelu_erf",
        "s * normcdf(s)",
        "normcdf(s) + s * normpdf(s)",
        init="he",
        second_derivative=where("normpdf(w) * (2 - w * w)", w="maximum(minimum(s, 40), -40)"),
    ),
    # s σ(s) with the logistic σ = e / (1 + e), e = exp(s): slope σ(s) (1 + e + s) / (1 + e), 1 from
    # s = 45 on; curvature σ(s) σ(-s) (2 - s tanh(s/2)), where σ(s) σ(-s) = r² is even in s
    Activation(
        "silu",
        where("s * smooth(e / (1 + e))", e="exp(minimum(s, 40))"),
        where("(1 + e + w) * h * (e * h)", h="1 / (1 + e)", e="exp(w)", w="minimum(s, 45)"),
        init="he",
        second_derivative=where(
            "r * (2 - s * tanh(0.5 * s)) * r", r="e / (1 + e * e)", e="exp(-0.5 * abs(s))"
        ),
    ),
    # Misra 2019: s t, t = tanh(softplus(s)) = n / (n + 2) with e = exp(s), n = e (e + 2); 1 from
    # s = 20 on. Slope (n + 4 s e (e + 1) / (n + 2)) / (n + 2), 1 from s = 25 on. Curvature
    # 2 t' + s t'' with t' = 4 e (1 + e) / (n + 2)², t'' = t' (1 - 2 e² (e + 2) / (n + 2)) / (1 + e)
    # and p / q in place of e, so that neither overflows.
    Activation(
        "mish",
        where("s * smooth(n / (n + 2))", n="e * (e + 2)", e="exp(minimum(s, 20))"),
        where(
            "(w * (e + 1) * e * 4 / (n + 2) + n) / (n + 2)",
            n="e * (e + 2)",
            e="exp(w)",
            w="minimum(s, 25)",
        ),
        init="he",
        second_derivative=where(
            "4 * p * q / m / m * (2 * (p + q) * q + q * s * (q - 2 * (p * p) * (p + 2 * q) / m))",
            m="p * p + 2 * (q * (p + q))",
            p="maximum(e, positive(s))",
            q="maximum(e, 1 - positive(s))",
            e="exp(-abs(s))",
        ),
    ),
    Activation("hard_tanh", "maximum(minimum(s, 1), -1)", "positive(1 - abs(z))"),
    Activation("exp", "exp(s)", "z"),
    Activation("softmax", "", ""),  # each backend implements it, log_softmax and cross_entropy
    Activation("log_softmax", "", ""),
)


# An infinite logarithm counts as -100, as in PyTorch
_BINARY = where(
    "-u * log_z - v * log_1_z",
    log_z="maximum(log(z), -900 * positive(z) - 100)",
    log_1_z="maximum(log1p(-z), -900 * positive(1 - z) - 100)",
)

LOSSES = _by_name(
    Loss("squared_error", "0.5 * (z - y) * (z - y)", "z - y"),
    Loss("absolute_error", "abs(z - y)", "sign(z - y)"),
    # quadratic up to q, linear beyond it
    Loss(
        "huber",
        where("d * ((z - y) - 0.5 * d)", d="maximum(minimum(z - y, q), -q)"),
        "maximum(minimum(z - y, q), -q)",
        parameter=1.0,
        condition="q > 0",
    ),
    Loss(
        "log_cosh",
        "log_cosh(z - y)",
        "tanh(z - y)",
        second_derivative=where("4 * e / (1 + e) / (1 + e)", e="exp(-2 * abs(z - y))"),
    ),
    # the pinball loss: its minimum is the q-quantile of y
    Loss(
        "quantile",
        "maximum(q * (y - z), (q - 1) * (y - z))",
        "maximum(minimum(sign(z - y), 1 - q), -q)",
        parameter=0.5,
        condition="0 < q < 1",
    ),
    # -log of the Poisson probability of y with mean z, without log(y!). A z below 9e-39 counts as
    # 9e-39, and y / z as at most 3e38: a finite slope times a σ' of 0 is 0.
    Loss(
        "poisson",
        where("z - y * log(w)", w="maximum(z, 9e-39)"),
        where("1 - minimum(y / w, 3e38)", w="maximum(z, 9e-39)"),
        outputs="exp softplus",
        second_derivative=where("y / w / w", w="maximum(z, 9e-39)"),
    ),
    # options weight the targets y and 1 - y: class weights, label smoothing, weight of positives
    Loss(
        "binary_cross_entropy",
        where(_BINARY, u="y", v="1 - y"),
        where("(1 - y) / v - y / w", v="maximum(1 - z, 9e-39)", w="maximum(z, 9e-39)"),
        outputs="sigmoid",
        second_derivative=where(
            "(1 - y) / v / v + y / w / w", v="maximum(1 - z, 9e-39)", w="maximum(z, 9e-39)"
        ),
        weighed=(
            _BINARY,
            where("v / p - u / w", p="maximum(1 - z, 1e-38)", w="maximum(z, 1e-38)"),
            where("v / p / p + u / w / w", p="maximum(1 - z, 1e-38)", w="maximum(z, 1e-38)"),
        ),
    ),
    Loss("cross_entropy", "", "", outputs="softmax"),
)
# cross-entropy of probabilities z, in which z below q counts as q; a trainer computes it from S[L]
# instead
OF_PROBABILITIES = Loss(
    "cross_entropy of probabilities", "-y * log(maximum(z, q))", "-y / maximum(z, q)", parameter=1.0
)

MATCHED = {
    # with x = a s: (1 - y) softplus(x) + y softplus(-x), and a ((1 - y) σ(x) - y σ(-x)) with
    # e = exp(-x)
    ("binary_cross_entropy", "sigmoid"): Matched(
        "smooth((positive(s) - y) * s * a + log1p(exp(-a * abs(s))))",
        where("a * ((1 - y) / (1 + e) - y / (1 + 1 / e))", e="exp(-a * s)"),
        where("a * a * e / (1 + e) / (1 + e)", e="exp(-a * abs(s))"),
        weighed=(
            where(
                "u * maximum(-a * s, 0) + v * maximum(a * s, 0) + (u + v) * log1p(e)",
                e="exp(-abs(a * s))",
            ),
            where(
                "a * (v * exp(minimum(a * s, 0)) - u * exp(minimum(-a * s, 0))) / (1 + e)",
                e="exp(-abs(a * s))",
            ),
            where("a * a * (u + v) * e / ((1 + e) * (1 + e))", e="exp(-abs(a * s))"),
        ),
    ),
    # from s = 1000 on, z is infinite
    ("poisson", "exp"): Matched("z - y * smooth(minimum(s, 1000))", "z - y"),
    # log z is s if z is less than 1e-30, whose logarithm is -69.07755278982137; the slope is
    # σ(s) (z - y) / z with σ(s) = 1 - exp(-z), which is z there. The second derivative is
    # σ(s) (exp(-z) + y h) with h = (1 - (1 + z) exp(-z)) / z², computed up to z = 1/2 as the series
    # r of (exp(z) - 1 - z) / z² times exp(-z)
    ("poisson", "softplus"): Matched(
        where("z - y * smooth(log(w) + minimum(s + 69.07755278982137, 0))", w="maximum(z, 1e-30)"),
        where("(y - z) * (expm1(-w) / w)", w="maximum(z, 1e-30)"),
        where(
            "-expm1(-z) * (exp(-z) + y * (p * ((1 - (1 + v) * exp(-v)) / v / v)"
            " + (1 - p) * (exp(-w) * r)))",
            p="positive(z - 0.5)",
            r="0.5 * (1 + w / 3 * (1 + w / 4 * (1 + w / 5 * (1 + w / 6 * (1 + w / 7 * (1 + w / 8"
            " * t))))))",
            t="1 + w / 9 * (1 + w / 10 * (1 + w / 11 * (1 + w / 12 * (1 + w / 13 * (1 + w / 14"
            " * (1 + w / 15))))))",
            v="maximum(z, 0.5)",
            w="minimum(z, 0.5)",
        ),
    ),
    ("squared_error", "identity"): Matched("0.5 * (s - y) * (s - y)", "s - y"),
}


PENALTIES = _by_name(
    Penalty("l2", "0.5 * l2 * w * w", "l2 * w"), Penalty("l1", "l1 * abs(w)", "l1 * sign(w)")
)


# Kingma and Ba 2015. (1 - beta2) * g is computed before its product with g; this overflows
# sqrt(1 / (1 - beta2)) times later than g * g
_M = "m = beta1 * m + (1 - beta1) * g"
_V = "v = beta2 * v + (1 - beta2) * g * g"
_RATE = "rate * sqrt(1 - pow(beta2, t)) / (1 - pow(beta1, t))"
_ADAM = f"({_RATE}) * (m / (sqrt(v) + epsilon * sqrt(1 - pow(beta2, t))))"
_ADAM_CHANGE = "(rate / (1 - beta1) + 1 / sqrt(1 - beta2)) * (maximum(reach, G) / epsilon + 1)"

UPDATES = _by_name(
    Update("sgd", (), "w = w - rate * g", "0", "rate * G"),
    # Sutskever et al. 2013: the velocity is a sum of steps and carries the rate, so that changing
    # the rate does not rescale the past
    Update(
        "momentum",
        ("v",),
        "v = momentum * v - rate * g; w = w + v",
        "momentum * reach + rate * G",
        "momentum * reach + rate * G",
    ),
    Update(
        "nesterov",
        ("v",),
        "v = momentum * v - rate * g; w = w + (momentum * v - rate * g)",
        "momentum * reach + rate * G",
        "momentum * (momentum * reach + rate * G) + rate * G",
    ),
    # PyTorch's velocity: a sum of gradients, which the current rate scales as a whole
    Update(
        "gradient_momentum",
        ("u",),
        "u = momentum * u + g; w = w - rate * u",
        "momentum * reach + G",
        "rate * (momentum * reach + G)",
    ),
    Update(
        "gradient_nesterov",
        ("u",),
        "u = momentum * u + g; w = w - rate * (g + momentum * u)",
        "momentum * reach + G",
        "rate * (G + momentum * (momentum * reach + G))",
    ),
    Update("adam", ("m", "v"), f"{_M}; {_V}; w = w - {_ADAM}", "maximum(reach, G)", _ADAM_CHANGE),
    # epsilon added to sqrt(v) before the bias of v is corrected: end of section 2 of their paper
    Update(
        "adam_hat",
        ("m", "v"),
        f"{_M}; {_V}; w = w - ({_RATE}) * (m / (sqrt(v) + epsilon))",
        "maximum(reach, G)",
        _ADAM_CHANGE,
    ),
    # Loshchilov and Hutter 2019: Adam with the weights pulled to zero by rate * decay
    Update(
        "adamw",
        ("m", "v"),
        f"{_M}; {_V}; w = (1 - rate * decay) * w - {_ADAM}",
        "maximum(reach, G)",
        _ADAM_CHANGE,
    ),
    # Tieleman and Hinton 2012
    Update(
        "rmsprop",
        ("v",),
        "v = alpha * v + (1 - alpha) * g * g; w = w - rate * (g / (sqrt(v) + epsilon))",
        "0",
        "(rate + 1) * G / epsilon",
    ),
    # Chen et al. 2023
    Update(
        "lion",
        ("m",),
        "w = (1 - rate * decay) * w - rate * sign(beta1 * m + (1 - beta1) * g);"
        " m = beta2 * m + (1 - beta2) * g",
        "maximum(reach, G)",
        "rate",
    ),
)
