"""grpc.aio on uvloop at both ends, over a unix socket, one channel.

Its best settings here: generic handlers with msgspec as their serializers, on the same structs as Callboard's, so
that protobuf is no handicap; coroutines as handlers (plain functions go through a thread pool, which is slower);
streams written by async generators and read by ``async for``; no compression, no interceptors. The defaults of its
channel: other targets of optimisation, no bandwidth probes, or more channels changed nothing beyond the spread.

Batched by its application, in two ways. *batched* keeps an RPC for each stream, as gRPC is meant to be used: what a
stream's producer has left when its writer comes by goes as one message. *one RPC* carries all 64 streams, as one
link of Callboard's does, and gives each event to the task that reads its stream. A message is up to 64 KiB, encoded
and decoded by one call; producers wait while a whole message is waiting. Inside *one RPC* a stream has no credit, no
end and no cancellation of its own, so it does less than gRPC's streams or Callboard's: what an application could gain.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import uvloop
from _bus_load import (
    MAX_BATCH_BYTES,
    STREAMS,
    TEXT,
    TURN,
    Asker,
    Echo,
    Event,
    Free,
    Listener,
    Reply,
    Steps,
    all_streams,
    check_count,
    follow_orders,
    out_of_order,
    ready,
)
from msgspec.msgpack import Decoder, Encoder

Batch = list[tuple[int, Event]]
Producer = Callable[[Any, Any], AsyncIterator[Event]]

encode = Encoder().encode
EVENTS_PER_BATCH = MAX_BATCH_BYTES // len(encode((STREAMS, Event(100_000, TEXT))))


async def echo(request: Echo, context: Any) -> Reply:
    return Reply(request.text)


async def steps(request: Steps, context: Any) -> AsyncIterator[Event]:
    for index in range(request.count):
        yield Event(index, TEXT)
        await asyncio.sleep(0)


async def free(request: Free, context: Any) -> AsyncIterator[Event]:
    for index in range(request.count):
        yield Event(index, TEXT)
        if index % TURN == TURN - 1:
            await asyncio.sleep(0)


class Outbox:
    """Events of many producers on their way into messages."""

    def __init__(self, num_producers: int) -> None:
        self._num_producers = num_producers
        self._events: Batch = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    async def produce(self, stream: int, events: AsyncIterator[Event]) -> None:
        async for event in events:
            while len(self._events) >= EVENTS_PER_BATCH:
                self._room.clear()
                await self._room.wait()
            self._events.append((stream, event))
            self._wake.set()
        self._num_producers -= 1
        self._wake.set()

    async def batches(self) -> AsyncIterator[Batch]:
        while self._num_producers or self._events:
            await self._wake.wait()
            self._wake.clear()
            batch, self._events = self._events, []
            self._room.set()
            if batch:
                yield batch


def batched(producer: Producer, num_streams: int) -> Callable[[Any, Any], AsyncIterator[Batch]]:
    """Return the handler that carries so many streams of a producer's."""

    async def handler(request: Any, context: Any) -> AsyncIterator[Batch]:
        outbox = Outbox(num_streams)
        async with asyncio.TaskGroup() as group:
            for stream in range(num_streams):
                group.create_task(outbox.produce(stream, producer(request, context)))
            async for batch in outbox.batches():
                yield batch

    return handler


class Inbox:
    """A stream's events on their way to its reader."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._wake: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def read(self) -> Event:
        while not self._events:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._events.popleft()


def serve(address: str) -> None:
    def streaming(handler: Any, request: type[Any]) -> Any:
        return grpc.unary_stream_rpc_method_handler(handler, Decoder(request).decode, encode)

    async def run() -> None:
        server = grpc.aio.server()
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(echo, Decoder(Echo).decode, encode),
            "Steps": streaming(steps, Steps),
            "Free": streaming(free, Free),
            "BatchedSteps": streaming(batched(steps, 1), Steps),
            "BatchedFree": streaming(batched(free, 1), Free),
            "ManySteps": streaming(batched(steps, STREAMS), Steps),
            "ManyFree": streaming(batched(free, STREAMS), Free),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
        server.add_insecure_port(address.replace("ipc://", "unix://"))
        await server.start()
        ready()
        await server.wait_for_termination()

    uvloop.run(run())


def client(address: str, pids: Sequence[int]) -> None:
    async def run() -> None:
        async with grpc.aio.insecure_channel(address.replace("ipc://", "unix://")) as channel:
            ask = channel.unary_unary("/bench/Echo", encode, Decoder(Reply).decode)

            def plain(name: str, request: type[Any]) -> Listener:
                method = channel.unary_stream(f"/bench/{name}", encode, Decoder(Event).decode)

                async def listen(stream: int, count: int) -> None:
                    num_events = 0
                    async for event in method(request(count)):
                        if event.index != num_events:
                            raise out_of_order(event.index, num_events)
                        num_events += 1
                    check_count(num_events, count)

                return all_streams(listen)

            def batches(name: str, request: type[Any]) -> Listener:
                method = channel.unary_stream(f"/bench/{name}", encode, Decoder(Batch).decode)

                async def listen(stream: int, count: int) -> None:
                    num_events = 0
                    async for batch in method(request(count)):
                        for _, event in batch:
                            if event.index != num_events:
                                raise out_of_order(event.index, num_events)
                            num_events += 1
                    check_count(num_events, count)

                return all_streams(listen)

            def many(name: str, request: type[Any]) -> Listener:
                method = channel.unary_stream(f"/bench/{name}", encode, Decoder(Batch).decode)

                async def read(inbox: Inbox, count: int) -> None:
                    for index in range(count):
                        event = await inbox.read()
                        if event.index != index:
                            raise out_of_order(event.index, index)

                async def listen(count: int) -> None:
                    inboxes = [Inbox() for _ in range(STREAMS)]
                    async with asyncio.TaskGroup() as group:
                        for inbox in inboxes:
                            group.create_task(read(inbox, count))
                        async for batch in method(request(count)):
                            for stream, event in batch:
                                inboxes[stream].put(event)

                return listen

            listeners = {
                "steps": plain("Steps", Steps),
                "free": plain("Free", Free),
                "batched steps": batches("BatchedSteps", Steps),
                "batched free": batches("BatchedFree", Free),
                "one steps": many("ManySteps", Steps),
                "one free": many("ManyFree", Free),
            }
            askers: dict[str, Asker] = {"": lambda: ask(Echo(TEXT))}
            await follow_orders(askers, listeners, pids)

    uvloop.run(run())
