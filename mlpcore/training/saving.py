"""Saving and loading of a trainer: settings and progress as JSON, arrays as tensors.

header["trainer"]: settings, optimizer with its schedule, progress, chunks and algorithms, the
                   unfinished run
tensors:           parameters, the optimizer's state, the best parameters so far, and lists too long
                   for the header: histories, class weights
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlpcore._version import __version__
from mlpcore.backends import devices
from mlpcore.checks import values
from mlpcore.core import losses, schedules
from mlpcore.core import optimizers as rules
from mlpcore.core.optimizers import Optimizer
from mlpcore.core.schedules import Adaptive, Progress, Schedule
from mlpcore.io import kinds, model_file
from mlpcore.training.learner import Learner
from mlpcore.training.state import History, State, Unfinished

Array = NDArray[Any]
log = logging.getLogger("mlpcore")
DAMAGES = (  # errors that a forged header may cause
    ArithmeticError,
    AttributeError,
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    RecursionError,
)
OPTIMIZERS = {
    rule.__name__: rule for rule in (rules.SGD, rules.Adam, rules.AdamW, rules.RMSprop, rules.Lion)
}
SCHEDULES = {
    schedule.__name__: schedule
    for schedule in (
        schedules.Constant,
        schedules.StepDecay,
        schedules.Cosine,
        schedules.InverseScaling,
        schedules.Adaptive,
        schedules.FormulaSchedule,
    )
}


# -- a trainer --


def write(
    learner: Learner, path: str | os.PathLike[str], keep: int, about: Mapping[str, Any]
) -> None:
    """Write a trainer to a safetensors file, atomically; nothing may change it during the call.

    Args:
        learner: the network in training, perhaps in the middle of a run.
        path: path of the file.
        keep: versions to keep.
        about: the user's notes.

    Raises:
        OSError: the file cannot be written, or must not be replaced.
        TypeError: the optimizer or schedule is a user-defined class, or JSON cannot hold `about`.
    """
    net, run = learner.net, learner.run
    if run is not None:
        run.pause()
    learner.count_skipped()
    vectors, facts = learner.step.snapshot()
    left = run.unfinished() if run else learner.left
    tensors = {"parameters": devices.find(net.device).to_host(net.store.flat), **vectors}
    if left is not None and left.best is not None:
        tensors["best"] = devices.find(net.device).to_host(left.best)
    keep = values.positive_integer(keep, "keep")
    kinds.require_replaceable(values.path(path), kinds.TRAINERS, keep, learner.id)
    versions = {"mlpcore": __version__, "numpy": np.__version__}
    described = {**describe_trainer(learner), "step": facts, "versions": versions}
    lists = {name: pack(part, names) for name, part, names in _long_lists(described)}
    tensors |= {name: numbers for name, numbers in lists.items() if len(numbers)}
    header = {**net.header(), "trainer": described}
    if about:
        header["about"] = about
    model_file.write(path, header, tensors, keep, learner)


def describe_trainer(learner: Learner) -> dict[str, Any]:
    """Return a trainer without its arrays, as JSON types except for the lists that `pack` takes.

    Raises:
        TypeError, ValueError: the optimizer has settings that `Trainer.load` would refuse.
    """
    optimizer, run = learner.step.problem.optimizer, learner.run
    optimizer.require_epsilon(learner.net.dtype.name)
    optimizer.require_layers(learner.net.layout.layers)
    left = run.unfinished() if run else learner.left
    settings = dataclasses.asdict(learner.step.problem.settings)
    skips = settings.pop("on_non_finite") == "skip"
    chunk_rows = None if settings["chunk_rows"] == "auto" else settings["chunk_rows"]
    settings |= {"chunk_rows": chunk_rows, "dropout": settings["dropout"] or (), "tolerant": skips}
    return {
        "loss": losses.described(learner.loss),
        "optimizer": describe(optimizer),
        "settings": settings,
        "id": learner.id,
        "precision": learner.precision,
        "deterministic": learner.deterministic,
        "seed": settings["seed"],
        "device": learner.net.device,
        "progress": describe_progress(learner.progress),
        "history": dict(learner.history),
        "run": None if left is None else left.state.describe(),
    }


def read_arguments(described: dict[str, Any], tensors: dict[str, Array]) -> dict[str, Any]:
    """Return the constructor arguments stored in a file; the constructor validates them.

    First, the lists that `pack` moved into tensors are put back.
    """
    for name, part, names in _long_lists(described):
        unpack(part, names, tensors.pop(name, np.empty(0)))
    settings = dict(described["settings"])
    skips = values.boolean(settings.pop("tolerant"), "tolerant")
    settings["chunk_rows"] = "auto" if settings["chunk_rows"] is None else settings["chunk_rows"]
    return settings | {
        "loss": losses.restored(described["loss"]),
        "optimizer": read_optimizer(described["optimizer"]),
        "dropout": settings["dropout"] or None,
        "on_non_finite": "skip" if skips else "raise",
        "precision": described["precision"],
        "deterministic": described["deterministic"],
    }


def restore(learner: Learner, described: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Give a new learner, made from `read_arguments`, the progress and state stored in a file.

    Raises:
        ArithmeticError, LookupError, TypeError, ValueError: the file does not hold a trainer.
    """
    net = learner.net
    learner.progress = read_progress(described["progress"])
    learner.history = values.typed_value(described["history"], History, "history")
    learner.id = values.typed_value(described.get("id", ""), str, "id")
    if described["run"] is not None:
        state, best = State.read(described["run"]), tensors.pop("best", None)
        like = net.store.flat
        if best is not None and (best.shape, best.dtype) != (like.shape, net.dtype):
            raise ValueError(
                f"best is {best.dtype} {best.shape}; the parameters are {net.dtype} {like.shape}"
            )
        learner.left = Unfinished(state, best)
    learner.step.restore(tensors, described["step"])
    if described["device"] != net.device:
        log.warning(
            "checkpoint written on %s, resuming on %s: results will not be bit-identical",
            described["device"],
            net.device,
        )


def _long_lists(
    described: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any], Collection[str]]]:
    """Yield the header parts with long lists: tensor name, part, names of the lists."""
    yield "loss options", described["loss"], ("class_weight", "pos_weight")
    yield "history", described["history"], described["history"].keys()
    if described["run"] is not None:
        yield "run history", described["run"]["history"], described["run"]["history"].keys()


# -- its parts --


def describe(settings: Optimizer | Schedule) -> dict[str, Any]:
    """Return an optimizer or a schedule as JSON types.

    Raises:
        TypeError: it is not one of mlpcore's own.
    """
    name = type(settings).__name__
    if {**OPTIMIZERS, **SCHEDULES}.get(name) is not type(settings):
        kind = "learning_rate" if isinstance(settings, Schedule) else "optimizer"
        hint = "; an mc.FormulaSchedule can" if kind == "learning_rate" else ""
        raise TypeError(f"{kind}: {name} is not one of mlpcore's own and cannot be saved{hint}")
    found = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if "layers" in found:
        found["layers"] = [[l, *dataclasses.astuple(x)] for l, x in found["layers"].items()]
    return {"name": name} | {
        key: describe(x) if isinstance(x, Schedule) else x for key, x in found.items()
    }


def read_optimizer(described: Mapping[str, Any]) -> Optimizer:
    """Return the optimizer that `describe` described."""
    found = dict(described)
    rule = OPTIMIZERS[found.pop("name")]
    found["layers"] = {l: rules.Layer(*settings) for l, *settings in found["layers"]}
    if isinstance(found["learning_rate"], Mapping):
        found["learning_rate"] = _read_schedule(found["learning_rate"])
    return rule(**found)


def _read_schedule(described: Mapping[str, Any]) -> Schedule:
    settings = dict(described)
    return SCHEDULES[settings.pop("name")](**settings)


def describe_progress(progress: Progress) -> dict[str, Any]:
    """Return the progress as JSON types, without the reductions of a user-defined schedule."""
    followed = progress.followed
    if type(followed) not in (type(None), Adaptive):
        progress = dataclasses.replace(progress, reductions=0)
        followed = None
    found = {field.name: getattr(progress, field.name) for field in dataclasses.fields(progress)}
    return found | {"followed": None if followed is None else describe(followed)}


def read_progress(described: Mapping[str, Any]) -> Progress:
    """Return the progress that `describe_progress` described; raise as `values.typed` does."""
    followed = described["followed"]
    followed = None if followed is None else _read_schedule(followed)
    return values.typed(Progress, {**described, "followed": followed})


def pack(part: dict[str, Any], names: Collection[str]) -> NDArray[np.float64]:
    """Return the named lists of numbers as one array, and leave their lengths in `part`."""
    lists = {name: part[name] for name in names if isinstance(part[name], list | tuple)}
    part |= {name: len(numbers) for name, numbers in lists.items()}
    return np.fromiter(chain.from_iterable(lists.values()), np.float64)


def unpack(part: dict[str, Any], names: Collection[str], packed: NDArray[Any]) -> None:
    """Put back the lists that `pack` took out.

    Raises:
        ValueError: `packed` is not float64, or its length is not the sum of the lengths in `part`.
    """
    lengths = {name: part[name] for name in names if type(part[name]) is int}
    known = (
        packed.dtype == np.float64 and packed.ndim == 1 and min(lengths.values(), default=0) >= 0
    )
    if not known or sum(lengths.values()) != len(packed):
        raise ValueError(f"expected lists of {lengths}; got {packed.dtype} {packed.shape}")
    numbers = iter(packed.tolist())
    part |= {name: list(islice(numbers, length)) for name, length in lengths.items()}
