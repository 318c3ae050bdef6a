"""Two results side by side: which steps are faster, slower, or indistinguishable."""

from __future__ import annotations

from typing import Any

from bench import stats
from bench.tables import duration


def changed(old: dict[str, Any], new: dict[str, Any], width: float) -> tuple[float, str]:
    """Return the ratio of two medians, and "faster" or "slower" if bounds and band allow it."""
    a, b = stats.Median(*old["seconds"]), stats.Median(*new["seconds"])
    ratio = b.median / a.median
    apart = b.low > a.high * (1 + width) or b.high * (1 + width) < a.low
    return ratio, "even" if not apart else "slower" if ratio > 1 else "faster"


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return one line per implementation and common point, and the differences between runs."""
    lines = [
        f"{key}: {old['identity'].get(key)} -> {new['identity'].get(key)}"
        for key in new["identity"]
        if old["identity"].get(key) != new["identity"][key]
    ]
    lines += [f"{'point':<44}{'':<20}{'A':>10}{'B':>10}{'B / A':>7}{'band':>7}"]
    common = [key for key in old["points"] if key in new["points"]]
    for key in common:
        before, after = old["points"][key]["peers"], new["points"][key]["peers"]
        width = max(before["mlpcore"]["band"], after["mlpcore"]["band"])
        for name in (
            name
            for name in before
            if "seconds" in before[name] and "seconds" in after.get(name, {})
        ):
            ratio, verdict = changed(before[name], after[name], width)
            times = "".join(f"{duration(side[name]['seconds'][0]):>10}" for side in (before, after))
            lines.append(f"{key:<44}{name:<20}{times}{ratio:>7.2f}{width:>7.1%}  {verdict}")
    lines += [
        f"only in {which}: {key}"
        for which, a, b in (("A", old, new), ("B", new, old))
        for key in a["points"]
        if key not in b["points"]
    ]
    if not common:
        lines.append("no points in common")
    return "\n".join(
        [
            *lines,
            "The two runs were not interleaved: B / A includes changes of the machine in between.",
        ]
    )
