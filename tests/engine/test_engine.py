"""The engine actor over its real KV manager, in one process, with a simulated model."""

import asyncio
import subprocess
import sys
import threading
from contextlib import asynccontextmanager

import pytest

from callboard.actors.actor import start_actor, stop_actor
from callboard.actors.engine.engine import Engine
from callboard.actors.engine.simulated import SimulatedRunner, Simulation, simulated_tokens
from callboard.actors.kv_manager import KvManager
from callboard.actors.protocol import (
    Abort,
    BadRequest,
    ComputeKv,
    GetKvStats,
    KvComputed,
    LayersDone,
    SamplingParams,
    Stalled,
    StartGenerate,
)
from callboard.bus import ActorDied, LinkLost, Node
from callboard.bus.transports.inproc import InprocHub
from callboard.kv.layout import BadRange, KvLayout
from callboard.kv.tokens import pack_tokens

LAYOUT = SimulatedRunner(Simulation()).layout


class Running:
    """One engine, one manager, one client."""

    def __init__(self, client, manager_node, engine_node, options, num_blocks, layout):
        self.client, self.manager_node, self.engine_node = client, manager_node, engine_node
        self.options, self.num_blocks, self.layout = options, num_blocks, layout
        self.num_requests = 0

    async def start_manager(self):
        config = KvManager.Config(name="kv", layout=self.layout, num_blocks=self.num_blocks)
        self.manager = KvManager(config)
        self.manager_ref = self.client.ref((await start_actor(self.manager_node, "kv", self.manager)).address)

    async def start_engine(self):
        config = Engine.Config(name="e", manager=self.manager_node.address_of("kv"), runner="simulated", **self.options)
        self.engine = Engine(config)
        self.ref = self.client.ref((await start_actor(self.engine_node, "e", self.engine)).address)

    def request(self, prompt, request_id=None, attempt=0, **sampling):
        self.num_requests += 1
        name = request_id or f"r{self.num_requests}"
        return StartGenerate(name, attempt, pack_tokens(prompt), SamplingParams(**sampling))

    async def generate(self, prompt, **options):
        async with self.ref.stream(self.request(prompt, **options), timeout=20) as items:
            return [token async for token in items]

    def compute_kv(self, request_id, tokens, table, *, attachment=None):
        """Have KV computed as its manager does: from its node, and under the engine's attachment."""
        named = self.engine.attachment.named if attachment is None else attachment
        message = ComputeKv(request_id, pack_tokens(tokens), pack_tokens(table), 0, named)
        return self.manager_node.ref(self.ref.address).stream(message, timeout=20)

    async def assert_all_free(self):
        stats = await self.manager_ref.ask(GetKvStats(recall=True))
        for _ in range(100):
            if stats.free + stats.cached == stats.num_blocks:
                break
            await asyncio.sleep(0.01)
            stats = await self.manager_ref.ask(GetKvStats(recall=True))
        assert not stats.problems
        assert stats.free + stats.cached == stats.num_blocks

    async def until(self, condition):
        for _ in range(2000):
            if condition():
                return
            await asyncio.sleep(0.002)
        raise AssertionError("it did not come to pass")


@asynccontextmanager
async def running(*, num_blocks=64, layout=LAYOUT, **options):
    hub = InprocHub()
    async with (
        Node("client", endpoint="inproc://client", transport=hub.transport()) as client,
        Node("kv", endpoint="inproc://kv", transport=hub.transport()) as manager_node,
        Node("e", endpoint="inproc://e", transport=hub.transport()) as engine_node,
    ):
        run = Running(client, manager_node, engine_node, options, num_blocks, layout)
        await run.start_manager()
        try:
            await run.start_engine()
            yield run
            await stop_actor(run.engine)
        finally:
            await stop_actor(run.manager)


def prompt_of(length, family=0):
    return [(i * 13 + family * 101) % 1000 for i in range(length)]


async def test_a_stream_ends_with_reason_and_usage():
    async with running() as run:
        tokens = await run.generate(prompt_of(40), max_tokens=5)
        assert [token.id for token in tokens] == simulated_tokens(prompt_of(40), 5)
        assert [token.position for token in tokens] == list(range(5))
        assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]
        assert [token.usage is None for token in tokens] == [True] * 4 + [False]
        usage = tokens[-1].usage
        assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_computed_tokens) == (40, 0, 40)
        await run.assert_all_free()


async def test_a_repeated_prompt_computes_only_what_is_not_cached():
    async with running(num_blocks=200) as run:
        shared = prompt_of(1000)
        await run.generate([*shared, 1, 2, 3], max_tokens=2)
        tokens = await run.generate([*shared, 7, 8, 9, 10], max_tokens=4)
        assert [token.id for token in tokens] == simulated_tokens([*shared, 7, 8, 9, 10], 4)
        assert tokens[-1].usage.num_cached_tokens == 992
        assert tokens[-1].usage.num_computed_tokens == 12


@pytest.mark.parametrize("num_blocks", [8, 12, 40])
async def test_many_requests_in_a_small_pool_get_exactly_their_tokens(num_blocks):
    async with running(num_blocks=num_blocks, max_num_batched_tokens=48, max_num_seqs=6) as run:
        prompts = [prompt_of(3 + 11 * i % 60, family=i % 4) for i in range(24)]
        answers = await asyncio.gather(*(run.generate(prompt, max_tokens=30) for prompt in prompts))
        for prompt, tokens in zip(prompts, answers, strict=True):
            assert [token.id for token in tokens] == simulated_tokens(prompt, 30)
        preempted = sum(tokens[-1].usage.num_preemptions for tokens in answers)
        assert (preempted > 0) == (num_blocks < 40)
        run.engine.scheduler.check_integrity()
        await run.assert_all_free()


async def test_leaving_a_stream_ends_its_sequence_and_gives_its_blocks_back():
    async with running(simulated=Simulation(seconds_per_step=0.002)) as run:
        async with run.ref.stream(run.request(prompt_of(50), max_tokens=500), timeout=20) as items:
            async for token in items:
                if token.position == 3:
                    break
        await run.until(lambda: not len(run.engine.scheduler))
        await run.assert_all_free()


async def test_requests_cancelled_at_any_moment_leave_nothing_behind():
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "simulated": Simulation(seconds_per_step=0.0005)}
    async with running(num_blocks=16, **options) as run:

        async def leave_after(seconds, prompt):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(seconds):
                    await run.generate(prompt, max_tokens=200)

        async with asyncio.TaskGroup() as group:
            for i in range(40):
                group.create_task(leave_after(0.001 * i, prompt_of(1 + 5 * i % 70, family=i)))
        assert [token.id for token in await run.generate(prompt_of(9), max_tokens=5)] == simulated_tokens(
            prompt_of(9), 5
        )
        run.engine.scheduler.check_integrity()
        assert not run.engine._generations
        await run.assert_all_free()


async def test_kv_is_computed_layer_by_layer_into_a_borrowed_table():
    async with running(max_num_batched_tokens=32) as run:
        async with run.compute_kv("kv-1", prompt_of(40), [60, 61, 62]) as items:
            done = [item async for item in items]
        layers = [(0, 1), (1, 2), (2, 3), (3, 4)]
        assert done[:-1] == [LayersDone(*pair, *chunk) for chunk in [(0, 32), (32, 40)] for pair in layers]
        assert isinstance(done[-1], KvComputed)
        assert done[-1].num_computed_tokens == 40


async def test_blocks_of_an_earlier_attachment_are_not_written():
    async with running() as run:
        for attachment in ("another", ""):
            with pytest.raises(LinkLost, match="anew"):
                async with run.compute_kv("kv-1", prompt_of(40), [60, 61, 62], attachment=attachment) as items:
                    await anext(items)
        async with run.compute_kv("kv-1", prompt_of(40), [60, 61, 62]) as items:
            assert [item async for item in items]


async def test_kv_is_computed_for_nobody_but_the_engines_own_manager():
    async with running() as run:
        named = run.engine.attachment.named
        message = ComputeKv("kv-1", pack_tokens(prompt_of(40)), pack_tokens([60, 61, 62]), 0, named)
        with pytest.raises(BadRequest, match="only its KV manager"):
            async with run.ref.stream(message, timeout=5) as items:
                await anext(items)
        assert not len(run.engine.scheduler)


async def test_a_manager_that_stops_does_not_take_it_that_its_engines_write_no_more():
    async with running() as run:
        run.manager.blocks.admit("e", "s", pack_tokens(prompt_of(40)))
        held = run.manager.blocks.counts().leased
        await stop_actor(run.manager)
        counts = run.manager.blocks.counts()
        assert held == 3
        assert (counts.leased, counts.quarantined) == (0, 3)


async def test_an_abort_is_answered_when_nothing_is_written_any_more():
    async with running(simulated=Simulation(seconds_per_step=0.05), max_num_batched_tokens=16) as run:
        async with run.compute_kv("kv-1", prompt_of(40), [60, 61, 62]) as items:
            await anext(items)
        await run.ref.ask(Abort("kv-1"))
        assert run.engine._stepped.is_set()
        assert not len(run.engine.scheduler)


async def test_an_abort_ends_every_sequence_of_a_request_also_one_that_waits():
    async with running(max_num_seqs=1, simulated=Simulation(seconds_per_step=0.002)) as run:
        first = asyncio.ensure_future(run.generate(prompt_of(9), request_id="a", max_tokens=500))
        await run.until(lambda: len(run.engine.scheduler))
        second = asyncio.ensure_future(run.generate(prompt_of(9), request_id="a", max_tokens=500))
        await run.until(lambda: len(run.engine._generations) == 2)
        await run.ref.ask(Abort("a"))
        ends = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(end, BadRequest) or end[-1].finish_reason == "abort" for end in ends)
        await run.ref.ask(Abort("a"))
        await run.assert_all_free()


async def test_an_abort_of_one_attempt_leaves_those_beside_it():
    async with running(simulated=Simulation(seconds_per_step=0.002)) as run:
        first = asyncio.ensure_future(run.generate(prompt_of(9), request_id="a", max_tokens=500))
        later = asyncio.ensure_future(run.generate(prompt_of(9), request_id="a", attempt=1, max_tokens=40))
        await run.until(lambda: len(run.engine.scheduler) == 2)
        await run.ref.ask(Abort("a", 0))
        end, whole = await asyncio.gather(first, later, return_exceptions=True)
        assert isinstance(end, BadRequest) or end[-1].finish_reason == "abort"
        assert (whole[-1].finish_reason, len(whole)) == ("length", 40)


async def test_a_reader_that_stalls_is_aborted_and_stalls_nobody():
    options = {"max_buffered_tokens": 8, "stall_s": 0.05, "num_blocks": 64, "max_num_seqs": 2}
    async with running(**options) as run:
        async with run.ref.stream(run.request(prompt_of(5), max_tokens=900), timeout=20, credit=4) as slow:
            await run.until(lambda: any(g.sequence.is_paused for g in run.engine._generations.values()))
            assert len(await run.generate(prompt_of(7), max_tokens=20)) == 20
            # Its blocks and its place are free although its stream is still open here, and was never read.
            await run.until(lambda: not run.engine._generations)
            await run.assert_all_free()
            assert [token.id for token in slow.take_ready()] == simulated_tokens(prompt_of(5), 4)
            with pytest.raises(Stalled, match=r"nothing of it was read for 0.05 s"):
                await anext(slow)


async def test_a_slow_reader_that_goes_on_gets_everything():
    async with running(max_buffered_tokens=8) as run:
        async with run.ref.stream(run.request(prompt_of(5), max_tokens=100), timeout=20, credit=4) as slow:
            await run.until(lambda: any(g.sequence.is_paused for g in run.engine._generations.values()))
            tokens = [token.id async for token in slow]
        assert tokens == simulated_tokens(prompt_of(5), 100)


@pytest.mark.parametrize(
    ("prompt", "sampling", "sentence"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 1000], {}, "token id 1000 is not in the vocabulary of 1000"),
        ([1, -1], {}, "token id -1"),
        ([1] * 256, {}, "256 tokens, and this model takes at most 255"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1"),
        ([1], {"temperature": -0.5}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.5}, "top_p"),
        ([1], {"top_k": 0}, "top_k"),
    ],
)
async def test_bad_input_is_refused_and_the_engine_lives(prompt, sampling, sentence):
    async with running(max_model_len=256) as run:
        with pytest.raises(BadRequest, match=sentence):
            await run.generate(prompt, **sampling)
        assert len(await run.generate(prompt_of(255), max_tokens=9)) == 1


async def test_half_a_token_and_a_begin_outside_of_the_prompt_are_refused():
    async with running() as run:
        for message, error in [
            (StartGenerate("a", 0, b"\0\0\0", SamplingParams()), BadRequest),
            (StartGenerate("a", 0, pack_tokens([1, 2]), SamplingParams(), begin=3), BadRange),
            (StartGenerate("a", 0, pack_tokens([1, 2]), SamplingParams(), begin=-3), BadRange),
        ]:
            with pytest.raises(error):
                async with run.ref.stream(message, timeout=5) as items:
                    await anext(items)
        with pytest.raises(BadRequest, match="do not hold"):
            async with run.compute_kv("a", [1, 2], []) as items:
                await anext(items)


async def test_no_sequence_is_longer_than_the_pool():
    async with running(num_blocks=3) as run:
        tokens = await run.generate(prompt_of(40), max_tokens=100)
        assert len(tokens) == 8
        assert tokens[-1].finish_reason == "length"
        await run.assert_all_free()


async def test_an_engine_survives_its_manager():
    async with running(simulated=Simulation(seconds_per_step=0.002)) as run:
        going = asyncio.ensure_future(run.generate(prompt_of(9), max_tokens=500))
        await run.until(lambda: len(run.engine.scheduler))
        await stop_actor(run.manager)
        with pytest.raises((LinkLost, ActorDied)):
            await going
        assert not run.engine.attachment.is_attached
        waiting = asyncio.ensure_future(run.generate(prompt_of(9), max_tokens=5))
        await run.start_manager()
        assert [token.id for token in await waiting] == simulated_tokens(prompt_of(9), 5)
        await run.assert_all_free()


class HeldRunner:
    """A runner whose steps stand still in their thread for as long as ``may_run`` is not set."""

    def __init__(self, inner):
        self.inner = inner
        self.facts, self.layout = inner.facts, inner.layout
        self.map_pool, self.unmap_pool = inner.map_pool, inner.unmap_pool
        self.may_run = threading.Event()
        self.is_running = False

    def run(self, step, on_layers):
        self.is_running = True
        assert self.may_run.wait(20)
        self.is_running = False
        return self.inner.run(step, on_layers)


async def test_kv_that_is_being_computed_ends_with_its_manager_and_the_engine_lives():
    async with running() as run:
        held = run.engine.runner = HeldRunner(run.engine.runner)
        async with run.compute_kv("send", prompt_of(30), [5, 6]) as items:
            await run.until(lambda: held.is_running)
            await stop_actor(run.manager)
            await run.until(lambda: not run.engine.attachment.is_attached)
            held.may_run.set()
            with pytest.raises((LinkLost, ActorDied)):
                await anext(items)
        await run.start_manager()
        assert [token.id for token in await run.generate(prompt_of(9), max_tokens=5)] == simulated_tokens(
            prompt_of(9), 5
        )


async def test_a_broken_engine_gives_nothing_back_before_its_step_has_ended():
    async with running() as run:
        held = run.engine.runner = HeldRunner(run.engine.runner)
        going = asyncio.ensure_future(run.generate(prompt_of(40), max_tokens=5))
        await run.until(lambda: held.is_running)
        run.engine_node.crash("e", RuntimeError("a bug"))
        with pytest.raises(ActorDied):
            await going
        for _ in range(20):
            await asyncio.sleep(0.005)
            assert (await run.manager_ref.ask(GetKvStats())).leased >= 3
        held.may_run.set()
        await run.assert_all_free()


async def test_an_engine_that_stops_ends_its_streams_and_gives_everything_back():
    async with running(simulated=Simulation(seconds_per_step=0.002)) as run:
        going = asyncio.ensure_future(run.generate(prompt_of(9), max_tokens=500))
        await run.until(lambda: len(run.engine.scheduler))
        await stop_actor(run.engine)
        with pytest.raises(ActorDied):
            await going
        await run.assert_all_free()
        await run.start_engine()
        assert len(await run.generate(prompt_of(9), max_tokens=5)) == 5


async def test_a_pool_of_another_layout_ends_the_start_with_a_sentence():
    with pytest.raises(BadRequest, match="another layout"):
        async with running(layout=KvLayout(2, 1, 8)):
            pass


def test_a_simulated_engine_does_not_import_torch():
    code = (
        "import sys, callboard.actors.engine.engine as e; from callboard.bus import Address; "
        "from callboard.actors.engine.runners import make_runner; "
        "make_runner(e.Engine.Config('e', Address('', '', ''), runner='simulated')); "
        "print([m for m in ('torch', 'transformers', 'litestar') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == "[]"
