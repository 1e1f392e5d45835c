"""What is told beside the records: who came and went, and what was lost."""

from dataclasses import dataclass
from typing import Literal

NoticeKind = Literal["following", "came", "back", "stopped", "died", "cut", "lost", "without", "ended"]


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence about following itself. ``time`` and ``wall`` as of an Event."""

    text: str
    kind: NoticeKind
    """``following``: what was to be told of the past has been, from here on it is told as it happens. ``came``,
    ``back``, ``stopped``, ``died``, ``cut`` (out of reach, perhaps alive), ``without`` (tells nothing): of a node.
    ``lost``: records that are told nowhere. ``ended``: of the fleet; nothing follows."""
    node: str = ""
    num_lost: int = 0
    """Records that were made and are not told; what was lost with a process nobody can count."""
    time: float = 0.0
    wall: float = 0.0
