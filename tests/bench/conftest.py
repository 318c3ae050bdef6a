import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if (ROOT / "bench" / "run.py").exists():
    sys.path.insert(0, str(ROOT))
else:
    # the tests stand alone, as beside a built wheel: the suite is no part of it
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def root():
    return ROOT
