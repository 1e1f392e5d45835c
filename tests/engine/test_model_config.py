import json

import pytest
import torch
from tiny_models import CONFIGS, NAMES, save_tiny_model
from transformers import AutoConfig, GPT2Config, T5Config

from callboard.actors.engine.model import load_model, problem_of
from callboard.actors.engine.runner import TransformersRunner
from callboard.actors.model_config import ModelConfigError, ModelFacts, facts_of, layout_of, read_model_config
from callboard.kv.layout import KvLayout


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_says_its_facts(name, tmp_path):
    path = save_tiny_model(name, tmp_path)
    facts = read_model_config(path)
    assert facts == ModelFacts(4, 2, 32, 512, 512, (2,), (path / "model.safetensors").stat().st_size)
    assert layout_of(facts, 16, "bfloat16") == KvLayout(4, 2, 32, 16, "bfloat16")
    assert facts_of(AutoConfig.from_pretrained(path).to_dict()) == facts_of(CONFIGS[name].to_dict())


def test_nested_and_old_configs_are_understood():
    inner = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 9}
    nested = {"text_config": {**inner, "max_position_embeddings": 128}, "eos_token_id": [1, 106]}
    assert facts_of(nested, {"eos_token_id": 7}) == ModelFacts(2, 4, 16, 128, 9, (1, 7, 106))
    assert facts_of(GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=64, vocab_size=77).to_dict()) == ModelFacts(
        3, 4, 8, 64, 77, (50256,)
    )


def test_what_is_no_model_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(ModelConfigError, match="there is no model directory"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelConfigError, match=r"holds no config\.json"):
        read_model_config(tmp_path)
    for text, sentence in [
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "num_hidden_layers is missing"),
        (json.dumps(T5Config().to_dict()), "encoder-decoder"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelConfigError, match=sentence):
            read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"add_cross_attention": True}, "cross attention"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"use_bidirectional_attention": True}, "not causal"),
        ({"alibi": True}, "position bias"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"attention_chunk_size": 8192}, "chunked attention"),
        ({"text_config": {"attn_logit_softcapping": 50.0}}, "soft-capped"),
    ],
)
def test_models_that_would_be_served_wrongly_are_refused(config, sentence):
    assert sentence in problem_of(config)
    assert problem_of({"layer_types": ["full_attention", "sliding_attention"]}) is None


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("Gemma2", {}, "soft-capped"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sinks"),
        ("Mamba", {"state_size": 4}, "num_attention_heads is missing|paged attention"),
    ],
)
def test_unsupported_architectures_do_not_load(kind, changes, sentence, tmp_path):
    import transformers

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    if kind != "Mamba":
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
        shape |= {"max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**shape, **changes)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelConfigError, match=sentence):
        load_model(tmp_path, "float32")


def test_a_learned_position_model_is_served(local_engine, tmp_path):
    from oracle import assert_tokens_pass_oracle
    from transformers import GPT2LMHeadModel

    from callboard.actors.protocol import SamplingParams

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=128, vocab_size=256, initializer_range=0.15)
    plain = GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path)
    engine = local_engine(TransformersRunner(tmp_path), max_model_len=128)
    engine.submit("a", list(range(30)), SamplingParams(max_tokens=20))
    assert_tokens_pass_oracle(plain, list(range(30)), engine.run()["a"])
