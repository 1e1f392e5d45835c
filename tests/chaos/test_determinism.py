"""A run is a function of its seed: in this process, after other runs, and in another one with other hashes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .harness import run_seed
from .strategies import draw

TESTS = Path(__file__).parent.parent
SEEDS = range(300, 312)
PRINT = f"from chaos.harness import run_seed\nfor seed in {list(SEEDS)}: print(run_seed(seed).log_digest)"


def digests_of_a_process(hash_seed: str) -> list[str]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, text=True, check=True, env=environment, cwd=TESTS.parent
    )
    return done.stdout.split()


def test_a_seed_gives_the_same_messages_in_every_process() -> None:
    here = [run_seed(seed).log_digest for seed in SEEDS]
    assert len(set(here)) == len(here)
    assert digests_of_a_process("1") == here
    assert digests_of_a_process("4000000000") == here


def test_a_seed_gives_the_same_log_byte_for_byte_when_it_is_run_again() -> None:
    first, second = run_seed(303, with_log=True), run_seed(303, with_log=True)
    assert len(first.log) > 300
    assert "\n".join(first.log) == "\n".join(second.log)
    assert first.log_digest == run_seed(303).log_digest


def test_a_schedule_is_drawn_from_its_seed_and_can_be_read() -> None:
    assert draw(5) == draw(5)
    assert str(draw(5)) != str(draw(6))
    text = "\n".join(str(draw(seed)) for seed in range(200))
    for kind in ("break", "partition", "pause", "kill", "crash", "stop", "congest"):
        assert f": {kind} " in text


def test_chaos_loads_neither_torch_nor_http() -> None:
    code = "import sys, chaos.harness; print([m for m in ('torch', 'litestar', 'uvicorn') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_virtual_time_is_bounded(seed: int) -> None:
    assert run_seed(seed).virtual_s < 120
