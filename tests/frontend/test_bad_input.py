"""Bad input is answered by a 4xx in OpenAI's shape that says what to change; the frontend serves on."""

import json
from typing import Any

import openai
import pytest

from callboard.actors.frontend.errors import ApiError
from callboard.actors.frontend.requests import decode_chat, decode_completion

USER = {"role": "user", "content": "x"}


def refusal(decode: Any, body: Any) -> ApiError:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ApiError) as raised:
        decode(data).conversation()
    return raised.value


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"prompt": 5}, "prompt", "got `int`"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string"),
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]", "got `str`"),
        ({"prompt": ["x"] * 129}, "prompt", "129"),
        ({"model": None}, "model", "got `null`"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": "5"}, "max_tokens", "got `str`"),
        ({"max_tokens": True}, "max_tokens", "got `bool`"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 17}, "n", "<= 16"),
        ({"temperature": 2.5}, "temperature", "<= 2.0"),
        ({"temperature": -0.1}, "temperature", ">= 0.0"),
        ({"top_p": 0}, "top_p", "> 0.0"),
        ({"top_p": 1.1}, "top_p", "<= 1.0"),
        ({"top_k": -2}, "top_k", ">= -1"),
        ({"seed": 2**70}, "seed", "<="),
        ({"stop": ""}, "stop", "length >= 1"),
        ({"stop": ["a", ""]}, "stop[1]", "length >= 1"),
        ({"stop": list("abcde")}, "stop", "length <= 4"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "when 'stream' is true"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"logprobs": 2}, "logprobs", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"presence_penalty": 2.5}, "presence_penalty", "<= 2.0"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", ">= -2.0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not supported"),
        ({"min_p": 0.1}, "min_p", "not supported"),
    ],
)
def test_a_bad_completion_request_names_the_field(change: dict[str, Any], param: str, says: str) -> None:
    error = refusal(decode_completion, {"model": "m", "prompt": "x", **change})
    assert (error.status, error.body.param, error.body.type) == (400, param, "invalid_request_error")
    assert says in error.body.message


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": "hi"}, "messages", "got `str`"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "Missing"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'king'"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "no content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "not supported"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0]", "not supported"),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content", "got `int`"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "'image_url'"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "no text"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", ">= 1"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"response_format": "text"}, "response_format", "not supported"),
        ({"top_logprobs": 2, "logprobs": True}, "top_logprobs", "not supported"),
        ({"logprobs": 1}, "logprobs", "got `int`"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
    ],
)
def test_a_bad_chat_request_names_the_field(change: dict[str, Any], param: str, says: str) -> None:
    error = refusal(decode_chat, {"model": "m", "messages": [USER], **change})
    assert (error.status, error.body.param, error.body.type) == (400, param, "invalid_request_error")
    assert says in error.body.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "m",}', b'{"prompt": "\\ud800"}', b'{"prompt": "\xff"}', b'{"x": ' + b"[" * 100_000],
    ids=["empty", "cut", "comma", "surrogate", "not-utf8", "deep"],
)
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    error = refusal(decode_completion, body)
    assert (error.status, error.body.code) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"5", b"null"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert refusal(decode_completion, body).status == 400


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_a_missing_field_is_named(name: str) -> None:
    error = refusal(decode_completion, {key: "x" for key in ("model", "prompt") if key != name})
    assert (error.body.param, error.body.code) == (name, "missing_required_parameter")


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    nothing = dict.fromkeys(("tools", "stop", "n", "seed", "logprobs", "max_tokens", "temperature", "stream_options"))
    quiet = {"tool_choice": "none", "response_format": {"type": "text"}, "top_logprobs": 0, "frequency_penalty": 0.0}
    request = decode_chat(json.dumps({"model": "m", "messages": [USER], **nothing, **quiet, "user": "me"}).encode())
    assert request.conversation() == [USER]


async def test_every_refusal_has_openais_shape_and_the_frontend_serves_on(door: Any) -> None:
    bad = await door.http.post("/v1/completions", content=b"{nonsense")
    assert bad.status_code == 400
    assert set(bad.json()) == {"error"}
    assert set(bad.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await door.openai.completions.create(model="tiny", prompt="x", temperature=9)
    assert (await door.complete()).status_code == 200
    assert len(door.router.asked) == 1


async def test_an_unknown_model_is_not_found(door: Any) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        await door.openai.completions.create(model="other", prompt="x")
    assert raised.value.code == "model_not_found"
    assert "'tiny'" in raised.value.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5] * 256}, "prompt"),
        ({"prompt": [5] * 255, "max_tokens": 2}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 256}, "max_tokens"),
    ],
)
async def test_what_exceeds_the_context_is_refused_with_numbers(door: Any, body: dict[str, Any], param: str) -> None:
    reply = await door.complete(**body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "256" in error["message"]
    assert door.router.asked == []


async def test_a_chat_that_exceeds_the_context_is_refused(door: Any) -> None:
    reply = await door.chat(messages=[{"role": "user", "content": "x " * 400}])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    reply = await door.chat(max_completion_tokens=250)
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [-1], [320], [[5], [10**6]]])
async def test_a_prompt_no_model_can_read_is_refused(door: Any, prompt: Any) -> None:
    reply = await door.complete(prompt=prompt)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")


async def test_a_body_that_is_too_large_is_refused(open_door: Any) -> None:
    door = await open_door(max_body_bytes=1000)
    assert (await door.complete(prompt="x" * 2000)).status_code == 413
    assert (await door.complete(prompt="x" * 20_000)).json()["error"]["code"] == "request_too_large"

    async def chunks() -> Any:
        for _ in range(20):
            yield b" " * 100

    assert (await door.http.post("/v1/completions", content=chunks())).status_code == 413
    assert (await door.complete()).status_code == 200


async def test_unknown_urls_and_methods_are_refused_in_the_same_shape(door: Any) -> None:
    for method, url, status in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ]:
        reply = await door.http.request(method, url)
        assert reply.status_code == status, url
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_without_a_template_there_is_no_chat(open_door: Any, model_dir: Any, tmp_path: Any) -> None:
    from callboard.actors.frontend.frontend import ServedModel

    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    door = await open_door(models={"tiny": ServedModel(str(tmp_path), 256)})
    reply = await door.chat()
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "no_chat_template")


async def test_only_keys_that_are_known_open_the_door(open_door: Any) -> None:
    door = await open_door(api_keys=("other", "secret"))
    assert (await door.openai.models.list()).data[0].id == "tiny"
    assert (await door.openai.completions.create(model="tiny", prompt="x")).choices
    for header in ("Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer sécret"):
        headers = {"authorization": header.encode()}
        for method, url in [("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")]:
            reply = await door.http.request(method, url, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await door.http.get("/health")).status_code == 200
