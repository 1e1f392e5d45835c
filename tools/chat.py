"""``callboard chat``: talk to a running fleet over its HTTP API, streaming; also one question, or piped text."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from .errors import CliError
from .running import find_fleet

Conversation = list[dict[str, str]]


def run(arguments: argparse.Namespace) -> int:
    """Ask one question (given, or piped), or hold a conversation."""
    url, model = _where(arguments)
    conversation: Conversation = []
    if arguments.system is not None:
        conversation.append({"role": "system", "content": arguments.system})
    question = " ".join(arguments.question)
    if not question and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise CliError('nothing was asked: give a question, as in callboard chat "Who are you?"')
    if question:
        conversation.append({"role": "user", "content": question})
        _answer(url, model, conversation, arguments)
        return 0
    return _converse(url, model, conversation, arguments)


def _where(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the API's base URL and the model to ask."""
    if arguments.url is not None and arguments.model is not None:
        return arguments.url.rstrip("/"), arguments.model
    fleet = find_fleet(arguments.fleet)
    if fleet.state.host:
        sentence = f'fleet "{fleet.state.name}" answers where it was started, and this is its host {fleet.state.host}'
        raise CliError(f"{sentence}: pass --url and --model")
    if fleet.state.url is None:
        raise CliError(f'fleet "{fleet.state.name}" serves no HTTP: it has no engines')
    if arguments.model is None and not fleet.state.models:
        raise CliError(f'fleet "{fleet.state.name}" is still starting: see callboard ps')
    return arguments.url or f"{fleet.state.url}/v1", arguments.model or fleet.state.models[0]


def _converse(url: str, model: str, conversation: Conversation, arguments: argparse.Namespace) -> int:
    import readline  # noqa: F401  (line editing and history for input)

    print(f"Talking to {model}. Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if not question:
            continue
        conversation.append({"role": "user", "content": question})
        try:
            answer = _answer(url, model, conversation, arguments)
            conversation.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            print("\n(stopped)")
            conversation.pop()
        except CliError as error:
            print(error, file=sys.stderr)
            conversation.pop()


def _answer(url: str, model: str, conversation: Conversation, arguments: argparse.Namespace) -> str:
    """Print an answer as it comes; return it. Raises CliError."""
    body: dict[str, Any] = {
        "model": model,
        "messages": conversation,
        "stream": True,
        "max_tokens": arguments.max_tokens,
    }
    body["temperature"] = arguments.temperature
    pieces = []
    for piece in stream_chat(url, body, api_key=os.environ.get("OPENAI_API_KEY")):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def stream_chat(url: str, body: dict[str, Any], *, api_key: str | None) -> Iterator[str]:
    """Yield the pieces of a streamed chat completion. Raises CliError with the server's own sentence."""
    import httpx

    headers = {b"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    try:
        with (
            httpx.Client(timeout=httpx.Timeout(600.0, connect=5.0), trust_env=False) as client,
            client.stream("POST", f"{url}/chat/completions", json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                hint = "" if response.status_code != 401 or api_key else " Put the key into OPENAI_API_KEY."
                raise CliError(_sentence(response.status_code, response.read()) + hint)
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield from _pieces(json.loads(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        raise CliError(f"cannot talk to {url}: {error or type(error).__name__}") from None


def _pieces(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise CliError(f"the answer broke off: {chunk['error'].get('message', chunk['error'])}")
    for choice in chunk.get("choices", []):
        if piece := choice.get("delta", {}).get("content"):
            yield piece


def _sentence(status: int, body: bytes) -> str:
    try:
        return f"the server refused ({status}): {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server refused ({status}): {body[:200].decode(errors='replace')}"
