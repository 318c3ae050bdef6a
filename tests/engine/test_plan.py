"""The plan is what the engine allocates, to the byte; a step allocates next to nothing beyond it,
whatever the batch.
"""

import functools
import gc
import tracemalloc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import mlpcore as mc
from mlpcore.backends import devices
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.ops import Buffer
from mlpcore.data.batches import Inputs
from mlpcore.engine import chunks, derivatives
from mlpcore.engine import plan as planning
from mlpcore.engine.plan import parse_bytes

LARGE = 2048  # bytes: what is smaller are 0-d arrays, not buffers


class Ledger:
    """The arrays of `NumpyOps.empty` that are still alive, and their largest total size."""

    def __init__(self):
        self.live = self.peak = 0
        self.sizes = []

    def take(self, ops, nbytes):
        array = np.empty(nbytes, np.uint8)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.sizes.append(nbytes)
        weakref.finalize(array, self.give, nbytes)
        return array

    def give(self, nbytes):
        self.live -= nbytes


@pytest.fixture
def ledger(monkeypatch):
    found = Ledger()
    monkeypatch.setattr(NumpyOps, "empty", lambda ops, nbytes: found.take(ops, nbytes))
    return found


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def numpy_blocks():
    """Bytes of each array of size that NumPy holds, as tracemalloc sees it."""
    gc.collect()
    domain = np.lib.tracemalloc_domain
    return sorted(
        t.size for t in tracemalloc.take_snapshot().traces if t.domain == domain and t.size >= LARGE
    )


def peak_of(call):
    """Most bytes that a call takes at a time beyond those before it, and what it returns."""
    gc.collect()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = call()
    return tracemalloc.get_traced_memory()[1] - before, found


def data(rows, n_in, n_out, loss="squared_error", dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((rows, n_in)).astype(dtype)
    if loss == "cross_entropy":
        return X, rng.integers(0, n_out, rows)
    return X, rng.random((rows, n_out)).astype(dtype)


NETS = {
    "relu": {"sizes": [20, 64, 64, 10], "activations": "relu", "output": "softmax"},
    "gelu keeps S": {
        "sizes": [20, 64, 48, 10],
        "activations": ["gelu", "mish"],
        "output": "identity",
    },
    "learned slopes": {
        "sizes": [20, 64, 700, 10],
        "activations": ["prelu", ("prelu", 0.1, "per output")],
        "output": "identity",
    },
    "one layer": {"sizes": [64, 32], "output": "identity"},
    "no bias, float64": {
        "sizes": [20, 64, 33],
        "activations": "tanh",
        "output": "sigmoid",
        "bias": False,
        "dtype": "float64",
    },
    "softmax unmatched": {"sizes": [20, 64, 40], "activations": "elu", "output": "softmax"},
    "log_softmax unmatched": {"sizes": [20, 64, 40], "activations": "elu", "output": "log_softmax"},
    "many classes": {
        "sizes": [20, 64, 100],
        "activations": [("sigmoid", 2.0)],
        "output": "softmax",
    },
}
LOSS = {
    "relu": "cross_entropy",
    "many classes": "cross_entropy",
    "no bias, float64": "binary_cross_entropy",
}
OPTIMIZERS = [mc.SGD(0.01), mc.SGD(0.01, momentum=0.9), mc.AdamW(1e-3), mc.Lion(1e-4)]


def trainer_of(name, optimizer=None, **settings):
    net = mc.MLP(**NETS[name])
    return mc.Trainer(
        net, loss=LOSS.get(name, "squared_error"), optimizer=optimizer or mc.AdamW(1e-3), **settings
    )


def data_of(name, rows):
    net = NETS[name]
    return data(
        rows,
        net["sizes"][0],
        net["sizes"][-1],
        LOSS.get(name, "squared_error"),
        net.get("dtype", "float32"),
    )


# -- to the byte -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"chunk_rows": 96}, {"chunk_rows": 64, "workers": 2}, {"clip_norm": 1.0, "l2": 0.1}],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "momentum", "adamw", "lion"])
@pytest.mark.parametrize("name", list(NETS))
def test_the_engine_allocates_the_parts_of_the_plan_and_nothing_else(
    ledger, traced, name, optimizer, settings
):
    X, Y = data_of(name, 300)
    before = numpy_blocks()
    trainer = trainer_of(name, optimizer, **settings)
    plan = trainer.plan(batch_size=300)
    ledger.sizes.append(planning.part_bytes(plan.parts["parameters"]))  # made by the network
    for _ in range(3):
        trainer.step(X, Y)
    parts = sorted(planning.part_bytes(buffers) for buffers in plan.parts.values())
    assert sorted(ledger.sizes) == parts
    assert sum(parts) == plan.total_bytes
    net = planning.part_bytes(plan.parts["parameters"])
    held = numpy_blocks()
    for block in before:
        held.remove(block)
    held.remove(trainer.net.parameters.nbytes)
    parts.remove(net)
    assert held == [part for part in parts if part >= LARGE]


@pytest.mark.parametrize("chunk_rows", ["auto", 96])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("many classes", {"label_smoothing": 0.1}),
        ("many classes", {"label_smoothing": 0.1, "class_weight": 1 + np.arange(100)}),
        ("no bias, float64", {"pos_weight": np.arange(33), "label_smoothing": 0.1}),
    ],
)
def test_what_the_options_of_a_loss_take_is_in_the_plan(ledger, name, options, chunk_rows):
    X, Y = data_of(name, 300)
    trainer = trainer_of(name, chunk_rows=chunk_rows, **options)
    plan = trainer.plan(batch_size=300)
    ledger.sizes.append(planning.part_bytes(plan.parts["parameters"]))  # made by the network
    for _ in range(3):
        trainer.step(X, Y)
    assert sorted(ledger.sizes) == sorted(
        planning.part_bytes(buffers) for buffers in plan.parts.values()
    )


def test_the_networks_parameters_are_in_the_plan_with_the_bytes_they_take():
    for name in NETS:
        trainer = trainer_of(name)
        (buffer,) = trainer.plan(batch_size=8).parts["parameters"]
        assert buffer.shape == trainer.net.parameters.shape
        assert planning.part_bytes([buffer]) == trainer.net.parameters.nbytes


@pytest.mark.parametrize(
    ("x", "y", "w"),
    [
        ("float64", "float32", None),
        ("float32", "float64", "float64"),
        ("uint8", "int32", "float32"),
        (">f4", "float32", "int16"),
    ],
)
@pytest.mark.parametrize("indexed", [False, True])
def test_the_plan_knows_the_stages_for_inputs_of_other_types(ledger, x, y, w, indexed):
    X, Y = data(300, 20, 10)
    X, Y = (100 * X).astype(x), (9 * Y).astype(y)
    weights = None if w is None else np.arange(300).astype(w)
    net = mc.MLP([20, 64, 10], "tanh")
    trainer = mc.Trainer(net, loss="squared_error", optimizer=mc.SGD(0.0), chunk_rows=100)
    rows = np.arange(299, -1, -1) if indexed else None
    trainer.step(X, Y, weights, rows=rows)
    plan = trainer._step.workspace.make_plan(
        300, Inputs(X.dtype.str, Y.dtype.str, "" if w is None else weights.dtype.str, False)
    )
    fixed = planning.part_bytes(plan.parts["parameters"])
    assert sum(ledger.sizes) == plan.total_bytes - fixed


@pytest.mark.parametrize("batch_size", [64, 100, 1000])
def test_fit_with_early_stopping_allocates_its_plan_also_beside_the_last_partial_batch(
    ledger, batch_size
):
    X, Y = data(1000, 20, 10)
    trainer = mc.Trainer(
        mc.MLP([20, 64, 10], "tanh"), loss="squared_error", optimizer=mc.Adam(1e-3), chunk_rows=60
    )
    plan = trainer.plan(batch_size=batch_size, rows=1000, early_stopping=True)
    assert set(plan.parts) == {"parameters", "state", "fit", "workspace"}
    trainer.fit(
        X,
        Y,
        epochs=2,
        batch_size=batch_size,
        early_stopping=mc.EarlyStopping(monitor="loss"),
        progress=False,
    )
    assert ledger.peak == plan.total_bytes - planning.part_bytes(plan.parts["parameters"])
    assert sorted(ledger.sizes) == sorted(
        planning.part_bytes(p) for name, p in plan.parts.items() if name != "parameters"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hvp", "gnvp"])
def test_the_curvature_of_a_loss_is_not_worked_out_for_each_chunk(name):
    """Python's trees of formulas took more than the arrays of a small limit."""
    X, Y = data(2000, 20, 5)
    net = mc.MLP([20, 64, 64, 5], output="sigmoid", seed=1, device="cpu")
    loss, v = mc.loss("binary_cross_entropy", pos_weight=[1, 2, 3, 4, 5]), net.parameters.copy()
    multiply = functools.partial(getattr(net, name), X, Y > 0, v, loss, memory_limit="600 KiB")
    multiply()
    tracemalloc.start()
    try:
        multiply()
        assert tracemalloc.get_traced_memory()[1] < 600 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "gradient", "evaluate", "losses"])
def test_weights_by_class_are_made_for_the_rows_in_use(name):
    X, Y = np.zeros((200_000, 2), np.float32), np.zeros(200_000, int)
    net = mc.MLP([2, 4, 2], output="softmax", device="cpu")
    trainer = mc.Trainer(net, class_weight=[1, 2], memory_limit="1 MiB")
    rows = {} if name in ("evaluate", "losses") else {"rows": [1, 2, 3]}
    call = functools.partial(getattr(trainer, name), **rows)
    call(X[:9], Y[:9])
    trainer.step(X, Y, rows=[1, 2, 3])
    tracemalloc.start()
    try:
        result = call(X, Y)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most - getattr(result, "nbytes", 0) < 400 << 10  # all of them take 800 KiB


@pytest.mark.parametrize("limit", [None, "100 KiB"])
def test_evaluation_after_a_step_of_one_row_does_not_go_row_by_row(limit):
    X, Y = data(20_000, 2, 1)
    trainer = mc.Trainer(mc.MLP([2, 4, 1]), "squared_error", memory_limit=limit)
    trainer.step(X[:1], Y[:1])
    sizes = []
    trainer._step.evaluate = lambda batch, plan, see: sizes.append(plan.rows)
    trainer.losses(X, Y)
    assert sizes == [64]


def test_long_lists_of_chunks_are_not_kept():
    tracemalloc.start()
    try:
        for size in (100_000, 100_001):
            chunks.cut(size, 1, 1)
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_fit_with_validation_allocates_its_plan_too(ledger):
    """Evaluation goes by chunks as well; it needs no array that training has not."""
    X, Y = data(1000, 20, 10)
    trainer = mc.Trainer(
        mc.MLP([20, 64, 10], "tanh"), loss="squared_error", optimizer=mc.Adam(1e-3)
    )
    plan = trainer.plan(batch_size=64, rows=1000, early_stopping=True)
    trainer.fit(
        X,
        Y,
        epochs=2,
        batch_size=64,
        validation=(X[:500], Y[:500]),
        early_stopping=mc.EarlyStopping(),
        progress=False,
    )
    assert ledger.peak == plan.total_bytes - planning.part_bytes(plan.parts["parameters"])


def test_making_a_plan_allocates_nothing(ledger, traced):
    trainer = trainer_of("relu")
    taken, before = list(ledger.sizes), numpy_blocks()
    plan = trainer.plan(batch_size=1 << 20, rows=1 << 24, early_stopping=True)
    assert ledger.sizes == taken
    assert numpy_blocks() == before
    assert plan.total_bytes > (1 << 24) * 8


def test_a_smaller_or_equal_batch_uses_the_arrays_that_are_there(ledger):
    X, Y = data_of("gelu keeps S", 300)
    trainer = trainer_of("gelu keeps S", chunk_rows=100)
    trainer.step(X, Y)
    taken = list(ledger.sizes)
    for rows in (300, 299, 101, 100, 7, 1, 300):
        trainer.step(X[:rows], Y[:rows])
    assert ledger.sizes == taken


def test_a_larger_batch_gives_the_old_arrays_back_before_it_takes_new_ones(ledger):
    X, Y = data_of("gelu keeps S", 512)
    trainer = trainer_of("gelu keeps S")
    for rows in (16, 128, 512):
        trainer.step(X[:rows], Y[:rows])
        plan = trainer.plan(batch_size=rows)
        assert (
            ledger.live
            == ledger.peak
            == plan.total_bytes - planning.part_bytes(plan.parts["parameters"])
        )


def test_the_table_prints_every_buffer_and_the_total():
    plan = trainer_of("gelu keeps S").plan(batch_size=100, rows=1000, early_stopping=True)
    text = str(plan)
    for buffers in plan.parts.values():
        for buffer in buffers:
            shape = " x ".join(f"{n:,}" for n in buffer.shape)
            assert any(
                x.strip().startswith(f"{buffer.name} ") and f" {shape} " in x and buffer.why in x
                for x in text.splitlines()
            )
    assert f"{plan.total_bytes:,} bytes" in text
    assert plan.rows == 100


def test_s_is_planned_only_where_a_slope_reads_it():
    def names(hidden, output, loss):
        plan = mc.Trainer(mc.MLP([3, 4, 4, 2], hidden, output), loss=loss).plan(batch_size=8)
        return {x.name for x in plan.parts["workspace"] if x.name[0] in "SZ" and "[" in x.name}

    assert names(["tanh", "relu"], "tanh", "squared_error") == {"Z[1]", "Z[2]", "Z[3]"}
    assert names(["gelu", "relu"], "identity", "squared_error") == {"S[1]", "Z[1]", "Z[2]", "S[3]"}
    assert names("mish", "softmax", "cross_entropy") == {"S[1]", "Z[1]", "S[2]", "Z[2]", "S[3]"}


def test_arrays_of_a_part_start_at_cache_lines_and_do_not_overlap():
    buffers = [Buffer(f"x{i}", shape, dtype, "") for i,
        (shape, dtype) in enumerate([((3,), "float32"), ((5, 7), "float64"),
               ((1,), "int64"), ((9,), "uint8"), ((64,), "float32")])]  # fmt: skip
    arrays = planning.allocate(NumpyOps(), buffers)
    for i, array in enumerate(arrays.values()):
        assert array.ctypes.data % planning.ALIGNMENT == 0
        array[...] = i
    assert all((array == i).all() for i, array in enumerate(arrays.values()))
    assert [(x.shape, x.dtype.name) for x in arrays.values()] == [
        (b.shape, b.dtype) for b in buffers
    ]


# -- inside a step ---------------------------------------------------------------------------------


CASES = {
    "plain": {},
    "weighted": {"weighted": True},
    "indexed": {"indexed": True},
    "float64 X": {"x": "float64"},
    "float64 X, indexed, weighted": {"x": "float64", "indexed": True, "weighted": True},
    "uint8 X": {"x": "uint8"},
    "float64 net": {"x": "float64", "net": "float64"},
    "relu": {"sizes": [16, 64, 3], "hidden": "relu"},
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("optimizer", [mc.SGD(1e-3), mc.AdamW(1e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("batch", [64, 4096, 65536])
def test_a_step_allocates_at_most_64_kib_whatever_the_batch(batch, case, optimizer, workers):
    settings = CASES[case]
    X, Y = data(batch, 16, 3, "cross_entropy", settings.get("x", "float32"))
    w = np.linspace(0, 1, batch, dtype=np.float32) if settings.get("weighted") else None
    rows = np.random.default_rng(0).permutation(batch) if settings.get("indexed") else None
    net = mc.MLP(
        settings.get("sizes", [16, 32, 3]),
        settings.get("hidden", "gelu"),
        "softmax",
        dtype=settings.get("net", "float32"),
    )
    trainer = mc.Trainer(net, optimizer=optimizer, workers=workers, clip_norm=1.0)
    for _ in range(2):
        trainer.step(X, Y, w, rows=rows)
    gc.collect()
    tracemalloc.start()
    try:
        trainer.step(X, Y, w, rows=rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 64 << 10


def test_penalties_take_no_array_of_the_weights_size(traced):
    trainer = mc.Trainer(
        mc.MLP([300, 300]), loss="squared_error", optimizer=mc.SGD(0.0), l1=0.1, l2=0.1
    )
    X, Y = data(4, 300, 300)
    trainer.step(X, Y)
    gc.collect()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    trainer.step(X, Y)
    assert tracemalloc.get_traced_memory()[1] - before <= 64 << 10


# -- flat in the batch -----------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat_in_the_batch_beyond_the_chunk(ledger):
    trainer = trainer_of("relu", mc.SGD(0.01), workers=1)
    totals = [trainer.plan(batch_size=rows).total_bytes for rows in (4096, 65536, 1 << 20, 1 << 24)]
    assert len(set(totals)) == 1
    X, Y = data_of("relu", 20000)
    trainer.step(X[:4096], Y[:4096])
    taken = ledger.peak
    trainer.step(X, Y)
    assert ledger.peak == taken


def test_without_chunks_memory_grows_with_the_batch():
    whole = [
        trainer_of("relu", chunk_rows=n, workers=1).plan(batch_size=n).total_bytes
        for n in (1024, 4096, 16384)
    ]
    assert whole[2] - whole[1] == pytest.approx(4 * (whole[1] - whole[0]), rel=1e-3)
    assert (
        whole[2]
        > 8 * trainer_of("relu", chunk_rows=1024, workers=1).plan(batch_size=16384).total_bytes
    )


# -- the limit -------------------------------------------------------------------------------------


def test_a_limit_sets_the_largest_chunk_that_keeps_it_and_results_do_not_depend_on_it(ledger):
    X, Y = data_of("gelu keeps S", 1000)
    free = trainer_of("gelu keeps S", chunk_rows=1000)
    whole = free.plan(batch_size=1000).total_bytes
    smallest = trainer_of("gelu keeps S", chunk_rows=1).plan(batch_size=1000).total_bytes
    J, after = free.step(X, Y), free.net.parameters
    for limit in (whole, (whole + smallest) // 2, smallest + 5000, smallest):
        trainer = trainer_of("gelu keeps S", chunk_rows=1000, memory_limit=limit)
        plan = trainer.plan(batch_size=1000)
        assert plan.total_bytes <= limit
        if plan.rows < 1000:
            assert (
                trainer_of("gelu keeps S", chunk_rows=plan.rows + 1)
                .plan(batch_size=1000)
                .total_bytes
                > limit
            )
        ledger.live, ledger.peak = 0, 0
        used = trainer_of("gelu keeps S", chunk_rows=1000, memory_limit=limit)
        assert used.step(X, Y) == pytest.approx(J, rel=1e-5)
        assert ledger.peak + used.net.parameters.nbytes <= limit
        # Adam's first step is the rate's sign
        np.testing.assert_allclose(used.net.parameters, after, atol=2e-3)


def test_a_limit_gives_up_workers_before_it_fails():
    roomy = trainer_of("relu", workers=2, chunk_rows=64).plan(batch_size=1000)
    tight = trainer_of("relu", workers=2, chunk_rows=64, memory_limit=roomy.total_bytes - 1).plan(
        batch_size=1000
    )
    assert (roomy.workers, tight.workers) == (2, 1)
    assert tight.total_bytes < roomy.total_bytes


def test_a_limit_that_one_row_breaks_is_refused_with_the_largest_buffers():
    smallest = trainer_of("relu", chunk_rows=1).plan(batch_size=1000).total_bytes
    X, Y = data_of("relu", 1000)
    trainer = trainer_of("relu", memory_limit=smallest - 1)
    before = trainer.net.parameters.copy()
    for call in (
        lambda: trainer.plan(batch_size=1000),
        lambda: trainer.step(X, Y),
        lambda: trainer.fit(X, Y, batch_size=1000),
    ):
        with pytest.raises(
            MemoryError, match=r"memory_limit .* is needed; the largest: \S+ .*KiB, .*state m"
        ):
            call()
    np.testing.assert_array_equal(trainer.net.parameters, before)
    assert trainer_of("relu", memory_limit=smallest).plan(batch_size=1000).rows == 1


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("validated", [False, True])
def test_a_limit_is_kept_by_all_of_fit(ledger, traced, share, validated):
    """Row order, best parameters, the last partial batch, validation: everything the engine
    allocates.
    """
    X, Y = data(2000, 20, 10)
    net = mc.MLP([20, 64, 10], "gelu")

    def new(limit, rows):
        return mc.Trainer(
            net, loss="squared_error", optimizer=mc.Adam(1e-3), memory_limit=limit, chunk_rows=rows
        )

    low = new(None, 1).plan(900, rows=2000, early_stopping=True).total_bytes
    high = new(None, 900).plan(900, rows=2000, early_stopping=True).total_bytes
    limit = int(low + share * (high - low))
    ledger.live = ledger.peak = 0
    gc.collect()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    validation = (X[:1500], Y[:1500]) if validated else None
    stopping = mc.EarlyStopping(monitor="validation_loss" if validated else "loss")
    new(limit, 900).fit(
        X,
        Y,
        epochs=2,
        batch_size=900,
        validation=validation,
        early_stopping=stopping,
        progress=False,
    )
    assert ledger.peak + net.parameters.nbytes <= limit
    slack = 192 << 10  # objects of Python, the scan of the inputs, and 64 KiB of a step
    assert tracemalloc.get_traced_memory()[1] - before + net.parameters.nbytes <= limit + slack


CURVED = {
    "mish, softmax": (["mish", "softmax"], "cross_entropy"),
    "learned slopes, log_softmax": (
        [("prelu", 0.25, "per output"), "log_softmax"],
        "squared_error",
    ),
}
CALLS = {
    "predict": lambda net, A, **size: net.predict(A.X, **size),
    "logits": lambda net, A, **size: net.logits(A.X, **size),
    "jvp": lambda net, A, **size: np.hstack(net.jvp(A.X, A.X, A.v, **size)),
    "vjp": lambda net, A, **size: np.append(*net.vjp(A.X, A.Z, **size)),
    "vjp of a tangent": lambda net, A, **size: np.append(
        *net.vjp(A.X, A.Z, dX=A.X, dV=A.Z, **size)
    ),
    "hvp": lambda net, A, **size: net.hvp(A.X, A.Y, A.v, A.loss, sample_weight=A.w, **size),
    "gnvp": lambda net, A, **size: net.gnvp(A.X, A.Y, A.v, A.loss, sample_weight=A.w, **size),
}


@pytest.fixture
def planned(monkeypatch):
    """The plans of the calls of a network, as they are made."""
    plans, plan = [], derivatives.Size.plan

    def kept(size, *arguments):
        plans.append(plan(size, *arguments))
        return plans[-1]

    monkeypatch.setattr(derivatives.Size, "plan", kept)
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVED)
def test_predictions_and_derivatives_take_what_their_plan_says_and_keep_the_limit(
    traced, planned, name
):
    """X and the direction, in Fortran order and float64, are cast a chunk at a time."""
    (hidden, output), loss = CURVED[name]
    net, rng = mc.MLP([64, 48, 12], hidden, output, seed=1), np.random.default_rng(0)
    Y = rng.integers(0, 12, 1000) if loss == "cross_entropy" else rng.standard_normal((1000, 12))
    A = SimpleNamespace(
        X=np.asfortranarray(rng.standard_normal((1000, 64))), Y=Y,
        Z=rng.standard_normal((1000, 12)),
        v=rng.standard_normal(net.parameters.size), w=rng.uniform(size=1000), loss=loss,
    )  # fmt: skip
    own = net.parameters.nbytes
    for call, function in CALLS.items():
        whole = function(net, A, chunk_rows=1000)
        least = _least(lambda: function(net, A, memory_limit=1))  # noqa: B023
        limit = least + 200_000
        taken, found = peak_of(lambda: function(net, A, memory_limit=limit))  # noqa: B023
        plan = planned[-1]
        assert plan.total_bytes <= limit, call
        assert 1 < plan.rows < 1000, call
        # which is put together here
        result = found.nbytes if call in ("jvp", "vjp", "vjp of a tangent") else 0
        assert 0.5 * plan.total_bytes < taken - result + own < plan.total_bytes + (96 << 10), (
            call,
            taken,
            str(plan),
        )
        np.testing.assert_allclose(
            found, whole, rtol=1e-4, atol=1e-4 * abs(whole).max(), err_msg=call
        )


def _least(call):
    """The bytes that a call says it needs."""
    with pytest.raises(
        MemoryError, match=r"memory_limit 1 bytes .* that is needed; the largest: "
    ) as caught:
        call()
    number, unit = str(caught.value).split(" is less than the ")[1].split()[:2]
    return int(float(number.replace(",", "")) * {"KiB": 1 << 10, "MiB": 1 << 20}[unit]) + (1 << 16)


def _refusal(call):
    """Return the message of a call's MemoryError."""
    with pytest.raises(MemoryError) as caught:
        call()
    return str(caught.value)


@pytest.mark.slow
def test_a_limit_that_a_result_breaks_names_it_before_anything_is_allocated(traced):
    net, X, one = (
        mc.MLP([8, 8, 100]),
        np.ones((5000, 8), np.float32),
        np.ones((5000, 1), np.float32),
    )
    wide = mc.MLP([8, 300, 300, 1])
    v = np.ones(wide.parameters.size)
    for call, largest in (
        (lambda: net.predict(X, memory_limit="1 MiB"), "output 1.9 MiB"),
        (lambda: net.jvp(X, X, memory_limit="1 MiB"), "output 1.9 MiB, tangent 1.9 MiB"),
        (lambda: mc.MLP([8, 8, 1]).vjp(X, one, memory_limit="100 KiB"), "gradient by X 156.2 KiB"),
        (lambda: wide.hvp(X, one, v, memory_limit="1 MiB"), "v 364.5 KiB"),
    ):
        taken, message = peak_of(functools.partial(_refusal, call))
        assert taken < 1 << 20
        assert largest in message.split("the largest: ")[1]
    with pytest.raises(ValueError, match="memory_limit: expected bytes"):
        net.predict(X, memory_limit="much")
    share = net.hvp(X, np.ones((5000, 100)), np.ones(net.parameters.size), memory_limit="50%")
    np.testing.assert_array_equal(
        share, net.hvp(X, np.ones((5000, 100)), np.ones(net.parameters.size))
    )


# -- arrays that are not row-major -----------------------------------------------------------------


def _unaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    memory[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return memory.view(array.dtype).reshape(array.shape)


LYING = {
    "Fortran order": np.asfortranarray,
    "reversed": lambda A: np.ascontiguousarray(A[::-1])[::-1],
    "some of its columns": lambda A: np.repeat(A, 2, axis=-1)[..., ::2],
    "big-endian": lambda A: A.astype(A.dtype.newbyteorder(">")),
    "unaligned": _unaligned,
    "float64 in Fortran order": lambda A: np.asfortranarray(
        A, "f8" if A.dtype.kind == "f" else "i8"
    ),
}


def weighted(limit=None):
    net = mc.MLP([64, 16, 4], "tanh", "softmax", seed=1)
    return mc.Trainer(
        net, optimizer=mc.Adam(1e-3), memory_limit=limit, workers=1, chunk_rows=256, seed=2
    )


@pytest.mark.slow
def test_rows_that_lie_in_any_way_are_read_without_a_copy_of_all_of_them(traced):
    """Steps, evaluation and prediction take what row-major rows take, without 1 MiB of X."""
    X, Y = data(4096, 64, 4, "cross_entropy")
    X, w = (
        X.astype(np.float16).astype(np.float32),
        np.linspace(0.5, 1, 4096).astype(np.float16).astype(np.float32),
    )
    calls = {
        "step on three rows": lambda t, X, Y, w: t.step(X, Y, w, rows=[3000, 1, 2]),
        "step on all": lambda t, X, Y, w: t.step(X, Y, w),
        "gradient": lambda t, X, Y, w: t.gradient(X, Y, w, rows=np.arange(0, 4096, 7))[0],
        "evaluate": lambda t, X, Y, w: t.evaluate(X, Y, w),
        "losses": lambda t, X, Y, w: t.losses(X, Y),
        "predict": lambda t, X, Y, w: t.net.predict(X, chunk_rows=256),
    }
    plain = weighted()
    usual = {name: peak_of(functools.partial(call, plain, X, Y, w)) for name, call in calls.items()}
    for lying, lay in LYING.items():
        other, arrays = weighted(), [lay(array) for array in (X, Y, w)]
        for name, call in calls.items():
            taken, found = peak_of(functools.partial(call, other, *arrays))
            np.testing.assert_equal(found, usual[name][1], err_msg=f"{lying}: {name}")
            # a chunk as it is given, two for what is swapped on its way through NumPy
            assert taken < usual[name][0] + 2 * 256 * 64 * 8 + (64 << 10), (
                lying,
                name,
                taken,
                usual[name][0],
            )


@pytest.mark.slow
@pytest.mark.parametrize("roomy", [True, False])
@pytest.mark.parametrize("lying", ["Fortran order", "reversed", "big-endian"])
def test_fit_copies_what_is_not_row_major_only_where_the_limit_leaves_room_and_lists_it(
    traced, lying, roomy
):
    X, Y = data(8192, 64, 4, "cross_entropy")
    x, y = LYING[lying](X), LYING[lying](Y)
    least = weighted().plan(512, rows=8192).total_bytes
    limit, copies = least + (3 << 20 if roomy else 1 << 20), []
    plain, other = weighted(limit), weighted(limit)
    plain.fit(X, Y, epochs=2, batch_size=512, progress=False)

    def look(trainer, entry):
        copies.extend(
            b.name for b in trainer._step.workspace.allocated.parts["fit"] if "row-major" in b.name
        )

    fit = {
        "epochs": 2,
        "batch_size": 512,
        "validation": (x, y),
        "progress": False,
        "callbacks": [look],
    }
    taken, history = peak_of(lambda: other.fit(x, y, **fit))
    np.testing.assert_array_equal(other.net.parameters, plain.net.parameters)
    assert ("X row-major" in copies) == roomy
    assert len(history["loss"]) == 2
    assert taken + other.net.parameters.nbytes <= limit + (192 << 10)


def test_without_a_limit_fit_lists_its_row_major_copies_and_prepare_makes_them_once():
    X, Y = data(500, 64, 4, "cross_entropy")
    trainer, other, plans = weighted(), weighted(), []
    trainer.fit(
        np.asfortranarray(X), Y, epochs=1, batch_size=50, progress=False,
        callbacks=[lambda t, _: plans.append(t._step.workspace.allocated)],
    )  # fmt: skip
    assert [b.shape for b in plans[0].parts["fit"] if b.name == "X row-major"] == [(500, 64)]
    prepared = other.prepare(np.asfortranarray(X), Y)
    assert prepared.X.flags.c_contiguous
    assert prepared.Y is Y
    assert other.step(prepared, rows=[4, 2]) == weighted().step(X, Y, rows=[4, 2])


# -- bytes as text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, None), (1, 1), (2 << 30, 2 << 30), ("1 B", 1), ("17 bytes", 17), ("2 KiB", 2048),
        ("2KB", 2000),
        ("1.5 MiB", 3 << 19),
        ("500 MB", 500_000_000), (" 2 GiB ", 2 << 30), ("0.5 GB", 500_000_000), ("1 TiB", 1 << 40),
        ("1TB", 10**12),
    ],
)  # fmt: skip
def test_bytes_may_be_given_as_a_number_or_text(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "-5%",
        "GiB",
        "2 XB",
        "-1 GiB",
        "1.2.3 MB",
        ". MB",
        "1e3 MB",
        "two GiB",
        "0 MiB",
        0,
        -5,
        "2 GiB!",
    ],
)
def test_text_that_is_no_number_of_bytes_is_refused_with_the_text(text):
    with pytest.raises(ValueError, match="memory_limit.*" + (repr(text) if text != ". MB" else "")):
        parse_bytes(text)
    with pytest.raises(ValueError, match="memory_limit"):
        mc.Trainer(mc.MLP([2, 1]), loss="squared_error", memory_limit=text)


@pytest.mark.parametrize("value", [True, [1], b"2 GiB"])
def test_what_is_neither_whole_bytes_nor_text_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"memory_limit.*{type(value).__name__}"):
        parse_bytes(value)


def test_a_share_is_one_of_the_free_memory():
    assert (
        parse_bytes(0.25, free=lambda: 1000)
        == parse_bytes("25%", free=lambda: 1000)
        == parse_bytes(" 25.0 %", free=lambda: 1000)
    )
    for share in (1.5, 0.0, -0.5, float("nan"), "0%", "101%"):
        with pytest.raises(
            ValueError,
            match=r"memory_limit: expected bytes.*a fraction of free memory such as 0\.5",
        ):
            parse_bytes(share, free=lambda: 1000)
    net = mc.MLP([2, 1])
    free = devices.find("cpu").free_bytes()
    assert 1 << 20 < free < 1 << 50
    assert (
        0.2 * free
        < mc.Trainer(net, "squared_error", memory_limit="25%")._step.problem.settings.memory_limit
        < 0.3 * free
    )


def test_a_numpy_integer_is_a_number_of_bytes():
    assert parse_bytes(np.int64(1 << 20)) == 1 << 20
