"""The kernels of pages_triton.py as machine code of GPUs that are not here: one line of JSON for each, on what it does.

Pages are those of a Llama-3-8B: 8 heads of 128, in bfloat16.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / ".typing"))  # There `callboard` is the repository itself.

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from callboard.kernels import pages_triton

TILE = {"WIDTH": 1024, "TOKENS": 16, "COLUMNS": 1024}
MOVE = {"source": "*i16", "target": "*i16", "source_slots": "*i64", "target_slots": "*i64", "num_tokens": "i32"}
SCALED = {"pool": "*i16", "slots": "*i64", "packed": "*u8", "scales": "*fp32", "num_tokens": "i32"}
FORMATS = {"i16": 1, "fp32": 0}


def move(source: str, target: str, **constants: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    formats = {"SOURCE_FORMAT": FORMATS[source], "TARGET_FORMAT": FORMATS[target]}
    types = MOVE | {"source": f"*{source}", "target": f"*{target}", "source_half": "i64", "target_half": "i64"}
    constants |= {"SOURCE_SLOT": 1024, "TARGET_SLOT": 1024} | formats | TILE
    return pages_triton.move_kernel, {name: kind for name, kind in types.items() if name not in constants}, constants


def scaled(kernel: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    types = SCALED | {"pool_half": "i64", "packed_half": "i64"}
    return kernel, types, {"SLOT": 1024, "FORMAT": 1} | TILE


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    names = kernel.arg_names
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")
    } | {(names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith("_half")}
    source = ASTSource(
        kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=pages_triton.OPTIONS)


def spills(cubin: bytes) -> int:
    """Return the bytes of a thread's stack, which is where registers go that there are too few of."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", usage.stdout + usage.stderr)
    assert found, usage
    return int(found[1])


def widest(ptx: str, what: str) -> str:
    """Return the widest access of global memory but for single numbers (a table's entry, a scale)."""
    wide = set(re.findall(rf"{what}\.global\.(v\d\.b\d+)", ptx))
    assert len(wide) == 1, wide
    return str(wide.pop())


def main() -> None:
    for capability, (kernel, types, constants) in (
        (90, move("i16", "i16", target_slots=None)),
        (80, move("fp32", "i16")),
        (80, scaled(pages_triton.quantize_kernel)),
        (90, scaled(pages_triton.dequantize_kernel)),
    ):
        made = compiled(kernel, types, constants, capability)
        ptx = made.asm["ptx"]
        line = {
            "kernel": kernel.__name__,
            "loads": widest(ptx, "ld"),
            "stores": widest(ptx, "st"),
            "spills": spills(made.asm["cubin"]),
            "flushes": ".ftz" in ptx or "div.full" in ptx or "div.approx" in ptx,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
