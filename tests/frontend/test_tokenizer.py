"""The light tokenizer says what transformers says."""

from datetime import datetime
from pathlib import Path

import pytest

from callboard.actors.embedded_model import embedded_gguf, resolve
from callboard.actors.frontend.chat_template import ChatTemplate, TemplateRefused
from callboard.actors.frontend.tokenizer import Tokenizer, TokenizerMissing
from callboard.tools.running import cache_dir

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\tand tabs ",
    "Grüße, 你好, 🙂👩‍👩‍👧, \u0301",
    "<|im_start|>user\nhi<|im_end|>",
    "x = 1234567890 # don't",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be terse. <b>\n"}, {"role": "user", "content": "  hi  "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "你好 🙂"},
    ],
]
RICH_TEMPLATE = """{{ bos_token }}{%- for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}[{{ message | tojson }}]{% endgeneration %}

{% endfor %}
{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}"""


@pytest.mark.smollm2
def test_it_equals_transformers_on_the_embedded_model() -> None:
    from transformers import AutoTokenizer

    converted = resolve(str(embedded_gguf()), cache_dir(), print)
    theirs = AutoTokenizer.from_pretrained(converted)
    ours = Tokenizer.load(converted, lambda: 0.0)

    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for messages in CONVERSATIONS:
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.chat_template is not None
        assert ours.chat_template.render(messages) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ours.encode_chat(messages) == ids
    theirs.chat_template = RICH_TEMPLATE
    rich = ChatTemplate(RICH_TEMPLATE, ours.special_tokens, datetime.now().timestamp)
    for messages in CONVERSATIONS:
        assert rich.render(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_the_start_token_is_added_to_texts_and_not_to_chats(model_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.processors import TemplateProcessing

    rust = RustTokenizer.from_file(str(model_dir / "tokenizer.json"))
    rust.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    tokenizer = Tokenizer.load(tmp_path, lambda: 0.0)
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello", add_special_tokens=True) == [1, *hello]
    assert tokenizer.encode_chat([{"role": "user", "content": "Hello"}]) == [1, *hello]


def test_end_tokens_come_from_every_file_that_names_one(model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    assert Tokenizer.load(tmp_path, lambda: 0.0).eos_token_ids == (0, 2, 7)


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    text = "Hello Grüße 你好 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(2) == b"<|im_end|>"


def test_a_template_may_refuse(model_dir: Path) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, lambda: 0.0)
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        template.render([])


@pytest.mark.parametrize("source", ["{{ messages[0].content.secret.x }}", "{{ 1 / 0 }}", "{{ messages[0] + 1 }}"])
def test_a_template_that_breaks_is_a_refusal(source: str) -> None:
    with pytest.raises(TemplateRefused):
        ChatTemplate(source, {}, lambda: 0.0).render([{"role": "user", "content": "x"}])


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {}, lambda: 0.0)
    with pytest.raises(TemplateRefused):
        template.render([])


def test_a_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, lambda: 0.0)
