"""Everything that needs a GPU, in one script that needs no installation: tests, then benchmarks; one JSON.

    make gpu PYTHON=python3 ARGS="--json bench/results/gpu.json"
    python3 tests/gpu/run.py --list                    what it would run
    python3 tests/gpu/run.py --only survival           some of it

It wants a Python (3.11 or newer) with torch for CUDA, Triton, transformers, numpy, pytest, rich, uvloop, msgspec and
pyzmq, and for what goes over UCX ucxx-cu13, libucxx-cu13, libucx-cu13 and librmm-cu13. On a machine without a network
the missing ones are brought as wheels in a folder, and installed beside:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site WHEELS/*.whl
    PYTHONPATH=/tmp/site python3 tests/gpu/run.py --json FILE

``callboard`` itself is taken from this checkout. Every part is a process of its own, so that one that crashes the GPU's
context, or hangs, costs only itself; the JSON is written anew after each. All of it takes at most TOTAL_S seconds: what
would not fit is said to be skipped. ``--device cpu`` runs what does not need a GPU to make sense, to try the script.

Exit code: 0, all holds; 1, something does not; 2, there is no GPU here. No GPU has run this script in this form yet.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = (HERE, HERE.parent, ROOT / ".typing")  # In the last one, `callboard` is the repository itself.
TOTAL_S = 460.0
LEAST_S = 5.0


@dataclass(frozen=True)
class Part:
    """A module of this folder, or a benchmark, and how long it may take."""

    name: str
    what: str
    limit_s: float
    bench: tuple[str, ...] = ()
    """The benchmark's file and arguments; else the part is the module ``name`` of this folder."""
    needs_gpu: bool = True


PARTS = (
    Part("survival", "does shared memory survive its owner's kill -9, and does a killed writer stop", 60),
    Part("attention", "paged attention against its reference, never waiting, and its time", 60, needs_gpu=False),
    Part("page_kernels", "the page kernels against their references, for every dtype", 90),
    Part("managers", "cuda_ipc between two managers' pools; a receiver killed in a send", 90, needs_gpu=False),
    Part(
        "engine_tokens", "an engine's tokens against transformers; layers reported when in place", 90, needs_gpu=False
    ),
    Part("fleet_on_gpu", "two engines on one GPU, end to end; kill -9 of one", 120, needs_gpu=False),
    Part("ucx_memory", "UCX between two processes on GPU memory", 60, needs_gpu=False),
    Part("kernels", "bench/kernels.py", 90, ("bench/kernels.py", "--quick")),
    Part(
        "overlap",
        "bench/overlap.py between two engines' pools",
        90,
        ("bench/overlap.py", "--quick", "--device", "cuda"),
    ),
)


def environment() -> dict[str, str]:
    """Return what a part's process is to see."""
    paths = [*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run_to_end(words: list[str], limit_s: float) -> tuple[int, str]:
    """Run a program; return its exit code and what it printed. Raises TimeoutExpired; then no process of it is left."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=limit_s)
            return process.returncode, out
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            raise subprocess.TimeoutExpired(words, limit_s, out) from None


def run_part(part: Part, device: str, limit_s: float) -> dict[str, Any]:
    """Run a part as a process of its own; return its rows and goals, and what went wrong."""
    result: dict[str, Any] = {"part": part.name, "rows": [], "goals": [], "problem": ""}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        if part.bench:
            words = [str(ROOT / part.bench[0]), *part.bench[1:], "--json", str(file)]
        else:
            words = [__file__, "--part", part.name, "--device", device, "--json", str(file)]
        begin = time.perf_counter()
        try:
            code, out = run_to_end([sys.executable, *words], limit_s)
            if code:
                result["problem"] = f"it ended with {code}: {out[-1500:]}"
            elif not file.exists():
                result["problem"] = f"it wrote nothing: {out[-500:]}"
        except subprocess.TimeoutExpired as error:
            result["problem"] = f"it was not done after {limit_s:.0f} s: {error.output[-800:]}"
        result["seconds"] = round(time.perf_counter() - begin, 1)
        if file.exists():
            found = json.loads(file.read_text())
            result |= {"rows": found["rows"], "goals": found.get("goals", [])}
    return result


def run(parts: list[Part], device: str, json_file: str | None) -> int:
    """Run parts one after another; print a short table last, and return the exit code."""
    begin, results = time.perf_counter(), list[dict[str, Any]]()
    for part in parts:
        left_s = TOTAL_S - (time.perf_counter() - begin)
        if part.bench and not (ROOT / part.bench[0]).is_file():
            results.append({"part": part.name, "rows": [], "goals": [], "problem": f"there is no {part.bench[0]}"})
        elif left_s < LEAST_S:
            results.append({"part": part.name, "rows": [], "goals": [], "problem": "skipped: no time was left"})
        else:
            print(f"== {part.name}: {part.what}", flush=True)
            results.append(run_part(part, device, min(part.limit_s, left_s)))
            for row in results[-1]["rows"]:
                print(row, flush=True)
            print(results[-1]["problem"], flush=True)
        if json_file:
            Path(json_file).write_text(json.dumps(report(results, device), indent=1) + "\n")
    print("\n== summary")
    for result in results:
        tests = [row for row in result["rows"] if "holds" in row]
        held = sum(bool(row["holds"]) for row in tests) + sum(bool(goal["holds"]) for goal in result["goals"])
        count = len(tests) + len(result["goals"])
        print(f"{result['part']:14} {held} of {count} hold, {result.get('seconds', 0)} s. {result['problem'][:200]}")
        for row in tests:
            if not row["holds"]:
                print(f"    does not hold: {row}")
    whole = report(results, device)
    return 0 if all(goal["holds"] for goal in whole["goals"]) else 1


def report(results: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Return the one JSON: the shape is that of every benchmark."""
    goals = [
        {"name": f"{each['part']} ran", "value": each["problem"], "goal": "", "holds": not each["problem"]}
        for each in results
    ]
    for result in results:
        tests = [row for row in result["rows"] if "holds" in row]
        goals += [
            {"name": row["test"], "value": row.get("error", ""), "goal": "holds", "holds": row["holds"]}
            for row in tests
        ]
        goals += result["goals"]
    rows = [{"part": result["part"], **row} for result in results for row in result["rows"]]
    return {
        "bench": "gpu",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(device),
        "rows": rows,
        "goals": goals,
    }


def machine(device: str) -> dict[str, Any]:
    """Describe what this ran on."""
    import torch

    name = torch.cuda.get_device_name(device) if device != "cpu" else None
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    return {"device": name, "cores": len(os.sched_getaffinity(0)), **versions}


def why_not() -> str:
    """Return what keeps this from running, in a sentence; "" if nothing does."""
    if importlib.util.find_spec("torch") is None:
        return "this Python has no torch: name one that has, make gpu PYTHON=..."
    import torch

    return "" if torch.cuda.is_available() else "there is no CUDA device here: nothing was tested"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--list", action="store_true", help="show what would run, and end")
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", choices=[part.name for part in PARTS], help="run only these"
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:0; cpu tries what makes sense without a GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        rows = importlib.import_module(arguments.part).rows(arguments.device)
        Path(arguments.json).write_text(json.dumps({"rows": rows}))
        return 0
    is_cpu = arguments.device == "cpu"
    parts = [part for part in PARTS if part.name in (arguments.only or [part.name]) and not (is_cpu and part.needs_gpu)]
    if arguments.list:
        for part in parts:
            print(f"{part.name:14} {part.what} (at most {part.limit_s:.0f} s)")
        return 0
    if not is_cpu and (sentence := why_not()):
        print(sentence, file=sys.stderr)
        return 2
    return run(parts, arguments.device, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
