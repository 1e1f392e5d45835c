"""Explaining a request: which one is meant, and what people and machines are told of it."""

import io
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fleet import running_fleet
from rich.console import Console
from synthetic_trace import Shape, Writer, disaggregated, whole

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import Generate, SamplingParams
from callboard.bus import VirtualClock
from callboard.bus.taps import RECEIVED, TapRecord, finished
from callboard.bus.testing import run_virtual
from callboard.kv.tokens import pack_tokens
from callboard.tools.cli import main
from callboard.tools.errors import CliError
from callboard.tools.trace.breakdown import breakdown
from callboard.tools.trace.event import Event, event_of
from callboard.tools.trace.explain import Source, pick
from callboard.tools.trace.explained import as_json, mean_itl_s, print_text
from callboard.tools.trace.past import collect
from callboard.tools.trace.story import Story, assemble
from callboard.tools.trace.waterfall import bar, lines_of, walk


def story_of(events: Iterable[Event]) -> Story:
    [story] = assemble(events).values()
    return story


def text_of(story: Story, **options: Any) -> str:
    out = io.StringIO()
    print_text(story, Console(file=out, width=500, highlight=False), **options)
    return out.getvalue()


def source(*ids: str, **shapes: Shape) -> Source:
    """Requests a second apart, known in any order."""
    spans = itertools.count(1)
    events = [event for n, name in enumerate(ids) for event in disaggregated(name, n, shapes.get(name, Shape()), spans)]
    random.Random(1).shuffle(events)
    return Source(lambda: iter(events), 'fleet "test"')


# ---- which request -----------------------------------------------------------------------------------------------


def test_a_request_is_named_by_its_id_by_how_it_begins_or_by_a_sequence() -> None:
    known = source("4f1d22c0", "4f1e0000", "chatcmpl-77")
    assert pick(known, "4f1d22c0").request_id == "4f1d22c0"
    assert pick(known, "4f1e").request_id == "4f1e0000"
    assert pick(known, "77").request_id == "chatcmpl-77"
    assert pick(known, "chatcmpl-77.3").request_id == "chatcmpl-77"


def test_without_a_name_it_is_the_last_that_is_over() -> None:
    known = source("a", "b", "c", a=Shape(num_tokens=200))
    assert pick(known, "").request_id == "a"
    under_way = [event for event in known.read() if event.record.request_id != "b" or event.time < 1.4]
    assert pick(Source(lambda: under_way, ""), "").request_id == "a"
    assert pick(source("a", "b"), "").request_id == "b"


def test_what_is_given_back_late_does_not_make_a_request_the_last() -> None:
    known = source("a", "b")
    [end] = [event for event in known.read() if event.record.name == "http" and event.record.request_id == "a"]
    late = msgspec.structs.replace(end.record, name="give_back", time=end.record.time + 60.0, span=1 << 40)
    events = [*known.read(), event_of(late, end.node)]
    assert pick(Source(lambda: events, ""), "").request_id == "b"


def test_where_none_is_over_it_is_the_last_one() -> None:
    events = [event for event in disaggregated("a", 0.0) if event.time < 0.2]
    assert pick(Source(lambda: events, ""), "").end is None


def test_the_slowest_is_the_one_that_took_longest() -> None:
    assert pick(source("a", "b", "c", b=Shape(prefill_s=0.9)), "", is_slowest=True).request_id == "b"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("4f1", r'2 requests begin with "4f1": 4f1d22c0, 4f1e0000$'),
        ("4f1d22c1", r'no node remembers a request "4f1d22c1": do you mean 4f1d22c0\?$'),
        ("zzz", r'no node remembers a request "zzz": 3 are known, and this one may be too long ago$'),
    ],
)
def test_a_request_that_is_not_known_is_refused_in_a_sentence(wanted: str, words: str) -> None:
    with pytest.raises(CliError, match=words):
        pick(source("4f1d22c0", "4f1e0000", "chatcmpl-77"), wanted)


def test_a_fleet_that_has_served_nothing_says_so() -> None:
    with pytest.raises(CliError, match='fleet "test" knows of no request yet'):
        pick(Source(list, 'fleet "test"'), "")


def test_a_recording_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["trace", "explain", "--from", str(tmp_path / "no.cbtrace")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no.cbtrace" in line


# ---- for people --------------------------------------------------------------------------------------------------


def test_the_head_says_what_it_was_and_how_long_it_took() -> None:
    text = text_of(story_of(disaggregated("r", 5.0)))
    head = text.split("\n\n")[0]
    assert "Request r at " in head
    assert "model smollm2-135m, 312 prompt tokens, 32 output tokens" in head
    assert "TTFT 321 ms; JCT 2026 ms; ITL 55.0 ms on average; 99.9% of the time is explained" in head
    assert "Script disaggregate 1" in head
    assert "Engines: decode (prep_recv and start_generate), prefill (remote_send)" in head


def test_the_tree_says_what_each_sub_request_did() -> None:
    text = text_of(story_of(disaggregated("r", 5.0, Shape(wait_blocks_s=0.3))))
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith(("├", "└", "│", " "))}
    assert "16 of 312 tokens in its cache, takes 296" in rows["prep_recv"]
    assert "296 tokens computed, 16 reused; 1.2 MiB by shm" in rows["remote_send"]
    assert "32 tokens, the first after 58.1 ms" in rows["start_generate"]
    tree = text.split("\n\n")[1]
    assert "for 19 free blocks" in tree
    assert "296 tokens (16 cached); 1,184 tokens/s; 1 step" in tree
    assert "1.2 MiB by shm to kv-cpu1, 96.4 MiB/s; 2.4 ms of it after the last layer" in tree
    assert "31 tokens; 18 tokens/s; 31 steps; mean batch 1.0" in tree


def test_the_table_adds_up_and_has_a_line_for_what_is_not_known() -> None:
    table = text_of(story_of(disaggregated("r", 5.0))).split("\n\n")[2].splitlines()
    assert table[0].split()[-5:] == ["ACTOR", "MS", "%", "OF", "TTFT"]
    for column, whole_ms in ((slice(25, 34), 2026.3), (slice(44, 53), 320.9)):
        numbers = [float(line[column]) for line in table[1:]]
        assert numbers[-1] == whole_ms
        assert sum(numbers[:-1]) == pytest.approx(whole_ms, abs=0.5)
    assert table[-2].startswith("unexplained")
    assert table[-1].startswith("in all")
    assert table[1] == "computing      decode       1760.0   86.9%       56.0  decode 1705 ms, prefill 55.0 ms"


def test_bars_stand_where_their_spans_do() -> None:
    story = story_of(disaggregated("r", 5.0))
    lines = {line.name: line for line in walk(lines_of(story))}
    assert story.end is not None
    drawn = {name: bar(line.spans, story.begin, story.end, 40) for name, line in lines.items()}
    assert {len(each) for each in drawn.values()} == {40}
    assert drawn["POST /v1/chat/completions"] == "━" * 40
    assert drawn["remote_send"] == "━━━━━" + " " * 35
    assert drawn["decode"] == " " * 6 + "━" * 34
    assert drawn["prep_recv"] == "╸" + " " * 39


def test_an_error_stands_where_it_happened_and_is_passed_on_above() -> None:
    story = story_of(disaggregated("r", 5.0, Shape(error="ActorDied: decode is dead")))
    lines = text_of(story).splitlines()
    assert lines[1] == "It failed: ActorDied: decode is dead"
    [decode] = [line for line in lines if "└ decode" in line]
    assert decode.endswith("failed: ActorDied: decode is dead")
    [start] = [line for line in lines if "└ start_generate" in line]
    assert start.endswith("  failed")


def test_hundreds_of_packed_pieces_have_one_line_and_are_accounted_for() -> None:
    events = disaggregated("a", 0.0)
    send = next(event.record.span for event in events if event.record.name == "RemoteSend")
    [begin] = [event.time for event in events if event.record.name == "ComputeKv" and event.record.what == RECEIVED]
    writer = Writer("a", itertools.count(1000))
    for number in range(300):
        piece = writer.call("TakePages", "kv-cpu1", "kv-cpu0", begin + 0.0005 * number, send)
        writer.end(piece, piece.received + 0.001 + 0.02 * (number % 3))  # Some take long enough for a line each.
    story = story_of([*events, *writer.events])
    text = text_of(story)
    assert text.count("take_pages") == text.count("take_pages x300") == 1
    assert breakdown(story).share > 0.98
    last = writer.call("TakePages", "kv-cpu1", "kv-cpu0", begin + 0.16, send)
    writer.end(last, last.received + 0.001, error="StaleReservation: given up")
    assert "failed: StaleReservation: given up" in text_of(story_of([*events, *writer.events]))


def test_several_attempts_are_shown_each_with_its_end() -> None:
    ids = itertools.count(1)
    writer = Writer("r", ids)
    root = next(ids)
    generate = writer.call("Generate", "main", "frontend", 0.0, root, num_tokens=9)
    died, none = "ActorDied: d is dead", "NoEngine: none is there"
    for number, error, begin, end in ((0, died, 0.1, 1.0), (1, none, 1.0, 1.01), (1, "", 1.1, 2.0)):
        attempt = next(ids)
        if error != none:
            start = writer.call("StartGenerate", f"d{number}", "main", begin, attempt, num_tokens=9)
            writer.end(start, end - 0.1, error=error, items=3)
        facts = {"script": "s", "version": "1", "number": number, "options": "{}"}
        writer.span("attempt", "main", begin, end, generate.span, span=attempt, error=error, **facts)
    writer.end(generate, 2.2, items=3)
    writer.span("http", "frontend", 0.0, 2.3, 0, span=root, status=200)
    tree = text_of(story_of(writer.events)).split("\n\n")[1]
    rows = tree.splitlines()[2:]
    # The router counts as one attempt what found no engine, and went on when there was one.
    wanted = ["├ attempt 1", "│ └ start_generate", "├ attempt 2", "└ attempt 2", "  └ start_generate"]
    assert [row[: len(begin)] for row, begin in zip(rows, wanted, strict=True)] == wanted
    assert ["failed: ActorDied: d is dead" in row for row in rows] == [False, True, False, False, False]


def test_what_a_script_hands_to_another_router_counts_once_and_is_its_own() -> None:
    ids = itertools.count(1)
    writer = Writer("r", ids)
    root, outer, inner = next(ids), next(ids), next(ids)
    generate = writer.call("Generate", "main", "frontend", 0.0, root, num_tokens=9)
    handed = writer.call("Generate", "long", "main", 0.2, outer, num_tokens=9)
    writer.end(handed, 1.8, items=3)
    writer.span("attempt", "long", 0.3, 1.7, handed.span, span=inner, script="chain", version="2", number=0)
    writer.span("attempt", "main", 0.1, 1.9, generate.span, span=outer, script="mine", version="1", number=0)
    writer.end(generate, 2.0, items=3)
    writer.span("http", "frontend", 0.0, 2.1, 0, span=root, status=200)
    story = story_of(writer.events)
    assert (story.num_tokens, story.script, story.version) == (3, "mine", "1")


def test_a_request_under_way_is_explained_until_now() -> None:
    story = story_of([event for event in disaggregated("r", 5.0) if event.time < 5.2])
    assert "not over after 4000 ms: explained until its last record, 161 ms" in text_of(story, now=story.begin + 4)
    text = text_of(story)
    assert "not over: explained until its last record, 161 ms after its begin" in text
    assert "Under way: remote_send of kv-cpu0." in text
    assert "..." in next(line for line in text.splitlines() if line.startswith("remote_send"))


def test_clocks_of_other_hosts_and_nodes_that_could_not_be_asked_are_told() -> None:
    far = ("kv-cpu0", "prefill")
    events = [replace(e, error_s=0.0004) if e.node in far else e for e in disaggregated("r", 5.0)]
    text = text_of(story_of(events), missing={"decode": "nobody listens"})
    assert "Other hosts' clocks may be off: kv-cpu0 by 400 us, prefill by 400 us" in text
    assert "decode could not be asked, what it knows is missing: nobody listens" in text
    assert "clocks" not in text_of(story_of(disaggregated("r", 5.0)))


def test_several_sequences_are_told_apart() -> None:
    ids = itertools.count(1)
    events = [*disaggregated("r", 5.0, ids=ids)]
    events += [event for event in whole("r.1", 5.0, ids=ids) if event.record.name not in ("http", "read")]
    tree = text_of(story_of(events)).split("\n\n")[1]
    assert "sequence r " in tree
    assert "sequence r.1" in tree


# ---- for machines ------------------------------------------------------------------------------------------------


def test_json_has_all_spans_and_a_breakdown_that_adds_up() -> None:
    story = story_of(disaggregated("r", 5.0))
    found = json.loads(json.dumps(as_json(story)))
    assert len(found["spans"]) == len(story.spans)
    ids = {span["id"] for span in found["spans"]}
    assert len(ids) == len(story.spans)
    assert all(span["parent"] in ids for span in found["spans"] if span["parent"])
    parts = sum(part["ms"] for part in found["breakdown"]["parts"])
    assert parts + found["breakdown"]["unexplained_ms"] == pytest.approx(found["jct_ms"], abs=1e-3)
    assert (found["engines"], found["is_over"]) == (
        {"decode": ["prep_recv", "start_generate"], "prefill": ["remote_send"]},
        True,
    )


# ---- production actors on the virtual clock ----------------------------------------------------------------------

STEP_S, PREFILL_S, DECODE_S = 0.01, 0.001, 0.002
COSTS = Simulation(seconds_per_step=STEP_S, seconds_per_prefill_token=PREFILL_S, seconds_per_decode=DECODE_S)


async def _served(prompts: list[int], num_tokens: int, **settings: Any) -> dict[str, Story]:
    layout = SimulatedRunner(COSTS).layout
    async with running_fleet(layout=layout, clock=VirtualClock(), simulated=COSTS, **settings) as fleet:
        for index, num_prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
            await fleet.generate(list(range(num_prompt)), sampling, request_id=f"r{index}")
        past = await collect(fleet.client, fleet.actors["directory"].ref.address)
        assert past.missing == {}
        trace = fleet.client.trace  # Who asks the router here is in no directory.
        own = [TapRecord(*finished(row)) for request_id in trace.request_ids() for row in trace.of(request_id)]
        return assemble([*past.events, *(event_of(record, "client") for record in own)])


def test_on_the_virtual_clock_every_part_is_exactly_what_it_cost() -> None:
    stories = run_virtual(lambda: _served([100], 5))
    story = stories["r0"]
    found = breakdown(story)
    parts = {(part.actor, part.name): part.seconds for part in found.parts}
    assert parts["p", "compute"] == pytest.approx(STEP_S + 100 * PREFILL_S)
    assert parts["d", "prefill"] == pytest.approx(STEP_S + DECODE_S)  # The last token once more, for its logits.
    assert parts["d", "decode"] == pytest.approx(4 * (STEP_S + DECODE_S))
    # What is sent after the last layer, and no more: messages take no time here.
    assert found.jct_s == pytest.approx(sum((0.11, 0.012, 0.048)) + parts["kv-p", "send"], abs=1e-6)
    assert 0 < parts["kv-p", "send"] < 0.004
    assert found.share == pytest.approx(1.0)
    assert [(span.name, span.actor) for span in story.sub_requests] == [
        *(("prep_recv", "kv-d"), ("remote_send", "kv-p"), ("start_generate", "d"))
    ]
    assert (story.num_prompt_tokens, story.num_tokens, story.script) == (100, 5, "disaggregate")
    assert story.ttft_s == pytest.approx(0.122 + parts["kv-p", "send"], abs=1e-6)
    assert "4 tokens; 83 tokens/s; 4 steps; mean batch 1.0" in text_of(story)


def test_what_is_cached_is_not_sent_again_and_the_words_say_so() -> None:
    story = run_virtual(lambda: _served([96, 96], 2))["r1"]
    assert "96 of 96 tokens in its cache, nothing to receive" in text_of(story)
    assert "remote_send" not in {span.name for span in story.sub_requests}


def test_what_a_slow_reader_holds_up_is_told_as_unread() -> None:
    """Nobody reads for 20 s: credit runs out at the router, then at the engine, which pauses."""

    async def main() -> Story:
        costs, sampling = Simulation(seconds_per_step=0.001), SamplingParams(max_tokens=3000, ignore_eos=True)
        layout, clock = SimulatedRunner(costs).layout, VirtualClock()
        async with running_fleet(
            layout=layout, clock=clock, simulated=costs, engines=("e",), script="round_robin"
        ) as fleet:
            message = Generate("slow", "tiny", pack_tokens(list(range(50))), sampling)
            async with fleet.router.stream(message, timeout=1000) as tokens:
                await anext(tokens)
                await clock.sleep(20)
                async for _ in tokens:
                    pass
            past = await collect(fleet.client, fleet.actors["directory"].ref.address)
        return story_of(event for event in past.events if event.record.request_id == "slow")

    story = run_virtual(main)
    found = breakdown(story)
    assert found.share == pytest.approx(1.0)
    assert {category: round(seconds, 1) for category, seconds in found.by_category().items()} == {
        "credit": 19.2,
        "compute": 3.0,
    }
    rows = {line.split()[1]: line for line in text_of(story).splitlines() if line.startswith(("├", "└", "│"))}
    assert "2,999 tokens; 1,000 tokens/s; 2,999 steps; mean batch 1.0" in rows["decode"]
    assert "nobody read its tokens" in rows["paused"]
    assert mean_itl_s(story) == pytest.approx(0.001)


THINKS = """
import asyncio
from callboard.router import Fleet, Request, Tokens

async def route(request: Request, fleet: Fleet, *, think_s: float = 0.5) -> Tokens:
    [p] = [engine for engine in fleet.engines if engine.name == "p"]
    [d] = [engine for engine in fleet.engines if engine.name == "d"]
    await asyncio.sleep(think_s)
    request.note(chosen=d.name)
    kv, _ = await asyncio.gather(d.prep_recv(request), p.prep_recv(request))
    await asyncio.sleep(think_s / 2)
    await p.remote_send(request, kv)
    async for token in d.start_generate(request, kv=kv):
        yield token
    await asyncio.sleep(think_s / 5)
"""


def test_the_scripts_own_time_is_what_lies_between_its_verbs(tmp_path: Path) -> None:
    script = tmp_path / "thinks.py"
    script.write_text(THINKS)
    story = run_virtual(lambda: _served([50], 3, script=str(script), options={"think_s": 1.0}))["r0"]
    found = breakdown(story)
    assert found.share == pytest.approx(1.0)
    assert found.by_category()["script"] == pytest.approx(1.7)
    spans = [span for span in story.spans if span.name == "script"]
    # Before the two verbs at once, then before remote_send, before start_generate (at once), and after its last token.
    assert [round(span.seconds, 6) for span in spans] == [1.0, 0.5, 0.0, 0.2]
    text = text_of(story)
    assert "Script thinks" in text
    assert "(think_s=1.0), noted chosen=d" in text
