"""On which line of a TOML text a key stands, since ``tomllib`` does not say.

A path is what one would index the parsed document with: ``("engine", 1, "device")``.
"""

import re

Path = tuple[str | int, ...]

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_KEY = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def _keys(text: str) -> list[str]:
    return [key.strip("\"'") for key in _KEY.findall(text)]


class TomlLines:
    """An index of the lines of one valid TOML text. Keys inside inline tables are found by the line they begin on."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}
        table: Path = ()
        multiline: str | None = None
        for number, line in enumerate(text.splitlines(), start=1):
            if multiline is not None:
                multiline = None if multiline in line else multiline
                continue
            if header := _HEADER.fullmatch(line):
                table = self._enter(_keys(header[2]), is_array=header[1] == "[[")
                self._note(table, number)
            elif assignment := _ASSIGNMENT.match(line):
                self._note(table + tuple(_keys(assignment[1])), number)
                self._note_inline(table + tuple(_keys(assignment[1])), line[assignment.end() :], number)
                multiline = next((mark for mark in ('"""', "'''") if line.count(mark) == 1), None)

    def _enter(self, keys: list[str], *, is_array: bool) -> Path:
        table: Path = ()
        for depth, key in enumerate(keys):
            table += (key,)
            if is_array and depth == len(keys) - 1:
                self._counts[table] = self._counts.get(table, -1) + 1
            if table in self._counts:
                table += (self._counts[table],)
        return table

    def _note(self, path: Path, line: int) -> None:
        for depth in range(1, len(path) + 1):
            self._lines.setdefault(path[:depth], line)

    def _note_inline(self, path: Path, value: str, line: int) -> None:
        if value.lstrip().startswith("{"):
            for match in _ASSIGNMENT.finditer(value.replace("{", " ").replace(",", " ")):
                self._note(path + tuple(_keys(match[1])), line)

    def line_of(self, path: Path) -> int | None:
        """Return the line of ``path``, or of the nearest table around it."""
        for depth in range(len(path), 0, -1):
            if path[:depth] in self._lines:
                return self._lines[path[:depth]]
        return None
