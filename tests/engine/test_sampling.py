import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callboard.actors.engine.sampling import candidates, noise, sample
from callboard.actors.engine.step import Draw
from callboard.actors.protocol import SamplingParams
from callboard.kv.tokens import pack_tokens

VOCAB = 211


def logits_of(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def tokens_of(logits, *draws):
    return [chosen.token for chosen in sample(logits, [Draw(*draw) for draw in draws])]


def test_noise_has_the_distribution_of_gumbel():
    values = noise(1, 2, 3, 200_000).double()
    assert abs(values.mean() - 0.5772156649) < 0.01
    assert abs(values.var() - torch.pi**2 / 6) < 0.02
    below = torch.tensor([(values < x).double().mean() for x in (-1.0, 0.0, 1.0, 3.0)])
    torch.testing.assert_close(
        below, torch.tensor([-1.0, 0.0, 1.0, 3.0]).neg().exp().neg().exp().double(), atol=5e-3, rtol=0
    )


def test_noise_differs_in_each_coordinate_and_repeats_for_equal_ones():
    streams = [noise(*key, 1000) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0), (-1, 0, 0)]]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
            assert abs(correlation) < 0.12
    assert torch.equal(noise(7, 1, 9, 50), noise(7, 1, 9, 1000)[:50])
    assert torch.equal(noise(7, 1, 9, torch.tensor([3, 999])), noise(7, 1, 9, 1000)[[3, 999]])


def test_samples_follow_the_softmax_at_a_temperature():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    sampling = SamplingParams(temperature=0.7, seed=3)
    counts = torch.zeros(4)
    for position in range(4000):
        counts[tokens_of(logits, (sampling, position))] += 1
    torch.testing.assert_close(counts / 4000, torch.softmax(logits[0] / 0.7, -1), atol=0.025, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.2, 2.0), st.floats(0.05, 1.0), st.one_of(st.none(), st.integers(1, 300)), st.integers(0, 2**64 - 1))
def test_a_sample_does_not_depend_on_its_batch(temperature, top_p, top_k, seed):
    logits = logits_of(3, seed % 1000)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    others = (SamplingParams(), 0), (SamplingParams(temperature=1.0, seed=5), 7)
    alone = tokens_of(logits[1:2], (sampling, 4))
    assert tokens_of(logits, others[0], (sampling, 4), others[1])[1:2] == alone
    kept = candidates(logits[1], sampling)
    assert kept is None or alone[0] in kept.tolist()


@given(st.floats(0.01, 0.99), st.integers(0, 99))
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p, seed):
    (logits,) = logits_of(1, seed)
    kept = candidates(logits, SamplingParams(temperature=1.0, top_p=top_p))
    mass = torch.softmax(logits, -1)[kept]
    assert mass.sum() >= top_p - 1e-5
    assert mass[:-1].sum() < top_p + 1e-5
    assert mass.min() >= torch.softmax(logits, -1)[[i for i in range(VOCAB) if i not in kept.tolist()]].max()


def test_top_k_of_one_and_a_tiny_temperature_are_greedy():
    logits = logits_of(5)
    greedy = logits.argmax(-1).tolist()
    for sampling in (
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=1),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1.0, top_p=1e-9),
    ):
        assert tokens_of(logits, *[(sampling, i) for i in range(5)]) == greedy


def test_the_logprob_is_that_of_the_unfiltered_distribution():
    logits = logits_of(1)
    (chosen,) = sample(logits, [Draw(SamplingParams(temperature=0.5, top_k=3, seed=1), 0)])
    assert abs(chosen.logprob - torch.log_softmax(logits[0], -1)[chosen.token].item()) < 1e-5


def penalized_token(logits, output, sampling):
    """Which token wins, counted out by hand."""
    row = logits[0].clone()
    for token in set(output):
        row[token] -= sampling.presence_penalty + output.count(token) * sampling.frequency_penalty
    return int(row.argmax())


@settings(max_examples=50, deadline=None)
@given(
    st.floats(-2.0, 2.0), st.floats(-2.0, 2.0), st.lists(st.integers(0, VOCAB - 1), max_size=60), st.integers(0, 999)
)
def test_penalties_count_what_is_in_the_output(presence, frequency, output, seed):
    logits = logits_of(1, seed)
    output += [int(logits.argmax())] * 3
    sampling = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    (chosen,) = sample(logits, [Draw(sampling, len(output), pack_tokens(output))])
    assert chosen.token == penalized_token(logits, output, sampling)
    # The logprob is of the distribution without penalties, as it is without temperature.
    assert abs(chosen.logprob - float(torch.log_softmax(logits[0], -1)[chosen.token])) < 1e-4


def test_penalties_change_nothing_for_others_of_the_batch():
    logits = logits_of(2)
    loved = int(logits[0].argmax())
    harsh = SamplingParams(presence_penalty=2.0, frequency_penalty=2.0)
    first, second = sample(logits, [Draw(harsh, 20, pack_tokens([loved] * 20)), Draw(SamplingParams(), 20)])
    assert first.token != loved
    assert second.token == int(logits[1].argmax())
