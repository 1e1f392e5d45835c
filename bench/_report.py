"""What every benchmark shares: arguments, the machine, medians with their spread, one table, and one JSON shape."""

import argparse
import datetime
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def arguments(description: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse ``--quick`` and ``--json FILE``, and the options in ``more`` (name to add_argument's keywords)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Describe what this ran on."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "device": None}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def median(values: Sequence[float]) -> float:
    """Return the median, 0 of nothing."""
    return statistics.median(values) if values else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the sorted values lie (nearest rank)."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


def spread(values: Sequence[float]) -> str:
    """Return median and range of repeats, for people."""
    if len(values) < 2:
        return f"{median(values):.2f}"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def goal(name: str, value: float, limit: str) -> dict[str, Any]:
    """Return a goal as the JSON has it; ``limit`` is such as ``<= 1.3`` or ``>= 0.7``."""
    sign, number = limit.split()
    holds = value <= float(number) if sign == "<=" else value >= float(number)
    return {"name": name, "value": round(value, 4), "goal": limit, "holds": holds}


def report(name: str, rows: list[dict[str, Any]], goals: list[dict[str, Any]], path: str | None) -> None:
    """Print the rows as one table and the goals under it; write the JSON if a path is given."""
    console = Console()
    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    console.print(table)
    for item in goals:
        console.print(f"{'holds' if item['holds'] else 'falls short'}: {item['name']} {item['value']} ({item['goal']})")
    if path:
        result = {
            "bench": name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "rows": rows,
            "goals": goals,
        }
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _cell(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
