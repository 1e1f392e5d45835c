"""A strict reader of Chrome trace events: what a file must be like so that every viewer shows the same."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

KEYS = {
    "M": {"ph", "pid", "tid", "name", "args"},
    "B": {"ph", "ts", "pid", "tid", "name", "cat", "args"},
    "E": {"ph", "ts", "pid", "tid", "name"},
    "s": {"ph", "ts", "pid", "tid", "name", "cat", "id"},
    "f": {"ph", "ts", "pid", "tid", "name", "cat", "id", "bp"},
}
META = {
    "process_name": "name",
    "process_labels": "labels",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}


class InvalidTrace(Exception):
    """The file breaks a rule of the format."""


@dataclass
class Slice:
    name: str
    category: str
    process: str
    thread: str
    begin: float
    end: float
    args: dict[str, Any]
    parent: "Slice | None"


@dataclass
class Trace:
    processes: dict[int, str] = field(default_factory=dict)
    threads: dict[int, str] = field(default_factory=dict)
    """In the order of their sort index."""
    slices: list[Slice] = field(default_factory=list)
    flows: list[tuple[Slice, Slice]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    sort: dict[int, int] = field(default_factory=dict)


def need(condition: bool, text: str) -> None:
    if not condition:
        raise InvalidTrace(text)


def read(data: bytes) -> Trace:
    """Return what a file shows. Raises InvalidTrace at the first rule that is broken."""
    content = json.loads(data)
    need(isinstance(content, dict) and isinstance(content.get("traceEvents"), list), "not a trace object")
    need(content.get("displayTimeUnit") in ("ms", "ns"), "displayTimeUnit")
    trace = Trace(about=content.get("otherData", {}))
    owner: dict[int, int] = {}
    stacks: dict[int, list[Slice]] = defaultdict(list)
    begun: dict[int, tuple[dict[str, Any], Slice]] = {}
    ended: set[int] = set()
    now = 0.0
    for event in content["traceEvents"]:
        ph = event.get("ph")
        need(ph in KEYS and set(event) == KEYS[ph], f"fields of {event}")
        pid, tid = event["pid"], event["tid"]
        need(type(pid) is int and type(tid) is int and type(event["name"]) is str, f"types of {event}")
        if ph == "M":
            need(now == 0.0 and not trace.slices, "metadata comes first")
            _meta(trace, event, owner)
            continue
        ts = event["ts"]
        need(type(ts) in (int, float) and math.isfinite(ts) and ts >= now, f"time of {event} after {now}")
        need((ts * 1000).is_integer() if type(ts) is float else True, f"{ts} is no whole number of nanoseconds")
        now = ts
        need(pid in trace.processes and owner.get(tid) == pid, f"{event} is on a track without a name")
        stack = stacks[tid]
        if ph == "B":
            need(type(event["cat"]) is str and event["cat"] != "" and isinstance(event["args"], dict), f"{event}")
            parent = stack[-1] if stack else None
            where = trace.processes[pid], trace.threads[tid]
            made = Slice(event["name"], event["cat"], *where, ts, math.inf, event["args"], parent)
            stack.append(made)
            trace.slices.append(made)
        elif ph == "E":
            need(bool(stack) and stack[-1].name == event["name"], f"{event} ends what is not innermost")
            stack.pop().end = ts
        else:
            need(bool(stack), f"{event} is in no slice")
            _flow(trace, event, stack[-1], begun, ended)
    need(not any(stacks.values()), "slices without an end")
    need(set(begun) == ended, "arrows without an end")
    trace.threads = dict(sorted(trace.threads.items(), key=lambda item: trace.sort[item[0]]))
    return trace


def _meta(trace: Trace, event: dict[str, Any], owner: dict[int, int]) -> None:
    name, pid, tid = event["name"], event["pid"], event["tid"]
    need(name in META and set(event["args"]) == {META[name]}, f"metadata {event}")
    value = event["args"][META[name]]
    need(type(value) is (int if name.endswith("index") else str), f"metadata {event}")
    if name == "process_name":
        need(pid not in trace.processes, f"process {pid} has two names")
        trace.processes[pid] = value
    elif name == "thread_name":
        need(tid not in trace.threads and tid != pid and pid in trace.processes, f"thread {event}")
        need(tid not in trace.processes, "a thread's id is a process's")
        trace.threads[tid], owner[tid] = value, pid
    elif name == "thread_sort_index":
        need(tid in trace.threads, f"thread {event}")
        trace.sort[tid] = value


def _flow(
    trace: Trace, event: dict[str, Any], at: Slice, begun: dict[int, tuple[dict[str, Any], Slice]], ended: set[int]
) -> None:
    number = event["id"]
    if event["ph"] == "s":
        need(number not in begun, f"two arrows are number {number}")
        begun[number] = event, at
        return
    need(number in begun and number not in ended, f"{event} ends no arrow")
    start, source = begun[number]
    ended.add(number)
    need(event["bp"] == "e" and all(start[key] == event[key] for key in ("name", "cat")), f"{start} is not of {event}")
    trace.flows.append((source, at))
