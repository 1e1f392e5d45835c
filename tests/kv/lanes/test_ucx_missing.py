"""Where UCX is not installed: nothing needs it but a lane over it, and that says what to do."""

from pathlib import Path

import pytest
from two_managers import PROMPT, prep, running, send

from callboard.kv.lanes import NoLane, UcxWires, WiresMissing, ucx, usable_lanes
from callboard.tools.errors import FleetFileError
from callboard.tools.fleet_check import check_fleet
from callboard.tools.fleet_file import load_fleet_file

FLEET = Path(__file__).parents[3] / "fleets" / "ucx.toml"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "LIBRARIES", ("no_such_library",))


async def test_a_wire_that_is_wanted_all_the_same_names_the_extra() -> None:
    wires = UcxWires("127.0.0.1")
    with pytest.raises(WiresMissing, match=r'pip install "callboard\[ucx\]"'):
        await wires.invite()
    await wires.close()


def test_managers_have_the_other_lanes() -> None:
    assert "shm" in usable_lanes("auto", UcxWires("127.0.0.1"))
    assert usable_lanes("ucx", UcxWires("127.0.0.1")) == ()


def test_the_fleet_file_that_asks_for_it_is_refused_with_the_remedy() -> None:
    with pytest.raises(FleetFileError, match=r'run pip install "callboard\[ucx\]", or write transport = "auto"'):
        check_fleet(load_fleet_file(FLEET))


async def test_a_manager_that_is_told_to_use_it_says_that_no_lane_leads_there() -> None:
    async with running({"transport": "ucx"}, {"transport": "ucx"}) as fleet:
        reserved = await fleet.at("d").ask(prep(PROMPT))
        with pytest.raises(NoLane, match="no lane leads to d"):
            await fleet.at("p").ask(send(reserved, PROMPT))
        assert (await fleet.stats("p")).leased == 0
