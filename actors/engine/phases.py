"""What a sequence goes through in an engine, one phase after another, each recorded when it ends.

A phase ends with the event that begins the next one, so there is nothing between them. Within a phase the time in
steps is summed apart from the time between steps.
"""

from typing import Any

from callboard.bus import Call, Node

from .step import Step


class Phases:
    """The phases of one sequence: queue, prefill, decode (or compute), paused; handover of the last of it."""

    def __init__(self, node: Node, call: Call) -> None:
        self.name = ""
        """The phase it is in; empty while it has no blocks."""
        self._node = node
        self._call = call
        self._begin = self._mark = 0.0
        self._num_steps = self._num_batched = self._num_decodes = self._num_prefill_tokens = 0
        self._step_s = self._between_s = 0.0

    def enter(self, name: str, now: float, **facts: Any) -> None:
        """Begin a phase, or none (``""``), and record the one that ends; ``facts`` are of that one."""
        if self.name:
            if self._num_steps:
                facts |= {
                    "num_steps": self._num_steps,
                    "step_s": self._step_s,
                    "between_s": self._between_s + now - self._mark,
                    "batch": self._num_batched / self._num_steps,
                    "step_decodes": self._num_decodes,
                    "step_prefill_tokens": self._num_prefill_tokens,
                }
            if self.name == "handover":
                self._node.note_turn(self._call, self._begin, self.name)
            else:
                self._node.note(self._call, self.name, self._begin, end=now, **facts)
        self.name = name
        self._begin = self._mark = now
        self._num_steps = self._num_batched = self._num_decodes = self._num_prefill_tokens = 0
        self._step_s = self._between_s = 0.0

    def stepped(self, begin: float, end: float, step: Step) -> None:
        """Count a step that the sequence was in, and all that the step computed: what it took is to be explained."""
        # Hot: once per token.
        self._between_s += begin - self._mark
        self._step_s += end - begin
        self._mark = end
        self._num_steps += 1
        self._num_batched += len(step.chunks)
        self._num_decodes += step.num_decodes
        self._num_prefill_tokens += step.num_tokens - step.num_decodes
