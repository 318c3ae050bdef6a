"""The memory of the forward pass's cache, and its limit by chunks of rows.

The backward pass reads every Z[l], so the forward pass keeps them. That is the cache: for a batch
of m rows,

    m Σ_l n_l numbers, l = 1 … L          (the weights are Σ_l n_{l-1} n_l numbers, whatever m is)

A trainer with `chunk_rows=m` takes the whole batch at once: its memory is that cache, one G[l] at a
time and scratch space per row, all of which grow with m. But rows are independent, and dW is a sum
over rows: with `chunk_rows="auto"` a chunk goes forward and backward, adds to dW, and its arrays
are reused for the next chunk. Memory stops growing at the size of one chunk.

"Planned" is the total of `trainer.plan`, before anything is allocated. "Measured" is the peak of
Python's tracemalloc, to which NumPy reports its arrays, during the first step; it includes about
0.1 MiB of Python's own objects. The batch itself, X and Y, belongs to the caller and is not
counted.
"""

import argparse
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import mlpcore as mc

NETS = {"narrow": [64] * 4 + [1], "wide": [256] * 4 + [1], "deep": [64] * 16 + [1]}
MIB = 1 << 20


def make_trainer(sizes, chunk_rows):
    """Return a trainer of a tanh net in float32, with plain SGD and one worker."""
    net = mc.MLP(sizes, activations="tanh", init="glorot")
    return mc.Trainer(net, "squared_error", mc.SGD(1e-3), chunk_rows=chunk_rows, workers=1)


def cache_bytes(sizes, rows):
    """Return the bytes of Σ_l n_l numbers per row, l = 1 … L, of 4 bytes each."""
    return 4 * rows * sum(sizes[1:])


def measured_bytes(sizes, batch, chunk_rows):
    """Return the peak memory during the first step, without the caller's X and Y."""
    rng = np.random.default_rng(0)
    X, Y = (
        rng.standard_normal((batch, sizes[0]), np.float32),
        rng.standard_normal((batch, sizes[-1]), np.float32),
    )
    tracemalloc.start()
    try:
        trainer = make_trainer(sizes, chunk_rows)
        tracemalloc.reset_peak()  # drawing the weights used temporary arrays
        trainer.step(X, Y)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(batches):
    """Return {net: rows (batch, cache, planned and measured whole, chunk, both for auto)}."""
    measured_bytes([2, 2, 1], 2, "auto")  # exclude one-time imports and compilation
    results = {}
    for name, sizes in NETS.items():
        results[name] = []
        for batch in batches:
            row = [batch, cache_bytes(sizes, batch)]
            for chunk_rows in (batch, "auto"):
                plan = make_trainer(sizes, chunk_rows).plan(batch)
                row += [plan.rows] if chunk_rows == "auto" else []
                row += [plan.total_bytes, measured_bytes(sizes, batch, chunk_rows)]
            results[name].append(row)
    return results


def draw(results, path):
    """Draw memory against batch size: lines are planned, points measured."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(results.items()):
        batch, cache, whole, whole_measured, _, auto, auto_measured = np.array(rows).T
        color, sizes = f"C{i}", NETS[name]
        axes.plot(
            batch,
            whole / MIB,
            color=color,
            label=f"{name}: {len(sizes) - 1} layers, width {sizes[0]}",
        )
        axes.plot(batch, auto / MIB, color=color, linestyle="--")
        axes.plot(batch, cache / MIB, color=color, linestyle=":", linewidth=1)
        axes.plot(batch, whole_measured / MIB, "o", color=color)
        axes.plot(batch, auto_measured / MIB, "o", color=color, markerfacecolor="white")
    for style, label in (
        ({"linestyle": "-", "marker": "o"}, "whole batch"),
        ({"linestyle": "--", "marker": "o", "markerfacecolor": "white"}, 'chunk_rows="auto"'),
        ({"linestyle": ":", "linewidth": 1}, "the cache alone"),
    ):
        axes.plot([], [], color="gray", label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="batch, rows", ylabel="memory of the trainer, MiB")
    axes.set_title("Memory of a training step (lines: planned, points: measured)")
    axes.set_xticks(batch, [f"{m:,}" for m in batch], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(out, quick=False):
    """Print the table and save the picture."""
    batches = [256, 1024, 4096] if quick else [256, 1024, 4096, 16384, 65536]
    results = measure(batches)
    print("Memory of a trainer in MiB, float32, plain SGD; the caller's X and Y not counted\n")
    for name, rows in results.items():
        sizes = NETS[name]
        weights = 4 * sum(a * b for a, b in pairwise(sizes)) / MIB
        print(f"{name}: {len(sizes) - 1} layers, width {sizes[0]};", end=" ")
        print(f"weights {weights:.2f} MiB, cache {cache_bytes(sizes, 1):,} bytes per row")
        print("                         chunk_rows=batch          chunk_rows=auto")
        print("     batch     cache    planned  measured     rows   planned  measured")
        for batch, cache, whole, whole_measured, chunk, auto, auto_measured in rows:
            print(
                f"{batch:10,} {cache / MIB:9.2f} {whole / MIB:10.2f} {whole_measured / MIB:9.2f}",
                end="",
            )
            print(f"{chunk:9,} {auto / MIB:9.2f} {auto_measured / MIB:9.2f}")
        print(
            f"{batches[0]:,} to {batches[-1]:,} rows: x {batches[-1] / batches[0]:.0f} rows,",
            end=" ",
        )
        print(
            f"memory x {rows[-1][3] / rows[0][3]:.1f} with whole batches, x "
            f"{rows[-1][6] / rows[0][6]:.1f} with chunks\n"
        )
    worst = max(
        abs(row[i + 1] - row[i]) for rows in results.values() for row in rows for i in (2, 5)
    )
    print(
        f"Largest difference between measured and planned: {worst / 1024:.0f} KiB (Python's own "
        "objects are included in the measurement)"
    )
    draw(results, Path(out) / "memory.png")
    print(f"saved {Path(out) / 'memory.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=".", help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="smaller batches")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
