"""Several routers over one fleet: all of them change their script or none does, whoever dies meanwhile."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from swapping import FAILING, add_router, ask, change, changer, look, served, set_script, targets, text_of, to, visitor

from callboard.actors.actor import Actor
from callboard.actors.protocol import Entry
from callboard.actors.registration import Registration
from callboard.actors.route_protocol import ActivateRoute, Current, DropRoute, GetChange, PrepareRoute, RouteChange
from callboard.bus import BusError, LinkLost
from callboard.router import ScriptError
from callboard.router.errors import RouteRefused
from callboard.router.swap.swap import look_at, swap


@pytest.fixture
async def three(fleet):
    """Engines "a" and "b", and three routers on nodes of their own that run the same."""
    for name in ("a", "b"):
        await fleet.add_engine(name)
    routers = [await add_router(fleet, name, "least_loaded") for name in ("r1", "r2", "r3")]
    return SimpleNamespace(fleet=fleet, routers=routers)


async def names_of(three, *routers):
    return [(await look(three.fleet, each)).change.active.name for each in routers or three.routers]


async def prepare(three, decide):
    """Prepare a change on all routers, as whoever swaps does, and return it with their targets."""
    node = await visitor(three.fleet)
    all_three = targets(node, *three.routers)
    reports = await look_at(node, all_three)
    made = decide(reports)
    for target, report in zip(all_three, reports, strict=True):
        await target.ref.ask(PrepareRoute(made, report.change.id))
    return made, all_three


async def test_a_swap_reaches_all_routers(three):
    swapped = await set_script(three.fleet, to("a"), *three.routers)
    assert swapped.late == ()
    assert await names_of(three) == ["to_a"] * 3
    for router in three.routers:
        assert await ask(router, f"by-{router.name}") == [100, 101]
    assert served(three.fleet)["a"] == ["by-r1", "by-r2", "by-r3"]


async def test_a_router_that_cannot_load_it_keeps_all_from_changing(three, tmp_path):
    body = f"import pathlib\nif pathlib.Path({str(tmp_path / 'not-here')!r}).exists():\n    1 / 0\n" + to("a").source
    third = three.routers[2].routes

    def load_there(loading=third.load):
        def load(made):
            (tmp_path / "not-here").touch()  # As on a machine that lacks what the script needs.
            return loading(made)

        return load

    third.load = load_there()
    with pytest.raises(ScriptError, match="ZeroDivisionError"):
        await set_script(three.fleet, text_of(body), *three.routers)
    assert await names_of(three) == ["least_loaded"] * 3
    (tmp_path / "not-here").unlink()
    await set_script(three.fleet, to("b"), *three.routers[:2])


async def test_a_router_that_is_dead_keeps_all_from_changing(three):
    await stop(three, "node-r2")
    with pytest.raises(RouteRefused, match=r"router r2: .*nothing was changed"):
        await set_script(three.fleet, to("a"), *three.routers)
    assert await names_of(three, three.routers[0], three.routers[2]) == ["least_loaded"] * 2
    await set_script(three.fleet, to("b"), three.routers[0], three.routers[2])


async def stop(three, name):
    node = three.fleet.nodes.pop(name)
    node.remove(name.removeprefix("node-"))
    await node.stop()


@pytest.mark.parametrize("keeps", [True, False])
async def test_a_router_that_dies_between_prepare_and_activate_comes_back_with_the_new_script(three, tmp_path, keeps):
    made, all_three = await prepare(three, changer().set_script(to("a")))
    await stop(three, "node-r2")
    for target in (all_three[0], all_three[2]):
        await target.ref.ask(ActivateRoute(made.id))
    back = await add_router(three.fleet, "r2", "least_loaded", routes_at=str(tmp_path / "r2") if keeps else "")
    assert back.script.name == "to_a"
    assert (await look(three.fleet, back)).change.id == made.id


async def test_a_router_that_is_started_again_runs_what_it_ran(fleet, tmp_path):
    await fleet.add_engine("a")
    kept = str(tmp_path / "routes")
    first = await add_router(fleet, "r1", "least_loaded", routes_at=kept)
    await set_script(fleet, to("a"), first)
    await set_script(fleet, text_of("async def route(request, fleet, *, k: int = 1):\n    yield\n", k=3), first)
    await change(fleet, changer().try_script(to("a"), share=10.0), first)
    before = await look(fleet, first)
    await stop(SimpleNamespace(fleet=fleet), "node-r1")
    again = await add_router(fleet, "r1", "least_loaded", node="node-again", routes_at=kept)
    after = await look(fleet, again)
    assert (after.change, after.history) == (before.change, before.history)
    assert [each.script for each in after.versions] == [each.script for each in before.versions]
    assert again.script.options == {"k": 3}
    await change(fleet, changer().roll_back("2"), again)
    assert again.script.name == "to_a"


@pytest.mark.parametrize("content", [b"", b"\x00rubbish", b"\x93\x01\x02\x03"])
async def test_a_file_that_cannot_be_read_is_passed_over(fleet, tmp_path, content):
    (tmp_path / "routes").write_bytes(content)
    await fleet.add_engine("a")
    router = await add_router(fleet, "r1", "least_loaded", routes_at=str(tmp_path / "routes"))
    assert router.script.name == "least_loaded"
    assert await ask(router, "r") == [100, 101]


async def test_what_is_said_twice_does_nothing(three):
    made, all_three = await prepare(three, changer().set_script(to("a")))
    base = three.routers[0].routes.change.id
    for target in all_three:
        await target.ref.ask(PrepareRoute(made, base))
    for _ in range(2):
        for target in all_three:
            await target.ref.ask(ActivateRoute(made.id))
    for target in all_three:
        await target.ref.ask(PrepareRoute(made, base))
        await target.ref.ask(DropRoute(made.id))
        await target.ref.ask(DropRoute("nobody's"))
    assert await names_of(three) == ["to_a"] * 3
    assert [len((await look(three.fleet, each)).history) for each in three.routers] == [2] * 3


async def test_what_was_dropped_or_never_prepared_is_not_activated(three):
    made, all_three = await prepare(three, changer().set_script(to("a")))
    await all_three[0].ref.ask(DropRoute(made.id))
    for change_id in (made.id, "never"):
        with pytest.raises(RouteRefused, match="not prepared here"):
            await all_three[0].ref.ask(ActivateRoute(change_id))


async def test_a_change_of_what_runs_no_more_is_refused(three):
    node = await visitor(three.fleet)
    all_three = targets(node, *three.routers)
    late = changer("bob").set_script(to("b"))(await look_at(node, all_three))
    base = three.routers[0].routes.change.id
    await change(three.fleet, changer("ann").set_script(to("a")), *three.routers)
    with pytest.raises(RouteRefused, match="ann has changed the script to to_a meanwhile"):
        await all_three[0].ref.ask(PrepareRoute(late, base))


async def test_of_two_who_set_at_once_one_wins_and_the_other_is_told(three):
    outcomes = await asyncio.gather(
        change(three.fleet, changer("ann").set_script(to("a")), *three.routers),
        change(three.fleet, changer("bob").set_script(to("b")), *three.routers),
        return_exceptions=True,
    )
    refused = [each for each in outcomes if isinstance(each, RouteRefused)]
    won = [each for each in outcomes if not isinstance(each, BaseException)]
    assert (len(won), len(refused)) == (1, 1)
    assert "changing the script" in str(refused[0]) or "has changed the script" in str(refused[0])
    assert await names_of(three) == [won[0].change.active.name] * 3


async def test_who_dies_after_preparing_keeps_others_out_only_for_a_while(three):
    await prepare(three, changer("ann").set_script(to("a")))
    with pytest.raises(RouteRefused, match="ann is changing the script to to_a at this moment"):
        await set_script(three.fleet, to("b"), *three.routers)
    await asyncio.sleep(10.0)
    await set_script(three.fleet, to("b"), *three.routers)
    assert await names_of(three) == ["to_b"] * 3


async def test_a_change_that_one_router_has_activated_reaches_all(three):
    made, all_three = await prepare(three, changer().set_script(to("a")))
    await all_three[1].ref.ask(ActivateRoute(made.id))  # And then whoever swaps dies.
    await asyncio.sleep(15.0)
    assert await names_of(three) == ["to_a"] * 3


async def test_who_swaps_meanwhile_waits_until_all_run_the_same(three):
    made, all_three = await prepare(three, changer().set_script(to("a")))
    for target in (all_three[0], all_three[2]):
        await target.ref.ask(DropRoute(made.id))
    await all_three[1].ref.ask(ActivateRoute(made.id))
    await set_script(three.fleet, to("b"), *three.routers)
    assert await names_of(three) == ["to_b"] * 3


async def test_a_router_that_goes_back_by_itself_takes_the_others_along(three):
    await set_script(three.fleet, text_of(FAILING), *three.routers)
    for number in range(3):
        with pytest.raises(BusError):
            await ask(three.routers[1], f"r{number}")
    await asyncio.sleep(3.0)
    assert await names_of(three) == ["least_loaded"] * 3
    assert {(await look(three.fleet, each)).change.by for each in three.routers} == {"router r2"}


async def test_a_change_for_one_router_leaves_the_others_alone(three):
    decide = changer(names=("r2",)).set_script(to("a"))
    await change(three.fleet, decide, three.routers[1])
    await asyncio.sleep(5.0)
    assert await names_of(three) == ["least_loaded", "to_a", "least_loaded"]
    with pytest.raises(RouteRefused, match="run different scripts"):
        await change(three.fleet, changer().try_script(to("b"), share=None), *three.routers)
    await set_script(three.fleet, to("b"), *three.routers)
    assert await names_of(three) == ["to_b"] * 3


async def test_a_router_that_joins_takes_what_the_others_run(three):
    await set_script(three.fleet, to("a"), *three.routers)
    fourth = await add_router(three.fleet, "r4", "least_loaded")
    assert fourth.script.name == "to_a"


async def test_a_router_for_other_routers_scripts_is_changed_only_by_its_name(three):
    inner = await add_router(three.fleet, "inner", "round_robin", is_inner=True)
    await set_script(three.fleet, to("a"), *three.routers)
    await asyncio.sleep(5.0)
    assert await names_of(three, inner) == ["round_robin"]
    await change(three.fleet, changer(names=("inner",)).set_script(to("b")), inner)
    await asyncio.sleep(5.0)
    assert await names_of(three, inner, *three.routers) == ["to_b", "to_a", "to_a", "to_a"]


async def test_a_swap_that_is_given_up_while_it_prepares_leaves_nothing(three):
    node = await visitor(three.fleet)
    slow = to("a")
    task = asyncio.ensure_future(swap(node, targets(node, *three.routers), changer().set_script(slow)))
    for _ in range(12):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await set_script(three.fleet, to("b"), *three.routers)
    assert await names_of(three) == ["to_b"] * 3


async def test_a_router_that_cannot_load_what_the_others_run_is_led_out_by_another_change(three):
    first, second, _ = three.routers

    def lacks(made, loading=second.routes.load):
        if made.active.name == "to_b":  # As on a machine without a module of it.
            raise ScriptError(file=made.active.path, line=1, reason="no module", remedy="")
        return loading(made)

    second.routes.load = lacks
    await set_script(three.fleet, to("b"), first)
    await asyncio.sleep(3.0)
    assert await names_of(three) == ["to_b", "least_loaded", "to_b"]
    assert "cannot be loaded here" in (await look(three.fleet, second)).problem
    await set_script(three.fleet, to("a"), *three.routers)
    assert await names_of(three) == ["to_a"] * 3
    assert (await look(three.fleet, second)).problem == ""


async def test_where_it_is_not_known_whether_a_change_was_taken_nobody_says_that_it_was_not(three):
    first = three.routers[0]

    def take_and_die(made, loaded, taking=first.routes.apply):
        taking(made, loaded)
        three.dying = asyncio.ensure_future(stop(three, "node-r1"))
        raise LinkLost("its answer is lost")

    first.routes.apply = take_and_die
    with pytest.raises(RouteRefused, match=r"router r1 did not take it: .*callboard route show"):
        await set_script(three.fleet, to("a"), first)
    await three.dying


class Impostor(Actor):
    """Says in the directory that it is a router, and that it runs something new."""

    def __init__(self, made):
        self.made = made

    async def start(self):
        detail = {"epoch": str(self.made.epoch), "change": self.made.id}
        self.registration = Registration(self, Entry(self.name, "router", self.ref.address, detail=detail))

    def on_get_change(self, message: GetChange) -> Current:
        return Current(self.made)


@pytest.mark.parametrize("is_at_start", [True, False])
async def test_nothing_is_taken_over_by_a_bus_that_anybody_can_reach(fleet, tmp_path, is_at_start):
    await fleet.add_engine("a")
    fleet.nodes["control"].endpoint = "tcp://127.0.0.1:7000"
    ran = tmp_path / "ran"
    text = text_of(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n{to('a').source}")
    made = RouteChange(9, "x", "set", msgspec.structs.replace(text, number=9))
    if not is_at_start:
        await fleet.add_router("least_loaded")
    await fleet.start(await fleet.node("stranger"), "stranger", Impostor(made), fleet.directory)
    await asyncio.sleep(3.0)
    if is_at_start:
        await fleet.add_router("least_loaded")
    assert await ask(fleet.router, "r") == [100, 101]
    assert (await look(fleet)).change.active.name == "least_loaded"
    assert not ran.exists()
