"""Lines: what a request of a fleet looks like to people and to programs, and what filters leave of it."""

import argparse
import json
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec
import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import ATTEMPTS_EACH, FIRST_DIRECT_ATTEMPT, Entry, SamplingParams
from callboard.bus import Address
from callboard.bus.taps import ANSWERED, ENDED, NO_BODY, RECEIVED, SENT, SPAN, TapRecord
from callboard.router.peer import HAND_ON_BITS
from callboard.tools.errors import CliError
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.filters import Filter, filter_of
from callboard.tools.trace.lines import JsonLines, Lines, Text
from callboard.tools.trace.notice import Notice
from callboard.tools.trace.past import Past, collect, resolve
from callboard.tools.trace.phrases import phrase
from callboard.tools.trace.story import CATEGORY_OF
from callboard.tools.trace.table import Table, clock_text, color_of, short_id
from callboard.tools.trace.told import MOST_CALLS, Reader

LAYOUT = SimulatedRunner(Simulation()).layout


async def past_of(fleet: Fleet) -> Past:
    return await collect(fleet.client, Address("control", "inproc://control", "directory"))


async def some_requests() -> Past:
    """Two requests on a prefill and a decode engine: the second finds the first one's blocks in the caches."""
    async with running_fleet(layout=LAYOUT) as fleet:
        for _ in range(2):
            await fleet.generate(list(range(312)), SamplingParams(max_tokens=32, ignore_eos=True))
        return await past_of(fleet)


def told(past: Past, wanted: Filter | None = None, *, last: int = 10, everything: bool = False) -> list[str]:
    reader = Reader(lambda: {event.node for event in past.events})
    names = [entry.name for entry in past.entries]
    table = Table(reader, names, has_colors=False, is_ascii=False, everything=everything)
    lines = Lines(wanted or Filter(), Text(table, lambda: past.entries), reader, last=last, actors=lambda: names)
    for event in past.events:
        lines.remember(event)
    return lines.past().splitlines()


def json_of(past: Past, wanted: Filter | None = None) -> list[dict[str, Any]]:
    reader = Reader(lambda: {event.node for event in past.events})
    lines = Lines(wanted or Filter(), JsonLines(), reader, last=10, actors=lambda: [e.name for e in past.entries])
    for event in past.events:
        lines.remember(event)
    return [json.loads(line) for line in lines.past().splitlines()]


def matching(lines: Iterable[str], *patterns: str) -> bool:
    """Say whether lines fit the patterns, in this order, with others in between."""
    rest = iter(lines)
    return all(any(re.search(pattern, line) for line in rest) for pattern in patterns)


async def test_a_request_is_told_from_its_sub_requests_to_its_last_token() -> None:
    lines = told(await some_requests(), last=2)
    first, second = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert matching(
        first,
        r"client +→ main +generate",
        r"main +→ d +prep_recv +312 .* make room for the KV of 312 tokens",
        r"main +← d +prep_recv .* done: 0 of 312 tokens cached, lacks \[0, 312\)",
        r"main +→ p +remote_send +312 .* write the KV of tokens \[0, 312\) to d, compute what is missing",
        r"p +compute +312 .* computed KV to send in 1 step",
        r"main +← p +remote_send +312 .* done: 78.0 KiB of KV by inproc, 312 computed, 0 reused",
        r"main +→ d +start_generate +312 .* take over that KV, and generate",
        r"d +decode +31 .* generated the rest in 31 steps",
        r"main +← d +start_generate +32 .* done: 32 tokens, first after [\d.]+ [mu]?s",
        r"main +attempt .* ran script disaggregate",
        r"client +← main +generate",
    )
    assert matching(
        second,
        r"prep_recv .* done: 304 of 312 tokens cached, lacks \[304, 312\)",
        r"remote_send +312 .* to d, compute what is missing",
        r"← p +remote_send .* 8 computed, 304 reused",
    )


async def test_columns_stand_below_each_other() -> None:
    past = await some_requests()
    lines = [line for line in told(past, everything=True) if line]
    assert len(lines) > 40
    starts = {line.index(word) for line in lines for word in [line.split()[1]]}
    assert starts == {13}
    took = [re.search(r" {1,7}[\d.]+ (us|ms|s)  ?", line) for line in lines if "done" in line]
    assert len({match.end() for match in took if match}) == 1


async def test_only_the_last_requests_are_told_each_together() -> None:
    past = await some_requests()
    assert {line.split()[1] for line in told(past, last=1) if line} == {"request-2"}
    ids = [line.split()[1] for line in told(past, last=2) if line]
    assert ids == sorted(ids)


async def test_filters_leave_what_they_name() -> None:
    past = await some_requests()
    assert {line.split()[4] for line in told(past, Filter(verb="prep_recv")) if line} == {"d"}
    assert len([line for line in told(past, Filter(verb="prep_recv")) if line]) == 4
    assert {line.split()[1] for line in told(past, Filter(request="request-1")) if line} == {"request-1"}
    assert all(re.search(r"\bp\b", line) for line in told(past, Filter(actor="p")) if line)
    assert any("remote_send" in line for line in told(past, Filter(actor="p")))
    assert told(past, Filter(slower_s=60.0)) == []
    assert told(past, Filter(errors=True)) == []


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (Filter(verb="prep_rcv"), 'there is no verb "prep_rcv": did you mean prep_recv'),
        (Filter(verb="xyzzy"), 'there is no verb "xyzzy": such as prep_recv, remote_send, prefill'),
        (Filter(actor="man"), 'there is no actor "man": did you mean main'),
        (Filter(request="f00"), 'no node remembers a request "f00": it may be too long ago, or its id misread'),
        (Filter(request="req"), '2 requests begin with "req": request-1, request-2'),
    ],
)
async def test_a_name_that_nobody_has_is_a_sentence(wanted: Filter, sentence: str) -> None:
    past = await some_requests()
    with pytest.raises(CliError, match=re.escape(sentence)):
        told(past, wanted)


def test_a_request_is_named_by_its_id_a_sequences_id_or_how_it_begins() -> None:
    known = ["chatcmpl-4f1d22c0a9e34b11", "chatcmpl-99aa22c0a9e34b11", "my.own"]
    assert resolve("chatcmpl-4f1d22c0a9e34b11", known) == known[0]
    assert resolve("chatcmpl-4f1d22c0a9e34b11.3", known) == known[0]
    assert resolve("4f1d", known) == known[0]
    assert resolve("chatcmpl-9", known) == known[1]
    assert resolve("my.own", known) == "my.own"
    for wrong in ("", "x", "chatcmpl"):
        with pytest.raises(CliError):
            resolve(wrong, known)
    assert [short_id(each) for each in (known[0], known[0] + ".12", "my.own")] == ["4f1d22c0", "4f1d22c0.12", "my.own"]
    assert color_of(known[0]) == color_of(known[0] + ".12")


@pytest.mark.parametrize("text", ["50", "ms", "-1s", "5 years"])
def test_a_time_that_is_none_is_a_sentence(text: str) -> None:
    arguments = argparse.Namespace(request=None, actor=None, verb=None, slower=text, errors=False)
    with pytest.raises(CliError, match=r"--slower .* is no duration"):
        filter_of(arguments)


async def test_a_line_of_json_is_a_record_with_the_names_that_are_documented() -> None:
    past = await some_requests()
    found = json_of(past)
    assert {each["type"] for each in found} == {"record"}
    assert {each["what"] for each in found} == {"sent", "received", "answered", "ended", "span"}
    assert {each["request"] for each in found} == {"request-1", "request-2"}
    prepared = [each for each in found if each["verb"] == "prep_recv" and each["request"] == "request-1"]
    sent, received, answered, ended = prepared
    assert [each["what"] for each in prepared] == ["sent", "received", "answered", "ended"]
    assert len({each["span"] for each in prepared}) == 1
    assert (sent["from"], sent["to"], sent["actor"], sent["node"]) == ("main", "d", "kv-d", "control")
    assert sent["facts"]["num_tokens"] == 312
    assert ended["facts"] | {"begin": 0, "end": 312, "num_cached_tokens": 0} == ended["facts"]
    assert 0 < answered["took_s"] <= ended["took_s"] < 5
    assert received["bytes"] > 0
    when = datetime.fromisoformat(sent["wall"])
    assert abs(when.timestamp() - past.events[0].wall) < 60
    assert sent["time_s"] <= received["time_s"] <= answered["time_s"] <= ended["time_s"]
    [stream] = [each for each in found if (each["verb"], each["what"], each["request"]) == START]
    assert stream["items"] == 32
    assert 0 < stream["first_s"] < stream["took_s"]
    assert "error" not in stream
    [generate] = [each for each in found if (each["verb"], each["what"], each["request"]) == GENERATE]
    assert sent["parent"] == generate["span"]


START = ("start_generate", "ended", "request-1")
GENERATE = ("generate", "received", "request-1")


def test_a_notice_in_json_says_what_was_lost() -> None:
    notice = Notice("12 records of decode lost: ...", "lost", "decode", 12, 5.0, 1000.25)
    told = json.loads(JsonLines().notice(notice))
    assert told["wall"] == "1970-01-01T00:16:40.250000Z"
    assert [told[name] for name in ("type", "kind", "node", "num_lost", "time_s")] == [
        "notice",
        "lost",
        "decode",
        12,
        5,
    ]


# ---- made records --------------------------------------------------------------------------------------------------


def record(what: int, name: str, span: int, time: float, **fields: Any) -> Event:
    facts = msgspec.Raw(msgspec.msgpack.encode(fields.pop("facts", {})))
    values = {"begin": 0.0, "actor": "b", "source": "", "peer": "", "request_id": "r", "parent": 0, "num_bytes": 0}
    values |= {"num_items": 0, "first": 0.0, "error": "", "node": "n", **fields}
    node = values.pop("node")
    made = TapRecord(what=what, name=name, span=span, time=time, facts=facts, body=NO_BODY, **values)  # type: ignore[arg-type]
    return event_of(made, node)


def lines_of(
    *events: Event, nodes: Iterable[str] = ("n", "m"), has_colors: bool = False, everything: bool = False
) -> list[str]:
    reader = Reader(lambda: list(nodes))
    table = Table(reader, ["aaa"], has_colors=has_colors, is_ascii=True, everything=everything)
    text = Text(table, list)
    shown = [reader.read(event) for event in events]
    return [line for each in shown if each is not None for line in text.item(each).splitlines()]


def test_what_failed_and_what_was_cancelled_says_so() -> None:
    sent = record(SENT, "RemoteSend", 1, 1.0, source="a")
    failed = record(ENDED, "RemoteSend", 1, 1.5, begin=1.0, error="LinkLost: it broke")
    left = record(ENDED, "RemoteSend", 1, 1.5, begin=1.0, error="cancelled")
    assert lines_of(sent, failed)[-1].endswith("500 ms  failed: LinkLost: it broke")
    assert lines_of(sent, left)[-1].endswith("cancelled by its caller")
    assert "\x1b[31m" in lines_of(sent, failed, has_colors=True)[-1]


def test_a_users_own_message_is_told_by_its_fields() -> None:
    sent = record(SENT, "ScaleUp", 1, 1.0, source="a", facts={"engines": 3, "why": "load"}, num_bytes=70)
    ended = record(ENDED, "ScaleUp", 1, 1.25, begin=1.0, facts={"done": True})
    first, second = lines_of(sent, ended)
    assert re.search(r"a +-> b +scale_up +70 B +engines=3 why=load$", first)
    assert re.search(r"a +<- b +scale_up +250 ms +done: done=True$", second)


def test_a_call_whose_asking_node_tells_nothing_is_told_by_the_other() -> None:
    received = record(RECEIVED, "PrepRecv", 1, 1.0, peer="stranger", num_bytes=9)
    answered = record(ANSWERED, "PrepRecv", 1, 1.5, begin=1.0, peer="stranger")
    shown = lines_of(received, answered)
    assert re.search(r"stranger +-> b +prep_recv", shown[0])
    assert re.search(r"stranger +<- b +prep_recv .*500 ms +done$", shown[1])
    assert lines_of(received, answered, nodes=["n", "stranger"]) == []  # It will tell of it itself.


def test_an_end_whose_begin_was_lost_is_told_with_what_it_says_itself() -> None:
    [line] = lines_of(record(ENDED, "PrepRecv", 1, 1.5, begin=1.0, source="main", actor="kv-1"))
    assert re.search(r"main +<- kv-1 +prep_recv +500 ms +done$", line)


def test_every_phase_of_ours_is_told_in_words() -> None:
    reader = Reader(lambda: ["n"])
    told_by_facts: dict[str, dict[str, Any]] = {"prefill": {"num_cached_tokens": 16}, "send": {"lane": "shm"}}
    for number, name in enumerate(sorted(CATEGORY_OF), 1):
        told = reader.read(record(SPAN, name, number, 1.0, facts=told_by_facts.get(name, {})))
        assert told is not None
        assert phrase(told, reader), name


def test_another_router_is_seen_however_quickly_it_was_asked() -> None:
    note = record(SPAN, "reroute", 1, 1.0001, begin=1.0, facts={"to": "main-1", "why": "main-0 died"})
    (line,) = lines_of(note)
    assert "reroute" in line
    assert "went on with main-1: main-0 died" in line


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (0, "tokens"),
        (1, "tokens (attempt 2)"),
        (ATTEMPTS_EACH, "tokens (after 1 other router)"),
        (2 * ATTEMPTS_EACH + 1, "tokens (after 2 other routers, attempt 2)"),
        (1 << HAND_ON_BITS, "tokens"),
        ((2 << HAND_ON_BITS) + 1, "tokens (attempt 2)"),
        (FIRST_DIRECT_ATTEMPT + 7, "tokens"),
    ],
)
def test_attempts_are_told_as_people_count_them(attempt: int, words: str) -> None:
    (line,) = lines_of(record(SENT, "PrepRecv", 1, 1.0, source="a", facts={"num_tokens": 9, "attempt": attempt}))
    assert line.endswith(f"make room for the KV of 9 {words}")


def test_calls_that_never_end_do_not_pile_up() -> None:
    reader = Reader(lambda: ["n"])
    for number in range(MOST_CALLS + 500):
        reader.read(record(SENT, "PrepRecv", number + 1, 1.0, source="a"))
    assert len(reader._calls) == MOST_CALLS


def test_facts_that_are_damaged_or_of_other_types_break_no_line() -> None:
    strange: list[dict[str, Any]] = [{}, {"begin": "x", "end": None}, {"num_tokens": "many", "lane": 3}, {"batch": "?"}]
    names = ["Generate", "PrepRecv", "RemoteSend", "StartGenerate", "ComputeKv", "Admit", "OpenWrite", "CloseWrite"]
    spans = ["http", "prefill", "decode", "compute", "send", "attempt", "blocks", "queue", "place", "wait", "other"]
    for facts in [*strange, {"end": -5, "num_tokens": 9}, {"attempt": "1", "num_bytes": "x", "num_steps": None}]:
        for name in names:
            sent = record(SENT, name, 1, 1.0, source="a", facts=facts)
            ended = record(ENDED, name, 1, 2.0, begin=1.0, facts=facts, num_items=1)
            assert len(lines_of(sent, ended, everything=True)) == 2
        for name in spans:
            assert len(lines_of(record(SPAN, name, 2, 2.0, begin=1.0, facts=facts))) == 1
    damaged = record(SPAN, "prefill", 2, 2.0, begin=1.0)
    broken = msgspec.structs.replace(damaged.record, facts=msgspec.Raw(b"\xc1"))
    assert lines_of(event_of(broken, "n"))


def test_a_terminal_that_is_narrow_gets_lines_that_fit() -> None:
    reader = Reader(lambda: ["n"])
    for width in (100, 120, 139, 140, 200):
        table = Table(reader, ["aaa"], has_colors=False, is_ascii=False, everything=False, width=width)
        shown = reader.read(record(SENT, "ScaleUp", 1, 1.0, source="a", facts={"why": "x" * 300}))
        assert shown is not None
        line = table.line(shown)
        assert len(line) == width
        assert line.endswith("…")
        assert len(table.header()) <= width


def test_who_is_who_is_said_first() -> None:
    table = Table(Reader(list), ["aaa"], has_colors=False, is_ascii=True, everything=False)
    address = Address("n", "ipc:///x", "a")
    kinds = {"main": "router", "p": "engine", "d": "engine", "kv": "kv_manager", "frontend": "frontend"}
    said = table.cast([Entry(name, kind, address) for name, kind in kinds.items()])
    assert said == "-- router main; engines d, p; KV manager kv"


def test_a_wall_time_is_told_to_the_millisecond() -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.250", clock_text(1000.25))
