"""Evaluation: mean loss, scores and metrics over many rows, chunk by chunk."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore.backends import devices
from mlpcore.backends.numpy.ops import NumpyOps
from mlpcore.core.ops import Buffer
from mlpcore.data.batches import Data
from mlpcore.data.epochs import Streamed, inputs_of
from mlpcore.data.intake import Intake
from mlpcore.data.streams import Stream
from mlpcore.engine import plan as planning
from mlpcore.engine.step import Step
from mlpcore.training import scores
from mlpcore.training.callbacks import Entry
from mlpcore.training.scores import Metric

Array = NDArray[Any]
OnOutput = Callable[[Array, Array, "Array | None"], None]  # outputs, targets and weights of a chunk
EVALUATED = 16 << 20  # largest size in bytes of the windows in which a stream is evaluated
LEAST = 64  # smallest chunk in rows, if memory allows: smaller ones are slow


class Evaluation:
    """An evaluator of rows in memory or streamed, which works in the arrays of the steps.

    Args:
        step: the step whose network is evaluated.
        intake: checks rows and lays them out for the step.
    """

    def __init__(self, step: Step, intake: Intake):
        self.step, self.intake, self.device = step, intake, intake.device

    def evaluate(self, rows: Data | Stream, metrics: Mapping[str, Metric]) -> Entry:
        """Return "loss", "accuracy" or "r2", and the metrics, by name."""
        objective, flat = self.step.problem.objective, False
        figure = scores.Scores(objective, self.intake.outputs)
        collected = scores.Collected(objective)

        def on_output(output: Array, Y: Array, weights: Array | None) -> None:
            figure.add(output, Y, weights)
            if metrics:
                collected.add(output, Y, weights)

        losses, weights = [], []
        with contextlib.closing(self._windows(rows)) as windows:
            for data in windows:
                w = self.step.weight(data.batch(None)) or 0.0
                if w or isinstance(rows, Data):
                    losses.append(self._pass_over(data, on_output))
                    weights.append(w)
                    flat = data.flat
                elif data.by_class:  # class weights are all 0, but accuracy counts these rows
                    plain = Data.of(
                        data.X, data.Y, data.given, data.inputs.classes, data.inputs.host
                    )
                    if self.step.weight(plain.batch(None)):
                        self._pass_over(plain, on_output)
        if not sum(weights) < math.inf:
            raise ValueError(
                f"sample_weight sums to {sum(weights):g}, out of the range of float64: rescale the "
                "weights"
            )
        loss = losses[0] if len(losses) == 1 else float(np.average(losses, weights=weights))
        own = collected.measure(metrics, flat) if metrics else {}
        return dict(zip(scores.names(objective.loss), (loss, figure.result()), strict=True)) | own

    def row_losses(self, rows: Data | Stream) -> Array:
        """Return the loss of each row, without weights: (m,) float64, on the host."""
        count = len(rows.X) if isinstance(rows, Data) else rows.rows
        losses, at = np.empty(count or 0), 0

        def on_output(output: Array, Y: Array, weights: Array | None) -> None:
            nonlocal losses, at
            found = scores.row_losses(self.step.problem.objective, output, Y)
            if count is None:
                losses = np.append(losses, found)
            losses[at : at + len(found)] = found
            at += len(found)

        with contextlib.closing(self._windows(rows)) as windows:
            for data in windows:
                inputs = data.inputs._replace(w_dtype="")
                plain = data._replace(weights=None, given=None, inputs=inputs)
                self._pass_over(plain, on_output)
        return losses

    def _windows(self, rows: Data | Stream) -> Generator[Data, None, None]:
        """Yield the rows as `Data`: all at once from memory, a stream's window by window."""
        if isinstance(rows, Data):
            yield rows
            return
        size, buffers = self._choose_windows(rows)
        with contextlib.ExitStack() as stack:
            if self.intake.on_host:
                arrays = stack.enter_context(self.step.workspace.lent(buffers))
            else:  # windows are on the host
                arrays = planning.allocate(NumpyOps(), buffers)
            load = functools.partial(self.intake.load_piece, place=arrays.get("row weights"))
            source = Streamed(rows, size, arrays, load)
            for data, _ in stack.enter_context(contextlib.closing(source.windows(0, None, 0))):
                yield data

    def _choose_windows(self, stream: Stream) -> tuple[int, list[Buffer]]:
        """Return the batch size of the windows, and their buffers within half the free limit."""
        step, on_host = self.step, self.intake.on_host
        given = inputs_of(stream, self.intake.loss, self.intake.dtype.str)
        limit = step.problem.settings.memory_limit
        most, size = EVALUATED, planning.WIDEST
        if limit is not None and given is not None and on_host:
            least = step.workspace.make_plan(1, given, step.workspace.reserved)
            most = min(most, max(0, limit - least.total_bytes) // 2)

        def windows(size: int) -> list[Buffer]:
            every = stream.buffers(size, most)
            found = [x for x in every if not x.name.startswith("order")]  # rows stay in order
            return found + self.intake.weight_buffers(found[0].shape[0] if found else 0)

        if limit is not None and planning.part_bytes(windows(size)) > most:
            size = 1
        return size, windows(size)

    def _pass_over(self, data: Data, on_output: OnOutput) -> float:
        """Return the mean loss; pass each chunk to `on_output` in the form of `Scores.add`."""
        batch, step = data.batch(None), self.step
        # allocated arrays are used again, unless they belong to a short batch
        rows = (
            max(LEAST, step.workspace.allocated.rows)
            if step.workspace.allocated
            else planning.WIDEST
        )
        plan = step.prepare(min(batch.size, rows), data.inputs)

        def on_chunk(output: Array, start: int, stop: int) -> None:
            Y, w = (
                None if x is None else np.asarray(devices.find(self.device).to_host(x[start:stop]))
                for x in (data.Y, data.given)
            )
            assert Y is not None
            on_output(output, Y, w)

        return step.evaluate(batch, plan, on_chunk)
