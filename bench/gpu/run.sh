#!/usr/bin/env bash
# Checks and measures the CUDA backend on this machine's GPU: bash bench/gpu/run.sh SECTION …
# Results go to the folder $OUT or a fresh one; exits as the worst section does. See docs/gpu.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "${PYTHON:-python3}" -m bench.gpu.run "$@"
