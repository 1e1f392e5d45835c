"""Random-weight models small enough to build in milliseconds, one per attention variant that is served."""

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

# The default initializer range (0.02) gives near-ties and few distinct tokens: a weak test.
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=16),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=16, tie_word_embeddings=False),
}
NAMES = tuple(CONFIGS)


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Build one with transformers' own attention, to compare with. The same seed gives the same weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa").eval()


def save_tiny_model(name: str, directory: Path, seed: int = 0) -> Path:
    """Write one as a model directory (config.json, generation_config.json, safetensors) and return its path."""
    path = Path(directory) / f"{name}-{seed}"
    if not (path / "config.json").exists():
        tiny_model(name, seed).save_pretrained(path)
    return path


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Return token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (num_tokens,), generator=generator).tolist()


@torch.inference_mode()
def generate_tokens(model: PreTrainedModel, prompt: list[int], num_new: int, *, ignore_eos: bool = True) -> list[int]:
    """Return what transformers' greedy ``generate`` appends to a prompt."""
    ids = torch.tensor([prompt])
    eos = None if ignore_eos else model.config.eos_token_id
    full = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return full[0, len(prompt) :].tolist()
