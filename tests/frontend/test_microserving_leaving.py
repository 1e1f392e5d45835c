"""What clients of the microserving door leave behind between its calls, and in the midst of one: nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from waiting import until

from callboard.actors.move_protocol import SetDraining

from .mlc_fleet import Served, assert_right, long_leases, prepare, refused, served_fleet, until_free, until_holds


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with served_fleet(tmp_path_factory.mktemp("mlc")) as served:
        yield served
        await served.fleet.assert_nothing_leaks()


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_reservation_whose_client_does_not_come_back_ends_with_its_lease(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(50)
    body = prepare(served, "gone", prompt)
    prepared = await router.post(1, "prep_recv", {**body, "end": -1})
    assert await served.holds("e1") == 1
    await until_free(served)
    sent = {"begin": 0, "end": 49, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
    status, error = await refused(router, 0, "remote_send", {**body, **sent})
    assert (status, error["code"]) == (503, "unavailable")
    late = await served.http.post(f"{served.url('e1')}/microserving/start_generate", json={**body, "begin": 49})
    assert late.status_code == 200, "the engine computes by itself what was not kept for it"
    assert_right(served, prompt, late.json())


async def test_who_asks_again_for_something_else_gives_the_first_back(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    body = prepare(served, "again", served.prompt(50))
    first = await router.post(1, "prep_recv", {**body, "end": -1})
    assert (await router.post(1, "prep_recv", {**body, "end": -1})) == first, "a repeat gets the same reservation"
    second = await router.post(1, "prep_recv", {**body, "end": 30})
    assert second != first
    await until_holds(served, 1)
    body["prompt"] = served.prompt(50)
    third = await router.post(1, "prep_recv", {**body, "end": 30})
    await until_holds(served, 1)
    sent = {"begin": 0, "end": 30, "kv_addr_info": second["kv_append_metadata"], "recv_rank": 1}
    assert (await refused(router, 0, "remote_send", {**body, **sent}))[0] == 503
    sent["kv_addr_info"] = third["kv_append_metadata"]
    other_prompt = {**body, "prompt": served.prompt(50)}
    assert (await refused(router, 0, "remote_send", {**other_prompt, **sent}))[0] == 400
    assert (await refused(router, 0, "remote_send", {**body, **sent, "end": 31}))[0] == 400
    assert await router.post(0, "remote_send", {**body, **sent}) == {}


async def leave(call: "asyncio.Future[Any]", after: Callable[[], object]) -> None:
    """Close a client's connection in the midst of its call."""
    await until(after)
    call.cancel()
    await asyncio.wait([call])


async def test_a_client_that_leaves_while_it_waits_for_blocks_gets_none(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    with long_leases(served):
        bodies = [prepare(served, f"full-{index}", served.prompt(480)) for index in range(4)]
        for body in bodies:
            await router.post(1, "prep_recv", {**body, "end": -1})
        body = prepare(served, "waits", served.prompt(480))
        call = asyncio.ensure_future(router.post(1, "prep_recv", {**body, "end": -1}))
        queue = served.fleet.actors["kv-e1"].queue
        await leave(call, lambda: any(queue._waiting.values()))
        for body in bodies:  # What makes room: all that wait are served before who left is forgotten.
            served.frontend._door.let_go(served.frontend._door.held.of("e1", body["user"]))
        await until_holds(served, 0)
        await asyncio.sleep(0.1)
        await until_holds(served, 0)
    await served.fleet.assert_nothing_leaks()


async def test_a_client_that_leaves_while_kv_is_computed_gives_its_reservation_back(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    with long_leases(served):
        body = prepare(served, "computes", served.prompt(480))
        prepared = await router.post(1, "prep_recv", {**body, "end": -1})
        body |= {"begin": 0, "end": -1, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
        scheduler = served.fleet.actors["e0"].scheduler
        await leave(asyncio.ensure_future(router.post(0, "remote_send", body)), lambda: len(scheduler))
        await until_holds(served, 0)
        assert len(served.frontend._door.held) == 0 or served.frontend._door.held.of("e1", "computes") is None
        await until(lambda: not len(scheduler))
    await served.fleet.assert_nothing_leaks()


@pytest.mark.parametrize("has_pages", [False, True])
async def test_a_client_that_leaves_while_it_is_generated_leaves_nothing(served: Served, has_pages: bool) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    with long_leases(served):
        body = prepare(served, f"leaves-{has_pages}", served.prompt(100), max_tokens=400, stream=True)
        prepared = await router.post(1, "prep_recv", {**body, "end": -1})
        scheduler = served.fleet.actors["e1"].scheduler
        if has_pages:
            sent = {"begin": 0, "end": -1, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
            await router.post(0, "remote_send", {**body, **sent})
        call = asyncio.ensure_future(router.post(1, "start_generate", {**body, "begin": -1}))
        awaited = served.fleet.actors["kv-e1"].blocks.reservations._awaited
        await leave(call, lambda: len(scheduler) if has_pages else awaited)
        await until_holds(served, 0)
        await until(lambda: not len(scheduler))
    await served.fleet.assert_nothing_leaks()


async def test_pages_may_still_be_on_their_way_when_generating_begins(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(90)
    body = prepare(served, "early", prompt)
    prepared = await router.post(1, "prep_recv", {**body, "end": -1})
    start = {**body, "begin": -1}
    generate = asyncio.ensure_future(served.http.post(f"{served.url('e1')}/microserving/start_generate", json=start))
    awaited = served.fleet.actors["kv-e1"].blocks.reservations._awaited
    await until(lambda: awaited)
    sent = {"begin": 0, "end": -1, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
    await router.post(0, "remote_send", {**body, **sent})
    reply = (await generate).json()
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 89
    assert_right(served, prompt, reply)


async def test_who_says_that_less_is_there_than_was_promised_is_not_made_to_wait(served: Served) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(60)
    body = prepare(served, "alone", prompt)
    with long_leases(served):
        await router.post(1, "prep_recv", {**body, "end": -1})
        start = f"{served.url('e1')}/microserving/start_generate"
        reply = (await served.http.post(start, json={**body, "begin": 0})).json()
        assert_right(served, prompt, reply)
        await until_holds(served, 0)
        reply = (await served.http.post(start, json=served.body(prompt))).json()
        assert_right(served, prompt, reply)
    await served.fleet.assert_nothing_leaks()


async def test_an_engine_that_is_being_emptied_finishes_what_it_has_reserved_and_takes_nothing_new(
    served: Served,
) -> None:
    router = served.router("e0", "e1", is_disaggregated=True)
    prompt = served.prompt(30)
    body = prepare(served, "drained", prompt)
    prepared = await router.post(1, "prep_recv", {**body, "end": -1})
    engine = served.fleet.client.ref(served.fleet.actors["e1"].ref.address)

    async def drain(is_draining: bool) -> None:
        await engine.ask(SetDraining(is_draining))
        state = "draining" if is_draining else "ready"
        await served.frontend._view.wait_for(
            lambda view: any(e.name == "e1" and e.state == state for e in view.entries)
        )

    await drain(True)
    assert (await refused(router, 1, "prep_recv", {**body, "end": -1}))[0] == 503
    assert (await refused(router, 1, "start_generate", prepare(served, "other", prompt)))[0] == 503
    sent = {"begin": 0, "end": -1, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": 1}
    await router.post(0, "remote_send", {**body, **sent})
    start = f"{served.url('e1')}/microserving/start_generate"
    assert_right(served, prompt, (await served.http.post(start, json={**body, "begin": -1})).json())
    await drain(False)
