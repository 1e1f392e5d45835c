"""The openai SDK against the frontend over a real socket: models, completions and chat, whole and streamed."""

import json
from typing import Any

import openai
import pytest

from callboard.actors.protocol import Token
from callboard.bus import ActorDied
from callboard.kv.tokens import unpack_tokens

HELLO: Any = [{"role": "user", "content": "Hello"}]


async def test_models_are_listed_and_found(door: Any) -> None:
    listed = await door.openai.models.list()
    assert [model.id for model in listed.data] == ["tiny"]
    found = await door.openai.models.retrieve("tiny")
    assert (found.id, found.object) == ("tiny", "model")
    with pytest.raises(openai.NotFoundError):
        await door.openai.models.retrieve("org/other")


async def test_a_completion(door: Any) -> None:
    door.router.says("Hello wörld 🙂")
    reply = await door.openai.completions.create(model="tiny", prompt="the quick", max_tokens=50)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason, reply.object) == ("Hello wörld 🙂", "stop", "text_completion")
    prompt = door.router.tokenizer.encode("the quick", add_special_tokens=True)
    assert unpack_tokens(door.router.asked[0].prompt) == prompt
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.total_tokens == len(prompt) + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == 4
    assert reply.id.startswith("cmpl-")


async def test_a_chat_completion_goes_through_the_template(door: Any) -> None:
    reply = await door.openai.chat.completions.create(model="tiny", messages=HELLO)
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello world", "stop")
    [asked] = door.router.asked
    prompt = unpack_tokens(asked.prompt)
    text = door.router.tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == "<|im_start|>user\nHello<|im_end|><|im_start|>assistant\n"
    assert asked.sampling.max_tokens == 256 - len(prompt)


async def test_completions_stream(door: Any) -> None:
    door.router.says("Hello wörld 🙂", 0.01, " and more")
    stream = await door.openai.completions.create(model="tiny", prompt="x", max_tokens=60, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello wörld 🙂 and more"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_chats_stream_role_then_text_then_finish_then_usage(door: Any) -> None:
    stream = await door.openai.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "Hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].choices[0].delta.content is None
    assert last.choices == []
    assert last.usage.prompt_tokens_details.cached_tokens == 4


async def test_the_events_are_those_of_the_format(door: Any) -> None:
    reply = await door.complete(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, end = reply.text.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert [value["usage"] is None for value in values] == [True] * (len(values) - 1) + [False]
    assert "usage" not in json.loads((await door.complete(stream=True)).text.split("\n\n")[0].removeprefix("data: "))


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_stop_string_over_several_tokens_cuts_and_cancels(door: Any, is_streamed: bool) -> None:
    door.router.says("one two thr", 0.01, "ee four five", 30.0)
    request = {"model": "tiny", "prompt": "x", "max_tokens": 100, "stop": [" three", "zzz"]}
    if is_streamed:
        chunks = [chunk async for chunk in await door.openai.completions.create(**request, stream=True)]
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        [choice] = (await door.openai.completions.create(**request)).choices
        text, reason = choice.text, choice.finish_reason
    assert (text, reason) == ("one two", "stop")
    await door.router.all_ended.wait()
    assert list(door.router.ended.values()) == ["cancelled"]


async def test_choices_share_the_seed_and_differ_by_index(door: Any) -> None:
    door.router.plan = lambda message: [f"choice {message.sampling.index}"]
    reply = await door.openai.chat.completions.create(
        model="tiny", messages=HELLO, n=2, seed=7, extra_headers={"x-request-id": "mine"}
    )
    assert [choice.message.content for choice in reply.choices] == ["choice 0", "choice 1"]
    asked = sorted(door.router.asked, key=lambda message: message.sampling.index)
    assert [(message.request_id, message.sampling.seed) for message in asked] == [("mine", 7), ("mine.1", 7)]
    assert reply.usage.prompt_tokens == len(unpack_tokens(asked[0].prompt))
    assert (
        reply.usage.completion_tokens == 2 * len(door.router.tokenizer.encode("choice 0", add_special_tokens=False)) + 2
    )


async def test_streamed_choices_interleave(door: Any) -> None:
    door.router.plan = lambda message: ["a", 0.03, "b", 0.03, "c"]
    stream = await door.openai.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True)
    texts, order = ["", "", ""], []
    async for chunk in stream:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        order.append(choice.index)
    assert texts == ["abc"] * 3
    assert order != sorted(order)


async def test_several_prompts_give_choices_in_order(door: Any) -> None:
    door.router.plan = lambda message: [f"{unpack_tokens(message.prompt)[0]}/{message.sampling.index}"]
    reply = await door.openai.completions.create(model="tiny", prompt=[[5], [6]], n=2)
    assert [choice.text for choice in reply.choices] == ["5/0", "5/1", "6/0", "6/1"]
    assert reply.usage.prompt_tokens == 2


@pytest.mark.parametrize("prompt", ["the", ["the"], [10, 11], [[10, 11]], ["the", "fox"]])
async def test_prompts_come_in_every_shape(door: Any, prompt: Any) -> None:
    reply = await door.openai.completions.create(model="tiny", prompt=prompt)
    assert [choice.text for choice in reply.choices] == ["Hello world"] * (2 if prompt == ["the", "fox"] else 1)


async def test_defaults_and_extensions_reach_the_router(door: Any) -> None:
    await door.complete()
    await door.complete()
    await door.complete(temperature=0, top_p=0.5, top_k=3, ignore_eos=True, seed=-1, max_tokens=5, priority=2)
    await door.complete(top_k=-1, stop=None, logit_bias={}, best_of=1, presence_penalty=0, unheard_of=[1])
    first, second, third, fourth = (message.sampling for message in door.router.asked)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (1.0, 1.0, None, 16)
    assert (first.ignore_eos, first.stop_token_ids) == (False, (2,))
    assert first.seed != second.seed
    assert (third.temperature, third.top_p, third.top_k, third.max_tokens) == (0.0, 0.5, 3, 5)
    assert (third.ignore_eos, third.stop_token_ids, third.seed) == (True, (), 2**63 - 1)
    assert fourth.top_k is None
    assert door.router.asked[2].priority == 2


async def test_the_default_length_ends_at_the_context(door: Any) -> None:
    await door.complete(prompt=[5] * 250)
    assert door.router.asked[0].sampling.max_tokens == 6


async def test_length_is_a_finish_reason(door: Any) -> None:
    door.router.says("one two three four five")
    reply = await door.openai.completions.create(model="tiny", prompt="x", max_tokens=3)
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)


async def test_logprobs_of_the_chosen_tokens(door: Any) -> None:
    reply = await door.openai.completions.create(model="tiny", prompt="x", logprobs=1)
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == "Hello world"
    assert set(logprobs.token_logprobs) == {-0.5}
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert (await door.openai.completions.create(model="tiny", prompt="x")).choices[0].logprobs is None


async def test_logprobs_in_chats_whole_and_streamed(door: Any) -> None:
    door.router.says("é 🙂")
    whole = await door.openai.chat.completions.create(model="tiny", messages=HELLO, logprobs=True)
    entries = whole.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "é 🙂"
    stream = await door.openai.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, stream=True)
    streamed = [chunk.choices[0].logprobs async for chunk in stream]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs.content] == entries


async def test_text_parts_are_joined_and_developers_are_systems(door: Any) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    await door.openai.chat.completions.create(model="tiny", messages=messages)
    text = door.router.tokenizer.decode(unpack_tokens(door.router.asked[0].prompt), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe kind<|im_end|><|im_start|>user\na\nb<|im_end|>")


async def test_an_error_in_mid_stream_raises_in_the_sdk(door: Any) -> None:
    door.router.says("Hello", 0.05, ActorDied("the engine is gone"))
    stream = await door.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    texts: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")

    with pytest.raises(openai.APIError, match="engine is gone"):
        await read()
    assert "".join(texts) == "Hello"


async def test_an_aborted_request_is_an_error(door: Any) -> None:
    door.router.says(Token(0, 9, finish_reason="abort"))
    with pytest.raises(openai.InternalServerError, match="aborted"):
        await door.openai.completions.create(model="tiny", prompt="x")


async def test_a_long_prompt_is_the_same_as_a_short_one(open_door: Any, model_dir: Any) -> None:
    from callboard.actors.frontend.frontend import ServedModel

    door = await open_door(models={"tiny": ServedModel(str(model_dir), 100_000)})
    text = "the quick brown fox " * 500
    await door.complete(prompt=text)
    prompt = door.router.tokenizer.encode(text, add_special_tokens=True)
    assert unpack_tokens(door.router.asked[0].prompt) == prompt
    content = [{"role": "user", "content": text}]
    await door.openai.chat.completions.create(model="tiny", messages=content)
    assert len(door.router.asked[1].prompt) > len(door.router.asked[0].prompt)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_token_ids_are_returned_to_those_who_ask(door: Any, is_streamed: bool) -> None:
    door.router.says("Hello wörld 🙂")
    extra = {"return_token_ids": True}
    if is_streamed:
        stream = await door.openai.completions.create(model="tiny", prompt="x", stream=True, extra_body=extra)
        ids = [id async for chunk in stream for id in chunk.choices[0].token_ids]
    else:
        reply = await door.openai.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
        ids = reply.choices[0].token_ids
    assert door.router.tokenizer.decode(ids, skip_special_tokens=True) == "Hello wörld 🙂"
    plain = await door.openai.completions.create(model="tiny", prompt="x")
    assert "token_ids" not in plain.choices[0].model_dump()
