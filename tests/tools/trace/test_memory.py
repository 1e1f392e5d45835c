"""A tracer's memory does not grow with what passes through it. ``python tests/tools/trace/test_memory.py 1000000``."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from waiting import PATIENCE_S

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.directory import Directory
from callboard.actors.trace_protocol import TRACER
from callboard.actors.tracer import Tracer
from callboard.bus import Node
from callboard.bus.taps import ANSWERED, ENDED, NO_BODY, NO_FACTS, RECEIVED, SENT, SPAN

PAGE = os.sysconf("SC_PAGE_SIZE")
MOST_BEHIND = 10_000
MOST_GROWTH = 24 << 20
"""What waits while the machine is busy with other things is bounded too, and the allocator keeps it."""
FACTS = msgspec.Raw(msgspec.msgpack.encode({"num_tokens": 312, "engine": "decode", "attempt": 0}))
CALLS = ("Generate", "PrepRecv", "RemoteSend", "StartGenerate")


def make_request(node: Node, number: int) -> int:
    """Let a node note what it would of one request; one call in eight never ends. Return how many records those are."""
    request_id, num = f"chatcmpl-{number:016x}", 0
    for index, name in enumerate(CALLS):
        span, now = node.new_span(), node.clock.now()
        for what in (SENT, RECEIVED, ANSWERED, ENDED):
            if what == ENDED and (number + index) % 8 == 0:
                continue
            begin = 0.0 if what in (SENT, RECEIVED) else now
            facts = FACTS if what == SENT else NO_FACTS
            ids = (request_id, span, 0, 300, 0, 0.0, "")
            node.record((what, node.clock.now(), begin, "main", "frontend", node.name, name, *ids, facts, NO_BODY))
            num += 1
    now = node.clock.now()
    node.record(
        (SPAN, now, now, "main", "", "", "decode", request_id, node.new_span(), 0, 0, 0, 0.0, "", FACTS, NO_BODY)
    )
    return num + 1


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def piped(first: list[str], second: list[str]) -> "tuple[subprocess.Popen[str], subprocess.Popen[str]]":
    one = subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    two = subprocess.Popen(second, stdin=one.stdout, stdout=subprocess.PIPE, text=True)
    assert one.stdout is not None
    one.stdout.close()
    return one, two


async def pass_through(num_records: int, form: str) -> tuple[int, int, int, list[int]]:
    """Run ``callboard trace`` on a node that makes so many records; return those, lines, lost ones and its memory."""
    async with Node("control", endpoint="tcp://127.0.0.1:0", fleet="soak") as node:
        tracer, directory = Tracer(), Directory()
        await start_actor(node, TRACER, tracer)
        await start_actor(node, "directory", directory)
        command = [sys.executable, "-P", "-m", "callboard.tools.cli", "trace", "--format", form]
        command += ["--fleet", f"soak@{node.endpoint}"]
        trace, count = piped(command, ["wc", "-l"])
        async with asyncio.timeout(PATIENCE_S):
            while not tracer.num_followers:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
        num, requests, memory = 0, 0, []
        while num < num_records:
            num += make_request(node, requests)
            requests += 1
            if requests % 20 == 0:
                await asyncio.sleep(0)
                while tracer.num_followers and len(tracer._followers[0].rows) > MOST_BEHIND:
                    await asyncio.sleep(0.005)
            if requests % 200 == 0:
                memory.append(resident(trace.pid))
        await asyncio.sleep(2.0)
        memory.append(resident(trace.pid))
        trace.send_signal(2)
        _, errors = await asyncio.to_thread(trace.communicate, None, PATIENCE_S)
        lines, _ = await asyncio.to_thread(count.communicate, None, PATIENCE_S)
        assert trace.returncode == 0, errors
        assert errors.startswith("callboard: left soak, which runs on")
        lost = int(errors.split(";")[1].split()[0]) if ";" in errors else 0
        for actor in (tracer, directory):
            await stop_actor(actor)
        return num, int(lines), lost, memory


@pytest.mark.parametrize("form", ["text", "jsonl"])
async def test_memory_stays_flat_while_records_pass(form: str) -> None:
    num, lines, lost, memory = await pass_through(150_000, form)
    assert lost == 0
    if form == "jsonl":
        assert lines >= num
    warm = len(memory) // 2  # By then, calls that never end have filled their table.
    assert max(memory[warm:]) - memory[warm] < MOST_GROWTH


if __name__ == "__main__":
    for form in ("text", "jsonl"):
        num, lines, lost, memory = asyncio.run(pass_through(int(sys.argv[1]), form))
        tenths = [memory[len(memory) * tenth // 10] >> 10 for tenth in range(10)] + [memory[-1] >> 10]
        print(f"{form}: {num} records, {lines} lines, {lost} lost; KiB resident by tenths: {tenths}", flush=True)
