"""Several acceptors at one socket: connections are shared out by number, and none waits for one that hangs."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from waiting import until

from callboard.actors.frontend.acceptor import LEAD, Acceptor, Counts
from callboard.actors.frontend.listener import PortTaken, bind
from callboard.bus.tasks import Tasks


class Frontends:
    """Acceptors at one port, as several processes would be; ``there`` are those that the directory knows."""

    def __init__(self, folder: Path, num: int) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.there = set(range(num))
        self.accepted: list[list[socket.socket]] = [[] for _ in range(num)]
        self.counts = [Counts(folder / "connections", num=num, own=own) for own in range(num)]
        self.tasks = Tasks(lambda error: None)
        self.acceptors = [self._acceptor(own) for own in range(num)]
        self.clients: list[socket.socket] = []

    def _acceptor(self, own: int) -> Acceptor:
        async def keep(accepted: socket.socket) -> None:
            self.accepted[own].append(accepted)

        def others() -> set[int]:
            return self.there - {own}

        shared = socket.socket(fileno=os.dup(self.listener.fileno()))
        return Acceptor(shared, self.counts[own], others=others, open=keep, spawn=self.tasks.spawn)

    @property
    def nums(self) -> list[int]:
        """How many connections each has."""
        return [len(each) for each in self.accepted]

    def connect(self, num: int) -> None:
        """Connect so many clients, all at once."""
        for _ in range(num):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(self.listener.getsockname())
            self.clients.append(client)

    async def all_accepted(self) -> None:
        await until(lambda: sum(self.nums) == len(self.clients))

    def close(self) -> None:
        for acceptor in self.acceptors:
            acceptor.stop()
            acceptor._listener.close()
        for one in (self.listener, *self.clients, *(one for each in self.accepted for one in each)):
            one.close()


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[[int], Frontends]]:
    made: list[Frontends] = []

    def start(num: int) -> Frontends:
        made.append(Frontends(tmp_path, num))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.parametrize("num", [2, 3])
async def test_connections_that_come_at_once_are_shared_out(make: Callable[[int], Frontends], num: int) -> None:
    doors = make(num)
    for acceptor in doors.acceptors:
        acceptor.start()
    doors.connect(100)
    await doors.all_accepted()
    assert max(doors.nums) - min(doors.nums) <= 1 + max(doors.nums) // LEAD


async def test_the_next_connection_goes_to_who_has_the_fewest(make: Callable[[int], Frontends]) -> None:
    doors = make(2)
    first, second = doors.acceptors
    first.start()
    doors.connect(6)
    await doors.all_accepted()
    second.start()
    for expected in ([6, 1], [6, 2], [6, 3]):
        doors.connect(1)
        await doors.all_accepted()
        assert doors.nums == expected
    for _ in range(6):
        first.lost()
    doors.connect(1)
    await doors.all_accepted()
    assert doors.nums == [7, 3]


async def test_one_that_hangs_keeps_no_connection_waiting(make: Callable[[int], Frontends]) -> None:
    doors = make(2)
    doors.counts[1].tell(0)  # It accepts, as far as anybody can see.
    doors.acceptors[0].start()
    doors.connect(20)
    await doors.all_accepted()
    assert doors.nums == [20, 0]


async def test_the_count_of_one_that_was_killed_means_nothing_once_the_directory_has_lost_it(
    make: Callable[[int], Frontends],
) -> None:
    doors = make(2)
    doors.counts[1].tell(0)
    doors.there = {0}
    doors.acceptors[0].start()
    doors.acceptors[0].num_open = 5
    assert doors.acceptors[0]._is_due()
    doors.there = {0, 1}
    assert not doors.acceptors[0]._is_due()


async def test_what_one_has_not_accepted_when_it_leaves_another_does(make: Callable[[int], Frontends]) -> None:
    doors = make(2)
    first, second = doors.acceptors
    first.start()
    first.stop()
    doors.connect(10)
    await asyncio.sleep(0.05)
    assert doors.nums == [0, 0]
    second.start()
    await doors.all_accepted()
    assert doors.nums == [0, 10]
    first.start()
    doors.connect(5)
    await doors.all_accepted()
    assert doors.nums == [5, 10]


async def test_nobody_else_can_have_the_port_whatever_they_say(make: Callable[[int], Frontends]) -> None:
    address = make(2).listener.getsockname()
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(address)
    with pytest.raises(PortTaken, match=str(address[1])):
        bind(*address)


def test_counts_are_seen_by_all_that_map_them(tmp_path: Path) -> None:
    one, two, three = (Counts(tmp_path / "connections", num=3, own=own) for own in range(3))
    assert (tmp_path / "connections").stat().st_blocks, "who writes into a hole is killed where the disk is full"
    assert one.fewest() is None
    two.tell(7)
    three.tell(4)
    assert (one.fewest(), two.fewest(), three.fewest()) == (4, 4, 7)
    assert one.fewest([1]) == 7
    three.tell(None)
    assert (one.fewest(), two.fewest()) == (7, None)
    assert Counts(tmp_path / "connections", num=3, own=0).fewest() == 7, "one that starts again finds the others"
    assert (tmp_path / "connections").stat().st_mode & 0o777 == 0o600
