"""Lanes: how pages get from one pool into another, behind one contract (contract.py)."""

from .choose import (
    INPROC,
    KINDS,
    MAPPED,
    LaneOffer,
    is_mappable,
    machine_id,
    open_lane,
    open_own_lane,
    open_pool,
    open_wire_lane,
    usable_lanes,
)
from .contract import Lane, LaneClosed, NoLane, PageWrite
from .mapped import MappedLane
from .pace import PAGE_S, Pace, SimulatedPace
from .packed import PackedLane
from .staging import Staging
from .ucx import UcxWires, host_of
from .wire import TRAILER_BYTES, WIRES, Inlet, Invitation, Piece, Wire, WireBroken, Wires, WiresMissing

__all__ = [
    "INPROC",
    "KINDS",
    "MAPPED",
    "PAGE_S",
    "TRAILER_BYTES",
    "WIRES",
    "Inlet",
    "Invitation",
    "Lane",
    "LaneClosed",
    "LaneOffer",
    "MappedLane",
    "NoLane",
    "Pace",
    "PackedLane",
    "PageWrite",
    "Piece",
    "SimulatedPace",
    "Staging",
    "UcxWires",
    "Wire",
    "WireBroken",
    "Wires",
    "WiresMissing",
    "host_of",
    "is_mappable",
    "machine_id",
    "open_lane",
    "open_own_lane",
    "open_pool",
    "open_wire_lane",
    "usable_lanes",
]
