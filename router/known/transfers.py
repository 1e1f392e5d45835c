"""What handing KV from one pool to another takes, learned from the hand-offs that this router has asked for."""

from dataclasses import dataclass

from callboard.actors.protocol import Sent
from callboard.bus import Address

WEIGHT = 0.1  # of the newest hand-off in the running means
MOST_PAIRS = 1024


@dataclass(frozen=True, slots=True)
class Transfer:
    """Between two KV managers: what a hand-off takes at least, in seconds, and what KV takes that is sent as it is."""

    handoff_s: float = 0.002
    """Beyond queue and computation: reserving, opening, the tail after the last layer, settling."""
    token_s: float = 0.0
    """For each token that is sent without having been computed for it: all others leave while the next are computed."""


class Transfers:
    """Running means, by pair of managers; a pair that nothing is known of is taken to be like the others."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[Address, Address], Transfer] = {}
        self._any = Transfer()
        self._reserve_s = 0.0

    def copy(self) -> "Transfers":
        """Return what is known now; what is learned from now on is learned apart."""
        other = Transfers()
        other._pairs, other._any, other._reserve_s = dict(self._pairs), self._any, self._reserve_s
        return other

    def between(self, sender: Address | None, receiver: Address | None) -> Transfer:
        """Return what is known of a pair."""
        if sender is None or receiver is None:
            return self._any
        found = self._pairs.get((sender, receiver), self._any)
        return Transfer(found.handoff_s + self._reserve_s, found.token_s)

    def reserved(self, seconds: float) -> None:
        """Note how long a prep_recv took that did not wait for blocks."""
        self._reserve_s = _mean(self._reserve_s, min(seconds, 10 * self._reserve_s or seconds))

    def sent(self, sender: Address | None, receiver: Address, sent: Sent, *, seconds: float, num_tokens: int) -> None:
        """Note a remote_send of ``num_tokens``, which took ``seconds`` from asking to its answer."""
        if sender is None or not num_tokens:
            return
        key = (sender, receiver)
        before = self._pairs.pop(key, self._any)
        handoff_s, token_s = before.handoff_s, before.token_s
        rest_s = max(0.0, seconds - sent.queue_s - sent.compute_s)
        if sent.num_computed_tokens:
            handoff_s = _mean(handoff_s, rest_s)
        else:
            token_s = _mean(token_s, max(0.0, rest_s - handoff_s) / num_tokens)
        self._pairs[key] = self._any = Transfer(handoff_s, token_s)
        if len(self._pairs) > MOST_PAIRS:
            del self._pairs[next(iter(self._pairs))]


def _mean(old: float, new: float) -> float:
    return new if old == 0.0 else (1 - WEIGHT) * old + WEIGHT * new
