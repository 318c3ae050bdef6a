# Everyday commands; `just` lists them. They use .venv unless called as `just python=… COMMAND`.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := ".venv/bin/python"

_list:
    @just --list --unsorted

# create .venv with everything that the tests need
install:
    python3 -m venv .venv
    {{ python }} -m pip install -e ".[test]"

# check lint, format and types
check:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .
    {{ python }} -m mypy

# the tests that catch most mistakes, in about a minute; arguments go to pytest
fast *arguments:
    {{ python }} -m pytest -q -n 2 --dist loadfile -m "not slow and not emulated" {{ arguments }}

# all tests, two files at a time; for a few of them .venv/bin/pytest starts sooner
test *arguments:
    {{ python }} -m pytest -n 2 --dist loadfile {{ arguments }}

# the snippets and links of the documentation, and the examples
docs:
    {{ python }} -m pytest -q tests/test_docs.py tests/examples

# a benchmark suite, for example `just bench --suite quick`
bench *arguments:
    {{ python }} bench/run.py {{ arguments }}

# the checks on an NVIDIA GPU; arguments choose sections
gpu *arguments:
    bash bench/gpu/run.sh {{ arguments }}

# before a release: kills, random calls and steps, thousands of each
long *arguments:
    {{ python }} -m tests.reliability.long {{ arguments }}

# the fast tests on the lowest versions that pyproject.toml allows
lowest *arguments:
    #!/usr/bin/env bash
    set -euo pipefail
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    python3.11 -m venv "$scratch/venv"
    python3.11 tests/lowest.py >"$scratch/lowest.txt"
    "$scratch/venv/bin/pip" install -q -r "$scratch/lowest.txt"
    PYTHONPATH=$PWD "$scratch/venv/bin/python" -m pytest -q -p no:cacheprovider \
        -n 2 --dist loadfile -m "not slow and not emulated" {{ arguments }}

# everything CI does, in separate environments
ci:
    bash .ci/run
