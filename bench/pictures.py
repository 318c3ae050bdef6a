"""Pictures of a result, by case, optimizer and precision: throughput and memory by batch size."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.tables import number

OURS, GREY = "#c4161c", "#707070"
COLORS = {  # one hue per library; its variants differ by line and label
    "torch": "#e07b00", "jax": "#1f6fb4", "sklearn": "#3a8f3a", "warp-nn": "#7b4fb0",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
Line = tuple[str, list[float], list[float]]


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write a picture for each group with at least two batch sizes; return the files."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for point in result["points"].values():
        groups[point["case"], point["optimizer"], point["precision"], point["device"]].append(point)
    files = []
    for name, points in groups.items():
        if len(points) > 1:
            file = folder / f"{'_'.join(name)}.png"
            _picture(sorted(points, key=lambda point: point["batch"]), result).savefig(
                file, dpi=100
            )
            files.append(file)
    return files


def _picture(points: list[dict[str, Any]], result: dict[str, Any]) -> Figure:
    """Draw a picture 800 pixels wide: throughput above and, if measured, memory below."""
    memory = _lines(points, lambda point, entry: entry.get("memory", {}).get("peak_bytes"))
    figure = Figure(figsize=(8, 8.4 if memory else 4.6), layout="constrained")
    axes = figure.subplots(2 if memory else 1, 1, squeeze=False)[:, 0]
    first = points[0]
    sizes = first["sizes"]
    shape = (
        "-".join(map(str, sizes)) if len(sizes) < 8 else f"{len(sizes) - 1} layers of {sizes[0]}"
    )
    title = f"{shape} {first['activation']}, {first['optimizer']}, {first['precision']}"
    machine = result["machine"].get("gpu", {}).get("name") if first["device"] == "cuda" else None
    figure.suptitle(
        f"{title}\n{machine or '{cpu}, {cpus} CPUs'.format(**result['machine'])}", fontsize=11
    )

    rates = _lines(points, lambda point, entry: point["batch"] / entry["seconds"][0])
    bound = ([p["batch"] for p in points], [p["batch"] / p["bound"]["seconds"] for p in points])
    _panel(axes[0], [*rates, ("bound", *bound)], "throughput, rows / s")
    for point in points:
        low, high = point["peers"]["mlpcore"]["seconds"][1:]
        axes[0].plot(
            [point["batch"]] * 2,
            [point["batch"] / low, point["batch"] / high],
            color=OURS,
            linewidth=3,
            alpha=0.35,
        )
    if memory:
        plan = [point["peers"]["mlpcore"]["plan_bytes"] / 2**20 for point in points]
        mebibytes = [(name, x, [max(value, 2**16) / 2**20 for value in y]) for name, x, y in memory]
        _panel(
            axes[1], [*mebibytes, ("planned", bound[0], plan)], "peak memory beyond X and Y, MiB"
        )
    axes[-1].set_xlabel("batch, rows")
    return figure


def _lines(points: list[dict[str, Any]], value: Any) -> list[Line]:
    """Return batch sizes and values of each implementation that has any."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for point in points:
        for name, entry in point["peers"].items():
            if (
                entry["status"] == "ok"
                and name != "mlpcore again"
                and (found := value(point, entry)) is not None
            ):
                x, y = lines.setdefault(name, ([], []))
                x.append(point["batch"])
                y.append(found)
    return [(name, x, y) for name, (x, y) in lines.items()]


def _look(name: str, seen: dict[str, int]) -> dict[str, Any]:
    if name == "mlpcore":
        return {"color": OURS, "linewidth": 2.6, "marker": "o", "markersize": 5, "zorder": 5}
    if name in ("bound", "planned"):
        return {
            "color": "black" if name == "bound" else OURS,
            "linewidth": 1.2,
            "linestyle": (0, (1, 1.5)),
            "zorder": 4,
        }
    family = next((key for key in COLORS if name.startswith(key)), "")
    turn = seen.setdefault(family, 0)
    seen[family] += 1
    return {
        "color": COLORS.get(family, GREY),
        "linewidth": 1.4,
        "linestyle": STYLES[turn % 5],
        "marker": "o",
        "markersize": 3,
    }


def _panel(axes: Axes, lines: list[Line], label: str) -> None:
    """Draw lines on two log axes, each labelled at its right end."""
    seen: dict[str, int] = {}
    ends = []
    for name, x, y in lines:
        (line,) = axes.plot(x, y, **_look(name, seen))
        ends.append((y[-1], x[-1], name, line.get_color()))
    batches = sorted({batch for _, x, _ in lines for batch in x})
    axes.set(xscale="log", yscale="log", ylabel=label)
    axes.set_xticks(
        batches, [f"{batch:,}" if batch < 10000 else number(batch) for batch in batches], fontsize=9
    )
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(batches[0] / 1.15, batches[-1] * 1.15)
    _name(axes, ends)


def _name(axes: Axes, ends: list[tuple[float, float, str, Any]]) -> None:
    """Write names at the lines' ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    # height in inches of the panel and of a line of text
    height, step = 3.6 if len(axes.figure.axes) > 1 else 3.7, 0.165
    places = [
        axes.transLimits.transform(axes.transScale.transform((x, y)))[1] * height
        for y, x, _, _ in sorted(ends)
    ]
    for _ in range(200):  # push neighbours apart, both by half
        for i in range(len(places) - 1):
            gap = step - (places[i + 1] - places[i])
            if gap > 0:
                places[i], places[i + 1] = places[i] - gap / 2, places[i + 1] + gap / 2
    right = axes.get_xlim()[1]
    for (y, x, name, color), place in zip(sorted(ends), places, strict=True):
        weight = "bold" if name == "mlpcore" else "normal"
        end = axes.transLimits.inverted().transform((1.03, place / height))
        target = axes.transScale.inverted().transform((0, end[1]))[1]
        if x < right / 2:  # not measured at the largest batch: lead the eye to the name
            axes.plot([x, right], [y, y], color=color, linewidth=0.5, alpha=0.5)
        axes.annotate(
            name, (1.0, y), (1.05, target), xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            color=color, fontsize=9, fontweight=weight, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1,
                "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip
