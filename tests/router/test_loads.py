"""What a router takes for an engine's load: its own requests as they are now, and others' as reported."""

import random

from callboard.actors.load_protocol import LoadReport
from callboard.actors.protocol import Entry, Load
from callboard.bus import Address
from callboard.router.known.loads import Loads

IDLE = Load()


def entry(load: Load = IDLE) -> Entry:
    return Entry("e", "engine", Address("n", "inproc://n", "e"), load=load)


def total(loads: Loads, told: Load = IDLE) -> int:
    load = loads.load(entry(told))
    return load.num_running + load.num_waiting


def report(
    *began: str, ended: tuple[str, ...] = (), running: int = 0, is_whole: bool = False, **load: int
) -> LoadReport:
    return LoadReport(Load(num_running=running, **load), began, ended, is_whole)


def test_a_request_of_ours_is_counted_once_though_the_engine_counts_it_too():
    loads = Loads()
    loads.take("e", "r")
    assert total(loads) == 1
    loads.take_report("e", report("r", running=1))
    assert total(loads) == 1


def test_what_has_ended_here_is_not_taken_for_another_router_s_until_the_engine_has_heard_of_it():
    loads = Loads()
    loads.take("e", "r")
    loads.take_report("e", report("r", running=1))
    loads.give_back("e", "r")
    assert total(loads) == 0
    loads.take_report("e", report(ended=("r",)))
    assert total(loads) == 0


def test_requests_of_other_routers_are_counted_while_the_engine_has_them():
    loads = Loads()
    loads.take("e", "mine")
    loads.take_report("e", report("theirs", "mine", "theirs", running=3))
    assert total(loads) == 3
    loads.take_report("e", report(ended=("theirs",), running=2))
    loads.give_back("e", "mine")
    assert total(loads) == 1
    loads.take_report("e", report(ended=("theirs", "mine")))
    assert total(loads) == 0


def test_the_choices_of_one_request_are_one_request_to_the_engine():
    loads = Loads()
    for sequence in ("r", "r.1", "r.2"):
        loads.take("e", sequence)
    loads.take_report("e", report("r", "r", "r", running=3))
    assert total(loads) == 3


def test_what_a_request_will_bring_is_counted_until_the_engine_counts_it():
    loads = Loads()
    told = Load(prefill_token_s=0.001)
    loads.take("e", "r")
    loads.promise("e", "r", num_tokens=500, is_decode=True)
    load = loads.load(entry(told))
    assert (load.num_uncomputed_tokens, load.num_generating, load.queue_s) == (500, 1, 0.5)
    loads.take_report("e", report("r", num_uncomputed_tokens=480, num_generating=1))
    load = loads.load(entry(told))
    assert (load.num_uncomputed_tokens, load.num_generating) == (480, 1)


def test_a_promise_ends_with_the_request():
    loads = Loads()
    loads.take("e", "r")
    loads.promise("e", "r", num_tokens=500, is_decode=True)
    loads.give_back("e", "r")
    assert loads.load(entry()) == IDLE
    loads.promise("e", "r", num_tokens=500, is_decode=True)
    assert loads.load(entry()) == IDLE


def test_a_whole_report_stands_for_all_before_it():
    loads = Loads()
    loads.take_report("e", report("a", "b", running=2))
    loads.take_report("e", report("c", running=1, is_whole=True))
    assert total(loads) == 1


def test_the_directory_stands_in_when_reports_end():
    loads = Loads()
    told = Load(num_running=2)
    loads.report((entry(told),))
    loads.take_report("e", report("theirs", running=1))
    assert total(loads, told) == 1
    loads.lost("e")
    assert total(loads, told) == 2


def test_an_engine_that_was_ours_alone_is_idle_by_the_directory_too_once_our_request_has_ended():
    loads = Loads()
    loads.take("e", "r")
    loads.give_back("e", "r")
    told = Load(num_running=1)  # From the midst of it, and older than its end.
    loads.report((entry(told),))
    assert total(loads, told) == 0


def test_an_engine_that_is_gone_leaves_nothing():
    loads = Loads()
    loads.report((entry(Load(num_running=3)),))
    loads.take_report("e", report("theirs", running=1))
    loads.report(())
    assert total(loads) == 0


def test_a_copy_goes_its_own_way():
    loads = Loads()
    loads.take("e", "r")
    other = loads.copy()
    other.take("e", "s")
    other.promise("e", "r", num_tokens=9, is_decode=False)
    other.take_report("e", report("theirs", running=1))
    assert (total(loads), total(other)) == (1, 3)
    assert loads.load(entry()).num_uncomputed_tokens == 0


class Late:
    """Two routers and one engine, whose messages take their time. The names of requests begin with their router's."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.routers = {"a": Loads(), "b": Loads()}
        self.own: dict[str, set[str]] = {"a": set(), "b": set()}
        self.ending: list[str] = []
        self.coming: list[str] = []
        self.present: list[str] = []
        self.reports: dict[str, list[LoadReport]] = {"a": [], "b": []}

    def step(self, number: int) -> None:
        name = self.rng.choice("ab")
        match self.rng.randrange(5):
            case 0:
                self.routers[name].take("e", f"{name}{number}")
                self.own[name].add(f"{name}{number}")
                self.coming.append(f"{name}{number}")
            case 1 if self.coming:
                self.present.append(self.coming.pop(0))
                self.tell(began=(self.present[-1],))
            case 2 if self.present:
                self.end(self.rng.choice(self.present))
            case 3 if self.ending:
                self.give_back(self.ending.pop())
            case 4:
                self.hear(name, self.rng.randrange(4))

    def end(self, request_id: str) -> None:
        self.present.remove(request_id)
        self.tell(ended=(request_id,))
        self.ending.append(request_id)

    def give_back(self, request_id: str) -> None:
        self.own[request_id[0]].discard(request_id)
        self.routers[request_id[0]].give_back("e", request_id)

    def tell(self, began: tuple[str, ...] = (), ended: tuple[str, ...] = ()) -> None:
        for queue in self.reports.values():
            queue.append(LoadReport(Load(num_running=len(self.present)), began, ended))

    def hear(self, name: str, most: int = 1000) -> None:
        for report in self.reports[name][:most]:
            self.routers[name].take_report("e", report)
        del self.reports[name][:most]

    def settle(self) -> None:
        for name in "ab":
            self.hear(name)


def test_routers_agree_with_the_engine_whatever_comes_late():
    for seed in range(200):
        world = Late(seed)
        for number in range(60):
            world.step(number)
            for name, loads in world.routers.items():
                assert loads.num_own("e") == len(world.own[name]) <= total(loads)
        world.settle()
        for name, other in ("ab", "ba"):
            theirs = [request_id for request_id in world.present if request_id[0] == other]
            assert total(world.routers[name]) == len(world.own[name]) + len(theirs)
        for request_id in list(world.present):
            world.end(request_id)
        for request_id in [*world.ending, *world.coming]:
            world.give_back(request_id)
        world.settle()
        assert [total(loads) for loads in world.routers.values()] == [0, 0]


def test_a_request_that_comes_from_a_router_that_died_is_counted_once():
    loads = Loads()
    loads.take_report("e", report("r", running=1))
    loads.take("e", "r")
    assert total(loads) == 1
    loads.take_report("e", report("r", running=2))
    loads.take_report("e", report(ended=("r",), running=1))
    assert total(loads) == 1
    loads.give_back("e", "r")
    loads.take_report("e", report(ended=("r",)))
    assert total(loads) == 0
