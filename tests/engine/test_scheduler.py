import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from callboard.actors.engine.scheduler import Scheduler
from callboard.actors.engine.sequence import Sequence
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.protocol import SamplingParams
from callboard.kv.tokens import pack_tokens

requests = st.lists(
    st.tuples(st.integers(1, 70), st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=12
)  # prompt length, max_tokens, prompt family


def prompt_of(length, family):
    return [(i * 7 + family * 31 * (i > 20)) % 997 for i in range(length)]


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(8, 12), st.sampled_from([1, 3, 16]), st.sampled_from([1, 7, 64]), st.integers(0, 99))
@example([(65, 50, 0), (1, 1, 0)], 8, 1, 1, 0)
def test_any_mix_of_requests_in_a_small_pool_gets_exactly_its_tokens(
    local_engine, requests, num_blocks, max_num_seqs, budget, seed
):
    limits = {"max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs, "max_model_len": num_blocks * 16}
    engine = local_engine(SimulatedRunner(Simulation()), num_blocks=num_blocks, seed=seed, **limits)
    for i, (length, num_tokens, family) in enumerate(requests):
        engine.submit(str(i), prompt_of(length, family), SamplingParams(max_tokens=num_tokens))
        for _ in range(i % 3):
            engine.step()
    assert_exact(engine.run(), requests)


@settings(max_examples=40, deadline=None)
@given(requests, st.integers(0, 99))
def test_requests_that_share_prefixes_reuse_them_and_get_exactly_their_tokens(local_engine, requests, seed):
    engine = local_engine(SimulatedRunner(Simulation()), num_blocks=200, seed=seed, reuse=True)
    for i, (length, num_tokens, family) in enumerate(requests):
        engine.submit(str(i), prompt_of(length, family), SamplingParams(max_tokens=num_tokens))
        for _ in range(20 * (i % 3)):
            engine.step()
    assert_exact(engine.run(), requests)


def assert_exact(outputs, requests):
    for name, tokens in outputs.items():
        length, num_tokens, family = requests[int(name)]
        assert tokens == simulated_tokens(prompt_of(length, family), num_tokens)


@settings(max_examples=60, deadline=None)
@given(requests, st.integers(0, 99), st.data())
def test_aborts_at_any_moment_leave_no_block_behind(local_engine, requests, seed, data):
    engine = local_engine(SimulatedRunner(Simulation()), num_blocks=12, seed=seed, max_num_batched_tokens=40)
    for i, (length, num_tokens, family) in enumerate(requests):
        engine.submit(str(i), prompt_of(length, family), SamplingParams(max_tokens=num_tokens))
        engine.step()
        victim = str(data.draw(st.integers(0, i)))
        engine.scheduler.abort(victim)
        engine.scheduler.check_integrity()
    engine.run()


def scheduler(**limits):
    settings = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "max_model_len": 256, **limits}
    return Scheduler(block_size=16, **settings)


def placed(name, length, *, blocks, cached=0, sampling=None):
    sequence = Sequence(name, prompt_of(length, 0), sampling or SamplingParams(max_tokens=8))
    sequence.place(pack_tokens(blocks), cached)
    return sequence


def run(scheduler, engine_runner):
    step = scheduler.schedule()
    scheduler.apply(step, engine_runner.run(step, lambda *layers: None))
    return step


@pytest.fixture
def runner():
    runner = SimulatedRunner(Simulation())
    runner.map_pool(memoryview(bytearray(runner.layout.block_bytes * 32)), 32)
    return runner


def test_a_long_prompt_does_not_stall_decodes(runner):
    scheduling = scheduler()
    scheduling.add(placed("short", 5, blocks=[0]))
    run(scheduling, runner)
    scheduling.add(placed("long", 100, blocks=[1, 2, 3, 4, 5, 6, 7]))
    sizes = [[(c.sequence_id, c.end - c.begin) for c in run(scheduling, runner).chunks] for _ in range(3)]
    assert sizes == [[("short", 1), ("long", 31)]] * 3


def test_a_full_house_of_decodes_leaves_a_place_to_prompts(runner):
    scheduling = scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    for name, block in (("a", 0), ("b", 1)):
        scheduling.add(placed(name, 1, blocks=[block], sampling=SamplingParams(max_tokens=15)))
    run(scheduling, runner)
    waited_for = Sequence("kv", prompt_of(3, 1), None)
    waited_for.place(pack_tokens([2]), 0)
    scheduling.add(waited_for)
    steps = [[chunk.sequence_id for chunk in run(scheduling, runner).chunks] for _ in range(4)]
    assert steps == [["a", "kv"]] * 3 + [["a", "b"]]


def test_an_abort_waits_for_the_step_in_flight(runner):
    scheduling = scheduler()
    scheduling.add(placed("a", 5, blocks=[0]))
    step = scheduling.schedule()
    scheduling.abort("a")
    assert not scheduling.take_instructions()
    scheduling.apply(step, runner.run(step, lambda *layers: None))
    (released,) = scheduling.take_instructions()
    assert released.num_computed_tokens == 5
    assert not len(scheduling)


def test_the_latest_arrival_is_preempted_when_the_pool_is_exhausted(runner):
    scheduling = scheduler()
    scheduling.add(placed("early", 16, blocks=[0]))
    scheduling.add(placed("late", 16, blocks=[1]))
    run(scheduling, runner)
    scheduling.take_instructions()
    assert not scheduling.schedule().chunks  # nobody has a block, and a refill may still bring some
    scheduling.slab.is_exhausted = True
    scheduling.schedule()
    (released,) = scheduling.take_instructions()
    assert released.sequence.sequence_id == "late"
    assert released.is_preempted


def test_a_prompt_that_is_all_there_computes_its_last_token_and_writes_nothing(runner):
    scheduling = scheduler()
    scheduling.add(placed("a", 32, blocks=[0, 1], cached=32))
    (chunk,) = scheduling.schedule().chunks
    assert (chunk.begin, chunk.end, chunk.write_begin) == (31, 32, 32)


def test_generation_ends_at_an_end_token_a_stop_token_or_the_models_length(runner):
    tokens = simulated_tokens(prompt_of(10, 0), 8)
    for sampling, eos, max_len, expected in [
        (SamplingParams(max_tokens=8), (tokens[2],), 256, (tokens[:3], "stop")),
        (SamplingParams(max_tokens=8, ignore_eos=True), (tokens[2],), 256, (tokens, "length")),
        (SamplingParams(max_tokens=8, stop_token_ids=(tokens[4],)), (), 256, (tokens[:5], "stop")),
        (SamplingParams(max_tokens=8), (), 13, (tokens[:3], "length")),
    ]:
        scheduling = scheduler(eos_token_ids=eos, max_model_len=max_len)
        sequence = placed("a", 10, blocks=[0, 1], sampling=sampling)
        scheduling.add(sequence)
        while len(scheduling):
            run(scheduling, runner)
        assert (sequence.tokens[10:], sequence.finish_reason) == expected


def test_one_wrong_byte_of_kv_changes_the_simulated_tokens(runner):
    for corrupt in (False, True):
        scheduling = scheduler()
        memory = bytearray(runner.layout.block_bytes * 32)
        runner.map_pool(memoryview(memory), 32)
        sequence = placed("a", 10, blocks=[3, 5])
        scheduling.add(sequence)
        run(scheduling, runner)
        if corrupt:
            layer = 2 * 2 * 32 * 16 * runner.layout.slot_bytes  # the keys of layer 2
            memory[layer + (3 * 16 + 4) * runner.layout.slot_bytes] ^= 1
        while len(scheduling):
            run(scheduling, runner)
        assert (sequence.tokens[10:] == simulated_tokens(prompt_of(10, 0), 8)) is not corrupt
