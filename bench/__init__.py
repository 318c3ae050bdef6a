"""The benchmark suite: `python bench/run.py --suite quick --out DIR`; see docs/benchmarks.md."""
