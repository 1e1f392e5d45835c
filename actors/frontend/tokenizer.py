"""A model's tokenizer, read from its directory with the ``tokenizers`` library alone.

``AutoTokenizer`` would do the same (tests compare them) and load torch: 220 MB in a process that only moves text.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from .chat_template import ChatTemplate, TemplateRefused, Wall

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerMissing(Exception):
    """The model's directory holds no tokenizer that can be read here; the text names file and remedy."""


class Tokenizer:
    """Text to token ids and back, and the chat template, of one model.

    ``encode`` and ``render`` may run in any thread. ``eos_token_ids`` are all ids that end a sequence, in order.
    """

    def __init__(
        self,
        rust: RustTokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self._rust = rust
        self._decode = rust.decode
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        added = rust.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._is_byte_level = "ByteLevel" in str(rust.decoder)
        # Ids need not be dense: the vocabulary ends after its largest one.
        self.vocab_size: int = max(rust.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, directory: str | Path, wall: Wall) -> "Tokenizer":
        """Read tokenizer.json and the JSON files beside it. Raises TokenizerMissing."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerMissing(
                f"{directory} holds no tokenizer.json: save the model's tokenizer there with "
                'AutoTokenizer.from_pretrained(...).save_pretrained("' + str(directory) + '")'
            )
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerMissing(f"{path} cannot be read: {error}") from None
        # What a prompt is cut or padded to is not the tokenizer's business here.
        rust.no_truncation()
        rust.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special_tokens = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
        source = _template_source(directory, config)
        try:
            template = None if source is None else ChatTemplate(source, special_tokens, wall)
        except TemplateRefused as error:
            raise TokenizerMissing(f"{directory}: {error}") from None
        eos = _ids(_read_json(directory / "generation_config.json").get("eos_token_id"))
        named = rust.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
        return cls(
            rust,
            special_tokens=special_tokens,
            chat_template=template,
            eos_token_ids=tuple(sorted({*eos, *_ids(named)})),
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of ``text``, with the special tokens the model wants around a text if asked for."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's turn. Raises TemplateRefused."""
        if self.chat_template is None:
            raise TemplateRefused("the model has no chat template")
        # The template writes the special tokens itself: adding them again would double the first one.
        return self.encode(self.chat_template.render(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are no character become U+FFFD."""
        # Hot: a few times per token.
        text: str = self._decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, id: int) -> bool:
        """Say whether ``id`` is a control token that is never shown."""
        return id in self._special_ids

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes one token stands for: perhaps part of a character."""
        token = self._rust.id_to_token(id)
        if token is None:
            return b""
        if id in self._added_ids:
            return str(token).encode()
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return str(token).replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return table


_BYTE_OF = _byte_alphabet()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerMissing(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerMissing(f"{path} holds no JSON object")
    return data


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens, the model's own extra names included."""
    found: dict[str, str] = {}
    extra = config.get("extra_special_tokens")
    named = {**{name: config.get(name) for name in _SPECIAL_NAMES}, **(extra if isinstance(extra, dict) else {})}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    return source if isinstance(source, str) else None


def _ids(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
