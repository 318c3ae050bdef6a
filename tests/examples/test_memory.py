"""examples/memory.py: the plan is what is used, and grows with the batch only without chunks."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mlpcore as mc

example = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "examples" / "memory.py"))
)
OBJECTS = 256 << 10  # of Python itself, beside the arrays


@pytest.fixture(scope="module", autouse=True)
def _everything_compiled_once():
    example.measured_bytes([2, 2, 1], 2, "auto")


@pytest.mark.parametrize("sizes", [[3, 1], [5, 8, 2], [7, 6, 5, 4, 3]])
@pytest.mark.parametrize("rows", [1, 37])
def test_the_formula_counts_what_a_forward_pass_keeps(sizes, rows):
    net = mc.MLP(sizes, activations="tanh")
    cache = net.forward(np.zeros((rows, sizes[0]), np.float32))
    assert example.cache_bytes(sizes, rows) == cache.nbytes == sum(z.nbytes for z in cache.Z[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(example.NETS))
@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_first_step_uses_what_was_planned(name, batch, chunked):
    sizes, chunk_rows = example.NETS[name], "auto" if chunked else batch
    planned = example.make_trainer(sizes, chunk_rows).plan(batch).total_bytes
    assert planned <= example.measured_bytes(sizes, batch, chunk_rows) <= planned + OBJECTS


@pytest.mark.slow
@pytest.mark.parametrize("name", list(example.NETS))
def test_with_whole_batches_memory_grows_by_the_cache_and_one_G_a_row_at_least(name):
    sizes = example.NETS[name]
    small, large = (example.measured_bytes(sizes, batch, batch) for batch in (4096, 12288))
    a_row = (large - small) / 8192
    assert a_row > example.cache_bytes(sizes, 1) + 4 * max(sizes) - 4


@pytest.mark.slow
@pytest.mark.parametrize("name", list(example.NETS))
def test_with_chunks_memory_is_flat(name):
    sizes = example.NETS[name]
    small, large = (example.measured_bytes(sizes, batch, "auto") for batch in (4096, 32768))
    assert abs(large - small) < 64 << 10
    assert large < example.cache_bytes(sizes, 32768) / 10


@pytest.mark.slow
def test_the_table_lists_the_batches_and_the_larger_of_them_needs_more_only_without_chunks():
    results = example.measure([2048, 8192])
    assert set(results) == set(example.NETS)
    for rows in results.values():
        (
            (batch, cache, whole, _, chunk, auto, _),
            (batch_4, cache_4, whole_4, _, chunk_4, auto_4, _),
        ) = rows
        assert (batch, batch_4, cache_4) == (2048, 8192, 4 * cache)
        assert whole_4 > 2.5 * whole
        assert auto_4 <= 1.05 * auto
        assert chunk <= 1024
        assert chunk_4 <= 1024
