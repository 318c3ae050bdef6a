"""Every kernel instance compiles by NVRTC, and into what the kernels promise: no doubles, no
spills, 16-byte accesses.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.backends.cuda.instances import every_instance
from tests.backends.cuda.nvrtc import compile_kernels

WHEELS = {str(dist.metadata["Name"]) for dist in importlib.metadata.distributions()}
FOUND = "cuda-bindings" in WHEELS and any(name.startswith("nvidia-cuda-nvrtc") for name in WHEELS)
pytestmark = pytest.mark.skipif(
    not FOUND and "CI" not in os.environ, reason="needs nvidia-cuda-nvrtc and cuda-bindings"
)

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
REGISTERS = 128  # of a thread: two blocks of 256 threads on a multiprocessor
IN_DOUBLE = ("set_slot", "prepare_update")  # one thread, once a step


def is_wide(name):
    return bool(re.search(r", [248](,|>)", name))


def instances_of(architecture):
    """Yield the instances to compile: all on the second architecture, and on the other two each
    name, a kernel with its types and width, with one of its formulas.
    """
    seen, every = set(), architecture == ARCHITECTURES[1]
    for source, name in dict.fromkeys(every_instance()):
        if every or name not in seen:
            seen.add(name)
            yield source, name


def compile_all(work):
    """Half of an architecture's instances, by number of the source and name; each source once, in a
    namespace of its own.
    """
    architecture, half = work
    sources = {}
    for source, name in instances_of(architecture):
        sources.setdefault(source, []).append(name)
    text, names = [], {}
    for i, (source, its) in enumerate(sources.items()):
        if i % 2 == half:
            text.append(f"namespace k{i} {{\n{source}\n}}")
            names |= {
                (i, n): f"k{i}::" + re.sub(r"\b(half_t|bfloat16_t|Formula)\b", rf"k{i}::\1", n)
                for n in its
            }
    compiled = compile_kernels("\n".join(text), list(names.values()), architecture)
    return {(architecture, *key): compiled[name] for key, name in names.items()}


@pytest.fixture(scope="module")
def compiled():
    """(architecture, number of the source, name) → what became of it."""
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(
            compile_all, [(architecture, half) for architecture in ARCHITECTURES for half in (0, 1)]
        ):
            found |= part
    return found


def failing(compiled, good, names=lambda name: True):
    """The kernels of these names for which `good(kernel)` is false; there are some of these names
    on each architecture.
    """
    chosen = {key: kernel for key, kernel in compiled.items() if names(key[2])}
    assert {key[0] for key in chosen} == set(ARCHITECTURES)
    return [(key, kernel[1:]) for key, kernel in chosen.items() if not good(kernel)]


def test_every_instance_compiles(compiled):
    instances = set(every_instance())
    assert len(instances) > 400
    assert set(instances_of(ARCHITECTURES[1])) == instances
    for architecture in ARCHITECTURES:
        chosen = set(instances_of(architecture))
        assert {name for _, name in chosen} == {name for _, name in instances}
        assert sum(key[0] == architecture for key in compiled) == len(chosen)


def test_no_thread_spills_registers_or_has_a_stack(compiled):
    assert not failing(compiled, lambda kernel: kernel.spills == 0 and kernel.stack == 0)


def test_two_blocks_of_every_kernel_fit_a_multiprocessor(compiled):
    assert not failing(compiled, lambda kernel: 8 <= kernel.registers <= REGISTERS)


def test_kernels_of_float_and_half_types_compute_nothing_in_double(compiled):
    def floats(name):
        return "double" not in name and not name.startswith(IN_DOUBLE)

    assert not failing(compiled, lambda kernel: ".f64" not in kernel.ptx, floats)


def test_the_named_exceptions_and_the_kernels_of_double_do_compute_in_double(compiled):
    """Else the test above looks for the wrong thing."""
    assert not failing(
        compiled, lambda kernel: ".f64" in kernel.ptx, lambda name: name.startswith(IN_DOUBLE)
    )

    def doubles(name):
        return re.match(r"(bias_|activation_|elementwise_|softmax|log_softmax)\w*<double", name)

    assert not failing(
        compiled, lambda kernel: re.search(r"(add|mul|fma)\.(rn\.)?f64", kernel.ptx), doubles
    )


@pytest.mark.parametrize("access", ["ld", "st"])
@pytest.mark.parametrize(
    "kernel", ["bias_activation", "activation_gradient", "elementwise_loss", "update"]
)
def test_wide_instances_access_16_bytes_at_a_time(compiled, kernel, access):
    pattern = rf"\b{access}\.global(\.nc)?\.(v4\.[fub]32|v2\.[fub]64)"

    def wide(name):
        return name.startswith(kernel + "<") and is_wide(name)

    assert not failing(compiled, lambda found: re.search(pattern, found.ptx), wide)
