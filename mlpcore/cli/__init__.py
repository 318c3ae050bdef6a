"""The command line: `mlpcore train`, `predict`, `export`, `check`, `plan`, `info`."""

from mlpcore.cli.main import main

__all__ = ["main"]
