"""The page kernels, compiled for this GPU, against their references: tests/kernels/triton_checks.py, as it is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[1] / "kernels" / "triton_checks.py"


def rows(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Return what was found. The program takes a GPU by itself where there is one."""
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [
        {"test": f"page kernels: {each['check']}", "holds": not each["problem"], "problem": each["problem"][:500]}
        for each in found
    ]
    is_whole = done.returncode == 0 and bool(rows)
    return [*rows, {"test": "page kernels: all were checked", "holds": is_whole, "problem": done.stderr[-500:]}]
