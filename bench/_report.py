"""What every benchmark shares: arguments, the machine, medians with their spread, one table, and one JSON shape."""

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LOG_WIDTH = 160
"""Characters of a table that is not shown on a terminal."""


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
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "device": _gpu()}


def _gpu() -> str | None:
    """Return the GPU's name, if this ran on one."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


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


def goal(name: str, found: float | Sequence[float], limit: str) -> dict[str, Any]:
    """Return a goal as the JSON has it; ``limit`` is such as ``<= 1.3`` or ``>= 0.7``.

    What was ``found`` in several rounds counts by its median, and its range is told with it.
    """
    sign, number = limit.split()
    value = found if isinstance(found, float) else median(found)
    holds = value <= float(number) if sign == "<=" else value >= float(number)
    item = {"name": name, "value": round(value, 4), "goal": limit, "holds": holds}
    return item if isinstance(found, float) else {**item, "range": [round(min(found), 4), round(max(found), 4)]}


def report(
    name: str, rows: list[dict[str, Any]], goals: list[dict[str, Any]], path: str | None, *, by: str | None = None
) -> None:
    """Print the rows as one table, or one for each value of the column ``by``, and the goals under it.

    Writes the JSON if a path is given.
    """
    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    for value in dict.fromkeys(row[by] for row in rows) if by else (None,):
        some = [{key: row[key] for key in row if key != by} for row in rows if by is None or row[by] == value]
        console.print(_table(name if value is None else f"{name}: {value}", some))
    for item in goals:
        low, high = item.get("range", (None, None))
        between = "" if low is None else f", {low} to {high}"
        holds = "holds" if item["holds"] else "falls short"
        console.print(f"{holds}: {item['name']} {item['value']} ({item['goal']}{between})", soft_wrap=True)
    if path:
        result = {
            "bench": name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "rows": rows,
            "goals": goals,
        }
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        cells = [_cell(row.get(column)) for row in rows]
        # Headings are folded to keep the table narrow, what stands under them is not.
        width = max(map(len, [*cells, *column.split()]))
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right", width=width)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
