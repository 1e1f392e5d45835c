"""The script for GPUs: what it would run exists, and its first question can be asked of the stand-in."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "gpu"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


def test_every_part_is_there(script):
    for part in script.PARTS:
        if part.bench:
            continue
        tree = ast.parse((FOLDER / f"{part.name}.py").read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == "rows" for node in tree.body), part.name


def test_all_of_it_fits_into_eight_minutes(script):
    assert script.TOTAL_S + script.LEAST_S < 480
    assert all(part.limit_s < script.TOTAL_S for part in script.PARTS)


def test_a_part_that_hangs_or_fails_costs_only_itself(script, monkeypatch, tmp_path):
    for text, problem in (
        ("import time; time.sleep(60)", "not done after 0 s"),
        ("raise SystemExit(3)", "ended with 3"),
    ):
        program = tmp_path / "bench.py"
        program.write_text(text)
        part = script.Part("x", "", 1, (str(program),))
        result = script.run_part(part, "cpu", 0.2 if "sleep" in text else 20)
        assert problem in result["problem"]


ASK = "import survival, json, sys; print(json.dumps(survival.late_writes(sys.argv[1])))"


def test_the_question_what_a_killed_writer_still_writes_is_asked_to_its_end(stand_in, tmp_path):
    paths = os.pathsep.join([str(FOLDER), str(FOLDER.parents[1] / ".typing")])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stand_in), "PYTHONPATH": paths, "SURVIVAL_BLOCKS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "p")], env=environment, capture_output=True, text=True
    )
    assert '"holds": true' in done.stdout, done.stdout + done.stderr
