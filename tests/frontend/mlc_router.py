"""A router as people write them for MLC-LLM: it knows engines by their URLs, and joins paths to them as strings.

It asks what MLC-LLM's own asks, in the order and with the fields in which it does, and reads answers line by line.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

UNSET_IN_ITS_REQUESTS = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": None,
    "presence_penalty": None,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": None,
    "n": 1,
    "seed": None,
    "stop": None,
    "stream_options": None,
    "suffix": None,
    "top_p": None,
    "response_format": None,
    "debug_config": {"ignore_eos": False, "pinned_system_prompt": False, "special_request": None},
}
"""What a whole request model is dumped as; clients written for it send all of it."""


class EngineRefused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, error: dict[str, Any]) -> None:
        super().__init__(f"{status}: {error}")
        self.status = status
        self.error = error


class MlcRouter:
    """Server 0 prefills and the others decode, where there are others. ``balance``: the share of the decoding one."""

    def __init__(
        self, http: httpx.AsyncClient, urls: list[str], *, is_disaggregated: bool, balance: float = 0.0
    ) -> None:
        self.http = http
        self.urls = urls
        self.is_disaggregated = is_disaggregated
        self.balance = balance
        self.num_running = [0] * len(urls)
        self.num_started = [0] * len(urls)

    async def handle(self, request_id: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Give the chunks of a streamed answer, or the one whole answer."""
        whole = {**UNSET_IN_ITS_REQUESTS, **body, "user": request_id}
        way = self._disaggregated if self.is_disaggregated else self._round_robin
        async for response in way(whole):
            for choice in response["choices"]:
                assert choice["finish_reason"] in (None, "stop", "length"), "preempt is never told"
            yield response

    def _pick(self, among: list[int]) -> int:
        return min(among, key=lambda index: (self.num_running[index], self.num_started[index]))

    async def _round_robin(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        index = self._pick(list(range(len(self.urls))))
        self.num_started[index] += 1
        self.num_running[index] += 1
        try:
            async for response in self._post_streamed(index, "/v1/completions", request):
                yield response
        finally:
            self.num_running[index] -= 1

    async def _disaggregated(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        num_tokens = len(request["prompt"])
        decode = self._pick(list(range(1, len(self.urls))) or [0])
        end = -1 if not self.balance else int((1 - self.balance) * num_tokens)
        self.num_started[decode] += 1
        self.num_running[decode] += 1
        try:
            prepared = await self.post(decode, "prep_recv", {**request, "end": end})
            assert isinstance(prepared["kv_append_metadata"], str)
            begin = prepared["prefix_matched_length"]
            end = num_tokens + end if end < 0 else end
            assert begin <= end
            if begin < end:
                sent = {"begin": begin, "end": end, "kv_addr_info": prepared["kv_append_metadata"], "recv_rank": decode}
                assert await self.post(0, "remote_send", {**request, **sent}) == {}
            generate = {**request, "begin": end}
            async for response in self._post_streamed(decode, "/microserving/start_generate", generate):
                yield response
        finally:
            self.num_running[decode] -= 1

    async def post(self, index: int, verb: str, body: dict[str, Any]) -> Any:
        """Call a verb that is answered once. Raises EngineRefused."""
        response = await self.http.post(f"{self.urls[index]}/microserving/{verb}", json=body)
        if response.status_code != 200:
            raise EngineRefused(response.status_code, response.json()["error"])
        return response.json()

    async def _post_streamed(self, index: int, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with self.http.stream("POST", self.urls[index] + path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise EngineRefused(response.status_code, response.json()["error"])
            if not body.get("stream"):
                await response.aread()
                yield response.json()
                return
            is_done = False
            async for line in response.aiter_lines():
                if not (line := line.strip()):
                    continue
                assert not is_done, "something came after [DONE]"
                assert line.startswith("data: ")
                if is_done := line == "data: [DONE]":
                    continue
                yield json.loads(line.removeprefix("data: "))
            assert is_done
