"""Results as text: one block per point, one line per implementation."""

from __future__ import annotations

from collections import Counter
from typing import Any

HEAD = f"  {'':<20}{'step':>11}{'rows/s':>10}{'/ GEMMs':>9}{'/ mlpcore':>11}  "
HEAD += f"{'95% bound':<14}{'mlpcore is':<10}"
HEAD += f"{'peak':>12}{'a row':>12}"
LEGEND = (
    "/ GEMMs: step over the same library's GEMMs alone; / mlpcore: step over mlpcore's, above 1 "
    "where mlpcore is faster; "
    "even: not distinguishable within the A/A band; peak: memory beyond X and Y"
)


def duration(seconds: float) -> str:
    """Return `0.00123` as "1.23 ms"."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return (
                f"{seconds * factor:.3g} {unit}"
                if seconds * factor < 1000
                else f"{seconds * factor:,.0f} {unit}"
            )
    raise AssertionError(seconds)


def number(value: float) -> str:
    """Return `1234567` as "1.23M"."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def mebibytes(count: float | None) -> str:
    """Return bytes as MiB, "-" for None."""
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def block(point: dict[str, Any]) -> str:
    """Return the lines of one point."""
    sizes, ours = "-".join(map(str, point["sizes"])), point["peers"]["mlpcore"]
    bound = point["bound"]
    title = f"{sizes} {point['activation']}, {point['loss']}, batch {point['batch']:,}, "
    title += f"{point['optimizer']}, {point['precision']}"
    lines = [
        f"{title} on {point['device']} ({point['data']})",
        f"  bound {duration(bound['seconds'])} by {bound['by']}; A/A band {ours['band']:.1%}; "
        f"{point['rounds']} rounds; "
        f"mlpcore: {ours['note']}, planned {mebibytes(ours.get('plan_bytes'))}",
        HEAD,
    ]
    return "\n".join(
        lines
        + [f"  {name:<20}{_line(point, entry)}".rstrip() for name, entry in point["peers"].items()]
    )


def _line(point: dict[str, Any], entry: dict[str, Any]) -> str:
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['reason']}"
    seconds, memory = entry["seconds"][0], entry.get("memory", {})
    over = f"{entry['over_gemms'][0]:.2f}" if "over_gemms" in entry else "-"
    ratio, low, high = entry.get("over_mlpcore", (None, None, None))
    compared = (
        f"{'-':>11}  {'':<14}"
        if ratio is None
        else f"{ratio:>11.2f}  {f'{low:.2f} … {high:.2f} ':<14}"
    )
    peak = memory.get("peak_bytes")
    row = "-" if peak is None else f"{peak / point['batch']:,.0f} B"
    cells = f"{duration(seconds):>11}{number(point['batch'] / seconds):>10}{over:>9}{compared}"
    note = "" if entry["note"] == point["peers"]["mlpcore"]["note"] else entry["note"]
    note += (
        f" {duration(entry['device_seconds'][0])} by device events"
        if "device_seconds" in entry
        else ""
    )
    failed = f"  memory: {memory['failed']}" if "failed" in memory else ""
    return f"{cells}{entry.get('verdict', ''):<10}{mebibytes(peak):>12}{row:>12}  {note}{failed}"


def losses(result: dict[str, Any]) -> str:
    """Return the counts of verdicts, each lost comparison, and each missing one with its reason."""
    verdicts: Counter[str] = Counter()
    worse, missing = [], Counter[str]()
    for key, point in result["points"].items():
        for name, entry in point["peers"].items():
            if entry["status"] != "ok":
                missing[f"  {name} {entry['status']}: {entry['reason']}"] += 1
            elif entry.get("verdict", "A/A") != "A/A":
                verdicts[entry["verdict"]] += 1
                if entry["verdict"] == "slower":
                    worse.append(
                        f"  {key}: {name} takes {entry['over_mlpcore'][0]:.2f} of mlpcore's time"
                    )
    counts = ", ".join(f"{name} in {count}" for name, count in verdicts.items()) or "none made"
    lines = [f"of {sum(verdicts.values())} comparisons, mlpcore is: {counts}", *worse]
    if missing:
        lines += [
            "not compared:",
            *(f"{reason} ({count} points)" for reason, count in missing.items()),
        ]
    return "\n".join(lines)


def footprint(found: dict[str, Any]) -> str:
    """Return the lines on import, first step and sizes."""
    lines = [
        f"  {name:<34}{duration(entry[0])}" for name, entry in found.get("seconds", {}).items()
    ]
    lines += [f"  {name:<34}{mebibytes(count)}" for name, count in found.get("bytes", {}).items()]
    return "\n".join(
        [
            "footprint:",
            *lines,
            *(f"  {name}: {why}" for name, why in found.get("missing", {}).items()),
        ]
    )
