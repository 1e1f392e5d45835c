"""A user's actors, for fleets of tests: a copy of this file lies beside the fleet file."""

import asyncio
import os
import time

from callboard.actors.actor import Actor
from callboard.bus import Ask, Message


class Greeted(Message, frozen=True):
    text: str
    pid: int


class Greet(Ask[Greeted], frozen=True):
    name: str


class Die(Ask[Greeted], frozen=True):
    pass


class Hang(Ask[Greeted], frozen=True):
    pass


class Ping:
    def __init__(self, greeting="hi"):
        self.greeting = greeting

    def on_greet(self, message: Greet) -> Greeted:
        return Greeted(f"{self.greeting} {message.name}", os.getpid())

    def on_die(self, message: Die) -> Greeted:
        raise RuntimeError("a bug")

    def on_hang(self, message: Hang) -> Greeted:
        while True:
            pass


class NeverReady(Actor):
    async def start(self):
        await asyncio.Event().wait()


class Loading(Actor):
    async def start(self):
        await self.node.run_blocking(time.sleep, 30)


class Refusing(Actor):
    async def start(self):
        raise OSError("the moon is not in the right phase")
