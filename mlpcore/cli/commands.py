"""The commands that use or inspect a model: predict, export, check, plan, info."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mlpcore as mc
from mlpcore.cli import ahead, outputs
from mlpcore.cli.messages import carry_data, printable, say
from mlpcore.cli.model import Model, load_with
from mlpcore.cli.recipes import require_count, widths
from mlpcore.cli.report import class_figures, count_rows, figure, have, quantity_figures
from mlpcore.cli.sources import some
from mlpcore.core.optimizers import Optimizer
from mlpcore.io import kinds
from mlpcore.tables.datasets import Truth

Array = NDArray[Any]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": mc.SGD(0.1),
    "momentum": mc.SGD(0.1, momentum=0.9),
    "adam": mc.Adam(),
    "adamw": mc.AdamW(),
    "rmsprop": mc.RMSprop(),
    "lion": mc.Lion(),
}


def predict(options: argparse.Namespace) -> None:
    """Write a model's predictions for the rows of a data set, and print how good they are."""
    to_stdout = outputs.is_standard_output(options.out)
    if to_stdout:
        carry_data()

    def require_place() -> None:
        others = {"the model is": options.model, "the data are": options.data}
        outputs.require_distinct("--out", options.out, others)
        if options.out.lower().endswith((".parquet", ".pq", ".npz", ".xlsx")):
            raise ValueError(f"--out {options.out}: predictions are CSV; name a .csv file")
        if not to_stdout:
            outputs.require_table_place(options.out, _header(model), options.force)

    model = Model.load(options.model)
    require_place()
    X, truth = model.rows(options.data, target=False)
    Z = model.net.predict(X)
    answers = model.scale.invert(Z) if model.scale else Z
    require_place()  # another program may have written there meanwhile
    outputs.write_lines(options.out, _lines(model, answers))
    say(f"{len(Z):,} predictions written to {'standard output' if to_stdout else options.out}")
    lost = int(np.sum(~np.isfinite(answers).all(axis=1)))
    if lost:
        why = "the numbers there are too large for the model"
        say(f"note: the prediction of {count_rows(lost)} is not finite: {why}")
    elif truth is not None:
        column = (
            f"its column {printable(model.about['target'], 60)}"
            if "pipeline" in model.tensors
            else "its Y"
        )
        say(f"compared with {column}: " + "\n  ".join(_against(model, Z, truth)))


def _header(model: Model) -> str:
    """Return the first line of a file of predictions."""
    classes, count = model.about["classes"], model.net.sizes[-1]
    others = [f"p({name})" for name in classes] if classes else []
    first = (
        [f"prediction {i}" for i in range(count)] if not classes and count > 1 else ["prediction"]
    )
    return ",".join(map(outputs.cell, first + others)) + "\r\n"


def _lines(model: Model, answers: Array) -> Iterator[str]:
    """Yield the lines of a file of predictions: probabilities, or quantities with all digits."""
    yield _header(model)
    if model.about["classes"]:
        names = [outputs.cell(name) for name in model.about["classes"]]
        for row in answers:
            yield ",".join([names[row.argmax()], *(f"{p:.6f}" for p in row)]) + "\r\n"
    else:
        for row in answers.tolist():
            yield ",".join(map(repr, row)) + "\r\n"


def _against(model: Model, Z: Array, truth: Truth) -> list[str]:
    """Return the lines with the figures of predictions and a note on the rows left out."""
    count, Z = len(truth.values), Z[truth.rows]
    such = f", such as {truth.such[:60]!r}" if truth.such else ""
    others = (
        [f"{count_rows(truth.missing)} {have(truth.missing)} no value"] if truth.missing else []
    )
    if model.scale and truth.wrong:
        others.append(f"{count_rows(truth.wrong)} {have(truth.wrong)} no finite number{such}")
    left_out = f"; left out: {' and '.join(others)}" if others else ""
    if not count:
        return [f"no figures, since no row has a {'number' if model.scale else 'label'}{left_out}"]
    of = (
        f"on {count_rows(count)}"
        if count == len(truth.rows)
        else f"on {count:,} of {count_rows(len(truth.rows))}"
    )
    if model.scale:
        return [f"{_in_words(quantity_figures(Z, truth.values, model.scale))} {of}{left_out}"]
    known = truth.values >= 0
    figures = class_figures(Z[known], truth.values[known]) if known.any() else {}
    if not truth.wrong:
        return [f"{_in_words(figures)} {of}{left_out}"]
    accuracy = np.mean(Z.argmax(1) == truth.values)
    unknown = f"a label that the model does not know{such}"
    wrong = f"{truth.wrong:,} {have(truth.wrong)} {unknown}: counted as wrong"
    lines = [f"accuracy {accuracy:.4f} {of}; {wrong}{left_out}"]
    if figures:
        rows = count_rows(int(known.sum()))
        lines.append(f"of the {rows} with a label that it knows: {_in_words(figures)}")
    return lines


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {figure(name, value)}" for name, value in figures.items())


def export(options: argparse.Namespace) -> None:
    """Write a model as ONNX, and print its inputs and outputs."""
    from mlpcore.cli.export import export as write_onnx

    if importlib.util.find_spec("onnx") is None:
        raise ImportError('export needs the package onnx: pip install "mlpcore[cli,onnx]"')
    if options.onnx == "-":
        raise ValueError(
            "export: '-' is not a file name; name a file, or /dev/stdout if the system has it"
        )
    outputs.require_distinct("export:", options.onnx, {"the model is": options.model})
    if outputs.is_standard_output(options.onnx):
        carry_data()
    model = Model.load(options.model)
    outputs.require_onnx_place(options.onnx, model.about, options.force)
    with kinds.overwriting(options.force):
        write_onnx(options.model, options.onnx)
    if "pipeline" in model.tensors:
        say(
            f"{options.onnx} holds the network alone: X takes the pipeline's output, "
            f"{model.preparation.width} column(s)"
        )
        say("(standardised numbers, and ones for categories), in this order:")
        for number, name in enumerate(model.preparation.names):
            say(f"  {number:>4}  {printable(name, 60)}")
    else:
        names = model.about.get("features", ())
        say(
            f"{options.onnx}: X takes the {model.net.sizes[0]} column(s) unscaled "
            f"({some(names)}); the file standardises them"
        )
        _say_rounding(names, model.tensors["mean"], model.tensors["scale"], "X")
    classes = model.about["classes"]
    if not classes:
        ends = (
            ["the target"]
            if model.net.sizes[-1] == 1
            else [f"output {i}" for i in range(model.net.sizes[-1])]
        )
        _say_rounding(ends, model.tensors["target mean"], model.tensors["target scale"], "Z")
    say(
        "Z holds "
        + (
            f"the probabilities of {some(classes)}"
            if classes
            else "the predictions, in the units of the target"
        )
    )


def _say_rounding(names: Sequence[str], mean: Array, scale: Array, end: str) -> None:
    """Print a note if float32, the type of ONNX inputs and outputs, is too coarse for a column."""
    far = np.abs(mean) * np.finfo(np.float32).eps > 1e-3 * scale
    if far.any():
        listed = some([name for name, lost in zip(names, far, strict=True) if lost])
        say(
            f"note: {end} is float32, too coarse for {listed}, with means "
            "far larger than their spread: predictions will be less accurate than here"
        )


def check(options: argparse.Namespace) -> None:
    """Check the gradient of a model; raise a ValueError if it is wrong."""
    require_count(options.rows, "--rows")
    rng = np.random.default_rng(0)
    if options.data:
        model = Model.load(options.model)
        net, loss = model.net, model.about["loss"]
        X, truth = model.rows(options.data, target=True)
        assert truth is not None
        X, Y = X[truth.rows], truth.values
        if not model.scale:
            X, Y = X[Y >= 0], Y[Y >= 0]
        if not len(Y):
            raise ValueError(f"data {options.data!r}: no row has a target that the model knows")
        if len(Y) < len(truth.rows):
            say(
                f"{len(Y):,} of {count_rows(len(truth.rows))} have a target that the model knows; "
                "the others are left out"
            )
        rows = rng.permutation(len(Y))[: options.rows]
        X, Y = X[rows], model.scale.apply(Y[rows]) if model.scale else Y[rows]
    else:
        net, _, about = load_with(options.model)
        last = net.activations[-1]
        assert last is not None
        loss = about.get("loss") or mc.core.losses.matching(last)
        X = rng.standard_normal((options.rows, net.sizes[0]))
        Y = (
            rng.integers(0, net.sizes[-1], options.rows)
            if loss == "cross_entropy"
            else rng.random((options.rows, net.sizes[-1]))
        )
    say(
        f"{net!r}\nloss {loss}, {len(X)} "
        f"{'rows of ' + options.data if options.data else 'random rows'}, in float64"
    )
    result = mc.check_gradients(net, X, Y, loss)
    say(str(result))
    if not result.ok:
        raise ValueError(f"the gradient is wrong, worst in {result.worst}")


def plan(options: argparse.Namespace) -> None:
    """Print every array of a training step."""
    for name in ("batch", "chunk_rows", "workers"):
        require_count(getattr(options, name), f"--{name.replace('_', '-')}")
    net = mc.MLP(
        widths(options.sizes, "sizes"),
        options.activation,
        options.output,
        dtype=options.dtype,
        init="zeros",
    )
    last = net.activations[-1]
    assert last is not None
    trainer = mc.Trainer(
        net,
        options.loss or mc.core.losses.matching(last),
        OPTIMIZERS[options.optimizer],
        chunk_rows=options.chunk_rows or "auto",
        memory_limit=options.memory_limit,
        workers=options.workers,
    )
    say(str(trainer.plan(options.batch)))


def info(options: argparse.Namespace) -> None:
    """Print device, compiler, BLAS and versions; with `--compile` fill the cache of passes."""
    for key, value in mc.info().items():
        if key == "blas":
            for pool in value:
                threads = f"{pool['architecture']} kernels, {pool['num_threads']} threads"
                say(f"blas: {pool['internal_api']} {pool['version']}, {threads}")
        elif isinstance(value, dict):
            say(f"{key}: " + ", ".join(f"{name} {version}" for name, version in value.items()))
        else:
            say(f"{key}: {value}")
    if options.compile:
        say(ahead.compile_all(options.dtype))
