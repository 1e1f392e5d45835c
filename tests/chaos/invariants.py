"""What holds at every moment, and what when all is quiet, seen from above: by looking into the actors."""

from collections.abc import Iterator
from typing import Any

from callboard.actors.engine.engine import Engine
from callboard.actors.kv_manager import KvManager
from callboard.router.actor import RouterActor

from .whole_records import not_whole
from .world import World


def broken_now(world: World) -> Iterator[str]:
    """Yield what must never be, at any moment."""
    managers: dict[str, Any] = {}
    for machine, manager in world.up(KvManager):
        if hasattr(manager, "blocks") and machine.is_ready.is_set():
            managers[machine.name] = manager
            for problem in manager.blocks.check_integrity():
                yield f"leaked: {machine.name}: {problem}"
            if manager.tiers.host is not None:
                for problem in manager.tiers.host.index.check_integrity():
                    yield f"leaked: the tier of {machine.name}: {problem}"
    for machine, engine in world.up(Engine):
        if machine.is_ready.is_set() and engine.attachment.is_attached:
            try:
                engine.scheduler.check_integrity()
            except AssertionError as error:
                yield f"leaked: {machine.name}: {error}"
            manager = managers.get(engine.config.manager.node)
            if manager is not None:
                yield from _lent_to_others(machine.name, engine, manager)


def _lent_to_others(name: str, engine: Any, manager: Any) -> Iterator[str]:
    """Yield blocks that an engine has, although by its manager's books it has not, or not any more."""
    blocks = manager.blocks
    accounts = [blocks._engines.get(name), *blocks._lost.values()]
    incarnation = engine.node.incarnation
    account = next((each for each in accounts if each is not None and each.incarnation == incarnation), None)
    if account is None:
        return
    has = set(engine.scheduler.slab.blocks)
    for sequence in engine.scheduler._order:
        has.update(sequence.block_table)
    wrong = sorted(has - set(account.all_blocks()))
    if wrong:
        yield f"leaked: {name} has blocks {wrong}, and {manager.name} knows nothing of that"


def not_given_back(world: World, *, may_quarantine: bool) -> Iterator[str]:
    """Yield what is still held although nobody asks for anything.

    What a writer that cannot be reached may still write into stays in quarantine until it is heard of again.
    """
    waiting = [machine.name for machine in world.machines.values() if not machine.is_ready.is_set()]
    if waiting:
        yield f"hung: {waiting} are not ready"
        return
    if world.has_watched:
        for machine in world.machines.values():
            num_watchers = len(machine.node.trace.followers) - 1 if machine.node is not None else 0
            if num_watchers:
                yield f"leaked: {num_watchers} watchers at {machine.name}"
    for machine, manager in world.up(KvManager):
        counts = manager.blocks.counts()
        idle = counts.free + counts.cached + (counts.quarantined if may_quarantine else 0)
        if idle != counts.num_blocks or (counts.num_reservations and not counts.quarantined):
            yield f"leaked: {machine.name} has {counts}"
    managers = {machine.name: manager for machine, manager in world.up(KvManager)}
    for machine, engine in world.up(Engine):
        if len(engine.scheduler):
            yield f"hung: {machine.name} has {len(engine.scheduler)} sequences of nobody"
        account = managers[engine.config.manager.node].blocks._engines.get(machine.name)
        if not engine.attachment.is_attached or account is None or account.incarnation != engine.node.incarnation:
            yield f"hung: {machine.name} and {engine.config.manager.node} are not of one mind about its attachment"
    for machine, router in world.up(RouterActor):
        if router.num_in_flight:
            yield f"hung: {machine.name} has {router.num_in_flight} requests of nobody"
        for engine in world.schedule.engines:
            if router.loads.num_own(engine):
                yield f"leaked: {machine.name} counts {router.loads.num_own(engine)} requests at {engine}"
    yield from not_whole(world)
