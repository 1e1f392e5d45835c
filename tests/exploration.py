"""Every state of a small world (small_world.py), nearest first: what is wrong in one, and what leads nowhere."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from small_world import SIZE, Event, Scope, Slot, World, slots_of

from callboard.kv.reservation import State
from callboard.kv.tokens import unpack_tokens


def problems_of(world: World) -> list[str]:
    """Return what is wrong."""
    problems = world.problems + world.manager.check_integrity()
    pool, cache = world.manager.allocator.pool, world.manager.cache
    may_write: dict[Slot, str] = {}
    for who, slots in world.writers():
        for slot in slots:
            if slot in may_write:
                problems.append(f"slot {slot} may be written by {may_write[slot]} and by {who}")
            may_write[slot] = who
            if pool.refs(slot // SIZE) != 1 or slot // SIZE in cache:
                problems.append(f"{who} may write block {slot // SIZE}, which is sealed, free or somebody else's too")
    for made in world.made:
        if world.is_held(made):
            held = world.manager.reservations.get(made.reservation_id)
            prompt, reservation = world.scope.asked[made.name].prompt, held.reservation
            if reservation.state is State.SEALED:
                in_place = max(held.num_cached_tokens, reservation.end)
                if not world.has_kv(prompt, held.block_table, in_place):
                    problems.append(f"{made.name} is sealed without its KV")
                if may_write.keys() & slots_of(held.block_table, 0, in_place):
                    problems.append(f"{made.name} is sealed, and may be written")
    for tokens, block in cached_in(world):
        if not world.has_kv(tokens, (-1,) * (len(tokens) // SIZE - 1) + (block,), len(tokens), len(tokens) - SIZE):
            problems.append(f"the cache holds block {block} without its KV")
    return problems


def cached_in(world: World) -> Iterator[tuple[tuple[int, ...], int]]:
    """Give every cached block, with the tokens up to its end."""
    for node in world.manager.cache._nodes.values():
        block, key = node.block, b""
        while node.parent is not None:
            key, node = node.key + key, node.parent
        yield tuple(unpack_tokens(key)), block


def key_of(world: World) -> object:
    """Return what tells this state from others: all of it, but for the numbers of blocks and the time."""
    names: dict[int, int] = {}

    def rename(blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(names.setdefault(block, len(names)) for block in blocks)

    manager, made_keys = world.manager, []
    for made in sorted(world.made, key=lambda made: made.name):
        writes = tuple((w.status, w.is_grafted) for w in made.writes.values())
        if not world.is_held(made):  # Nobody may write it any more, or there is a problem.
            made_keys.append((made.name,))
            continue
        held = manager.reservations.get(made.reservation_id)
        reservation = held.reservation
        grafts = tuple((i, tuple(g), rename(g.values())) for i, g in sorted(held.grafts.items()))
        made_keys.append(
            (
                (made.name, made.reservation_id in world.awaited, writes, reservation.state, reservation._left_as),
                (frozenset(reservation.writes.values()), tuple(reservation.written), rename(held.block_table), grafts),
            )
        )
    accounts = tuple(
        tuple((name, rename(lease.blocks)) for name, lease in account.sequences.items())
        for accounts in (manager._engines, manager._lost)
        for account in accounts.values()
    )
    loan = (
        ()
        if world.loan is None
        else (rename(world.loan.block_table), rename(manager._loans.get(world.loan.loan_id, ())))
    )
    cached = sorted(cached_in(world))
    ticks = sorted({node.last_used for node in manager.cache._nodes.values()})
    lru = tuple(ticks.index(manager.cache._nodes[block].last_used) for _, block in cached)
    tree = tuple((tokens, rename((block,))) for tokens, block in cached)
    filled = tuple(sorted((names.get(s // SIZE, -1), s % SIZE, held) for s, held in world.holds.items()))
    slots = tuple((who, tuple(sorted((names.get(s // SIZE, -1), s % SIZE) for s in s_))) for who, s_ in world.writers())
    sets = (tuple(sorted(world.dead)), tuple(sorted(world.tied)), world.num_loans, "e" in manager._engines)
    return (tuple(made_keys), accounts, loan, tree, lru, filled, slots, sets)


def replay(scope: Scope, path: Iterable[Event]) -> World:
    """Return the state that these events lead to."""
    world = World(scope)
    for event in path:
        world.apply(event)
    return world


@dataclass
class Explored:
    """Every state, by number, with the events that lead on from it.

    ``found``: the first problem, and how to get there.
    """

    paths: list[tuple[Event, ...]]
    edges: list[list[tuple[Event, int]]]
    ends: set[int]
    refused: set[str]
    found: tuple[list[str], tuple[Event, ...]] | None = None

    def stuck(self, *, without: Callable[[Event], bool]) -> list[tuple[Event, ...]]:
        """Return how to get where no end can be reached by events other than those that ``without`` names."""
        back: list[list[int]] = [[] for _ in self.paths]
        for number, edges in enumerate(self.edges):
            for event, target in edges:
                if not without(event):
                    back[target].append(number)
        reached, pending = set(self.ends), list(self.ends)
        while pending:
            for number in back[pending.pop()]:
                if number not in reached:
                    reached.add(number)
                    pending.append(number)
        return [path for number, path in enumerate(self.paths) if number not in reached]


def explore(scope: Scope, *, most: int = 10**9) -> Explored:
    """Visit every state there is, nearest first; ends at the first that is wrong."""
    first = World(scope)
    numbers = {key_of(first): 0}
    found = Explored([()], [], {0}, set())
    while len(found.edges) < len(found.paths) and len(found.paths) < most:
        path = found.paths[len(found.edges)]
        edges: list[tuple[Event, int]] = []
        found.edges.append(edges)
        world = replay(scope, path)
        for event in list(world.events()):
            if world is None:
                world = replay(scope, path)
            is_refused = world.apply(event)
            key = key_of(world)
            if is_refused:
                found.refused.add(event[0])
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(found.paths)
                found.paths.append((*path, event))
                if problems := problems_of(world):
                    found.found = (problems, (*path, event))
                    return found
                if world.is_over:
                    found.ends.add(number)
            if is_refused and event[0] != "complete" and number != len(found.edges) - 1:
                found.found = ([f"{event} was refused, and has changed something"], (*path, event))
                return found
            edges.append((event, number))
            if number != len(found.edges) - 1:
                world = None
    return found
