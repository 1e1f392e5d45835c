"""The sequence diagram of a request: its actors, its sub-requests in order, and no text that is taken for grammar."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_trace import Shape, disaggregated, load

from callboard.tools.trace.event import Event
from callboard.tools.trace.mermaid import diagram, escaped
from callboard.tools.trace.story import Story, assemble

PARTICIPANT = re.compile(r"    participant (\w+)(?: as (.+))?")
MESSAGE = re.compile(r"    (\w+)(->>|-->>|--x|-\))([+-]?)(\w+): (.+)")
NOTE = re.compile(r"    Note over (\w+): (.+)")
TEXT = re.compile(r"(?:[^;#%<>{}\n]|#\d+;)+")


def story_of(events: list[Event]) -> Story:
    [story] = assemble(events).values()
    return story


def check(text: str) -> list[str]:
    """Read a diagram strictly; return its messages and notes. Who answers was asked before, and has not answered."""
    lines = text.splitlines()
    assert lines[0] == "sequenceDiagram"
    names: set[str] = set()
    asked: dict[str, int] = {}
    said = []
    for line in lines[1:]:
        if match := PARTICIPANT.fullmatch(line):
            assert not said, "participants come first"
            assert match[1] not in names
            names.add(match[1])
            assert TEXT.fullmatch((match[2] or "client").replace("<br/>", "")), line
        elif match := MESSAGE.fullmatch(line):
            source, _, mark, target, words = match.groups()
            assert {source, target} <= names
            assert TEXT.fullmatch(words), line
            if mark == "+":
                asked[target] = asked.get(target, 0) + 1
            elif mark == "-":
                assert asked.get(source, 0) > 0, f"{line} ends what has not begun"
                asked[source] -= 1
            said.append(line.strip())
        else:
            match = NOTE.fullmatch(line)
            assert match is not None, line
            assert match[1] in names
            assert TEXT.fullmatch(match[2]), line
            said.append(line.strip())
    return said


def test_a_request_is_told_from_the_client_to_the_engines_and_back() -> None:
    text = diagram(story_of(disaggregated("r", 5.0, Shape())))
    said = check(text)
    names = {match[1]: match[2] for line in text.splitlines() if (match := PARTICIPANT.fullmatch(line))}
    assert list(names.values()) == [
        None,
        "frontend",
        "main<br/>router",
        "kv-cpu0<br/>KV manager",
        "kv-cpu1<br/>KV manager",
        "prefill<br/>engine",
        "decode<br/>engine",
    ]
    readable = [re.sub(r"\ba\d\b", lambda match: names[match[0]].split("<")[0], line) for line in said]
    verbs = [line for line in readable if "(" in line and "->>+" in line]
    assert verbs == [
        "main->>+kv-cpu1: (1) prep_recv",
        "main->>+kv-cpu0: (2) remote_send",
        "main->>+decode: (3) start_generate",
    ]
    assert readable[0] == "client->>+frontend: POST /v1/chat/completions"
    assert readable[-1] == "frontend-->>-client: 200 after 2026 ms"
    assert "kv-cpu1-->>-main: (1) 700 us: 16 of 312 tokens in its cache, takes 296" in readable
    assert any(line.startswith("Note over prefill: compute 250 ms") for line in readable)
    assert sum(line.startswith("Note over kv-cpu0: send") for line in readable) == 1


def test_a_failure_is_crossed_out() -> None:
    said = check(diagram(story_of(disaggregated("r", 5.0, Shape(error="ActorDied: decode; is #dead")))))
    failed = [line for line in said if "--x-" in line]
    assert len(failed) == 3
    assert all("ActorDied: decode#59; is #35;dead" in line for line in failed)


@pytest.mark.parametrize("name", ["end", "a;b", "<script>", "note over", "x:y", "→%%{init}%%", '"q"', "-->>", "a\nb"])
def test_an_actor_of_any_name_takes_part(name: str) -> None:
    check(diagram(story_of(disaggregated("r", 5.0, Shape(decode=name, error=name)))))


@given(st.text(min_size=1))
def test_any_text_is_escaped(text: str) -> None:
    assert TEXT.fullmatch(escaped(text))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_was_lost_the_diagram_is_valid(seed: int) -> None:
    rng = random.Random(seed)
    kept = [event for event in load(3, rate=50, seed=seed) if rng.random() < 0.7]
    for story in assemble(kept).values():
        check(diagram(story))
