"""``@background``: it runs while its version is active, ends with it, gives back what it took, and starts again."""

import asyncio

import pytest
from swapping import LINE_OF_BODY, change, changer, look, set_script, text_of, to

from callboard.router import ScriptError
from callboard.router.script import load_text

ROUTE = """
async def route(request, fleet, *, share: float = 0.5):
    async for token in fleet.engines[0].start_generate(request):
        yield token
"""
EVERY = "@background(every=1.0)\nasync def work(fleet: Fleet):\n"


@pytest.fixture
async def one(fleet):
    await fleet.add_engine("a")
    await fleet.add_router("least_loaded")
    return fleet


async def reports(fleet, name="mine"):
    return next(each for each in (await look(fleet)).versions if each.script.name == name).background


async def test_it_runs_again_and_again_and_ends_with_its_version(one):
    await set_script(one, text_of(EVERY + "    [await e.abort(Request) for e in ()]\n" + ROUTE))
    await asyncio.sleep(10.5)
    assert (await reports(one))[0].num_runs == 11
    await set_script(one, to("a"))
    await asyncio.sleep(10.0)
    assert await reports(one) == ()
    assert one.is_clean()


async def test_without_every_it_runs_once(one):
    body = "@background()\nasync def work(fleet: Fleet):\n    assert [e.name for e in fleet.engines] == ['a']\n"
    await set_script(one, text_of(body + ROUTE))
    await asyncio.sleep(10.0)
    assert [(each.every_s, each.num_runs, each.num_failures) for each in await reports(one)] == [(None, 1, 0)]


async def test_it_is_started_again_after_an_exception_later_each_time(one, caplog):
    await set_script(one, text_of(EVERY + "    fleet.engines[3]\n" + ROUTE))
    await asyncio.sleep(20.0)
    (report,) = await reports(one)
    assert report.num_runs == report.num_failures
    assert 4 <= report.num_runs <= 6  # After about 1, 3, 7 and 15 seconds.
    line = LINE_OF_BODY + 2
    assert report.last_error == (
        f"/home/me/mine.py:{line} in work: fleet.engines[3]\nIndexError: tuple index out of range"
    )
    assert "IndexError: tuple index out of range" in caplog.text
    assert (await look(one)).change.what == "set"  # No request failed by it.


async def test_what_it_waits_for_may_be_cancelled_and_it_is_started_again(one):
    body = "    task = asyncio.ensure_future(asyncio.sleep(9.0))\n    task.cancel()\n    await task\n"
    await set_script(one, text_of(EVERY + body + ROUTE))
    await asyncio.sleep(20.0)
    (report,) = await reports(one)
    assert report.num_runs == report.num_failures
    assert 4 <= report.num_runs <= 6
    assert "in work: await task" in report.last_error


@pytest.mark.parametrize("ends", ["by itself", "with its version", "with an error", "with the router"])
async def test_what_it_reserved_is_given_back_however_it_ends(one, ends):
    body = {
        "by itself": "    await reserve(fleet)\n",
        "with an error": "    await reserve(fleet)\n    raise KeyError('planted')\n",
    }.get(ends, "    await reserve(fleet)\n    await asyncio.sleep(1e6)\n")
    body = f"""
@background()
async def work(fleet: Fleet):
{body}
async def reserve(fleet):
    for engine in fleet.engines:
        engine.pick()
        await engine.prep_recv(one_like(fleet))

def one_like(fleet):
    from callboard.actors.protocol import Generate
    from callboard.kv.tokens import pack_tokens
    message = Generate("mine", "m", pack_tokens(range(40)), SamplingParams())
    return Request(message, attempt=0, remaining_s=lambda: 10.0)
{ROUTE}"""
    await set_script(one, text_of(body))
    await asyncio.sleep(0.5)
    manager = one.managers["kv-a"]
    assert manager.num_made == 1
    if ends.startswith("with the router"):
        one.nodes["control"].remove("main")
        await one.router._tasks.cancel()
    elif ends == "with its version":
        assert not one.is_clean()
        await set_script(one, to("a"))
    await one.settle()
    assert not manager.reserved
    assert ends == "with the router" or one.router.loads.num_own("a") == 0


async def test_one_that_swallows_its_cancellation_gets_nothing_more(one, caplog):
    body = """
@background()
async def work(fleet: Fleet):
    engine = fleet.engines[0]
    try:
        await asyncio.sleep(1e6)
    except asyncio.CancelledError:
        await asyncio.sleep(20.0)
    engine.pick()
"""
    await set_script(one, text_of(body + ROUTE))
    await asyncio.sleep(1.0)
    await set_script(one, to("a"))
    await asyncio.sleep(10.0)
    assert "was cancelled and goes on" in caplog.text
    await asyncio.sleep(20.0)
    assert "may ask for nothing more" in caplog.text
    assert one.is_clean()
    assert await one.generate("r") == [100, 101, 102]


async def test_deaths_of_engines_are_no_fault_of_the_script(one, caplog):
    body = EVERY + "    await fleet.engines[0].prep_recv(await hot(fleet))\n"
    body += "async def hot(fleet):\n    raise ActorDied('it died')\n"
    await set_script(one, text_of(body + ROUTE))
    await asyncio.sleep(0.5)
    assert [each.levelname for each in caplog.records if "background" in each.message] == ["WARNING"]


async def test_a_canary_does_its_background_work_and_ends_it_when_it_is_rolled_back(one):
    await change(one, changer().try_script(text_of(EVERY + "    pass\n" + ROUTE), share=1.0))
    await asyncio.sleep(2.5)
    assert (await reports(one))[0].num_runs == 3
    await change(one, changer().promote)
    await asyncio.sleep(2.0)
    assert (await reports(one))[0].num_runs == 5  # It went on: the version was active before.
    await change(one, changer().roll_back(None))
    assert await reports(one) == ()


async def test_options_of_one_name_have_one_value():
    body = """
@background(every=2.5)
async def work(fleet: Fleet, *, share: float = 0.1, depth: int = 2):
    return share, depth
"""
    script = load_text(text_of(body + ROUTE, share="0.25"))
    assert script.options == {"share": 0.25, "depth": 2}
    (work,) = script.backgrounds
    assert (work.name, work.every_s, await work.function(None)) == ("work", 2.5, (0.25, 2))
    with pytest.raises(ScriptError, match="no option 'sharr'"):
        load_text(text_of(body + ROUTE, sharr=1))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("@background\nasync def work(fleet): pass\n", r"takes 0 positional arguments|@background\(\)"),
        ("@background(every=0)\nasync def work(fleet): pass\n", "no number of seconds above 0"),
        ("@background(every='1s')\nasync def work(fleet): pass\n", r"write @background\(\) or"),
        ("@background(every=1.0)\ndef work(fleet): pass\n", "takes a coroutine: write async def work"),
        ("@background(every=1.0)\nasync def work(): pass\n", "must take the fleet"),
    ],
)
def test_a_wrong_mark_is_said_when_the_script_is_loaded(body, words):
    with pytest.raises(ScriptError, match=words) as refusal:
        load_text(text_of(body + ROUTE))
    assert refusal.value.line == LINE_OF_BODY
