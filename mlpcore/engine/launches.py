"""Launches of a captured step: whole batches, chunk by chunk, an evaluation, or its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from mlpcore.core.ops import Array
from mlpcore.data.batches import Batch
from mlpcore.engine import capture as capturing
from mlpcore.engine.capture import Capture
from mlpcore.engine.chunks import cut, even
from mlpcore.engine.parts import StepParts
from mlpcore.engine.plan import Plan


def launch(
    capture: Capture, what: str, batch: Batch, plan: Plan, number: int, answer: int, weight: float
) -> None:
    """Launch the steps of a batch, or the gradient of one, without waiting.

    Args:
        capture: capture of the step.
        what: "step" or "gradient".
        batch, plan: the rows, and the plan for them.
        number: number of the first step, from 1.
        answer: address at which the results are stored, or 0.
        weight: Σ w of the batch, or 0 if the device computes it.
    """
    chunks = cut(batch.size, plan.rows, 1)[0]
    if len(chunks) > capturing.UNROLLED:
        _launch_by_chunks(capture, what, batch, chunks, number, answer, weight)
        return
    weighted = batch.weights is not None
    key = what, batch.size, weighted, batch.steps
    run = functools.partial(capture.run_whole, what, chunks, weighted, batch.steps)
    whole = capture.recorded(key, run)
    capture.set_slot(batch, 0, batch.size, number, answer, weight)
    whole.replay()
    capture.done()


def _launch_by_chunks(
    capture: Capture,
    what: str,
    batch: Batch,
    chunks: Sequence[tuple[int, int]],
    number: int,
    answer: int,
    weight: float,
) -> None:
    """Launch a step, or the gradient, of a batch with more chunks than one graph holds."""
    assert batch.steps == 1
    weighted, run = batch.weights is not None, functools.partial
    # all recordings exist before the first is replayed, since choosing algorithms overwrites arrays
    key = "begin", batch.size, weighted
    begin = capture.recorded(key, run(capture.begin, batch.size, weighted))
    shapes = {(stop - start, start > 0) for start, stop in chunks}
    steps = {
        (n, more): capture.recorded(
            ("chunk", n, weighted, more), run(capture.run_chunk, 0, n, weighted, more)
        )
        for n, more in shapes
    }
    end = capture.recorded(("end",), capture.end) if what == "step" else None
    for start, stop in chunks:
        first = 0.0 if start else weight
        capture.set_slot(batch, start, stop, number, answer, first, resume=start > 0)
        if not start:
            begin.replay()
        steps[stop - start, start > 0].replay()
        if end is not None and stop == batch.size:
            end.replay()
        capture.done()


def evaluate(
    capture: Capture,
    batch: Batch,
    plan: Plan,
    weight: float,
    see: Callable[[Array, int, int], None],
) -> None:
    """Run a batch forward, chunk by chunk, and add up its loss on the device.

    `see(output, start, stop)` gets each chunk's output on the host. The other arguments are those
    of `launch`.
    """
    weighted, run = batch.weights is not None, functools.partial
    key = "begin", batch.size, weighted
    begin = capture.recorded(key, run(capture.begin, batch.size, weighted))
    for start, stop in even(0, batch.size, plan.rows):
        n = stop - start
        forward = capture.recorded(("forward", n, weighted), run(capture.run_forward, n, weighted))
        loss = capture.recorded(("loss", n, weighted), run(capture.run_loss, n, weighted))
        capture.set_slot(batch, start, stop, 1, 0, 0.0 if start else weight, resume=start > 0)
        if not start:
            begin.replay()
        forward.replay()
        output = capture.to_host(capture.chunk.output(n))
        see(output.astype(capture.problem.dtype, copy=False), start, stop)
        loss.replay()
        capture.done()


def take_apart(
    capture: Capture, batch: Batch, plan: Plan, number: int, weight: float, rates: Sequence[float]
) -> StepParts:
    """Record the parts of a step on this batch and point them at its rows.

    Args:
        capture: capture of the step.
        batch, plan: the rows, and the plan for them.
        number: number of the step, from 1.
        weight: Σ w of the batch, or 0 if the device computes it.
        rates: learning rates of the step.
    """
    ops, weighted, chunks = capture.ops, batch.weights is not None, cut(batch.size, plan.rows, 1)[0]
    shapes = sorted({(stop - start, start > 0) for start, stop in chunks})
    step = gradient = None
    if len(chunks) <= capturing.UNROLLED:
        step, gradient = (
            capture.recorded(
                (what, batch.size, weighted, 1),
                functools.partial(capture.run_whole, what, chunks, weighted),
            )
            for what in ("step", "gradient")
        )

    def one_of_each_shape() -> None:
        for n, more in shapes:
            capture.run_chunk(0, n, weighted, more)

    ops.record(one_of_each_shape)  # chooses algorithms that are still open
    ops.asked.clear()
    ops.record(one_of_each_shape)
    asked = set(ops.asked)
    ops.only_products = True
    try:
        products = ops.record(functools.partial(capture.run_whole, "step", chunks, weighted))
    finally:
        ops.only_products = False
    if step is not None:
        capture.kernels.set_rates(rates)
        capture.set_slot(batch, 0, batch.size, number, 0, weight)
        capture.done()
    known = ops.algorithms
    tried = [known.fused[product] for product in asked if product in known.fused]
    algorithms = {p: known.chosen[p] for p in asked if known.fused.get(p, True)}
    fused = sum(tried), len(tried)
    return StepParts(step, gradient, products, [*chunks], plan.rows, fused, algorithms, batch)
