"""One pair of machines, and one fleet on them, for all tests here."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .joined_fleet import JoinedFleet
from .namespaces import NoNamespaces, two_hosts


@pytest.fixture(scope="session")
def fleet() -> Iterator[JoinedFleet]:
    folder = Path(tempfile.mkdtemp(prefix="cbh", dir="/tmp"))
    for name in ("run-a", "run-b"):
        (folder / name).mkdir(mode=0o700)
    try:
        with two_hosts(folder, hides=folder / "run-a") as (a, b):
            made = JoinedFleet(a, b, folder)
            try:
                made.start()
                yield made
            finally:
                made.close()
    except NoNamespaces as error:
        pytest.skip(f"no machines can be made of namespaces here: {error}")
    finally:
        shutil.rmtree(folder)
