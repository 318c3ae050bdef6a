"""Every script of examples/ runs, prints something and saves the pictures that it says it saves."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PICTURES = {"sigmoid_slope", "memory", "sobolev"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs_prints_and_saves_its_pictures(script, tmp_path):
    source = script.read_text(encoding="utf-8")
    if "import torch" in source:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    options = ["--out", str(tmp_path)] + (["--quick"] if '"--quick"' in source else [])
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *options],
        cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) > 5
    saved = re.findall(r"^saved (.+)$", done.stdout, re.MULTILINE)
    pictures = list(tmp_path.iterdir())
    assert sorted(map(str, pictures)) == sorted(saved)
    if script.stem in PICTURES:
        assert saved
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert picture.stat().st_size > 10_000


def test_the_scripts_with_pictures_are_among_the_scripts():
    assert {script.stem for script in SCRIPTS} >= PICTURES
