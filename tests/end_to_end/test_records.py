"""What a request leaves behind: every phase, at the actor that went through it, with both ends as they happened."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.engine.simulated import SimulatedRunner, Simulation
from callboard.actors.protocol import Generate, PrepRecv, Release, SamplingParams
from callboard.bus import AskTimeout, TapRecord, VirtualClock
from callboard.bus.taps import ENDED, SENT, SPAN, decode_facts
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import OutOfBlocks
from callboard.kv.tokens import pack_tokens

MODEL = Simulation(num_layers=4, seconds_per_step=0.01, seconds_per_prefill_token=0.001)
STEP_S, TOKEN_S = 0.01, 0.001
EAGER = """\
import asyncio
from callboard.router import Fleet, Request
async def route(request: Request, fleet: Fleet):
    p, d = fleet.prefill[0], fleet.decode[0]
    async with d.prep_recv(request) as kv:
        sending = asyncio.ensure_future(p.remote_send(request, kv))
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token
        await sending
"""


def fleet_of(model: Simulation = MODEL, **options: Any) -> Any:
    return running_fleet(
        layout=SimulatedRunner(model).layout, simulated=model, hub=InprocHub(), clock=VirtualClock(), **options
    )


def records_of(fleet: Fleet, request_id: str) -> list[tuple[str, TapRecord]]:
    """Return a request's records and the nodes that made them, by time."""
    found = [(name, TapRecord(*row)) for name, node in fleet.nodes.items() for row in node.trace.of(request_id)]
    return sorted(found, key=lambda each: each[1].time)


def spans_of(fleet: Fleet, request_id: str, name: str) -> list[TapRecord]:
    return [record for _, record in records_of(fleet, request_id) if record.what == SPAN and record.name == name]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def test_an_engine_says_how_long_a_sequence_queued_computed_and_decoded() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin") as fleet:
            await fleet.generate(list(range(100)), greedy(11), request_id="r")
            [queue], [prefill], [decode] = (spans_of(fleet, "r", name) for name in ("queue", "prefill", "decode"))
            assert queue.time == prefill.begin
            assert prefill.time == decode.begin
            assert prefill.time - prefill.begin == pytest.approx(STEP_S + 100 * TOKEN_S)
            assert decode.time - decode.begin == pytest.approx(10 * STEP_S)
            facts = decode_facts(prefill.facts)
            assert (facts["num_tokens"], facts["num_cached_tokens"], facts["num_steps"]) == (100, 0, 1)
            facts = decode_facts(decode.facts)
            assert (facts["num_tokens"], facts["num_steps"], facts["batch"]) == (10, 10, 1.0)
            assert facts["step_s"] == pytest.approx(10 * STEP_S)
            assert facts["step_s"] + facts["between_s"] == pytest.approx(decode.time - decode.begin)

    run_virtual(story)


def test_two_sequences_share_steps_and_the_second_waits_for_the_place_of_the_first() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin", max_num_seqs=1) as fleet:
            prompts = [list(range(50)), list(range(100, 150))]
            await asyncio.gather(*(fleet.generate(p, greedy(5), request_id=f"r{i}") for i, p in enumerate(prompts)))
            assert not spans_of(fleet, "r0", "place")
            [place] = spans_of(fleet, "r1", "place")
            [decode] = spans_of(fleet, "r0", "decode")
            assert place.begin < decode.begin < decode.time <= place.time

    run_virtual(story)


def test_a_script_and_what_it_chose_are_told(tmp_path: Path) -> None:
    script = tmp_path / "chooser.py"
    script.write_text(
        "from callboard.router import Fleet, Request\n"
        "async def route(request: Request, fleet: Fleet, *, ratio: float = 0.25):\n"
        "    request.note(because='it is Sunday', cost=3)\n"
        "    async for token in fleet.engines[0].start_generate(request):\n"
        "        yield token\n"
    )

    async def story() -> None:
        async with fleet_of(engines=("a",), script=str(script)) as fleet:
            await fleet.generate(list(range(20)), greedy(2), request_id="r")
            [attempt] = spans_of(fleet, "r", "attempt")
            facts = decode_facts(attempt.facts)
            assert (facts["script"], facts["number"], facts["options"]) == ("chooser", 0, '{"ratio":0.25}')
            assert (facts["why.because"], facts["why.cost"]) == ("it is Sunday", "3")
            assert len(str(facts["version"])) == 12
            before, after = spans_of(fleet, "r", "script")
            [sent] = [r for _, r in records_of(fleet, "r") if r.what == SENT and r.name == "StartGenerate"]
            [ended] = [r for _, r in records_of(fleet, "r") if r.what == ENDED and r.name == "StartGenerate"]
            assert attempt.begin == before.begin <= before.time <= sent.time
            assert ended.time <= after.begin <= after.time <= attempt.time

    run_virtual(story)


def test_a_script_may_note_whatever_it_likes(tmp_path: Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text(
        "from callboard.router import Fleet, Request\n"
        "async def route(request: Request, fleet: Fleet):\n"
        "    request.note(half='\\ud800')\n"
        "    async for token in fleet.engines[0].start_generate(request):\n"
        "        yield token\n"
        "    request.note(**{f'{i}' * 1000: 'x' * 1000 for i in range(1000)})\n"
    )

    async def story() -> None:
        async with fleet_of(engines=("a",), script=str(script)) as fleet:
            for request_id in ("r", "s"):
                await fleet.generate(list(range(20)), greedy(2), request_id=request_id)
            [attempt] = spans_of(fleet, "r", "attempt")
            assert decode_facts(attempt.facts)["why.half"] == "?"
            assert len(attempt.facts) < 10_000

    run_virtual(story)


def test_an_attempt_whose_end_is_cut_short_has_ended(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import asyncio\n"
        "from callboard.router import Fleet, Request\n"
        "async def route(request: Request, fleet: Fleet):\n"
        "    try:\n"
        "        async for token in fleet.engines[0].start_generate(request):\n"
        "            yield token\n"
        "    finally:\n"
        "        await asyncio.sleep(3.0)\n"
    )

    async def story() -> None:
        async with fleet_of(engines=("a",), script=str(script)) as fleet:
            message = Generate("r", "tiny", pack_tokens(list(range(20))), greedy(100))
            async with fleet.router.stream(message, credit=1) as tokens:
                await anext(tokens)
                await asyncio.sleep(0.5)  # The router waits for credit when the stream is left.
            await asyncio.sleep(0.5)
            assert not spans_of(fleet, "r", "attempt")
            await fleet.nodes[fleet.router.address.node].stop()
            [attempt] = spans_of(fleet, "r", "attempt")
            assert attempt.error == "cancelled"

    run_virtual(story)


def test_who_gave_up_waiting_for_a_place_had_waited() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin", max_num_seqs=1) as fleet:
            first = asyncio.ensure_future(fleet.generate(list(range(20)), greedy(200), request_id="first"))
            await asyncio.sleep(0.1)
            message = Generate("second", "tiny", pack_tokens(list(range(20))), greedy(2))
            with pytest.raises(AskTimeout):
                async with fleet.router.stream(message, timeout=0.5) as tokens:
                    await anext(tokens)
            await first
            [place] = spans_of(fleet, "second", "place")
            assert 0.3 < place.time - place.begin < 0.6

    run_virtual(story)


def test_pages_are_sent_by_the_manager_that_has_them_while_the_engine_computes() -> None:
    async def story() -> None:
        async with fleet_of(script="disaggregate") as fleet:
            await fleet.generate(list(range(96)), greedy(3), request_id="r")
            sends, [compute] = spans_of(fleet, "r", "send"), spans_of(fleet, "r", "compute")
            facts = [decode_facts(send.facts) for send in sends]
            assert sum(int(each["num_bytes"] or 0) for each in facts) == 96 * SimulatedRunner(MODEL).layout.token_bytes
            assert {(each["lane"], each["to"]) for each in facts} == {("inproc", "kv-d")}
            assert [(each["layer_begin"], each["layer_end"]) for each in facts] == [(0, 1), (1, 2), (2, 3), (3, 4)]
            assert compute.begin < sends[0].begin < compute.time
            [call] = [r for _, r in records_of(fleet, "r") if r.what == SENT and r.name == "RemoteSend"]
            assert {send.parent for send in sends} == {call.span}
            [ended] = [r for _, r in records_of(fleet, "r") if r.what == ENDED and r.name == "RemoteSend"]
            assert decode_facts(ended.facts)["num_computed_tokens"] == 96

    run_virtual(story)


def test_a_generation_that_comes_before_its_pages_waits_for_them(tmp_path: Path) -> None:
    script = tmp_path / "eager.py"
    script.write_text(EAGER)

    async def story() -> None:
        async with fleet_of(script=str(script)) as fleet:
            await fleet.generate(list(range(64)), greedy(2), request_id="r")
            [pages] = spans_of(fleet, "r", "pages")
            sends = spans_of(fleet, "r", "send")
            assert pages.actor == "kv-d"
            assert pages.begin < sends[-1].time <= pages.time

    run_virtual(story)


def test_a_script_that_waits_for_two_verbs_is_at_work_when_the_last_has_ended(tmp_path: Path) -> None:
    script = tmp_path / "both.py"
    script.write_text(EAGER)

    async def story() -> None:
        async with fleet_of(script=str(script)) as fleet:
            await fleet.generate(list(range(64)), greedy(20), request_id="r")
            [decode] = spans_of(fleet, "r", "decode")
            *_, after = spans_of(fleet, "r", "script")
            assert after.begin >= decode.time

    run_virtual(story)


def test_who_waits_for_blocks_is_told_how_long() -> None:
    async def story() -> None:
        async with fleet_of(engines=("d",), script="round_robin", num_blocks=8) as fleet:
            manager = fleet.managers["kv-d"]
            first = await manager.ask(PrepRecv("first", 0, pack_tokens(list(range(100))), engine="d"))
            second = PrepRecv("second", 0, pack_tokens(list(range(200, 300))), wait_s=5.0, engine="d")
            waiting = asyncio.ensure_future(manager.ask(second))
            await asyncio.sleep(1.0)
            await manager.ask(Release(first.kv))
            await waiting
            [blocks] = spans_of(fleet, "second", "blocks")
            assert blocks.time - blocks.begin == pytest.approx(1.0, abs=0.01)
            assert decode_facts(blocks.facts) == {"purpose": "prep_recv", "num_blocks": 7}
            third = PrepRecv("third", 0, pack_tokens(list(range(300, 400))), wait_s=0.5, engine="d")
            with pytest.raises(OutOfBlocks):
                await manager.ask(third)
            assert spans_of(fleet, "third", "blocks")
            assert not spans_of(fleet, "first", "blocks")

    run_virtual(story)


def test_a_reader_that_stops_is_a_pause_in_its_engine_and_credit_that_is_waited_for() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin", max_buffered_tokens=16) as fleet:
            prompt = pack_tokens(list(range(20)))
            message = Generate("r", "tiny", prompt, greedy(600))
            async with fleet.router.stream(message, credit=8, timeout=100) as tokens:
                await anext(tokens)
                await asyncio.sleep(15.0)
                async for _ in tokens:
                    pass
            pauses = spans_of(fleet, "r", "paused")
            assert max(pause.time - pause.begin for pause in pauses) > 5
            credits = {(record.actor, record.name) for record in spans_of(fleet, "r", "credit")}
            assert ("main", "credit") in credits
            decodes = spans_of(fleet, "r", "decode")
            assert sum(int(decode_facts(each.facts)["num_steps"] or 0) for each in decodes) == 599

    run_virtual(story)


def test_a_preempted_sequence_queues_and_computes_again() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin", num_blocks=12) as fleet:
            prompts = [[seed, *range(60)] for seed in (500, 600)]
            await asyncio.gather(*(fleet.generate(p, greedy(60), request_id=f"r{i}") for i, p in enumerate(prompts)))
            queues = max(len(spans_of(fleet, f"r{i}", "queue")) for i in range(2))
            assert queues >= 2

    run_virtual(story)


def test_a_request_that_is_left_has_its_phases_ended() -> None:
    async def story() -> None:
        async with fleet_of(engines=("a",), script="round_robin") as fleet:
            message = Generate("r", "tiny", pack_tokens(list(range(20))), greedy(1000))
            async with fleet.router.stream(message) as tokens:
                for _ in range(5):
                    await anext(tokens)
            await fleet.assert_nothing_leaks()
            [decode] = spans_of(fleet, "r", "decode")
            assert decode.time > decode.begin
            ends = {record.name: record.error for _, record in records_of(fleet, "r") if record.what == ENDED}
            assert ends["Generate"] == ends["StartGenerate"] == "cancelled"
            [attempt] = spans_of(fleet, "r", "attempt")
            assert attempt.time >= decode.begin

    run_virtual(story)
