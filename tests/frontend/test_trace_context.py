"""W3C trace context: what a traceparent and a tracestate may look like, and what is made of the others."""

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE_S

from callboard.actors.frontend.trace_context import MOST_STATE, TraceContext, accept, parse
from callboard.bus import AskTimeout, TapRecord
from callboard.bus.taps import decode_facts

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{PARENT}-01"
HEX = "0123456789abcdef"

trace_ids = st.text(HEX, min_size=32, max_size=32).filter(lambda text: text.strip("0"))
span_ids = st.text(HEX, min_size=16, max_size=16).filter(lambda text: text.strip("0"))


@given(trace_ids, span_ids, st.integers(0, 255))
def test_a_good_traceparent_is_taken_as_it_is(trace_id: str, parent_id: str, flags: int) -> None:
    found = parse(f"00-{trace_id}-{parent_id}-{flags:02x}")
    assert found == TraceContext(trace_id, parent_id, flags & 3)


@given(trace_ids, st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_what_is_returned_is_a_good_traceparent(trace_id: str, span: int, flags: int) -> None:
    returned = TraceContext(trace_id, flags=flags).traceparent(span)
    assert len(returned) == 55
    assert parse(returned) == TraceContext(trace_id, f"{span:016x}", flags)


@given(st.text(max_size=80))
def test_any_text_is_a_context_or_none(text: str) -> None:
    found = parse(text, text)
    assert found is None or text.strip(" \t").startswith(f"{text.strip()[:3]}{found.trace_id}-{found.parent_id}-")


@given(st.integers(0, 54), st.characters(exclude_characters=HEX + "- \t"))
def test_one_wrong_character_spoils_it(where: int, wrong: str) -> None:
    assert parse(GOOD[:where] + wrong + GOOD[where + 1 :]) is None


@pytest.mark.parametrize(
    "bad",
    [
        "",
        GOOD[:-1],
        GOOD + "-",
        GOOD + "-what",
        GOOD + ".",
        GOOD.upper(),
        GOOD.replace("-", "_"),
        f"ff-{TRACE}-{PARENT}-01",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-.1",
        f"cc-{TRACE}-{PARENT}-01.what",
        f"cc-{TRACE}-{PARENT}",
        GOOD + "\n",
        f"{GOOD},{GOOD}",
    ],
)
def test_a_bad_traceparent_is_none(bad: str) -> None:
    assert parse(bad) is None


@pytest.mark.parametrize(
    "later", [f"01-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-what-ever", f"01-{TRACE}-{PARENT}-01-"]
)
def test_a_later_version_is_read_as_far_as_it_is_known(later: str) -> None:
    assert parse(later) == TraceContext(TRACE, PARENT, 1)


def test_blanks_around_it_are_not_part_of_it() -> None:
    assert parse(f" \t{GOOD} ") == parse(GOOD)


def test_without_one_good_traceparent_a_new_trace_begins() -> None:
    rng = random.Random(7)
    begun = [accept(headers, rng) for headers in ([], [(b"traceparent", b"no")], [(b"traceparent", GOOD.encode())] * 2)]
    assert len({each.trace_id for each in begun}) == 3
    for each in begun:
        assert each.parent_id is None
        assert each.is_sampled
        assert each.facts() == {"trace_id": each.trace_id}
        assert parse(each.traceparent(5)) is not None


def test_a_trace_that_begins_here_has_no_state_of_another() -> None:
    headers = [(b"traceparent", b"no"), (b"tracestate", b"a=1")]
    assert accept(headers, random.Random(7)).state == ""


def test_the_answer_names_the_callers_trace_and_our_span() -> None:
    context = accept([(b"accept", b"*/*"), (b"traceparent", GOOD.encode()), (b"tracestate", b"a=1")], random.Random(7))
    value = f"00-{TRACE}-00000000000000ff-01".encode()
    assert context.headers(255) == [(b"traceparent", value), (b"traceresponse", value)]
    assert context.facts() == {"trace_id": TRACE, "parent_id": PARENT, "sampled": True, "trace_state": "a=1"}


def test_a_caller_that_does_not_sample_is_heard() -> None:
    context = parse(f"00-{TRACE}-{PARENT}-00")
    assert context is not None
    assert not context.is_sampled
    assert context.traceparent(1).endswith("-00")


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("a=1", "a=1"),
        ("a=1, b=2\t,,c=3", "a=1,b=2,c=3"),
        ("rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ("tenant@system=x y", "tenant@system=x y"),
        ("0k*_/-=:;!", "0k*_/-=:;!"),
        ("a", ""),
        ("a=1,a=2", ""),
        ("A=1", ""),
        ("a=", ""),
        ("a=1=2", ""),
        ("a=\x7f", ""),
        ("=1", ""),
        ("b=2,a =1", ""),
        (f"{'k' * 257}=1", ""),
        (f"a={'v' * 257}", ""),
        (",".join(f"k{index}=1" for index in range(33)), ""),
    ],
)
def test_a_tracestate_is_kept_if_every_member_is_good(state: str, kept: str) -> None:
    found = parse(GOOD, state)
    assert found is not None
    assert found.state == kept


def test_several_tracestate_headers_are_one() -> None:
    headers = [(b"tracestate", b"a=1"), (b"traceparent", GOOD.encode()), (b"tracestate", b"b=2")]
    assert accept(headers, random.Random(7)).state == "a=1,b=2"


def test_of_a_long_tracestate_long_members_go_first_and_then_the_last() -> None:
    long = "long=" + "v" * 200
    short = [f"k{index}=" + "v" * 61 for index in range(8)]
    found = parse(GOOD, ",".join([short[0], long, *short[1:]]))
    assert found is not None
    assert found.state == ",".join(short[:7])


keys = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-*/@", min_size=1, max_size=40).filter(
    lambda key: key[0] not in "_-*/@"
)
values = st.text("abc019!~:; ", min_size=1, max_size=256).filter(lambda value: value[-1] != " ")


@given(st.dictionaries(keys, values, max_size=32))
def test_whole_members_in_their_order_within_the_limit_are_passed_on(members: dict[str, str]) -> None:
    given_members = [f"{key}={value}" for key, value in members.items()]
    found = parse(GOOD, ",".join(given_members))
    assert found is not None
    assert len(found.state) <= MOST_STATE
    kept = found.state.split(",") if found.state else []
    assert kept == [member for member in given_members if member in kept]
    if len(",".join(given_members)) <= MOST_STATE:
        assert kept == given_members
    assert parse(GOOD, found.state) == found


# ---- at the door --------------------------------------------------------------------------------------------------


async def test_every_answer_names_its_callers_trace_and_a_span_of_ours(open_door: Any) -> None:
    door = await open_door(api_keys=("secret",))
    given = {"traceparent": GOOD, "authorization": "Bearer secret"}
    good = {"model": "tiny", "prompt": "the quick"}
    answers = {
        200: await door.http.post("/v1/completions", json=good, headers=given),
        400: await door.http.post("/v1/completions", content=b"{", headers=given),
        401: await door.http.post("/v1/completions", json=good, headers={"traceparent": GOOD}),
        404: await door.http.get("/nowhere", headers=given),
        405: await door.http.get("/v1/completions", headers=given),
    }
    streamed = await door.http.post("/v1/completions", json={**good, "stream": True}, headers=given)
    spans = set()
    for status, answer in [*answers.items(), (200, streamed)]:
        assert answer.status_code == status
        context = parse(answer.headers["traceparent"])
        assert context is not None
        assert context.trace_id == TRACE
        assert context.parent_id not in (None, PARENT)
        assert answer.headers["traceresponse"] == answer.headers["traceparent"]
        spans.add(context.parent_id)
    assert len(spans) == 6


async def test_a_failed_answer_names_the_trace_too(door: Any) -> None:
    door.router.says(AskTimeout("late"))
    answer = await door.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "the quick"}, headers={"traceparent": GOOD}
    )
    assert answer.status_code == 504
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert answer.headers["x-request-id"]


async def test_with_a_bad_traceparent_the_answer_names_a_new_trace(door: Any) -> None:
    answers = [
        await door.http.post("/v1/completions", json={"model": "tiny", "prompt": "the"}, headers={"traceparent": bad})
        for bad in ("00-no", GOOD.upper())
    ]
    contexts = [parse(answer.headers["traceparent"]) for answer in answers]
    traces = {context.trace_id for context in contexts if context is not None}
    assert len(traces) == 2
    assert TRACE not in traces


async def test_the_router_hears_the_trace_of_a_client_that_sent_one(door: Any) -> None:
    given = {"traceparent": GOOD, "tracestate": "a=1", "x-team": "blue"}
    answer = await door.http.post("/v1/completions", json={"model": "tiny", "prompt": "the"}, headers=given)
    heard = door.router.asked[-1].headers
    assert heard == {"x-team": "blue", "traceparent": answer.headers["traceparent"], "tracestate": "a=1"}
    await door.http.post("/v1/completions", json={"model": "tiny", "prompt": "the"}, headers={"x-team": "blue"})
    assert door.router.asked[-1].headers == {"x-team": "blue"}


async def test_only_a_stream_says_when_its_first_token_left(door: Any) -> None:
    node = door.frontend.node
    for is_stream in (True, False):
        body = {"model": "tiny", "prompt": "the", "stream": is_stream}
        name = (await door.http.post("/v1/completions", json=body)).headers["x-request-id"]
        found: list[TapRecord] = []
        async with asyncio.timeout(PATIENCE_S):
            while not found:
                await asyncio.sleep(0.01)  # The answer has come; its record follows.
                found = [record for row in node.trace.of(name) if (record := TapRecord(*row)).name == "http"]
        [http] = found
        assert ("first_s" in decode_facts(http.facts)) is is_stream
