"""The engine actor: one replica of a model, generating tokens, and computing KV for its manager.

A shell around the synchronous scheduler: it admits sequences before the scheduler sees them, runs its steps in a worker
thread, and carries out what comes of them. Nothing here decides what is computed next.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial

from callboard.actors.load_protocol import LoadReport, WatchLoad
from callboard.actors.model_config import kv_shape
from callboard.actors.protocol import (
    Abort,
    Attach,
    BadRequest,
    ComputeKv,
    Done,
    Entry,
    KvAddr,
    KvComputed,
    LayersDone,
    Stalled,
    StartGenerate,
    Token,
)
from callboard.actors.registration import Registration
from callboard.bus import ActorDied, BusError, current_call
from callboard.kv.page_store import PageStore
from callboard.kv.tokens import num_tokens

from .attachment import Attachment
from .block_supply import BlockSupply
from .config import EngineConfig
from .door import Door, check_begin, check_block_table, check_output, check_sampling
from .generation import Generation
from .load_watch import LoadWatch
from .moving import Movable
from .runners import make_runner
from .scheduler import Emit, Prefilled, Released, Scheduler
from .sequence import Sequence
from .simulated import SimulatedRunner
from .step import Runner, Step, StepResult
from .throughput import Throughput

REPORT_S = 0.25
"""How often the directory hears of the load, where it has changed."""


class Engine(Movable):
    """Serves StartGenerate, ComputeKv and Abort, and what moving.py has.

    Its blocks are its manager's, and end with their tie.
    """

    Config = EngineConfig

    runner: Runner
    scheduler: Scheduler
    supply: BlockSupply
    attachment: Attachment
    door: Door
    registration: Registration

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.is_draining = config.is_draining
        self.throughput = Throughput()
        self._generations: dict[str, Generation] = {}
        self._places = asyncio.Semaphore(config.max_num_seqs)
        self._wake = asyncio.Event()
        self._stepped = asyncio.Event()
        """Set while no step is under way."""
        self._stepped.set()
        self._started = asyncio.Event()
        self._is_stopping = False
        self._num_blocks = 0
        self._watch: LoadWatch

    async def start(self) -> None:
        config, node = self.config, self.node
        # Everything that computes runs in this one thread, loading too (bus/worker.py).
        self._worker = node.worker()
        self.runner = await self._worker.run(make_runner, config)
        if config.runner == "simulated" and config.simulated.load_s:
            await node.clock.sleep(config.simulated.load_s)
        self.scheduler = Scheduler(
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.runner.facts.max_model_len,
            eos_token_ids=self.runner.facts.eos_token_ids,
        )
        self.attachment = Attachment(
            node,
            node.ref(config.manager),
            Attach(config.name, self.runner.layout, self.ref.address, config.fingerprint),
            on_attached=self._on_attached,
            on_recall=lambda num_blocks: self.supply.recall(num_blocks),
            on_lost=self._on_lost,
        )
        self._watch = LoadWatch(node.clock, self.scheduler, self.throughput, self._generations)
        self.supply = BlockSupply(self, config.name, self.scheduler, self.attachment, self._wake.set)
        attaching, attached = self.spawn(self.attachment.run()), self.spawn(self.attachment.wait())
        await asyncio.wait((attaching, attached), return_when=asyncio.FIRST_COMPLETED)
        if attaching.done():
            await attaching
        entry = Entry(
            name=config.name,
            kind="engine",
            address=self.ref.address,
            model=config.model or config.name,
            roles=config.roles,
            device=config.device,
            manager=config.manager,
            state=self.state,
            load=self._watch.load(),
            detail={**config.limits(self.scheduler.max_model_len), "kv": kv_shape(self.runner.layout)},
        )
        self.registration = Registration(self, entry)
        self.spawn(self._run_steps())
        self.spawn(self._report_load())
        self._started.set()

    async def stop(self) -> None:
        self._is_stopping = True
        if self._started.is_set():
            await self._on_lost(ActorDied(f"{self.name}@{self.node.name} was stopped"))
        self._worker.close()

    # ---- handlers ------------------------------------------------------------------------------------------------

    async def on_start_generate(self, message: StartGenerate) -> AsyncIterator[Token]:
        begin_s = self.node.clock.now()
        await self._started.wait()
        check_sampling(message.sampling)
        prompt = self.door.check_prompt(message.prompt, is_generating=True)
        check_begin(message.begin, len(prompt))
        check_output(message.num_output_tokens, len(prompt), message.sampling)
        sequence_id = f"{message.request_id}/{self.node.new_id()}"
        sequence = Sequence(
            sequence_id,
            prompt,
            message.sampling,
            request_id=message.request_id,
            num_output_tokens=message.num_output_tokens,
        )
        generation = self._open(sequence)
        generation.attempt = message.attempt
        kv = message.kv
        try:
            while True:
                # First what is there: a reader must not wait for blocks to get tokens that are ready.
                if generation.needs_admission and not generation.num_unread:
                    await self._admit(generation, kv, begin_s or self.node.clock.now())
                    kv, begin_s = None, 0.0
                item = await generation.read()
                self._was_read(generation)
                if isinstance(item, Token):
                    yield item
                    if item.finish_reason is not None:
                        return
                elif generation.has_departed:
                    return
        finally:
            self._leave(generation)

    async def on_compute_kv(self, message: ComputeKv) -> AsyncIterator[LayersDone | KvComputed]:
        begin_s = self.node.clock.now()
        await self._started.wait()
        self.attachment.require(current_call(), message.attachment)
        tokens = self.door.check_prompt(message.tokens, is_generating=False)
        check_block_table(message.block_table, self._num_blocks)
        num_slots = num_tokens(message.block_table) * self.config.block_size
        if not 0 <= message.num_cached_tokens <= len(tokens) <= num_slots:
            raise BadRequest(reason=f"{num_slots} slots do not hold {len(tokens)} tokens")
        sequence_id = f"{message.request_id}/{self.node.new_id()}"
        sequence = Sequence(sequence_id, tokens, None, request_id=message.request_id)
        sequence.place(message.block_table, message.num_cached_tokens)
        generation = self._open(sequence)
        generation.admitted(begin_s)
        if sequence.num_uncomputed_tokens:
            self.scheduler.add(sequence)
            self._wake.set()
        else:
            generation.computed(self.node.clock.now())
        try:
            while True:
                item = await generation.read()  # None: it was ended, and reading again says why.
                if isinstance(item, LayersDone | KvComputed):
                    yield item
                if isinstance(item, KvComputed):
                    return
        finally:
            self._leave(generation)

    async def on_abort(self, message: Abort) -> Done:
        """Answered when no step writes the request's blocks any more."""
        if not self._started.is_set():
            return Done()
        for generation in list(self._generations.values()):
            is_meant = message.attempt in (None, generation.attempt)
            if is_meant and generation.sequence.request_id == message.request_id:
                generation.abort(self.node.clock.now())
                self.scheduler.abort(generation.sequence.sequence_id)
        self._wake.set()
        # Also where the scheduler knows nothing of it: it may have been dropped from under a step.
        await self._stepped.wait()
        return Done()

    # ---- sequences -----------------------------------------------------------------------------------------------

    def _open(self, sequence: Sequence) -> Generation:
        call = current_call()
        assert call is not None, "a stream is served"
        generation = Generation(sequence, call, self.node, now=self.node.clock.now())
        self._generations[sequence.sequence_id] = generation
        self._watch.began(generation.request_id)
        return generation

    async def _admit(self, generation: Generation, kv: KvAddr | None, begin_s: float) -> None:
        """Wait for a place, and for blocks; ends at once when the generation is aborted meanwhile.

        What needs them has been here since ``begin_s``.
        """
        async with generation.interruptible():
            # A reservation that waited for a place would keep its blocks from those who have one and wait for blocks.
            if kv is None and not generation.has_place:
                waits_s, has_to_wait = self.node.clock.now(), self._places.locked()
                try:
                    await self._places.acquire()
                    generation.has_place = True
                finally:
                    if has_to_wait:
                        self.node.note(generation.call, "place", waits_s)
            admitted_s = await self.supply.admit(generation.sequence, kv, begin_s)
        generation.admitted(admitted_s)

    def _was_read(self, generation: Generation) -> None:
        now = generation.read_s = self.node.clock.now()
        if generation.sequence.is_paused and generation.num_unread * 2 <= self.config.max_buffered_tokens:
            generation.sequence.is_paused = False
            generation.resumed(now)
            self._wake.set()

    def _leave(self, generation: Generation) -> None:
        """The stream is over: end its sequence, if that goes on."""
        if generation.has_place:
            generation.has_place = False
            self._places.release()
        self._generations.pop(generation.sequence.sequence_id, None)
        self._watch.ended(generation.request_id)
        self.scheduler.counts.ended(generation.sequence, generation.outcome)
        self.scheduler.abort(generation.sequence.sequence_id)
        self._wake.set()
        generation.left(self.node.clock.now())

    def _pause_if_unread(self, generation: Generation) -> None:
        if generation.num_unread < self.config.max_buffered_tokens or generation.sequence.finish_reason is not None:
            return
        generation.sequence.is_paused = True
        generation.paused(self.node.clock.now())
        if not generation.is_watched:
            generation.is_watched = True
            self.spawn(self._watch_stall(generation))

    async def _watch_stall(self, generation: Generation) -> None:
        """End the stream of a paused sequence once nothing of it has been read for ``stall_s``."""
        sequence, clock = generation.sequence, self.node.clock
        while sequence.is_paused and sequence.sequence_id in self._generations:
            left_s = generation.read_s + self.config.stall_s - clock.now()
            if left_s <= 0:
                # Its handler waits for credit, and nothing it could be told would reach it.
                generation.call.fail(Stalled(request_id=sequence.request_id, stall_s=self.config.stall_s))
                break
            await clock.sleep(left_s)
        generation.is_watched = False

    # ---- steps ---------------------------------------------------------------------------------------------------

    async def _run_steps(self) -> None:
        while not self._is_stopping:
            self._carry_out()
            self._watch.stepped()
            step = self.scheduler.schedule()
            self._carry_out()
            self.supply.refill()
            if step.chunks:
                await self._run_step(step)
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _run_step(self, step: Step) -> None:
        begin_s = self.node.clock.now()
        for chunk in step.chunks:
            if generation := self._generations.get(chunk.sequence_id):
                generation.started(begin_s)
        self._stepped.clear()
        try:
            result = await self._compute(step)
            end_s = self.node.clock.now()
            self.throughput.observe(step, begin_s, end_s)
            for chunk in step.chunks:
                if generation := self._generations.get(chunk.sequence_id):
                    generation.phases.stepped(begin_s, end_s, step)
            self.scheduler.apply(step, result)
        finally:
            self._stepped.set()

    async def _compute(self, step: Step) -> StepResult:
        """Run a step in the worker thread; a simulated one takes its time on the node's clock."""
        loop, runner = asyncio.get_running_loop(), self.runner
        running: asyncio.Future[StepResult]
        if isinstance(runner, SimulatedRunner):
            running = asyncio.ensure_future(
                runner.run_timed(step, partial(self._report_layers, step), self.node.clock.sleep)
            )
        else:
            running = asyncio.ensure_future(
                self._worker.run(
                    runner.run, step, lambda *layers: loop.call_soon_threadsafe(self._report_layers, step, *layers)
                )
            )
        try:
            return await asyncio.shield(running)
        finally:
            # A thread cannot be stopped, and writes to the end: nobody may take a cancelled step for over before.
            await asyncio.wait((running,))

    def _report_layers(self, step: Step, layer_begin: int, layer_end: int) -> None:
        now = self.node.clock.now()
        for chunk in step.chunks:
            if chunk.is_kv_only and (generation := self._generations.get(chunk.sequence_id)):
                generation.put(LayersDone(layer_begin, layer_end, chunk.begin, chunk.end), now)

    def _carry_out(self) -> None:
        """Do what the scheduler has left to be done."""
        now = self.node.clock.now()
        for instruction in self.scheduler.take_instructions():
            generation = self._generations.get(instruction.sequence.sequence_id)
            if isinstance(instruction, Prefilled):
                self.supply.seal(instruction.sequence)
            elif isinstance(instruction, Released):
                self._carry_out_release(instruction, generation, now)
            elif isinstance(instruction, Emit) and generation is not None:
                generation.emit(instruction.sample, instruction.position, instruction.finish_reason, now)
                self._pause_if_unread(generation)

    def _carry_out_release(self, released: Released, generation: Generation | None, now: float) -> None:
        if released.sequence.is_kv_only:
            if generation is not None and not released.sequence.num_uncomputed_tokens:
                generation.computed(now)
            return
        self.supply.give_back(released)
        if released.is_preempted and generation is not None:
            generation.preempted(now)

    # ---- the pool ------------------------------------------------------------------------------------------------

    async def _on_attached(self, store: PageStore) -> None:
        await self._worker.run(self.runner.map_pool, store.memory, store.num_blocks)
        facts = self.runner.facts
        pool_len = store.num_blocks * self.config.block_size
        max_model_len = min(self.config.max_model_len or facts.max_model_len, facts.max_model_len, pool_len)
        self.scheduler.max_model_len = max_model_len
        self.door = Door(facts.vocab_size, max_model_len)
        self._num_blocks = self._watch.num_blocks = self._watch.free_blocks = store.num_blocks

    async def _on_lost(self, error: BusError) -> None:
        """The manager is gone, and every block with it: end all, and let go of the pool after the step under way."""
        for generation in self._generations.values():
            if not generation.needs_admission:
                generation.fail(error)
        self.scheduler.drop_all()
        await self._stepped.wait()
        self.runner.unmap_pool()

    # ---- load ----------------------------------------------------------------------------------------------------

    async def on_watch_load(self, message: WatchLoad) -> AsyncIterator[LoadReport]:
        await self._started.wait()
        async with aclosing(self._watch.serve()) as reports:
            async for report in reports:
                yield report

    async def _report_load(self) -> None:
        while True:
            await self._watch.look_at_pool(self.attachment.manager)
            counters = self.scheduler.counts.counters()
            self.registration.update(state=self.state, load=self._watch.load(), counters=counters)
            await self.node.clock.sleep(REPORT_S)
