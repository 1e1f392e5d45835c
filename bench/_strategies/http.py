"""Just enough of an HTTP client to stream completions from the frontend with little processor time of its own."""

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connections:
    """Connections to a server, kept alive and used again."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.host, self.port = parts.hostname, parts.port or 80
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """Return an idle one, or a new one."""
        return self._idle.pop() if self._idle else await asyncio.open_connection(self.host, self.port, limit=1 << 20)

    def give_back(self, connection: Connection) -> None:
        """Take one back of which everything was read."""
        self._idle.append(connection)


class HttpDoor:
    """A completion, streamed. Its body is made before it is due."""

    def __init__(self, connections: Connections, model: str, prompt: list[int], max_tokens: int) -> None:
        self.cost = (0, 0)
        self._connections = connections
        body = msgspec.json.encode(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {connections.host}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def tokens(self) -> AsyncIterator[int]:
        """Yield how many tokens each event brought. Raises RuntimeError for an answer that is none."""
        connection = reader, writer = await self._connections.take()
        try:
            writer.write(self._request)
            if b" 200 " not in (status := await reader.readline()):
                raise RuntimeError(f"{status!r}: {(await reader.read(1000))!r}")
            # An event is never cut by the end of a chunk: what lies between them is no line of an event.
            async for line in reader:
                if line.startswith(b"data: {"):
                    choices = msgspec.json.decode(line[6:])["choices"]
                    if count := sum(len(choice.get("token_ids") or ()) for choice in choices):
                        yield count
                elif line.startswith(b"data: [DONE]"):
                    break
            async for line in reader:
                if line == b"0\r\n":
                    break
            await reader.readline()
        except BaseException:
            writer.close()
            raise
        self._connections.give_back(connection)
