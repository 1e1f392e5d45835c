"""Scripts that keep a live router's loop: they are interrupted, it counts against them, and all others go on."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fleet import Fleet, running_fleet
from swapping import LINE_OF_BODY, change, changer, look, set_script, text_of
from waiting import until

from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import Generate, SamplingParams
from callboard.actors.route_protocol import DropRoute, PrepareRoute
from callboard.kv.tokens import pack_tokens
from callboard.router import ScriptError
from callboard.router.actor import RouterActor
from callboard.router.errors import RouteRefused

COSTS = Simulation(seconds_per_step=0.005, seconds_per_prefill_token=0.0)
LAYOUT = SimulatedRunner(COSTS).layout
HUNG_S = 0.15
BAD, GOOD = list(range(7)), list(range(20))
ROUTE = """
async def route(request, fleet):
    if request.num_tokens == 7:
        {line}
    async for token in least_loaded(fleet.decode).start_generate(request):
        yield token
"""
LINE = LINE_OF_BODY + 3
"""Of the line that is put in."""


class Run:
    """A fleet on real time whose router has a watchdog."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        router = fleet.actors["main"]
        assert isinstance(router, RouterActor)
        self.router = router

    async def good(self, num_tokens: int = 40) -> None:
        """Ask for what no script hangs for, and look at the tokens."""
        generated = await self.fleet.generate(GOOD, SamplingParams(max_tokens=num_tokens))
        assert generated.tokens == simulated_tokens(GOOD, num_tokens)

    async def bad(self) -> None:
        await self.fleet.generate(BAD, SamplingParams(max_tokens=2))

    async def active(self) -> str:
        return (await look(self.fleet, self.router)).change.active.name


@asynccontextmanager
async def running() -> AsyncIterator[Run]:
    async with running_fleet(layout=LAYOUT, simulated=COSTS, script="least_loaded", hung_s=HUNG_S) as fleet:
        yield Run(fleet)
        await fleet.assert_nothing_leaks()


@pytest.mark.parametrize(
    "line",
    [
        "while True: pass",
        "__import__('time').sleep(3600)",
        "while True: least_loaded(fleet.decode)",
    ],
)
async def test_a_request_that_hangs_fails_by_its_scripts_fault_and_the_others_go_on(line: str) -> None:
    async with running() as run:
        await set_script(run.fleet, text_of(ROUTE.format(line=line)), run.router)
        others = [asyncio.ensure_future(run.good()) for _ in range(4)]
        await asyncio.sleep(0.1)
        with pytest.raises(ScriptError) as failed:
            await run.bad()
        assert (failed.value.file, failed.value.line) == ("/home/me/mine.py", LINE)
        assert "kept everything else here from going on" in failed.value.reason
        await asyncio.gather(*others)
        version = (await look(run.fleet, run.router)).versions[-1]
        assert (version.num_failures, version.num_in_flight) == (1, 0)
        assert version.last_error.startswith(f"/home/me/mine.py:{LINE} in route: {line}\nHung")
        assert not run.router.loads.num_own("d")


async def test_a_script_that_hangs_three_times_is_rolled_back() -> None:
    async with running() as run:
        await set_script(run.fleet, text_of(ROUTE.format(line="while True: pass")), run.router)
        ends = await asyncio.gather(*(run.bad() for _ in range(3)), return_exceptions=True)
        assert [type(end) for end in ends] == [ScriptError] * 3
        report = await look(run.fleet, run.router)
        assert (report.change.what, report.change.active.name) == ("failed", "least_loaded")
        assert "while True: pass" in report.change.why
        await run.bad()


@pytest.mark.parametrize(
    "body",
    [
        "@background(every=0.01)\nasync def work(fleet: Fleet):\n    while True: pass\n",
        "asyncio.get_event_loop().call_soon(lambda: [None for _ in iter(int, 1)])\n",
        "@background()\nasync def work(fleet: Fleet):\n"
        "    async with asyncio.TaskGroup() as group:\n        group.create_task(spin())\n"
        "async def spin():\n    while True: pass\n",
    ],
)
async def test_what_hangs_beside_the_requests_counts_against_its_version_too(body: str) -> None:
    if "call_soon" in body:  # From a request that goes on, and ends well.
        body = ROUTE.format(line=body.strip().replace("get_event_loop", "get_running_loop"))
    else:
        body += ROUTE.format(line="pass")
    async with running() as run:
        await set_script(run.fleet, text_of(body), run.router, max_failures=1)
        others = asyncio.ensure_future(run.good())
        await run.bad()
        async with asyncio.timeout(20):
            while await run.active() != "least_loaded":
                await asyncio.sleep(0.05)
        await others
        assert "mine.py" in (await look(run.fleet, run.router)).change.why


async def test_a_shadow_that_hangs_is_the_last_and_no_request_fails() -> None:
    async with running() as run:
        await change(
            run.fleet, changer().try_script(text_of(ROUTE.format(line="while True: pass")), share=None), run.router
        )
        await asyncio.gather(run.bad(), run.good())
        await run.bad()
        shadow = (await look(run.fleet, run.router)).shadow
        assert shadow is not None
        assert (shadow.num_failed, shadow.num_skipped) == (1, 1)
        assert shadow.last_error.startswith(f"/home/me/mine.py:{LINE} in route: while True: pass")


async def test_a_script_that_hangs_behind_its_last_token_has_given_all_of_them() -> None:
    body = """
async def route(request, fleet):
    async for token in least_loaded(fleet.decode).start_generate(request):
        yield token
    while request.num_tokens == 7: pass
"""
    async with running() as run:
        await set_script(run.fleet, text_of(body), run.router)
        got: list[int] = []
        with pytest.raises(ScriptError, match="was interrupted"):
            await _collect(run, got)
        assert got == simulated_tokens(BAD, 5)
        await run.good(5)


async def _collect(run: Run, got: list[int]) -> None:
    message = Generate("r", "tiny", pack_tokens(BAD), SamplingParams(max_tokens=5))
    async with run.fleet.router.stream(message) as tokens:
        async for token in tokens:
            got.append(token.id)


# ---- code outside of functions -------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script has less time to load than usual."""
    monkeypatch.setattr("callboard.router.swap.route_changes.LOAD_S", 0.2)


def loading(line: str) -> Any:
    return text_of(f"import time\n{line}\n{ROUTE.format(line='pass')}")


async def test_a_script_whose_loading_does_not_end_is_refused_with_its_line_and_leaves_nothing(short: None) -> None:
    async with running() as run:
        others = asyncio.ensure_future(run.good())
        with pytest.raises(ScriptError) as refused:
            await set_script(run.fleet, loading("while True: pass"), run.router)
        assert (refused.value.file, refused.value.line) == ("/home/me/mine.py", LINE_OF_BODY + 1)
        assert refused.value.reason == "its code outside of functions did not end within 0.2 s"
        await others
        assert not [work for work in run.router._left if work.is_going_on]
        await set_script(run.fleet, loading("pass"), run.router)
        assert await run.active() == "mine"


async def test_one_that_waits_in_c_keeps_a_thread_which_is_said_and_bounded(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("callboard.router.swap.route_changes.MOST_LEFT", 2)
    async with running() as run:
        for _ in range(2):
            with pytest.raises(ScriptError, match=r"mine.py:\d+: its code .* still goes on in a thread"):
                await set_script(run.fleet, loading("time.sleep(1.6)"), run.router)
        with pytest.raises(ScriptError, match=r"2 earlier scripts still.*Restart the router"):
            await set_script(run.fleet, loading("pass"), run.router)
        await run.good()
        async with asyncio.timeout(30):
            while any(work.is_going_on for work in run.router._left):
                await asyncio.sleep(0.1)
        await set_script(run.fleet, loading("pass"), run.router)
        assert await run.active() == "mine"


async def test_a_change_that_is_dropped_while_it_loads_ends_its_loading() -> None:
    async with running() as run:
        reports = [await look(run.fleet, run.router)]
        wanted = changer().set_script(loading("while True: pass"))(reports)
        num_threads = threading.active_count()
        preparing = asyncio.ensure_future(run.router.ref.ask(PrepareRoute(wanted, reports[0].change.id)))
        await until(lambda: threading.active_count() > num_threads)
        await run.router.ref.ask(DropRoute(wanted.id))
        with pytest.raises(RouteRefused, match="it was dropped while it was loaded"):
            await preparing
        await until(lambda: threading.active_count() == num_threads)
        await set_script(run.fleet, loading("pass"), run.router)


async def test_a_script_may_import_for_longer_than_it_may_keep_the_loop(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "slow_to_come.py").write_text("import time\ntime.sleep(0.6)\nHERE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    async with running() as run:
        others = asyncio.ensure_future(run.good())
        await set_script(run.fleet, loading("from slow_to_come import HERE"), run.router)
        await others
        assert await run.active() == "mine"


def test_a_first_script_whose_loading_does_not_end_keeps_no_router_from_saying_so(
    tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("callboard.router.actor.LOAD_S", 0.3)
    path = tmp_path / "mine.py"
    path.write_text("import time\ntime.sleep(3600)\n")
    with pytest.raises(ScriptError, match=rf"{path}:2: its code outside of functions did not end within 0.3 s"):
        RouterActor(RouterActor.Config(script=str(path), hung_s=2.0))
