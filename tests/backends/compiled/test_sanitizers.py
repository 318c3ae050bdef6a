"""Every compiled pass under the sanitizers of memory and of undefined behaviour.

A small C++ program runs the passes on heap arrays of exactly the size that they have, so that one
entry too far stops it, over awkward shapes and with every option and aliasing.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from mlpcore.backends import formula_text
from mlpcore.backends.compiled import compiler, passes
from mlpcore.core import activations, dropout, losses, sheet
from mlpcore.core.program import program
from tests.backends.compiled.test_passes import SCALARS
from tests.backends.cuda.instances import every_objective, learned_activations

pytestmark = pytest.mark.skipif(bool(compiler.why_not()), reason=compiler.why_not() or "-")

FLAGS = (
    "-std=c++17", "-O1", "-g", "-fopenmp-simd", "-ffp-contract=off", "-w",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
)  # fmt: skip
SHAPES = [
    (1, 1), (1, 3), (3, 1), (2, 15), (5, 16), (4, 17), (33, 7), (130, 33), (4097, 1), (6, 511),
    (5, 512), (4, 513), (2, 1023), (9, 1024), (3, 1025),
]  # fmt: skip
DRIVER = """
#include <cstdio>
#include <cstdlib>
using int64 = long long;
STRUCTS
static void* held[16];
static int count = 0;
template <class T> T* make(int64 n) {  // exactly n entries, which are -3, -2.5, … 3
  T* p = static_cast<T*>(malloc(n * sizeof(T)));
  for (int64 j = 0; j < n; ++j) p[j] = T(j * 5 % 13 - 6) / 2;
  held[count++] = p;
  return p;
}
static void forget() { while (count) free(held[--count]); }
using Run = void (*)(const void*, int64, int64);
static void run_all(Run run, const void* p) {  // as three threads, and as one
  for (int64 i = 0; i < 3; ++i) run(p, i, 3);
  run(p, 0, 1);
}
template <class T>
void activate(Run run, int64 m, int64 n, bool biased, bool keeps, bool learned, bool each) {
  Activate<T> p = {};
  p.S = make<T>(m * n), p.Z = keeps ? make<T>(m * n) : p.S;
  p.b = biased ? make<T>(n) : nullptr, p.a = learned ? make<T>(each ? n : 1) : nullptr;
  int64* place = make<int64>(2);
  place[0] = 5, place[1] = (1LL << 40) + 3;
  p.place = place, p.m = m, p.n = n, p.key = 0xfedcba98, p.threshold = 1 << 30;
  run_all(run, &p), forget();
}
template <class T> void descend(Run run, int64 m, int64 n, bool learned, bool each) {
  for (int way = 0; way < 12; ++way) {
    Descend<T> p = {};
    T *G = make<T>(m * n), *Z = make<T>(m * n);
    p.G = G, p.Z = Z, p.S = make<T>(m * n), p.a = learned ? make<T>(each ? n : 1) : nullptr;
    p.D = way % 3 == 0 ? make<T>(m * n) : way % 3 == 1 ? G : Z;
    p.db = way / 3 % 2 ? make<T>(n) : nullptr, p.accumulate = way / 6, p.m = m, p.n = n;
    run_all(run, &p), forget();
  }
}
template <class T> void loss(Run run, int64 m, int64 n, bool labels, bool columns) {
  for (int way = 0; way < 16; ++way) {
    Loss<T> p = {};
    T* x = make<T>(m * n);
    int64* classes = labels ? make<int64>(m) : nullptr;  // and some that are none
    for (int64 i = 0; labels && i < m; ++i) classes[i] = i % 5 == 4 ? -1 : i % 5 == 3 ? n : i % n;
    p.x = x, p.Y = labels ? static_cast<void*>(classes) : make<T>(m * n);
    p.k_step = way % 2, p.k = make<T>(p.k_step ? m : 1), p.D = way / 2 % 2 ? x : make<T>(m * n);
    p.db = way / 4 % 2 ? make<T>(n) : nullptr, p.J = make<double>(1), p.accumulate = way / 8;
    p.columns = columns ? make<T>(n) : nullptr, p.m = m, p.n = n;
    p.most = 3, p.kept = 0.75, p.spread = 0.25 / n;
    run_all(run, &p), forget();
  }
}
template <class T> void update(Run run, int64 n, int vectors, int scalars) {
  Update<T> p = {};
  T** to[] = {&p.v0, &p.v1, &p.v2, &p.v3};
  for (int i = 0; i < vectors; ++i) *to[i] = make<T>(n);
  const T** k = static_cast<const T**>(malloc(scalars * sizeof(T*)));
  T* one = make<T>(1);
  for (int i = 0; i < scalars; ++i) k[i] = one;
  p.k = k, p.n = n;
  run_all(run, &p), forget(), free(k);
}
template <class T> void sum_up(Run run, int64 m, int64 n) {
  SumUp<T> p = {};
  p.D = make<T>(m * n), p.db = make<T>(n), p.J = make<double>(1), p.m = m, p.n = n;
  const int64 rows = 4096 / n < 4 ? 4 : 4096 / n;
  p.sums = make<double>((m + rows - 1) / rows);
  run_all(run, &p), forget();
}
template <class T> void product(Run run, int64 m, int64 n) {
  const int64 depths[] = {1, 7, 257};
  for (const int64 k : depths) {
    for (int way = 0; way < 8; ++way) {
      const bool a = way & 1, b = way & 2;
      Product<T> p = {};
      p.A = make<T>(m * k), p.B = make<T>(k * n), p.C = make<T>(m * n);
      p.m = m, p.n = n, p.k = k, p.c_row = n, p.accumulate = way / 4;
      p.a_row = a ? 1 : k, p.a_column = a ? m : 1, p.b_row = b ? 1 : n, p.b_column = b ? k : 1;
      run_all(run, &p), forget();
    }
  }
}
template <class T> void gather(Run run, int64 m, int64 n) {
  for (int way = 0; way < 4; ++way) {
    Gather<T> p = {};
    int64 *place = make<int64>(3), *rows = make<int64>(m);
    for (int64 i = 0; i < m; ++i) rows[i] = m - 1 - i;
    place[1] = 0, place[2] = way % 2 ? reinterpret_cast<int64>(rows) : 0;
    p.to = make<T>(m * n), p.source = make<unsigned char>(m * n), p.place = place, p.m = m, p.n = n;
    p.row = way / 2 ? 1 : n, p.column = way / 2 ? m : 1;
    run_all(run, &p), forget();
  }
}
DECLARED
int main() {
  const int64 shapes[][2] = {SHAPES};
  for (auto& [m, n] : shapes) {
    CALLS
  }
  std::puts("done");
}
"""


def flag(*values):
    return ", ".join(str(value).lower() for value in values)


def layer_units(dtype):
    """(source, call of the driver) of the passes of a layer."""
    T, tanh = passes.TYPES[dtype], activations.resolve("tanh")
    bound = {each: learned_activations()[0].bound(np.ones(1 + each)) for each in (False, True)}
    dropped = dropout.with_dropout((None, tanh), (0.5,), 1)[1]
    for options in itertools.product((False, True), repeat=2):
        for name, sigma in (("activate", tanh), ("activate_and_drop", dropped)):
            source = passes.source(
                f"{name} Activate", T, formula_text.activation(sigma, dtype),
                (*options, False, False),
            )  # fmt: skip
            yield source, f"activate<{T}>(RUN, m, n, {flag(*options, False, False)});"
        for logarithmic in (False, True):
            source = passes.source("softmax Activate", T, "", (options[0], logarithmic))
            yield source, f"activate<{T}>(RUN, m, n, {flag(*options, False, False)});"
    for each, sigma in bound.items():
        formula = formula_text.activation(sigma, dtype)
        source = passes.source("activate Activate", T, formula, (True, True, True, each))
        yield source, f"activate<{T}>(RUN, m, n, {flag(True, True, True, each)});"
        source = passes.source("descend Descend", T, formula, (True, each))
        yield source, f"descend<{T}>(RUN, m, n, {flag(True, each)});"
    for name in ("tanh", "gelu"):
        formula = formula_text.activation(activations.resolve(name), dtype)
        source = passes.source("descend Descend", T, formula, (False, False))
        yield source, f"descend<{T}>(RUN, m, n, {flag(False, False)});"


def loss_units(dtype):
    """(source, call of the driver) of the losses' passes."""
    T = passes.TYPES[dtype]
    in_columns = next(o for o in every_objective() if o.loss.columns and o.matched)
    plain = losses.pair(losses.resolve("squared_error"), activations.resolve("identity"))
    for objective in (plain, in_columns):
        columns = bool(objective.loss.columns)
        formula = formula_text.loss(objective, dtype)
        source = passes.source("elementwise_loss Loss", T, formula)
        yield source, f"loss<{T}>(RUN, m, n, {flag(False, columns)});"
    for labels, mixes in itertools.product((True, False), repeat=2):
        source = passes.source("cross_entropy Loss", T, "", (labels, mixes))
        yield source, f"loss<{T}>(RUN, m, n, {flag(labels, mixes)});"
        if mixes:
            yield source, f"loss<{T}>(RUN, m, n, {flag(labels, False)});"


def other_units(dtype):
    """(source, call of the driver) of sums, products and gathered rows."""
    T = passes.TYPES[dtype]
    yield passes.source("sum_up SumUp", T), f"sum_up<{T}>(RUN, m, n);"
    tall = "m < 200 ? m : 1030, m < 200 ? n : 260"  # of an A that is packed, too
    yield passes.source("multiply Product", T), f"product<{T}>(RUN, {tall});"
    gathered = passes.source("gather Gather", T, "", ("unsigned char",))
    yield gathered, f"gather<{T}>(RUN, m, n);"


def update_units(dtype):
    """(source, call of the driver) of updates of two, three and four vectors."""
    T = passes.TYPES[dtype]
    for name in ("sgd", "momentum", "adamw"):
        row = sheet.UPDATES[name]
        compiled = program(row.statements, frozenset(SCALARS))
        vectors = ["w", "g", *row.states]
        formula = formula_text.struct(*formula_text.over_vectors(compiled, vectors))
        source = passes.source("update Update", T, formula)
        yield source, f"update<{T}>(RUN, m * n, {len(vectors)}, {len(compiled.folded)});"


def units(dtype):
    each = (layer_units, loss_units, other_units, update_units)
    return [unit for of in each for unit in of(dtype)]


def whole_program(parts, shapes=SHAPES):
    """One C++ program that runs these passes, each in a namespace of its own."""
    sources = list(dict.fromkeys(source for source, _ in parts))
    functions, declared, calls = [], [], []
    for i, source in enumerate(sources):
        text = source.replace("run_part(", f"run_part_{i}(").replace(
            "void run(const void* a", f"void run_{i}(const void* a"
        )
        functions.append(f"namespace unit_{i} {{\n{text}\n}}")
        declared.append(f'extern "C" void run_part_{i}(const void*, int64, int64);')
    for source, call in parts:
        calls.append(call.replace("RUN", f"run_part_{sources.index(source)}"))
    structs = "\n".join(
        f"template <class T> struct {name} {{ {fields}; }};"
        for name, fields in passes.ARGUMENTS.items()
    )
    sizes = ", ".join(f"{{{m}, {n}}}" for m, n in shapes)
    main = DRIVER.replace("STRUCTS", structs).replace("SHAPES", sizes)
    main = main.replace("DECLARED", "\n".join(declared)).replace("CALLS", "\n    ".join(calls))
    whole = main + "\n".join(functions)
    system = re.findall("^#include <.*>$", whole, re.M)
    return "\n".join([*dict.fromkeys(system), re.sub("^#include <.*>$", "", whole, flags=re.M)])


def run(text, folder):
    """Compile a program and run it; return its exit status and what it said."""
    source, made = Path(folder, "program.cpp"), Path(folder, "program")
    source.write_text(text, encoding="utf-8")
    command = [*compiler._required().command, *FLAGS, "-o", str(made), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    # the leak detector needs ptrace, which containers forbid
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([made], capture_output=True, text=True, env=environment, check=False)
    return ran.returncode, ran.stdout + ran.stderr


@functools.cache
def why_no_sanitizers():
    with tempfile.TemporaryDirectory() as folder:
        try:
            status, said = run("int main() { return 0; }", folder)
        except AssertionError as error:
            return f"the compiler has no sanitizers: {str(error)[:200]}"
    return f"the sanitizers do not run here: {said[:200]}" if status else ""


@pytest.fixture(autouse=True)
def sanitizers():
    if reason := why_no_sanitizers():
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", passes.TYPES)
def test_no_pass_leaves_its_arrays_or_does_what_is_undefined(dtype, tmp_path):
    status, said = run(whole_program(units(dtype)), tmp_path)
    assert (status, said) == (0, "done\n"), said[:3000]


# a fault, most of them one entry too far: the units, and the pass among them, that run into it
PLANTED = {
    "a sum reads one more": (
        loss_units, "elementwise_loss<", "first + 16 <= n", "first + 16 <= n + 1",
    ),
    "a sum over rows reads one more row": (
        layer_units, "descend<", "i + 4 <= m", "i + 4 <= m + 1",
    ),
    "a sum's tile has one column less": (
        layer_units, "descend<", "T part[TILE];", "T part[TILE - 1];",
    ),
    "a mask's tile has one column less": (
        layer_units, "activate_and_drop<", "unsigned column[TILE];", "unsigned column[TILE - 1];",
    ),
    "a label may be n": (
        loss_units, "cross_entropy<float, true, false>",
        "apart < n ? apart : n - 1", "apart <= n ? apart : n - 1",
    ),
    "an update writes one more": (update_units, "update<", "i < mine.end; ++i", "i <= p.n; ++i"),
    "a product's panel has one column less": (
        other_units, "multiply<", "panel[depth * columns];", "panel[depth * columns - 1];",
    ),
    "threads share one column too many": (
        other_units, "sum_up<", "end < n ? end : n}", "end <= n ? end : n + 1}",
    ),
    "a shift by all bits": (
        layer_units, "activate<", "biased << Of<F>::digits", "biased << (Of<F>::digits + 9)",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_the_sanitizers_see_a_planted_fault(fault, tmp_path):
    of, name, right, wrong = PLANTED[fault]
    source, call = next(unit for unit in of("float32") if f"  {name}" in unit[0])
    assert right in source
    shapes = [(4, 513), (9, 1024), (3, 5)]
    assert run(whole_program([(source, call)], shapes), tmp_path) == (0, "done\n")
    status, said = run(whole_program([(source.replace(right, wrong), call)], shapes), tmp_path)
    assert status
    assert "AddressSanitizer" in said or "runtime error" in said, said
