import pytest
from oracle import assert_tokens_pass_oracle
from tiny_models import NAMES, generate_tokens, random_prompt, save_tiny_model, tiny_model

from callboard.actors.engine.runner import TransformersRunner
from callboard.actors.protocol import SamplingParams

LENGTHS = (37, 5, 60, 1, 16, 90)


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    name = request.param
    path = save_tiny_model(name, tmp_path_factory.mktemp("models"))
    runner = TransformersRunner(path, max_num_batched_tokens=256, max_num_seqs=16)
    return tiny_model(name), runner


def greedy(num_tokens):
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def test_a_single_request_equals_generate(model, local_engine):
    plain, runner = model
    for length in LENGTHS:
        engine = local_engine(runner, max_num_batched_tokens=256)
        prompt = random_prompt(length, seed=length)
        engine.submit("a", prompt, greedy(24))
        assert engine.run()["a"] == generate_tokens(plain, prompt, 24)


def test_a_chunked_prefill_equals_generate(model, local_engine):
    plain, runner = model
    engine = local_engine(runner, max_num_batched_tokens=19)
    prompt = random_prompt(90)
    engine.submit("a", prompt, greedy(24))
    assert engine.run()["a"] == generate_tokens(plain, prompt, 24)


def test_mixed_requests_under_a_small_budget_pass_the_oracle(model, local_engine):
    plain, runner = model
    engine = local_engine(runner, max_num_batched_tokens=20)
    prompts = {f"r{i}": random_prompt(length, seed=i) for i, length in enumerate(LENGTHS * 2)}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, greedy(20))
    for name, tokens in engine.run().items():
        assert len(tokens) == 20
        assert_tokens_pass_oracle(plain, prompts[name], tokens)


def test_preempted_requests_pass_the_oracle(model, local_engine):
    plain, runner = model
    engine = local_engine(runner, num_blocks=9)
    prompts = {f"r{i}": random_prompt(30, seed=i) for i in range(4)}
    for name, prompt in prompts.items():
        engine.submit(name, prompt, greedy(40))
    for name, tokens in engine.run().items():
        assert len(tokens) == 40
        assert_tokens_pass_oracle(plain, prompts[name], tokens)
    assert sum(sequence.num_preemptions for sequence in engine.finished.values()) > 0


def test_a_repeated_prompt_reuses_its_blocks_and_equals_generate(model, local_engine):
    plain, runner = model
    for length in (64, 70):
        engine = local_engine(runner, reuse=True)
        prompt = random_prompt(length)
        engine.submit("first", prompt, greedy(20))
        engine.run()
        engine.submit("second", prompt, greedy(20))
        engine.submit("third", [*prompt[:40], *random_prompt(20)], greedy(20))
        outputs = engine.run()
        assert outputs["second"] == outputs["first"] == generate_tokens(plain, prompt, 20)
        assert engine.finished["second"].num_reused_tokens == 64
        assert engine.finished["third"].num_reused_tokens == 32
        assert_tokens_pass_oracle(plain, [*prompt[:40], *random_prompt(20)], outputs["third"])


def test_sampled_requests_pass_the_oracle(model, local_engine):
    plain, runner = model
    engine = local_engine(runner)
    settings = [
        SamplingParams(max_tokens=16, temperature=0.8, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=16, temperature=1.5, top_p=0.7, seed=6, index=1, ignore_eos=True),
        SamplingParams(max_tokens=16, temperature=1.0, top_k=5, top_p=0.9, seed=7, ignore_eos=True),
        greedy(16),
    ]
    prompts = [random_prompt(20 + i, seed=i) for i in range(4)]
    for i, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
        engine.submit(str(i), prompt, sampling)
    outputs = engine.run()
    for i, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True)):
        assert_tokens_pass_oracle(plain, prompt, outputs[str(i)], sampling)


def test_kv_only_work_shares_the_batch_and_reports_its_layers(model, local_engine):
    plain, runner = model
    engine = local_engine(runner, max_num_batched_tokens=24, reuse=True)
    prompt = random_prompt(48)
    engine.submit("kv", prompt, None)
    engine.submit("a", random_prompt(20, seed=1), greedy(8))
    engine.run()
    assert engine.layers_done[:4] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    engine.submit("b", prompt, greedy(16))
    assert engine.run()["b"] == generate_tokens(plain, prompt, 16)
    assert engine.finished["b"].num_reused_tokens == 48
