"""The model that is served: ``python -m _strategies.model FOLDER SHAPE`` writes one, SHAPE being a Shape as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec


class Shape(msgspec.Struct, frozen=True):
    """A Llama of random weights: what it says does not matter, what it takes does."""

    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 3
    num_kv_heads: int = 1
    vocab_size: int = 512
    max_model_len: int = 4096


def make_model(shape: Shape, folder: Path, *, is_simulated: bool) -> None:
    """Write a model directory with a tokenizer of bytes; for a simulated engine, one without weights."""
    folder.mkdir()
    if is_simulated:
        (folder / "config.json").write_text(json.dumps(_settings(shape) | {"model_type": "llama"}))
        _write_tokenizer(folder, shape.vocab_size)
        return
    command = [sys.executable, "-m", "_strategies.model", str(folder), msgspec.json.encode(shape).decode()]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL)


def _settings(shape: Shape) -> dict[str, int]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": 8 * shape.hidden_size // 3 // 32 * 32,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "max_position_embeddings": shape.max_model_len,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write one whose tokens are bytes, and beyond them words that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"<{id}>" for id in range(len(alphabet), vocab_size))]
    tokenizer = Tokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder, shape = sys.argv[1], msgspec.json.decode(sys.argv[2], type=Shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**_settings(shape))).save_pretrained(folder)
    _write_tokenizer(Path(folder), shape.vocab_size)


if __name__ == "__main__":
    main()
