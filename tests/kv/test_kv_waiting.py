"""Who waits for whom at a KV manager, and what must never wait: real engines, the virtual clock."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fleet import Fleet, running_fleet

from callboard.actors.actor import stop_actor
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import (
    Admit,
    Finish,
    PrepRecv,
    RemoteSend,
    Reserved,
    SamplingParams,
    StartGenerate,
)
from callboard.bus import VirtualClock
from callboard.bus.errors import ActorDied, LinkLost
from callboard.bus.testing import run_virtual
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import OutOfBlocks
from callboard.kv.tokens import pack_tokens

LAYOUT = SimulatedRunner(Simulation()).layout
SLOW = Simulation(seconds_per_step=0.01)


class PostponingHub(InprocHub):
    """A hub on which what one node sends to another may be made late."""

    def __init__(self) -> None:
        super().__init__()
        self.late: dict[tuple[str, str], float] = {}

    def delay(self, sender: str, receiver: str) -> float:
        return self.late.get((sender, receiver), 1e-4)


@asynccontextmanager
async def fleet_of(**options: Any) -> AsyncIterator[Fleet]:
    settings = {"hub": PostponingHub(), "num_blocks": 16, "simulated": SLOW, "script": "round_robin", **options}
    async with running_fleet(layout=LAYOUT, clock=VirtualClock(), **settings) as fleet:
        yield fleet


def prompt_of(length: int, family: int = 0) -> list[int]:
    return [(i * 13 + family * 101) % 1000 for i in range(length)]


async def prep(fleet: Fleet, manager: str, prompt: list[int]) -> Reserved:
    return await fleet.managers[manager].ask(PrepRecv("r", 0, pack_tokens(prompt)))


async def send(fleet: Fleet, manager: str, prompt: list[int], reserved: Reserved, *, wait_s: float = 0.0) -> None:
    kv, packed = reserved.kv, pack_tokens(prompt)
    await fleet.managers[manager].ask(RemoteSend("r", 0, packed, kv, kv.begin, kv.end, manager[3:], wait_s))


async def generate(fleet: Fleet, engine: str, prompt: list[int], max_tokens: int, kv: Any = None) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    message = StartGenerate("g", 0, pack_tokens(prompt), sampling, None, kv)
    async with fleet.client.ref(fleet.actors[engine].ref.address).stream(message, timeout=100) as items:
        return [token.id async for token in items]


def admit(sequence_id: str, prompt: list[int], *, kv: Any = None, wait_s: float = 0.0) -> Admit:
    return Admit("d", sequence_id, pack_tokens(prompt), kv, wait_s)


def test_whoever_lacks_no_block_does_not_queue_behind_those_who_do() -> None:
    async def story() -> None:
        async with fleet_of() as fleet:
            manager, prompt = fleet.managers["kv-d"], prompt_of(100)
            reserved = await prep(fleet, "kv-d", prompt)
            await send(fleet, "kv-p", prompt, reserved)
            waiting = asyncio.ensure_future(manager.ask(admit("large", prompt_of(200, 1), wait_s=5)))
            await asyncio.sleep(0.01)
            admitted = await manager.ask(admit("s", prompt, kv=reserved.kv), timeout=1)
            manager.tell(Finish("d", "s", b"", admitted.block_table))
            await waiting
            manager.tell(Finish("d", "large", b"", b""))
            await fleet.assert_nothing_leaks()

    run_virtual(story)


def test_a_send_goes_before_new_sequences_which_may_be_waiting_for_its_reservation() -> None:
    async def story() -> None:
        async with fleet_of(is_shared=True, num_blocks=18) as fleet:
            manager, prompt = fleet.managers["kv"], prompt_of(100)
            blocker = await manager.ask(admit("blocker", prompt_of(100, 1)))
            reserved = await prep(fleet, "kv", prompt)
            waiting = asyncio.ensure_future(manager.ask(admit("large", prompt_of(250, 2), wait_s=20)))
            await asyncio.sleep(0.01)
            message = RemoteSend("r", 0, pack_tokens(prompt), reserved.kv, 0, 100, "p", 5.0)
            sending = asyncio.ensure_future(manager.ask(message))
            await asyncio.sleep(0.01)
            manager.tell(Finish("d", "blocker", b"", blocker.block_table))
            await sending
            admitted = await manager.ask(admit("s", prompt, kv=reserved.kv))
            manager.tell(Finish("d", "s", b"", admitted.block_table))
            await waiting
            manager.tell(Finish("d", "large", b"", b""))
            await fleet.assert_nothing_leaks()

    run_virtual(story)


def test_a_reservation_is_adopted_though_every_place_is_taken_by_who_waits_for_blocks() -> None:
    async def story() -> None:
        async with fleet_of(num_blocks=8, max_num_seqs=1) as fleet:
            prompt, other = prompt_of(100), prompt_of(60, 1)
            reserved = await prep(fleet, "kv-d", prompt)
            await send(fleet, "kv-p", prompt, reserved)
            waiting = asyncio.ensure_future(generate(fleet, "d", other, 3))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(1):
                assert await generate(fleet, "d", prompt, 3, reserved.kv) == simulated_tokens(prompt, 3)
                assert await waiting == simulated_tokens(other, 3)

    run_virtual(story)


def test_slab_blocks_that_arrive_late_are_not_lost() -> None:
    async def story() -> None:
        hub = PostponingHub()
        async with fleet_of(hub=hub, engines=("d",)) as fleet:
            going = [asyncio.ensure_future(generate(fleet, "d", prompt_of(15, i), 100)) for i in range(2)]
            await asyncio.sleep(0.05)
            hub.late["inproc://kv-d", "inproc://d"] = 9.0
            await asyncio.sleep(0.5)
            hub.late.clear()
            await asyncio.gather(*going)
            await fleet.assert_nothing_leaks()

    run_virtual(story)


def test_a_send_to_a_manager_that_is_gone_ends_with_its_next_pages() -> None:
    async def story() -> None:
        slow = Simulation(seconds_per_prefill_token=0.01)
        async with fleet_of(simulated=slow, max_num_batched_tokens=16) as fleet:
            prompt = prompt_of(200)
            reserved = await prep(fleet, "kv-d", prompt)
            sending = asyncio.ensure_future(send(fleet, "kv-p", prompt, reserved))
            await asyncio.sleep(0.5)
            old = fleet.actors["kv-d"]
            assert isinstance(old, KvManager)
            await stop_actor(old)
            async with asyncio.timeout(0.2):
                with pytest.raises((ActorDied, LinkLost)):
                    await sending
            del fleet.managers["kv-d"]
            await asyncio.sleep(1)
            await fleet.assert_nothing_leaks()

    run_virtual(story)


def test_a_promise_of_room_waits_while_another_is_still_to_be_filled() -> None:
    async def story() -> None:
        async with fleet_of() as fleet:
            manager, prompt = fleet.managers["kv-d"], prompt_of(100)
            reserved = await prep(fleet, "kv-d", prompt)
            second = PrepRecv("second", 0, pack_tokens(prompt_of(100, 1)), None, 0.5)
            with pytest.raises(OutOfBlocks):
                await manager.ask(second)
            waiting = asyncio.ensure_future(manager.ask(second))
            await send(fleet, "kv-p", prompt, reserved)
            assert (await waiting).begin == 0

    run_virtual(story)
