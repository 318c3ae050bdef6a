"""The documentation is true: its snippets run and print what the page says, its links lead
somewhere.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def close(said: str, found: str) -> bool:
    """Return whether a printed number is the one on the page, up to its last digit."""
    a, b = (float(number.replace(",", "")) for number in (said, found))
    return abs(a - b) <= 0.1 * max(abs(a), abs(b))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
def test_the_snippets_of_a_page_run_in_order_and_print_what_it_says(page, tmp_path, monkeypatch):
    if page.name == "torch.md":
        pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "snippet"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        said = [line[4:] for line in code.splitlines() if line.startswith("# > ")]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(code, page.name, "exec"), names)
        if not said:
            continue
        found = [line for line in printed.getvalue().splitlines() if line.strip()]
        said = [line for line in said if line.strip()]
        assert len(found) == len(said)
        for a, b in zip(said, found, strict=True):
            assert NUMBER.sub("#", a).split() == NUMBER.sub("#", b).split(), (
                f"the page says {a!r}; printed was {b!r}"
            )
            assert all(
                close(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b), strict=True)
            ), (a, b)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
