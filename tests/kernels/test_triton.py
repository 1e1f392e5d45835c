"""The Triton kernels, without a GPU: interpreted, against their references; and compiled for GPUs.

In processes of their own: whether Triton interprets is decided when it is imported, for the whole process.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it is for Linux"
)
HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
WIRES = (*DTYPES, "float8_e4m3")
CHECKS = [
    *(f"gather {dtype} as {wire}" for dtype in DTYPES for wire in WIRES),
    *(f"scatter {wire} as {dtype}" for dtype in DTYPES for wire in WIRES),
    *(f"copy {dtype} as {other}" for dtype in DTYPES for other in DTYPES),
    *(f"every {wire} as {dtype}" for dtype in DTYPES for wire in WIRES if wire != dtype),
    "every float32 as float8_e4m3",
    "slots wider than a tile",
    "a pool of more than 2**31 elements",
]


def lines_of(program: str, **environment: str) -> list[dict[str, str]]:
    """Run a program of this folder; return the lines of JSON that it prints."""
    done = subprocess.run(
        [sys.executable, HERE / program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Return what is wrong with each kernel."""
    return {each["check"]: each["problem"] for each in lines_of("triton_checks.py", TRITON_INTERPRET="1")}


@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_equals_its_reference(check: str, interpreted: dict[str, str]) -> None:
    assert interpreted[check] == "", interpreted[check]


def test_every_check_is_asked_for(interpreted: dict[str, str]) -> None:
    assert set(interpreted) == set(CHECKS)


def test_kernels_compile_for_gpus_and_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    lines = lines_of("triton_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(lines) == 4
    for line in lines:
        assert line["loads"] == "v4.b32", line
        assert line["stores"] == "v4.b32", line
        assert line["spills"] == 0, line
        assert not line["flushes"], line
