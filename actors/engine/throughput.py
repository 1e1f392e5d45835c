"""How fast an engine is, learned from its own steps."""

from .step import Step

WEIGHT = 0.2  # of the newest step in the running means


class Throughput:
    """Running means of prefill and decode tokens per second; 0.0 until there is something to go by."""

    def __init__(self) -> None:
        self.prefill_tps = 0.0
        self.decode_tps = 0.0

    def observe(self, step: Step, seconds: float) -> None:
        """Take in a step. One that does both counts for what it does more of: the two share its time."""
        if seconds <= 0.0:
            return
        num_prefill = step.num_tokens - step.num_decodes
        if num_prefill > step.num_decodes:
            self.prefill_tps = _mean(self.prefill_tps, num_prefill / seconds)
        elif not num_prefill:
            self.decode_tps = _mean(self.decode_tps, step.num_decodes / seconds)

    def prefill_s(self, num_tokens: int) -> float:
        """Return the seconds that so many tokens are expected to take, 0.0 while nothing is known."""
        return num_tokens / self.prefill_tps if self.prefill_tps else 0.0


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - WEIGHT) * old + WEIGHT * new
