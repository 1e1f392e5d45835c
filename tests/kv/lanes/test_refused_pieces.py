"""What ends a send in the midst of its pages: their receiver refuses them, or its time is over."""

import asyncio
from random import Random

import pytest
from simulated_wires import WireNetwork
from two_managers import LAYOUT, PROMPT, Fleet, in_virtual_time, prep, running, send

from callboard.actors.protocol import Release
from callboard.bus import AskTimeout, VirtualClock
from callboard.bus.testing import run_virtual
from callboard.kv.layout import StaleReservation

UCX = {"transport": "ucx"}


@in_virtual_time(p_config=UCX, d_config=UCX, wires=WireNetwork(VirtualClock(), Random(1)))
async def test_a_receiver_that_refuses_pages_does_not_give_back_what_the_engine_may_be_writing_into(
    fleet: Fleet,
) -> None:
    engine = fleet.actors["pe"]
    reserved = await fleet.at("d").ask(prep(PROMPT))
    engine.may_compute.clear()
    engine.may_finish_abort.clear()
    sending = asyncio.ensure_future(fleet.at("p").ask(send(reserved, PROMPT)))
    await asyncio.sleep(1)
    await fleet.at("d").ask(Release(reserved.kv))
    engine.may_compute.set()
    engine.may_compute.clear()  # One chunk, whose pages are refused; the next one is a step that is under way.
    await asyncio.sleep(1)
    engine.may_compute.set()
    with pytest.raises(StaleReservation, match="given up"):
        await sending
    await asyncio.sleep(1)
    assert (await fleet.stats("p")).leased == 3, "the engine may still be writing"
    assert len(engine.aborted) == 1
    engine.may_finish_abort.set()
    await asyncio.sleep(1)
    assert (await fleet.stats("p")).free == 16
    assert (await fleet.stats("d")).free == 16


def test_a_send_that_runs_out_of_time_does_not_cost_the_others_their_wire() -> None:
    clock = VirtualClock()
    network = WireNetwork(clock, Random(1), delay_s=0.5)

    async def main() -> None:
        async with running(UCX, UCX, clock, network) as fleet:
            others = [100 + token for token in PROMPT]
            short = await fleet.at("d").ask(prep(PROMPT))
            long = await fleet.at("d").ask(prep(others, request_id="patient"))
            hasty = asyncio.ensure_future(fleet.at("p").ask(send(short, PROMPT), timeout=4))
            patient = asyncio.ensure_future(fleet.at("p").ask(send(long, others, request_id="patient"), timeout=60))
            with pytest.raises(AskTimeout):
                await hasty
            assert (await patient).num_bytes == 11 * LAYOUT.token_bytes
            assert len(network.cables) == 1

    run_virtual(main)
