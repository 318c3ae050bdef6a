"""The sheet and the compiler: slopes are derivatives, programs are what their text says,
nothing else gets in.
"""

import ast
import dataclasses
import gc
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mlpcore as mc
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core import activations, formulas, losses, program
from mlpcore.core.program import Program
from mlpcore.core.sheet import ACTIVATIONS, LOSSES, MATCHED, PENALTIES, UPDATES
from tests.core.formula_text import NOT_ANALYTIC, NUMPY, value


def derivative(text, by, h=2e-3, **variables):
    """∂/∂by, by a complex step if the formula is analytic, else by a fourth-order difference."""
    x = variables.pop(by)
    if not any(name in text for name in NOT_ANALYTIC):
        return value(text, **{by: x + 1e-30j}, **variables).imag / 1e-30

    def f(h):
        return value(text, **{by: x + h}, **variables)

    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def grid(low, high, *kinks):
    x = np.linspace(low, high, 241) + 0.00137
    return x[np.all([abs(x - kink) > 0.01 for kink in kinks], axis=0)] if kinks else x


PARAMETERS = {"sigmoid": [0.5, 1.0, 4.0]}  # of the others that have one: [0.0, 0.01, 0.7, 1.0, 1.6]
ELEMENTWISE = activations.names()
WITH_PARAMETERS = [
    (name, a)
    for name in ELEMENTWISE
    for a in (
        [None]
        if ACTIVATIONS[name].parameter is None
        else PARAMETERS.get(name, [0.0, 0.01, 0.7, 1.0, 1.6])
    )
]
SUMS = losses.names(rowwise=False)
LOSSES_WITH_PARAMETERS = [
    (name, q) for name in SUMS for q in ([None] if LOSSES[name].parameter is None else [0.2, 0.9])
]


def scalars(**given):
    return {key: number for key, number in given.items() if number is not None}


def targets(loss, size, seed=0):
    rng = np.random.default_rng(seed)
    if loss == "poisson":
        return rng.integers(0, 6, size).astype(float)
    if loss == "binary_cross_entropy":
        return rng.choice([0.0, 0.3, 1.0], size)
    return rng.standard_normal(size)


def outputs(loss, y):
    """Points z at which the loss on y has no kink, in its range."""
    if loss == "poisson":
        return np.linspace(0.05, 7, y.size)
    if loss == "binary_cross_entropy":
        return np.linspace(0.01, 0.99, y.size)
    gap = grid(-3, 3, 0, 0.2, -0.2, 0.9, -0.9)
    return y + np.resize(gap, y.size)


# -- the sheet -------------------------------------------------------------------------------------


def test_the_sheet_holds_every_activation_loss_and_optimizer_of_the_design():
    assert set(ACTIVATIONS) >= {
        "identity",
        "sigmoid",
        "tanh",
        "relu",
        "relu6",
        "leaky_relu",
        "prelu",
        "elu",
        "selu",
        "softplus",
        "gelu",
        "gelu_erf",
        "silu",
        "mish",
        "hard_tanh",
        "exp",
        "softmax",
        "log_softmax",
    }
    assert set(LOSSES) >= {
        "squared_error",
        "absolute_error",
        "huber",
        "log_cosh",
        "quantile",
        "poisson",
        "binary_cross_entropy",
        "cross_entropy",
    }
    assert set(UPDATES) >= {
        "sgd", "momentum", "nesterov", "gradient_momentum", "gradient_nesterov", "adam", "adam_hat",
        "adamw", "rmsprop", "lion",
    }  # fmt: skip
    assert set(PENALTIES) == {"l1", "l2"}


def test_a_row_of_the_sheet_is_what_a_user_may_make_and_its_name_means_it():
    for name, row in ACTIVATIONS.items():
        assert type(row) is mc.Activation
        assert activations.resolve(name, output=True) is row
    for name, row in LOSSES.items():
        assert type(row) is mc.Loss
        assert mc.loss(name).loss is row
    assert {loss for loss, _ in MATCHED} <= set(LOSSES)
    assert {output for _, output in MATCHED} <= set(ACTIVATIONS)


def test_every_formula_of_the_sheet_reads_what_its_row_may_read():
    for name, row in ACTIVATIONS.items():
        if not row.rowwise:
            assert formulas.reads(row.value) <= {"s", *row.scalars}, name
            assert formulas.reads(row.slope) <= {"s", "z", *row.scalars}, name
            assert formulas.reads(row.curvature) <= formulas.reads(row.slope) | {*row.scalars}, name
    for name, row in LOSSES.items():
        if not row.rowwise:
            read = formulas.reads(row.value) | formulas.reads(row.slope)
            assert read <= {"z", "y", *row.scalars}, name
    for (loss, output), row in MATCHED.items():
        known = {"s", "z", "y", *ACTIVATIONS[output].scalars, *LOSSES[loss].scalars}
        for formula in row[:3]:
            assert formula is None or formulas.reads(formula) <= known, (loss, output)
        for formula in row.weighed or ():
            assert formulas.reads(formula) <= {"s", "u", "v", *ACTIVATIONS[output].scalars}


def test_every_default_parameter_satisfies_its_own_condition_and_another_is_refused():
    conditions = {name: row.condition for name, row in (ACTIVATIONS | LOSSES).items()}
    assert {name for name, condition in conditions.items() if condition} == {
        "sigmoid",
        "leaky_relu",
        "elu",
        "huber",
        "quantile",
    }
    for row in (*ACTIVATIONS.values(), *LOSSES.values()):
        if row.condition is not None:
            assert formulas.holds(row.condition, **row.scalars)
            with pytest.raises(ValueError, match=f"must satisfy {row.condition}; got"):
                dataclasses.replace(row, parameter=-1.0)


@pytest.mark.parametrize(
    "condition", ["a", "a > b", "a in 3", "a > 0; 1", "", "f(a) > 0", "(" * 999]
)
def test_a_condition_that_is_no_comparison_of_the_parameter_is_refused(condition):
    with pytest.raises(ValueError, match=r"a > b|comparison|cannot be read|not allowed|too deep"):
        mc.Activation("mine", "a * s", parameter=1.0, condition=condition)


def test_a_penaltys_slope_is_the_derivative_of_its_value():
    for penalty in PENALTIES.values():
        for w in (-1.3, 0.4):
            wanted = derivative(penalty.value, "w", w=np.float64(w), l1=0.3, l2=0.7)
            found = formulas.evaluate_scalar(penalty.slope, w=w, l1=0.3, l2=0.7)
            assert found == pytest.approx(float(wanted), rel=1e-9)


def test_names_stand_for_what_they_mean_a_later_one_in_an_earlier_one():
    written = formulas.where("e / (1 + e)", e="exp(w)", w="minimum(s, 45)")
    assert written == "exp(minimum(s, 45)) / (1 + exp(minimum(s, 45)))"
    assert len(Program(f"z = {written}", frozenset()).instructions) == 4
    assert formulas.where("a * e", e="b + c") == "a * (b + c)"


# -- slopes are derivatives ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "a"), WITH_PARAMETERS)
def test_the_slope_of_an_activation_is_the_derivative_of_its_value(name, a):
    formula, slope = ACTIVATIONS[name].value, ACTIVATIONS[name].slope
    s, own = grid(-6, 6.5, 0, 1, -1, 6), scalars(a=a)
    z = value(formula, s=s, **own)
    found = value(slope, s=s, z=z, **own) + 0 * s
    np.testing.assert_allclose(found, derivative(formula, "s", s=s, **own), rtol=1e-9, atol=2e-10)


@pytest.mark.parametrize(("name", "q"), LOSSES_WITH_PARAMETERS)
def test_the_slope_of_a_loss_is_the_derivative_of_its_value_in_z(name, q):
    formula, slope = LOSSES[name].value, LOSSES[name].slope
    y = targets(name, 300)
    z, own = outputs(name, y), scalars(q=q)
    # the logarithm's pole
    edge = {"poisson": z, "binary_cross_entropy": np.minimum(z, 1 - z)}.get(name, 1.0)
    found = value(slope, z=z, y=y, **own)
    np.testing.assert_allclose(
        found, derivative(formula, "z", z=z, y=y, h=2e-3 * edge, **own), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("loss", "output"), list(MATCHED))
def test_a_matched_row_is_the_loss_of_the_output_and_its_derivative_by_s(loss, output, a):
    formula, slope = MATCHED[loss, output].value, MATCHED[loss, output].slope
    s = grid(-5, 2, 0)
    y = targets(loss, s.size)
    z = value(ACTIVATIONS[output].value, s=s, a=a)
    composed = formulas.substitute(formula, {"z": ACTIVATIONS[output].value})
    np.testing.assert_allclose(
        value(slope, s=s, z=z, y=y, a=a),
        derivative(composed, "s", s=s, y=y, a=a),
        rtol=1e-9,
        atol=1e-9,
    )
    np.testing.assert_allclose(
        value(formula, s=s, z=z, y=y, a=a),
        value(LOSSES[loss].value, z=z, y=y),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_values_and_slopes_stay_finite_and_right_in_the_limits(name):
    row = ACTIVATIONS[name]
    formula, slope, own = row.value, row.slope, row.scalars
    s = np.array([-1e4, -800.0, 0.0, 700.0 if name == "exp" else 1e4])
    # exp may overflow in denominators
    with np.errstate(over="ignore", invalid="raise", divide="raise"):
        z = value(formula, s=s, **own)
        d = value(slope, s=s, z=z, **own) + 0 * s
    assert np.isfinite(z).all()
    assert np.isfinite(d).all()
    left = {"identity": 1, "leaky_relu": 0.01, "prelu": 0.25}.get(name, 0)
    right = {
        "sigmoid": 0,
        "tanh": 0,
        "hard_tanh": 0,
        "relu6": 0,
        "selu": 1.0507009873554805,
        "exp": np.exp(700),
    }.get(name, 1)
    np.testing.assert_allclose([d[0], d[-1]], [left, right], rtol=1e-12, atol=1e-12)


# -- programs are what their text says -------------------------------------------------------------

ARRAYS, SCALARS = ("x", "y", "z"), ("a", "q")
LEAVES = st.sampled_from([*ARRAYS, *ARRAYS, *SCALARS, "0.5", "2", "-1.5", "3"])


def grow(inner):
    functions = [
        "tanh",
        "exp",
        "expm1",
        "log",
        "log1p",
        "abs",
        "sqrt",
        "sign",
        "positive",
        "sin",
        "cos",
        "-",
    ]
    call1 = st.tuples(st.sampled_from(functions), inner)
    call2 = st.tuples(st.sampled_from(["maximum", "minimum"]), inner, inner)
    binary = st.tuples(inner, st.sampled_from("+-*/"), inner)
    twice = st.tuples(inner, st.sampled_from("+-*/"))
    return st.one_of(
        call1.map(lambda t: f"{t[0]}({t[1]})"),
        call2.map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        binary.map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        twice.map(lambda t: f"({t[0]} {t[1]} tanh({t[0]}))"),
    )


EXPRESSIONS = st.recursive(LEAVES, grow, max_leaves=12)
FLOATS = {
    "T": float, "positive": lambda x: float(x > 0), "sign": lambda x: float((x > 0) - (x < 0)),
    "maximum": max,
    "minimum": min, "abs": abs,
    **{name: getattr(math, name) for name in ("tanh", "exp", "expm1", "log", "log1p", "sqrt", "sin",
            "cos")},
}  # fmt: skip


def plain(text, variables):
    """The formula by recursion: scalars in Python floats, arrays by NumPy, every intermediate
    result a new array.
    """

    def go(node):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        functions = NUMPY if names & set(ARRAYS) else FLOATS
        match node:
            case ast.Constant():
                return float(node.value)
            case ast.Name():
                return variables[node.id]
            case ast.UnaryOp():
                return -go(node.operand)
            case ast.BinOp():
                left, right = go(node.left), go(node.right)
                symbol = {
                    ast.Add: "__add__",
                    ast.Sub: "__sub__",
                    ast.Mult: "__mul__",
                    ast.Div: "__truediv__",
                }[type(node.op)]
                if isinstance(right, np.ndarray) and not isinstance(left, np.ndarray):
                    left = np.asarray(left)
                return getattr(left, symbol)(right)
            case ast.Call():
                return functions[node.func.id](*[go(x) for x in node.args])

    return go(ast.parse(text, mode="eval").body)


def run(statements, variables):
    """The program on copies of the arrays; returns them, and the program."""
    compiled = Program(statements, frozenset(SCALARS))
    arrays = {name: x.copy() for name, x in variables.items() if isinstance(x, np.ndarray)}
    numbers = {name: x for name, x in variables.items() if not isinstance(x, np.ndarray)}
    ops = NumpyOps()
    with np.errstate(all="ignore"):
        ops.map(compiled, arrays, {key: np.asarray(x) for key, x in compiled.fold(numbers).items()})
    return arrays, compiled


def variables(seed):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(17) for name in (*ARRAYS, "out")}
    arrays["y"][3], arrays["x"][5], arrays["z"][7] = 0.0, np.nan, np.inf
    return {**arrays, "a": 0.75, "q": -1.25}


ARITHMETIC = (ZeroDivisionError, ValueError, OverflowError)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["x", "z", "out"]), EXPRESSIONS), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_a_program_computes_what_its_statements_say_also_in_place_and_keeps_every_other_array(
    statements, seed
):
    state = variables(seed)
    try:
        with np.errstate(all="ignore"):
            expected = dict(state)
            for target, text in statements:
                # + 0 would lose the sign of -0
                expected[target] = np.array(np.broadcast_to(plain(text, expected), 17))
    except ARITHMETIC:  # a division by 0 among scalars
        assume(False)
    arrays, _ = run("; ".join(f"{target} = {text}" for target, text in statements), state)
    for name in (*ARRAYS, "out"):
        np.testing.assert_array_equal(arrays[name], expected[name], err_msg=name)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.sampled_from(["x", "out"]))
def test_a_program_uses_as_few_registers_as_its_order_of_steps_allows(text, target):
    compiled = Program(f"{target} = {text}", frozenset(SCALARS))

    def temporary(name):
        return name == target or name.startswith("r")

    # each step's result by number; who reads it last; what a place holds now
    written, uses, holds = [], {}, {}
    for i, step in enumerate(compiled.instructions):
        for name in step.operands:
            if name in holds:
                uses[holds[name]] = i
            elif name == target:
                uses["old"] = i
        assert temporary(step.out)
        holds[step.out] = i
        written.append(i)
    need = 0
    for i in written[:-1]:  # the last result goes into the target itself
        live = sum(j <= i < uses[j] for j in written[:-1])
        need = max(need, live - (uses.get("old", -1) <= i))
    assert compiled.registers == max(0, need)
    assert {
        name
        for step in compiled.instructions
        for name in (*step.operands, step.out)
        if name[0] == "r"
    } == {f"r{i}" for i in range(compiled.registers)}


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_equal_subexpressions_are_computed_once_and_scalars_not_per_entry(text):
    compiled = Program(f"out = {text}", frozenset(SCALARS))
    arrays = set()
    for node in ast.walk(ast.parse(text, mode="eval")):
        reads = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(ARRAYS)
        if (
            reads
            and isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call)
            and getattr(node, "func", ast.Name("")).id != "T"
        ):
            arrays.add(ast.dump(node))
    assert len(compiled.instructions) == max(1, len(arrays))


def test_the_programs_of_the_sheet_give_equal_results_on_separate_and_on_shared_arrays():
    rng = np.random.default_rng(1)
    for name in ELEMENTWISE:
        activation = activations.resolve(name)
        ops, s, g = NumpyOps(), rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
        z, in_place = np.empty_like(s), s.copy()
        kept = s.copy()
        ops.bias_activation(kept, None, activation, z)
        np.testing.assert_array_equal(kept, s, err_msg=f"{name}: S must be kept for the slope")
        ops.bias_activation(in_place, None, activation, in_place)
        np.testing.assert_array_equal(in_place, z, err_msg=name)
        # functions that are compiled into steps
        rounding = 1e-14 if "norm" in activation.value else 0
        np.testing.assert_allclose(
            z, value(activation.value, s=s, **activation.scalars), rounding, err_msg=name
        )
        results = []
        for shared in ("none", "g", "z"):
            S, Z, G, D = s.copy(), z.copy(), g.copy(), np.empty_like(s)
            D = {"none": D, "g": G, "z": Z}[shared]
            ops.activation_gradient(G, S, Z, activation, D, None)
            results.append(D)
            for letter, array, was in (("S", S, s), ("Z", Z, z), ("G", G, g)):
                if array is not D:
                    np.testing.assert_array_equal(
                        array, was, err_msg=f"{name}: {letter} must be kept"
                    )
        expected = g * value(activation.slope, s=s, z=z, **activation.scalars)
        np.testing.assert_allclose(results[0], expected, rounding, err_msg=name)
        np.testing.assert_array_equal(results[1], results[0], err_msg=name)
        np.testing.assert_array_equal(results[2], results[0], err_msg=name)


@pytest.mark.parametrize(("target", "registers"), [("z", 2), ("g", 3), ("d", 2)])
def test_the_cost_of_gelus_slope_does_not_creep_up(target, registers):
    compiled = Program(f"{target} = g * ({activations.resolve('gelu').slope})", frozenset())
    assert len(compiled.instructions) <= 16  # of 60 operations that are written out
    assert sum(step.function in ("exp", "tanh") for step in compiled.instructions) == 1
    assert compiled.registers <= registers


@pytest.mark.parametrize("function", ["maximum", "minimum"])
def test_maximum_and_minimum_pass_nan_on_from_either_side(function):
    x = np.array([np.nan, 1.0, np.nan])
    y = np.array([1.0, np.nan, np.nan])
    arrays, _ = run(f"out = {function}(x, y)", {"x": x, "y": y, "out": np.zeros(3)})
    assert np.isnan(arrays["out"]).all()
    for text in (f"out = {function}(x, 0)", f"out = {function}(0, x)"):
        arrays, _ = run(text, {"x": x, "out": np.zeros(3)})
        np.testing.assert_array_equal(np.isnan(arrays["out"]), np.isnan(x))


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_nan_in_the_pre_activation_is_a_nan_in_the_output(name):
    s = np.array([[np.nan, 0.3]])
    NumpyOps().bias_activation(s, None, activations.resolve(name), s)
    np.testing.assert_array_equal(np.isnan(s), [[True, False]])


# -- the whitelist ---------------------------------------------------------------------------------

REFUSED = [
    "s.real", "s.__class__", "().__class__", "s[0]", "s[:, 0]", "(lambda: s)()", "lambda s: s",
    "'s'", "b's'", "f'{s}'",
    "s if s else 1",
    "s and 1", "not s", "s < 1", "s == s", "[s]", "(s, s)", "{s}", "{s: 1}", "[x for x in s]",
    "s // 2", "s % 2",
    "s @ s", "s << 1", "~s", "+s", "(t := s)", "*s", "await s", "yield", "print(s)", "eval(s)",
    "__import__(s)",
    "exp(s)(s)", "maximum(s)", "maximum(s, 0, 1)", "tanh()", "tanh(s, s)", "tanh(x=s)", "tanh(*s)",
    "maximum(**s)", "np.exp(s)",
    "1j * s", "True", "None", "...", "s; s", "s = 1", "", " ", "s +", "import os", "s\n+ 1",
    "tan(s)", "exp",
    "s ** 2.0", "s ** s", "2 ** s", "s ** 17", "s ** -9", "s ** True", "s ** (1 + 1)",
    "s ** --2", "sin(s, s)",
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_arithmetic_on_the_allowed_names_is_refused(text):
    with pytest.raises(ValueError, match="formula"):
        mc.Activation("mine", text, "1")
    with pytest.raises(ValueError, match="formula"):
        mc.Loss("mine", "z - y", text.replace("s", "z"))


@pytest.mark.parametrize("text", [3, None, b"s", ["s"]])
def test_a_formula_that_is_no_text_is_a_type_error(text):
    with pytest.raises(TypeError, match="formula"):
        mc.Activation("mine", text, "1")


@pytest.mark.parametrize(
    ("make", "reads"),
    [
        (lambda: mc.Activation("mine", "z", "1"), "'z'"),
        (lambda: mc.Activation("mine", "a * s", "a"), "'a'"),
        (lambda: mc.Activation("mine", "s", "y"), "'y'"),
        (lambda: mc.Activation("mine", "q * s", "q", 1.0), "'q'"),
        (lambda: mc.Loss("mine", "s - y", "1"), "'s'"),
        (lambda: mc.Loss("mine", "q * (z - y)", "q"), "'q'"),
        (lambda: mc.Loss("mine", "a * (z - y)", "a", 1.0), "'a'"),
    ],
)
def test_a_variable_that_the_row_does_not_have_is_refused_by_name(make, reads):
    with pytest.raises(ValueError, match=f"reads {reads}"):
        make()


@pytest.mark.parametrize("text", ["pow(s, 2)", "pow(2, s)"])
def test_a_power_of_an_array_is_refused_where_the_formula_is_given_not_at_the_first_step(text):
    with pytest.raises(ValueError, match=r"pow is for the scalars of updates only; write s \*\* 2"):
        mc.Activation("mine", text, "1")


def test_an_exponent_that_is_no_small_whole_number_is_refused_with_what_to_write():
    with pytest.raises(
        ValueError,
        match=r"exponent of 's \*\* 2.5' must be a whole number from -8 to 16; .* exp\(exponent",
    ):
        mc.Activation("mine", "s ** 2.5", "1")


@pytest.mark.parametrize("n", formulas.POWERS)
def test_a_power_is_its_multiplications_squared_as_often_as_can_be(n):
    x = np.array([-2.0, -1.5, 0.75, 1.0, 3.0])
    arrays, compiled = run(f"out = x ** {n}", {"x": x, "out": np.zeros(5)})
    np.testing.assert_allclose(arrays["out"], [float(v) ** n for v in x], rtol=4e-15)
    shortest = {
        0: 1,
        1: 1,
        2: 1,
        3: 2,
        4: 2,
        5: 3,
        6: 3,
        7: 4,
        8: 3,
        9: 4,
        10: 4,
        11: 5,
        12: 4,
        13: 5,
        14: 5,
        15: 6,
        16: 4,
    }
    divided = n < 0
    assert len(compiled.instructions) == (shortest[abs(n)] if abs(n) != 1 or n > 0 else 0) + divided
    assert formulas.evaluate_scalar(f"a ** {n}", a=1.7) == pytest.approx(1.7**n, rel=1e-15)


def test_powers_share_their_squares_with_products_and_with_each_other_however_deep_they_are():
    _, compiled = run(
        "out = x ** 4 + x * x + x ** 2 * z", {"x": np.ones(3), "z": np.ones(3), "out": np.ones(3)}
    )
    assert [step.function for step in compiled.instructions] == [
        "multiply",
        "multiply",
        "add",
        "multiply",
        "add",
    ]
    deep = "(" * 99 + "x" + ") ** 16" * 99
    assert len(Program(f"out = {deep}", frozenset()).instructions) == 4 * 99
    with pytest.raises(ValueError, match="has no value"):
        program.check("value", "(" * 99 + "9" + ") ** 16" * 99 + " + s", ("s",), {})


def test_a_power_binds_as_in_python():
    arrays, _ = run(
        "out = -x ** 2 * 3 - (-x) ** 3", {"x": np.array([2.0, -1.0]), "out": np.zeros(2)}
    )
    np.testing.assert_array_equal(arrays["out"], [-4, -4])


@pytest.mark.parametrize(
    "text", ["-" * 3000 + "s", "+".join(["s"] * 3000), "(" * 500 + "s" + ")" * 500]
)
def test_a_formula_too_deep_to_read_is_a_value_error_too(text):
    with pytest.raises(ValueError, match="formula"):
        mc.Activation("mine", text, "1")


SMOOTH = [
    "s ** 3", "s ** 16 - 4 * s ** 5 + s ** 0", "1 / (1 + s ** 2)", "(1 + s ** 2) ** -3",
    "s * normcdf(s)", "sin(3 * s) / 3",
    "0.5 * s * (1 + erf(s / sqrt(2)))", "s * erfc(-s)", "a * tanh(s / a) + cos(a)",
    "log1p(s * s) * expm1(-s)", "-s", "7",
    "sqrt(s * s + a) - log(1 + exp(-s * s))", "normpdf(s - 1)",
]  # fmt: skip


@pytest.mark.parametrize("text", SMOOTH)
def test_a_slope_that_is_left_out_is_the_values_derivative_at_0_too(text):
    derived, s = mc.Activation("own", text, parameter=1.5), np.append(np.linspace(-2, 2, 31), 0)
    assert derived == mc.Activation("own", text, derived.slope, 1.5, "glorot")
    slope = value(derived.slope, s=s, a=1.5) + 0 * s
    np.testing.assert_allclose(slope, derivative(text, "s", s=s, a=1.5), rtol=1e-11, atol=1e-11)
    loss = mc.Loss("own", formulas.substitute(text, {"s": "z - y", "a": "q"}), parameter=1.5)
    np.testing.assert_allclose(
        value(loss.slope, z=s + 0.5, y=0.5, q=1.5) + 0 * s, slope, rtol=1e-11, atol=1e-11
    )


def test_a_derived_slope_reads_s_alone_and_says_at_a_kink_what_positive_says():
    cubed, bent = (
        mc.Activation("cubed", "s ** 3"),
        mc.Activation("bent", "maximum(s, 0) + a * minimum(s, 0)", parameter=0.1),
    )
    assert (cubed.slope, cubed.slope_reads_s) == ("3 * s ** 2", True)
    np.testing.assert_array_equal(value(bent.slope, s=np.array([-1.0, 1.0]), a=0.1), [0.1, 1.0])
    assert mc.Activation("flat", "2 - 2").slope == "0"
    assert mc.Loss("fourth", "(z - y) ** 4").slope == "4 * (z - y) ** 3"
    assert mc.Loss("pinball", "q * abs(z - y)", parameter=2.0).slope == "q * sign(z - y)"


@pytest.mark.parametrize(
    "text", [" * ".join(["tanh(s)"] * 200), "tanh(" * 150 + "s" + ")" * 150, "+".join(["s"] * 400)]
)
def test_a_slope_too_long_to_derive_is_asked_for(text):
    with pytest.raises(
        ValueError,
        match=r"slope: the derivative of .* is too long for a formula; pass the slope yourself",
    ):
        mc.Activation("own", text)
    assert mc.Activation("own", text, "1").slope == "1"


def test_reads_substitute_and_kinks_see_the_tree_not_the_text():
    assert formulas.reads("maximum(s, 0) + a * exp(2)") == {"s", "a"}
    assert formulas.reads("1 - z * z") == {"z"}
    for text, replacements in [
        ("a * z", {"z": "s + 1"}),
        ("z - z", {"z": "s - a"}),
        ("1 / z", {"z": "a / s"}),
        ("-z", {"z": "-s"}),
    ]:
        replaced = formulas.substitute(text, replacements)
        z = value(replacements["z"], s=1.7, a=0.4)
        assert value(replaced, s=1.7, a=0.4) == value(text, z=z, a=0.4)
    for kink, text in (
        (0.0, "maximum(s, 0)"),
        (2.0, "abs(s - 2)"),
        (-1.0, "minimum(-1, s)"),
        (3.0, "positive(3 - s)"),
    ):
        (sign,) = formulas.kinks(text)
        assert value(sign, s=kink - 1e-9) * value(sign, s=kink + 1e-9) < 0


@pytest.mark.parametrize(("condition", "values", "holds"), [
    ("a > 0", {"a": 0.0}, False), ("a >= 0", {"a": 0.0}, True), ("0 < q < 1", {"q": 1.0}, False),
    ("0 < q < 1", {"q": 0.5}, True),
])  # fmt: skip
def test_conditions_of_parameters_hold_where_they_say(condition, values, holds):
    assert formulas.holds(condition, **values) is holds


@pytest.mark.slow
def test_threads_parse_at_the_same_time():
    """Where one is in a garbage collection, CPython 3.11 counts the depth of another's tree."""

    class Slow:
        def __init__(self):
            self.me = self

        def __del__(self):
            time.sleep(0)

    def parse(_):
        until = time.monotonic() + 1
        while time.monotonic() < until:
            Slow()
            formulas.parse("((((((((s + 1) * z) + 2) * s) + 3) * z) + 4) * s)")

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(parse, range(3)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
