import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "bench" / "run.py").exists():
    sys.path.insert(0, str(ROOT))
else:
    collect_ignore_glob = [
        "test_*.py"
    ]  # the tests stand alone, as beside a built wheel: the suite is no part of it


@pytest.fixture(scope="session")
def root():
    return ROOT
