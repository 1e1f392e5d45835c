"""How fast an engine is, learned from its own steps."""

import math

from .step import Step
from .step_fit import StepFit

WEIGHT = 0.2  # of the newest step in the running means
SHARE_S = 5.0
"""How long a step counts in the share of time that prefill takes: its weight falls to a third in that time."""


class Throughput:
    """Running means of prefill and decode tokens per second; 0.0 until there is something to go by."""

    def __init__(self) -> None:
        self.prefill_tps = 0.0
        self.decode_tps = 0.0
        self.fit = StepFit()
        self._prefill_share = 0.0
        self._ended_s = 0.0

    def observe(self, step: Step, begin_s: float, end_s: float) -> None:
        """Take in a step. One that does both counts for what it does more of: the two share its time."""
        seconds = end_s - begin_s
        if seconds <= 0.0:
            return
        self.fit.observe(step, seconds)
        num_prefill = step.num_tokens - step.num_decodes
        if num_prefill > step.num_decodes:
            self.prefill_tps = _mean(self.prefill_tps, num_prefill / seconds)
        elif not num_prefill:
            self.decode_tps = _mean(self.decode_tps, step.num_decodes / seconds)
        # The share of the step itself as well: a long one has been all there was.
        weight = math.exp(-seconds / SHARE_S)
        share = self.prefill_share(begin_s)
        self._prefill_share = weight * share + (1.0 - weight) * (num_prefill > step.num_decodes)
        self._ended_s = end_s

    def prefill_share(self, now: float) -> float:
        """Return which part of the time lately went into steps of prefill, on the clock of ``observe``."""
        return self._prefill_share * math.exp(min(0.0, self._ended_s - now) / SHARE_S)

    def prefill_s(self, num_tokens: int) -> float:
        """Return the seconds that so many tokens are expected to take, 0.0 while nothing is known."""
        return num_tokens / self.prefill_tps if self.prefill_tps else 0.0


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - WEIGHT) * old + WEIGHT * new
