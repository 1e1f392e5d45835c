"""What is asked of every side, and what its mock workers answer with."""

import json

PROMPT = "In which order do the planets go around the sun, and how long does each of them take?"
MODELS = ("free", "paced")
STEP_S = 0.02
"""Between two events of a stream of the model ``paced``; those of ``free`` come as fast as they are made."""


def request(host: str, model: str, num_events: int, *, is_streamed: bool) -> bytes:
    """Return a completion's request, ready to be written to a connection that is kept alive."""
    wanted = {"model": model, "prompt": PROMPT, "max_tokens": num_events, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**wanted, "stream": is_streamed}).encode()
    lines = ("POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


def event(model: str, finish_reason: str | None) -> bytes:
    """Return a token's event as vLLM's servers write it."""
    choice = {"index": 0, "text": " token", "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
    head = {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion", "created": 1790000000}
    return b"data: " + json.dumps({**head, "model": model, "choices": [choice], "usage": None}).encode() + b"\n\n"


def whole(model: str, num_events: int) -> bytes:
    """Return an answer that is not streamed."""
    choice = {"index": 0, "text": num_events * " token", "logprobs": None, "finish_reason": "length"}
    usage = {"prompt_tokens": 20, "completion_tokens": num_events, "total_tokens": 20 + num_events}
    head = {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion", "created": 1790000000}
    return json.dumps({**head, "model": model, "choices": [choice], "usage": usage}).encode()


DONE = b"data: [DONE]\n\n"
