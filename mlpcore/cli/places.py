"""The files that `mlpcore train` writes, and checks that nothing is lost there."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from mlpcore.cli import outputs
from mlpcore.cli.messages import printable
from mlpcore.io.kinds import VACANT, kind
from mlpcore.training.checkpoints import interval

EVERY = "1 epoch"  # default interval between saves


@dataclass(frozen=True)
class Places:
    """The files that a training writes.

    Attributes:
        out: folder of model and picture.
        name: name of the data.
        checkpoint: path of the checkpoint; None if there is none.
    """

    out: Path
    name: str
    model: Path
    picture: Path
    checkpoint: Path | None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Places:
        """Return the places for a call."""
        out, name = Path(options.out), Path(options.data).stem
        checkpoint = None
        if options.checkpoint or options.every or options.resume:
            if options.checkpoint == "-":
                raise ValueError("--checkpoint: '-' is not a file name; name a file")
            if options.splits > 1:
                raise ValueError(
                    "--checkpoint, --every and --resume are for one run; leave out --splits"
                )
            checkpoint = Path(options.checkpoint or out / f"{name}.checkpoint.safetensors")
        return cls(out, name, out / f"{name}.safetensors", out / f"{name}.png", checkpoint)

    def require(self, call: outputs.Call, options: argparse.Namespace) -> None:
        """Raise an error if a file would be lost without --force."""
        outputs.require_folder(self.out, f"--out {printable(str(self.out))}")
        others = {"the data are": options.data}
        for argument, path, what in (
            ("the model", self.model, "the model goes"),
            ("the picture", self.picture, "the picture goes"),
            ("--checkpoint", self.checkpoint, ""),
        ):
            if path is not None:
                outputs.require_distinct(argument, path, others)
                others[what] = str(path)
        outputs.require_model_place(self.model, call, options.force)
        outputs.require_picture_place(self.picture, call, options.force)
        if self.checkpoint is not None:
            interval(options.every or EVERY)
            name, folder = f"--checkpoint {printable(str(self.checkpoint))}", self.checkpoint.parent
            if not folder.exists() and folder != self.out:
                raise FileNotFoundError(
                    f"{name}: the folder {printable(str(folder))} does not exist"
                )
            outputs.require_folder(folder, name)
            _require_checkpoint_place(self.checkpoint, call, options.resume, options.force)


def _require_checkpoint_place(path: Path, call: outputs.Call, resume: bool, force: bool) -> None:
    """Raise an error unless a new run may replace the file, or a resumed one use it."""
    found = kind(path)
    name = f"--checkpoint {printable(str(path))}"
    if found.name == "folder":
        raise IsADirectoryError(f"{name}: is a folder; name a file")
    if not force:
        outputs.require_writable(path, found)
    if found.name not in ("checkpoint", "unfinished"):
        if found.name not in VACANT and (resume or not force):
            remedy = (
                "name another file" if resume else "name another file, or overwrite it with --force"
            )
            raise ValueError(
                f"{name}: it is {found.text}, not a checkpoint of mlpcore train; {remedy}"
            )
        return
    before = outputs.saved_call(path)
    other = (
        "the call that started it is not recorded"
        if before is None
        else outputs.difference(before, call)
    )
    if resume:
        if other:
            raise ValueError(
                f"--resume: {printable(str(path))}: {other}; repeat the original "
                "call, or start over with --force alone"
            )
    elif not force and found.name == "unfinished":
        advice = "--resume continues it, --force starts over"
        raise ValueError(f"{name}: it holds an unfinished run ({found.where}); {advice}")
    elif not force and other:
        raise ValueError(
            f"{name}: it is the checkpoint of another call: {other}; name another file, or "
            "overwrite it with --force"
        )


@dataclass(frozen=True)
class Checkpoint:
    """Path and interval of a run's checkpoints.

    Attributes:
        before: identity of the file at the path when the run began; None if there was none.
    """

    path: Path
    every: str
    before: tuple[int, ...] | None

    @classmethod
    def at(cls, path: Path, every: str) -> Checkpoint:
        """Return the checkpoint for a run that begins now."""
        return cls(path, every, _identity(path))

    @property
    def written(self) -> bool:
        """True if this run has been saved."""
        return _identity(self.path) not in (None, self.before)


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
