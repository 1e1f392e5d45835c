"""What is done with the fleet: calibration, the blocks, two engines against one another, the router against none."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .fleet import Fleet, both_engine, both_model, pair_engines, pair_model
from .load import Block, Load, Met, Ran
from .mixes import Call, Mix, draw_calls
from .records import Calibrated, Compared, Measured, Records, Tuned
from .strategies import STRATEGIES, TUNED, Strategy

AT_ONCE = 16
"""Clients that find what can be done at most: enough for full batches, and as many as wait at 0.9 of it."""
FRONTEND_AT = 0.5
TUNED_AT = 0.8
"""Of the saturation: where budgets are told apart."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A block that is to be measured."""

    round: int
    mix: Mix
    utilisation: float
    strategy: Strategy

    @property
    def key(self) -> tuple[int, str, float, str]:
        return self.round, self.mix.name, self.utilisation, self.strategy.name


def plan(rounds: int, mixes: Iterable[Mix], strategies: Sequence[Strategy], *, only_last: bool = False) -> list[Cell]:
    """Return all blocks in order: whole rounds, and in each the strategies of a mix and rate next to one another.

    Strategies take turns in another order each time, the same in every run. With ``only_last``, each mix at its highest
    rate alone.
    """
    cells = []
    for number in range(rounds):
        for mix in mixes:
            some = [each for each in strategies if each.name in mix.only]
            for utilisation in mix.utilisations[-1:] if only_last else mix.utilisations:
                random.Random(f"{number}/{mix.name}/{utilisation}").shuffle(some)
                cells += [Cell(number, mix, utilisation, strategy) for strategy in some]
    return cells


class Measurer:
    """Measures, on a fleet, and keeps what it finds."""

    def __init__(self, fleet: Fleet, load: Load, records: Records, say: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._load = load
        self._records = records
        self._say = say
        self._pids = fleet.pids()
        self._num_blocks = 0
        setup = records.setup
        self._budgets, self._num_requests, self._vocab = setup.budgets, setup.num_requests, setup.shape.vocab_size

    # ---- one block -----------------------------------------------------------------------------------------------

    async def ask(
        self,
        strategy: Strategy,
        budget: int,
        mix: Mix,
        calls: list[Call],
        *,
        num_at_once: int | None = None,
        is_http: bool = False,
    ) -> Ran:
        """Send calls by a strategy to the engines with a budget."""
        if strategy.deployment == "pair":
            await self._fleet.set_roles(budget, strategy.roles)
        await self._fleet.use(strategy)
        model = pair_model(budget) if strategy.deployment == "pair" else both_model(budget)
        block = Block(
            [self._fleet.router],
            model,
            calls,
            mix.num_prefix,
            self._vocab,
            self._seed(),
            num_at_once=num_at_once,
            pids=self._pids,
            url=self._fleet.url if is_http else "",
        )
        return await self._load.run(block)

    async def ask_engines(self, names: Sequence[str], mix: Mix, calls: list[Call], num_at_once: int) -> Ran:
        """Send calls to engines themselves, ``num_at_once`` to each."""
        to = [self._fleet.engine(name) for name in names]
        block = Block(to, "", calls, 0, self._vocab, self._seed(), True, num_at_once, self._pids)
        return await self._load.run(block)

    def _seed(self) -> str:
        """Return one that no block had: no two blocks share a prefix."""
        self._num_blocks += 1
        return f"{self._num_blocks}/{random.getrandbits(64)}"

    # ---- phases --------------------------------------------------------------------------------------------------

    async def warm_up(self, strategies: Iterable[Strategy], mix: Mix) -> None:
        """Have every engine and router do everything once, and those that learn, learn."""
        for budget in self._budgets:
            for name in (*pair_engines(budget), both_engine(budget)):
                await self.ask_engines([name], mix, draw_calls(mix, math.inf, 8, 0), 4)
        for strategy in strategies:
            ran = await self.ask(strategy, self._budgets[0], mix, draw_calls(mix, math.inf, 8, 0), num_at_once=2)
            if failed := [met.error for met in ran.met if met.error]:
                raise SystemExit(f"{strategy.name} fails: {failed[0]}")

    async def calibrate(self, mix: Mix) -> None:
        """Find a mix's rates and budgets, unless they are known."""
        if mix.name in self._records.calibrated:
            return
        known = {strategy.name: strategy for strategy in STRATEGIES}
        parallel, count = known[TUNED["data parallel"]], max(2 * AT_ONCE, self._num_requests * 3 // 5)
        # Budgets cut long prompts; shorter ones go through whole under any.
        budgets = self._budgets if mix.num_prompt > self._budgets[0] else self._budgets[-1:]
        saturation = 0.0
        for budget in budgets:
            calls = draw_calls(mix, math.inf, count, 1)
            ran = await self.ask(parallel, budget, mix, calls, num_at_once=AT_ONCE)
            saturation = max(saturation, count / ran.seconds)
        tuning = []
        for deployment, name in TUNED.items() if len(budgets) > 1 else ():
            for budget in budgets:
                calls = draw_calls(mix, TUNED_AT * saturation, count, 2)
                jct = [met.jct_s for met in _good(await self.ask(known[name], budget, mix, calls))]
                tuning.append(Tuned(deployment, budget, fmean(jct)))
        best = {
            deployment: min(
                (each for each in tuning if each.deployment == deployment),
                key=lambda each: each.mean_jct_s,
                default=Tuned(deployment, budgets[0], 0.0),
            ).budget
            for deployment in TUNED
        }
        calls = draw_calls(mix, math.inf, 12, 3)
        alone = _good(await self.ask(parallel, best["data parallel"], mix, calls, num_at_once=1))
        found = Calibrated(
            mix.name,
            saturation,
            best,
            tuning,
            median(met.ttft_s for met in alone),
            median(map(tpot_s, alone)),
            median(met.jct_s for met in alone),
        )
        self._say(f"{mix.name}: {saturation:.1f} requests/s at most, token budgets {best}")
        self._records.add(found)

    async def measure(self, cell: Cell) -> None:
        """Run one block, unless it was."""
        if cell.key in self._records.measured:
            return
        calibrated = self._records.calibrated[cell.mix.name]
        rate = cell.utilisation * calibrated.saturation
        budget = calibrated.budgets[cell.strategy.tuned_as]
        calls = draw_calls(cell.mix, rate, self._num_requests, 100 + cell.round)
        ran = await self.ask(cell.strategy, budget, cell.mix, calls)
        self._records.add(Measured(*cell.key, rate, budget, ran.seconds, ran.cpu_s, ran.met))

    def seconds_of(self, cells: Iterable[Cell]) -> float:
        """Return how long blocks will take at least, those that were run left out."""
        left = [cell for cell in cells if cell.key not in self._records.measured]
        calibrated = self._records.calibrated
        return sum(self._num_requests / (cell.utilisation * calibrated[cell.mix.name].saturation) for cell in left)

    async def compare_engines(self, number: int, scale: float = 1.0) -> None:
        """Give each engine the same work while the other idles, and while it works."""
        if ("engines", number) in self._records.compared:
            return
        pair, values = pair_engines(self._budgets[-1]), {}
        for what, mix, at_once, count in (
            ("prefill", Mix("prefill", 600, 2, 0.0), 1, 24),
            ("decode", Mix("decode", 32, 64, 0.0), 4, 16),
        ):
            calls = draw_calls(mix, math.inf, max(at_once, round(scale * count)), number)
            alone = [await self.ask_engines([name], mix, calls, at_once) for name in pair]
            both = await self.ask_engines(pair, mix, [call for call in calls for _ in pair], at_once)
            values[f"{what} s"] = both.seconds / fmean(ran.seconds for ran in alone)
            values[f"{what} CPU"] = both.cpu_s["engine"] / sum(ran.cpu_s["engine"] for ran in alone)
            values[f"{what} CPU elsewhere"] = _elsewhere(both.cpu_s) / both.cpu_s["engine"]
        self._records.add(Compared("engines", number, values))

    async def compare_router(self, number: int, num_at_once: int, scale: float = 1.0) -> None:
        """Ask both engines themselves, and through the router."""
        what = f"router, {num_at_once} at a time"
        if (what, number) in self._records.compared:
            return
        mix, budget = Mix("router", 64, 16, 0.0), self._budgets[-1]
        router = next(strategy for strategy in STRATEGIES if strategy.name == "round_robin")
        calls = draw_calls(mix, math.inf, max(2, round(scale * 20)) * num_at_once, number)
        # Twice each, in an order that a drift of the machine favours neither.
        sides: dict[bool, list[Met]] = {False: [], True: []}
        for is_routed in (False, True, True, False):
            if is_routed:
                runs = [await self.ask(router, budget, mix, calls, num_at_once=num_at_once)]
            elif num_at_once == 1:
                halves = zip(pair_engines(budget), (calls[::2], calls[1::2]), strict=True)
                runs = [await self.ask_engines([name], mix, half, 1) for name, half in halves]
            else:
                runs = [await self.ask_engines(pair_engines(budget), mix, calls, num_at_once // 2)]
            sides[is_routed] += [met for ran in runs for met in _good(ran)]
        times = {
            is_routed: (median(met.ttft_s for met in some), median(map(tpot_s, some)))
            for is_routed, some in sides.items()
        }
        values = {"direct TTFT ms": 1e3 * times[False][0], "direct ITL ms": 1e3 * times[False][1]}
        values["added TTFT ms"], values["added ITL ms"] = (
            1e3 * (routed - direct) for routed, direct in zip(times[True], times[False], strict=True)
        )
        self._records.add(Compared(what, number, values))

    async def compare_frontend(self, number: int, mix: Mix) -> None:
        """Send the same arrivals over the bus and over HTTP."""
        if ("frontend", number) in self._records.compared:
            return
        calibrated = self._records.calibrated[mix.name]
        strategy = next(each for each in STRATEGIES if each.name == "least_loaded")
        calls = draw_calls(mix, FRONTEND_AT * calibrated.saturation, self._num_requests, 50 + number)
        values = {}
        for is_http in (number % 2 == 0, number % 2 == 1):
            ran = await self.ask(strategy, calibrated.budgets["data parallel"], mix, calls, is_http=is_http)
            side, met = "HTTP" if is_http else "bus", _good(ran)
            values[f"{side} TTFT ms"] = 1e3 * median(each.ttft_s for each in met)
            values[f"{side} TPOT ms"] = 1e3 * median(map(tpot_s, met))
            for kind, seconds in ran.cpu_s.items():
                values[f"{side} {kind} CPU ms"] = 1e3 * seconds / len(met)
        self._records.add(Compared("frontend", number, values))


def tpot_s(met: Met) -> float:
    """Return the time per output token after the first."""
    return (met.jct_s - met.ttft_s) / (met.num_tokens - 1)


def _good(ran: Ran) -> list[Met]:
    if failed := [met.error for met in ran.met if met.error]:
        raise SystemExit(f"a request failed: {failed[0]}")
    return ran.met


def _elsewhere(cpu_s: dict[str, float]) -> float:
    return sum(seconds for kind, seconds in cpu_s.items() if kind not in ("engine", "client"))
