"""A script's types, checked by mypy where that is installed, in a process of its own beside the dry run."""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from callboard.actors.route_protocol import ScriptText

MOST_S = 120.0
"""The first check on a machine takes some ten seconds, because mypy reads Callboard; the others less than one."""
PACKAGES = ("bus", "kv", "actors", "router")


@dataclass(frozen=True, slots=True)
class Types:
    """What mypy says, in words."""

    is_good: bool
    words: str


class TypeCheck:
    """A check under way."""

    def __init__(self, text: ScriptText) -> None:
        self._text = text
        self._folder = tempfile.TemporaryDirectory(prefix="callboard-types-")
        folder = Path(self._folder.name)
        packages = folder / "callboard"
        packages.mkdir()
        for name in PACKAGES:  # However Callboard is installed, mypy finds it here.
            (packages / name).symlink_to(Path(next(iter(importlib.import_module(f"callboard.{name}").__path__))))
        script = folder / f"{text.name}.py"
        script.write_text(text.source, encoding="utf-8")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "callboard" / "mypy"
        command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-color-output", "--config-file", ""]
        command += ["--explicit-package-bases", "--namespace-packages", "--follow-imports=silent"]
        command += ["--ignore-missing-imports", "--check-untyped-defs", "--cache-dir", str(cache), str(script)]
        environment = {**os.environ, "MYPYPATH": str(folder)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)

    def result(self) -> Types:
        """Wait for it, and return what it says."""
        try:
            out, errors = self._process.communicate(timeout=MOST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return Types(True, f"types: mypy did not end within {MOST_S:.0f} s")
        finally:
            self._folder.cleanup()
        name = f"{self._text.name}.py"
        found = [line.replace(name, self._text.path, 1) for line in out.splitlines() if line.startswith(name)]
        if self._process.returncode == 0:
            return Types(True, "types: they fit")
        return Types(False, "\n".join(["types:", *(found or [errors.strip() or out.strip()])]))


class _Nobody(TypeCheck):
    def __init__(self) -> None:
        pass

    def result(self) -> Types:
        return Types(True, 'types: not checked, because mypy is not installed (run "pip install mypy")')


def check_types(text: ScriptText) -> TypeCheck:
    """Begin to check a script's types."""
    return _Nobody() if importlib.util.find_spec("mypy") is None else TypeCheck(text)
