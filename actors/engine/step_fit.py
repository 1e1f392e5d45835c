"""What a step takes, as a sum of four parts, learned from the engine's own steps.

    seconds = step_s + prefill_token_s * prefill tokens + decode_s * decodes + attended_s * attended pairs

as in the performance model of Splitwise (arXiv 2311.18677), with a term for attention. Fitted by least squares over the
latest steps, without negative parts. Errors count relative to the root of a step's time, else the long ones would say
everything about what an empty one takes.
"""

from dataclasses import dataclass

from .step import Step

FORGET = 0.99
"""The weight of a step after each further one of its kind."""
RIDGE = 1e-6
"""Keeps parts that no step has told apart from being anything."""
FEW = 16
"""Steps before an outlier can be told."""
MOST_TIMES = 4.0
"""A step that takes so many times what was expected tells of the machine, not of the step: it counts as that long."""
RENEW = 8
"""Steps after which the parts are computed anew."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The parts of a step's time, in seconds; all zero until there is something to go by."""

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_s: float = 0.0
    attended_s: float = 0.0


class StepFit:
    """The fit over an engine's steps. Those with prefill and those without are forgotten apart.

    So a long time of the one kind leaves in place what is known of the other.
    """

    def __init__(self) -> None:
        self._sums = [[[0.0] * 5 for _ in range(4)] for _ in range(2)]
        self._num_steps = 0
        self._cost = StepCost()
        self._renew_at = 1

    def observe(self, step: Step, seconds: float) -> None:
        """Take in a step."""
        num_prefill = step.num_tokens - step.num_decodes
        num_pairs = sum((chunk.end - chunk.begin) * (chunk.begin + chunk.end + 1) / 2 for chunk in step.chunks)
        parts = (1.0, float(num_prefill), float(step.num_decodes), num_pairs)
        if self._num_steps >= FEW:
            cost = self.cost
            expected = cost.step_s + num_prefill * cost.prefill_token_s
            expected += step.num_decodes * cost.decode_s + num_pairs * cost.attended_s
            seconds = min(seconds, MOST_TIMES * expected) if expected > 0.0 else seconds
        self._num_steps += 1
        weight = 1.0 / max(seconds, 1e-6)
        sums = self._sums[num_prefill > 0]
        for row, part in zip(sums, parts, strict=True):
            scaled = weight * part
            for column, other in enumerate(parts):
                row[column] = FORGET * row[column] + scaled * other
            row[4] = FORGET * row[4] + scaled * seconds

    @property
    def cost(self) -> StepCost:
        """What steps take, as far as is known."""
        if self._num_steps >= self._renew_at:
            self._renew_at = self._num_steps + RENEW
            self._cost = self._solve()
        return self._cost

    def _solve(self) -> StepCost:
        a, b = self._sums
        sums = [[x + y for x, y in zip(row, other, strict=True)] for row, other in zip(a, b, strict=True)]
        kept = [index for index in range(4) if sums[index][index] > 0.0]
        while kept:
            found = _solve([[sums[i][j] for j in kept] + [sums[i][4]] for i in kept])
            lowest = min(range(len(kept)), key=lambda i: found[i])
            if found[lowest] >= 0.0:
                parts = dict(zip(kept, found, strict=True))
                return StepCost(*(parts.get(index, 0.0) for index in range(4)))
            del kept[lowest]
        return StepCost()


def _solve(rows: list[list[float]]) -> list[float]:
    """Solve a small symmetric system, each row with its right side, by elimination on scaled unknowns."""
    size = len(rows)
    scale = [rows[i][i] ** -0.5 for i in range(size)]
    scale.append(1.0)  # Of the right side.
    rows = [[value * scale[i] * scale[j] for j, value in enumerate(row)] for i, row in enumerate(rows)]
    for i in range(size):
        rows[i][i] += RIDGE
        for other in rows[i + 1 :]:
            factor = other[i] / rows[i][i]
            for column in range(i, size + 1):
                other[column] -= factor * rows[i][column]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = sum(rows[i][j] * found[j] for j in range(i + 1, size))
        found[i] = (rows[i][size] - rest) / rows[i][i]
    return [value * factor for value, factor in zip(found, scale[:size], strict=True)]
