"""FastAPI on uvicorn, called through aiohttp with JSON: what MLC-LLM's microserving uses. Over a unix socket.

Its best settings here: uvloop and httptools, no access log, no life-span, no OpenAPI; bodies are pydantic models, as
FastAPI has them; the client encodes and decodes with msgspec, keeps its connections (as many as requests in flight,
warm before anything counts), and takes events from what has arrived rather than line by line. Events are server-sent
events, a request for each of the 64 streams; httptools and uvicorn write each as a chunk of its own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import uvloop
from _bus_load import (
    TEXT,
    TURN,
    Asker,
    Listener,
    all_streams,
    check_count,
    follow_orders,
    out_of_order,
    ready,
)
from msgspec import Struct
from msgspec.json import Decoder, Encoder

KEEP_ALIVE_S = 3600
JSON = {"Content-Type": "application/json"}


class Echo(Struct):
    text: str


class Count(Struct):
    count: int


class Event(Struct):
    index: int
    text: str


encode = Encoder().encode
decode_echo, decode_event = Decoder(Echo).decode, Decoder(Event).decode


def serve(address: str) -> None:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from pydantic import BaseModel

    class EchoBody(BaseModel):
        text: str

    class CountBody(BaseModel):
        count: int

    class EventBody(BaseModel):
        index: int
        text: str

    app = FastAPI(openapi_url=None)

    async def echo(request: EchoBody) -> EchoBody:
        return EchoBody(text=request.text)

    async def steps(count: int) -> AsyncIterator[str]:
        for index in range(count):
            yield f"data: {EventBody(index=index, text=TEXT).model_dump_json()}\n\n"
            await asyncio.sleep(0)

    async def free(count: int) -> AsyncIterator[str]:
        for index in range(count):
            yield f"data: {EventBody(index=index, text=TEXT).model_dump_json()}\n\n"
            if index % TURN == TURN - 1:
                await asyncio.sleep(0)

    def streaming(events: Callable[[int], AsyncIterator[str]]) -> Any:
        async def answer(request: CountBody) -> StreamingResponse:
            return StreamingResponse(events(request.count), media_type="text/event-stream")

        return answer

    app.post("/echo")(echo)
    app.post("/steps", response_model=None)(streaming(steps))
    app.post("/free", response_model=None)(streaming(free))

    async def run() -> None:
        config = uvicorn.Config(
            app,
            uds=address.removeprefix("ipc://"),
            http="httptools",
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 (uvicorn tells it by this flag)
            await asyncio.sleep(0.01)
        ready()
        await serving

    uvloop.run(run())


def client(address: str, pids: Sequence[int]) -> None:
    import aiohttp

    async def run() -> None:
        connector = aiohttp.UnixConnector(address.removeprefix("ipc://"), limit=0, keepalive_timeout=KEEP_ALIVE_S)
        async with aiohttp.ClientSession("http://bench", connector=connector, headers=JSON) as session:

            async def ask() -> Echo:
                async with session.post("/echo", data=encode(Echo(TEXT))) as response:
                    return decode_echo(await response.read())

            def listener(path: str) -> Listener:
                async def listen(stream: int, count: int) -> None:
                    num_events = 0
                    rest = b""
                    async with session.post(path, data=encode(Count(count))) as response:
                        async for chunk in response.content.iter_any():
                            *lines, rest = (rest + chunk).split(b"\n\n")
                            for line in lines:
                                event = decode_event(line[6:])  # "data: "
                                if event.index != num_events:
                                    raise out_of_order(event.index, num_events)
                                num_events += 1
                    check_count(num_events, count)

                return all_streams(listen)

            askers: dict[str, Asker] = {"": ask}
            await follow_orders(askers, {"steps": listener("/steps"), "free": listener("/free")}, pids)

    uvloop.run(run())
