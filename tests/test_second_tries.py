"""Tests of real processes have a second try, which is told of; no other test has one."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FAILS_ONCE = """
{imports}
tries = []

def test_it():
    tries.append(len(tries))
    assert len(tries) > {num}, "it was not there in time"
"""


def test_only_what_has_processes_is_tried_again_and_each_is_named_with_its_error(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    for folder, imports, num in (
        ("tools", "import subprocess", 1),
        ("chaos", "import subprocess", 1),
        ("kv", "", 1),
        ("hosts", "import socket", 2),
    ):
        path = tmp_path / "tests" / folder / f"test_{folder}.py"
        path.parent.mkdir(parents=True)
        path.write_text(FAILS_ONCE.format(imports=imports, num=num))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", HERE.parent / "pyproject.toml"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, "--no-header", "tests"], cwd=tmp_path, capture_output=True, text=True
    )
    said = done.stdout
    assert done.returncode == 1, said + done.stderr
    assert "3 failed, 1 passed, 2 rerun" in said
    for line in ("tests/tools/test_tools.py::test_it", "tests/hosts/test_hosts.py::test_it"):
        assert f"RERUN {line}" in said
    for line in ("tests/chaos/test_chaos.py", "tests/kv/test_kv.py"):
        assert f"FAILED {line}" in said
        assert f"RERUN {line}" not in said
    told = said.partition("rerun test summary info")[2]
    assert "AssertionError: it was not there in time" in told.partition("short test summary info")[0]
