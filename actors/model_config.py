"""What a model directory says of itself, read from its JSON files alone: no torch, no transformers.

The launcher sizes pools by it, and the engine checks requests against it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from callboard.kv.layout import DTYPE_BYTES, KvLayout


class ModelConfigError(ValueError):
    """The directory holds no model that can be served; the message is a sentence for people."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What serving must know of a model. ``weight_bytes`` are those on disk."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    weight_bytes: int = 0


def read_model_config(directory: str | Path) -> ModelFacts:
    """Read a Hugging Face model directory's config.json and generation_config.json. Raises ModelConfigError."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelConfigError(f"there is no model directory {directory}")
    config = _read_json(directory / "config.json")
    if config is None:
        raise ModelConfigError(f"{directory} holds no config.json, so it is no Hugging Face model directory")
    generation = _read_json(directory / "generation_config.json") or {}
    try:
        facts = facts_of(config, generation)
    except ModelConfigError as error:
        raise ModelConfigError(f"{directory / 'config.json'}: {error}") from None
    files = list(directory.glob("*.safetensors")) or list(directory.glob("*.bin"))
    return msgspec.structs.replace(facts, weight_bytes=sum(file.stat().st_size for file in files))


def facts_of(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelFacts:
    """Return the facts in a config's dict (``config.to_dict()``, or a parsed config.json). Raises ModelConfigError."""
    text = _text_config(config)
    if config.get("is_encoder_decoder"):
        raise ModelConfigError("it is an encoder-decoder model, and only decoder-only ones can be served")
    num_layers = _required(text, "num_hidden_layers", "n_layer", "num_layers")
    num_heads = _required(text, "num_attention_heads", "n_head", "num_heads")
    num_kv_heads = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or _required(text, "hidden_size", "n_embd", "d_model") // num_heads
    eos = (generation or {}).get("eos_token_id")
    eos = _ids(config.get("eos_token_id", text.get("eos_token_id"))) | _ids(eos)
    return ModelFacts(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_model_len=_required(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        vocab_size=_required(text, "vocab_size"),
        eos_token_ids=tuple(sorted(eos)),
    )


def layout_of(facts: ModelFacts, block_size: int = 16, dtype: str = "float32") -> KvLayout:
    """Return how the model's KV lies in a pool. Raises ModelConfigError for a dtype or block size there is none for."""
    if dtype not in DTYPE_BYTES:
        raise ModelConfigError(f"KV cannot be stored as {dtype!r}, only as {', '.join(DTYPE_BYTES)}")
    if block_size < 1:
        raise ModelConfigError(f"a block cannot hold {block_size} tokens")
    return KvLayout(facts.num_layers, facts.num_kv_heads, facts.head_dim, block_size, dtype)


def kv_shape(of: ModelFacts | KvLayout) -> str:
    """Return, for people, what two engines' KV must have in common for one to take the other's."""
    return f"{of.num_layers} layers of {of.num_kv_heads} heads of {of.head_dim}"


def fingerprint_of(directory: str | Path, *, dtype: str, runner: str = "transformers") -> str:
    """Return what tells a model's KV from any other's: 16 bytes, as hex digits.

    It stands for the directory, its config.json, its weights (names, sizes, and when they were changed), the dtype and
    the runner that computes in it. Raises ModelConfigError.
    """
    directory = Path(directory).resolve()
    weights = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    try:
        files = [(path.name, (found := path.stat()).st_size, found.st_mtime_ns) for path in weights]
        config = (directory / "config.json").read_bytes()
    except OSError as error:
        raise ModelConfigError(f"cannot read the model in {directory}: {error}") from None
    whole = msgspec.msgpack.encode((str(directory), config, files, dtype, runner))
    return hashlib.blake2b(whole, digest_size=16).hexdigest()


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    for name in ("text_config", "llm_config", "language_config"):
        nested = config.get(name)
        if isinstance(nested, dict):
            return nested
    return config


def _required(config: dict[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelConfigError(f"{names[0]} is missing")


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else {int(item) for item in value}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelConfigError(f"{path} holds no JSON object")
    return data
