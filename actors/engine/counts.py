"""What an engine has done since it started, in numbers that only grow."""

from callboard.actors.protocol import Counters

from .sequence import Sequence


class Counts:
    """Counts of one engine. The scheduler notes tokens, the actor how its streams end."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_computed_tokens = 0
        self.num_generated_tokens = 0
        self.num_preemptions = 0
        self._num_finished: dict[str, int] = {}

    def emitted(self, sequence: Sequence, position: int) -> None:
        """Note a generated token."""
        # Hot: once per token.
        self.num_generated_tokens += 1
        if position == sequence.first_position:
            self.num_prompt_tokens += sequence.num_prompt_tokens

    def ended(self, sequence: Sequence, outcome: str) -> None:
        """Note that the stream of a sequence is over; kv-only ones are no requests."""
        if not sequence.is_kv_only:
            self._num_finished[outcome] = self._num_finished.get(outcome, 0) + 1

    def counters(self) -> Counters:
        """Return them as the directory hears of them."""
        return Counters(
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_preemptions=self.num_preemptions,
            num_finished={reason: self._num_finished[reason] for reason in sorted(self._num_finished)},
        )
