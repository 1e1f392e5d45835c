"""A stand-in for NVIDIA's driver (stand_in.c), compiled against NVIDIA's header."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from callboard.kv.cuda_driver import LIBRARY, CudaDriver


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """Return a directory with the stand-in in it, under the real one's name."""
    compiler, triton = shutil.which("cc"), importlib.util.find_spec("triton")
    if compiler is None or triton is None or triton.origin is None:
        pytest.skip("it takes a C compiler, and Triton for NVIDIA's cuda.h")
    header = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).parent / "stand_in.c"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-I", str(header), str(source)]
    subprocess.run([*command, "-o", str(folder / LIBRARY)], check=True)
    return folder


@pytest.fixture(scope="session")
def driver(stand_in):
    return CudaDriver(str(stand_in / LIBRARY))
