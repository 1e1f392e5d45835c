"""What the documents say is there: files, links, commands with their options, and every key of the fleet file."""

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from callboard.tools.cli import parser
from callboard.tools.fleet_file import Engine, Kv, Listen, Log, Model, Restart, Router, Tier, Trace, UserActor

ROOT = Path(__file__).parent.parent
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
CODE = ("bus", "kernels", "kv", "actors", "router", "tools", "tests", "bench")
TABLES: dict[str, type[msgspec.Struct]] = {
    "`[listen]`": Listen,
    "`[models.NAME]`": Model,
    "`[defaults.kv]`": Kv,
    "`tiers = [": Tier,
    "`[[engine]]`": Engine,
    "`[[router]]`": Router,
    "`[[actor]]`": UserActor,
    "`restart = {": Restart,
}
"""The tables of the fleet file, by how their headings in its document begin."""


def blocks(text: str) -> list[str]:
    """Return the blocks of commands."""
    return re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)


def spans(text: str) -> list[str]:
    """Return what stands in back-ticks within the text."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def command_lines() -> Iterator[list[str]]:
    """Yield the words of every line of a block that calls callboard, up to a pipe."""
    for text in DOCUMENTS.values():
        for line in "\n".join(blocks(text)).splitlines():
            if match := re.match(r"(?:\S*\$ )?callboard (.*)", line):
                words = shlex.split(match[1], comments=True)
                yield words[: words.index("|")] if "|" in words else words


def subcommand(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser that the first words lead to, and the words that are left."""
    found, rest = parser(), list(words)
    while rest:
        acts = [each.choices for each in found._actions if isinstance(each, argparse._SubParsersAction)]
        if not acts or rest[0] not in acts[0]:
            break
        found = acts[0][rest.pop(0)]
    return found, rest


def test_every_command_that_is_shown_is_understood() -> None:
    lines = list(command_lines())
    assert len(lines) > 30
    for words in lines:
        try:
            parser().parse_args(words)
        except SystemExit:
            pytest.fail(f"not understood: callboard {shlex.join(words)}")


def test_every_command_in_the_text_exists_and_has_the_options_it_is_shown_with() -> None:
    shown = {span for text in DOCUMENTS.values() for span in spans(text) if re.match(r"callboard [a-z]", span)}
    assert len(shown) > 20
    for span in sorted(shown):
        _, name, *_ = words = span.split()
        found, rest = subcommand(words[1:])
        assert found.prog != "callboard", f"there is no command {name}: {span}"
        for option in (word for word in rest if word.startswith("-")):
            assert option in found._option_string_actions, f"{span}: {option} is no option of {found.prog}"


def test_what_make_is_asked_for_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, text in DOCUMENTS.items():
        asked = re.findall(r"^make ([a-z]+)", "\n".join([*blocks(text), *spans(text)]), re.MULTILINE)
        assert set(asked) <= targets, name


def test_links_lead_somewhere() -> None:
    for name, text in DOCUMENTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("https://"):
                path, _, heading = link.partition("#")
                found = (ROOT / name).parent.joinpath(path)
                assert found.exists(), f"{name}: {link}"
                titles = re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE) if heading else []
                slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert not heading or heading in slugs, f"{name}: {link}: {slugs}"


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "docs/measured.md"])
def test_the_files_that_are_named_are_there(name: str) -> None:
    there = [f"/{path.relative_to(ROOT)}" for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    for span in spans(DOCUMENTS[name]):
        for path in re.findall(r"[\w./]+\.py\b", span):
            assert any(each.endswith(f"/{path.removeprefix('.venv/bin/')}") for each in there), f"{name}: {path}"


def test_the_architecture_is_one_page() -> None:
    lines = DOCUMENTS["ARCHITECTURE.md"].splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


def keys_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the keys of a table of the fleet file with their defaults, as TOML has them; "required" without one."""
    keys: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        made = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        keys[field.encode_name] = "required" if field.required else msgspec.json.decode(msgspec.json.encode(made))
    return keys


def keys_of_the_page(heading: str) -> dict[str, Any]:
    """Return the same as the document's table below ``heading`` says it."""
    page = DOCUMENTS["docs/fleet-file.md"]
    match = re.search(rf"^##+ {re.escape(heading)}.*?(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no heading {heading}"
    said: dict[str, Any] = {}
    for key, default in re.findall(r"^\| `([\w.]+)` \| (.*?) \|", match[0], re.MULTILINE):
        if default in ("none", "required"):
            said[key] = None if default == "none" else default
        else:
            said[key] = tomllib.loads(f"it = {default.strip('`')}")["it"]
    return said


@pytest.mark.parametrize("heading", TABLES)
def test_the_document_of_the_fleet_file_has_every_key_with_its_default(heading: str) -> None:
    assert keys_of_the_page(heading) == keys_of(TABLES[heading])


def test_the_document_of_the_fleet_file_has_the_tables_of_two_keys_too() -> None:
    said = keys_of_the_page("`[trace]` and `[log]`")
    known = {"trace": keys_of(Trace), "log": keys_of(Log)}
    assert said == {f"{table}.{key}": value for table, keys in known.items() for key, value in keys.items()}
