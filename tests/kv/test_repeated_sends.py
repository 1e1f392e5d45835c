"""remote_send twice: the repeat does nothing, joins the first, or takes its place."""

import asyncio

import pytest
from two_managers import LAYOUT, PROMPT, admit, in_virtual_time, is_in_place, prep, send

from callboard.bus import AskTimeout
from callboard.kv.layout import BadRange
from callboard.kv.tokens import unpack_tokens


@pytest.fixture(params=["p", "d"], ids=["between pools", "inside a pool"])
def sender(request):
    return request.param


async def test_a_repeat_gets_the_answer_of_the_first_and_computes_nothing(fleet, sender):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    first = await fleet.at(sender).ask(send(reserved, PROMPT))
    num_computed = fleet.actors["pe"].num_computed + fleet.actors["de"].num_computed
    assert await fleet.at(sender).ask(send(reserved, PROMPT)) == first
    assert fleet.actors["pe"].num_computed + fleet.actors["de"].num_computed == num_computed
    assert fleet.actors["p"].num_bytes_sent + fleet.actors["d"].num_bytes_sent == first.num_bytes


async def test_a_repeat_while_the_first_is_under_way_joins_it(fleet, sender):
    engine = fleet.actors[f"{sender}e"]
    engine.may_compute.clear()
    reserved = await fleet.at("d").ask(prep(PROMPT))
    both = [asyncio.ensure_future(fleet.at(sender).ask(send(reserved, PROMPT))) for _ in range(2)]
    await fleet.settle()
    engine.may_compute.set()
    first, second = await asyncio.gather(*both)
    assert first == second
    assert engine.num_computed == len(PROMPT)


async def test_when_the_first_is_cancelled_its_repeat_goes_on(fleet, sender):
    engine = fleet.actors[f"{sender}e"]
    engine.may_compute.clear()
    reserved = await fleet.at("d").ask(prep(PROMPT))
    first, second = (asyncio.ensure_future(fleet.at(sender).ask(send(reserved, PROMPT))) for _ in range(2))
    await fleet.settle()
    first.cancel()
    await fleet.settle()
    engine.may_compute.set()
    assert (await second).num_computed_tokens == len(PROMPT)
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)


async def test_another_range_is_no_repeat_and_may_not_overlap(fleet, sender):
    reserved = await fleet.at("d").ask(prep(PROMPT))
    await fleet.at(sender).ask(send(reserved, PROMPT, 0, 6))
    with pytest.raises(BadRange, match="another write"):
        await fleet.at(sender).ask(send(reserved, PROMPT, 5, 11))
    await fleet.at(sender).ask(send(reserved, PROMPT, 6, 11))
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)


@in_virtual_time()
async def test_a_send_that_ran_out_of_time_is_repeated_by_the_next_attempt(fleet):
    engine = fleet.actors["pe"]
    engine.may_compute.clear()
    reserved = await fleet.at("d").ask(prep(PROMPT))
    with pytest.raises(AskTimeout):
        await fleet.at("p").ask(send(reserved, PROMPT), timeout=1.0)
    engine.may_compute.set()
    sent = await fleet.at("p").ask(send(reserved, PROMPT))
    assert sent.num_bytes == len(PROMPT) * LAYOUT.token_bytes
    admitted = await fleet.at("d").ask(admit(PROMPT, reserved.kv))
    assert is_in_place(fleet, "d", PROMPT, unpack_tokens(admitted.block_table), 0, 11)
