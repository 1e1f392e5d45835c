"""Lanes: how pages get from one pool into another, behind one contract (contract.py)."""

from .choose import INPROC, KINDS, LaneOffer, open_lane, open_pool
from .contract import Lane, LaneClosed, PageWrite
from .mapped import MappedLane
from .pace import PAGE_S, Pace, SimulatedPace

__all__ = [
    "INPROC",
    "KINDS",
    "PAGE_S",
    "Lane",
    "LaneClosed",
    "LaneOffer",
    "MappedLane",
    "Pace",
    "PageWrite",
    "SimulatedPace",
    "open_lane",
    "open_pool",
]
