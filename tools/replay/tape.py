"""A recording as a replay needs it: its requests, what came of them, what fleet it was, and what things cost there."""

from dataclasses import dataclass
from pathlib import Path

from callboard.tools.errors import CliError
from callboard.tools.trace.recording import Batch, FleetView, Noticed, Recording, read_recording

from .asking import Show
from .costs import Costs, CostsOf
from .outcomes import Outcome, Outcomes
from .recorded import RecordedRequest, Requests
from .shape import ShapeOf

MOST_ERROR_S = 1e-3


@dataclass(frozen=True, slots=True)
class Tape:
    """What was read. ``notes`` say what it lacks, for people."""

    recording: Recording
    requests: tuple[RecordedRequest, ...]
    outcomes: dict[str, Outcome]
    shape: ShapeOf
    costs: Costs
    notes: tuple[str, ...]

    @property
    def fleet(self) -> str:
        """The name of the fleet that was recorded."""
        return self.recording.header.fleet

    @property
    def seconds(self) -> float:
        """From the first request to the last."""
        return self.requests[-1].time - self.requests[0].time

    def describe(self) -> str:
        """Return what it is, in a line."""
        num, part = len(self.requests), Path(self.recording.path).name
        times = f"{num} request{'s' * (num != 1)} asked within {self.seconds:.1f} s"
        return f"{part}: {times}, fleet {self.fleet}"


def read_tape(path: str, *, is_partial: bool, limit: int | None, show: Show) -> Tape:
    """Read a whole recording, once. Raises CliError where there is nothing to replay in it."""
    recording = read_recording(path, is_partial=is_partial)
    if recording.header.bodies == "none":
        raise CliError(f"{path} was recorded without prompts: record with --prompts hashed to replay it")
    requests, outcomes, costs, shape = Requests(), Outcomes(), CostsOf(), ShapeOf()
    notes: list[str] = []
    error_s, num_died = 0.0, 0
    for chunk in recording.chunks():
        if isinstance(chunk, FleetView):
            shape.see(chunk.entries)
        elif isinstance(chunk, Noticed):
            num_died += chunk.kind in ("died", "stopped")
        elif isinstance(chunk, Batch):
            error_s = max(error_s, chunk.error_s)
            for event in chunk.events():
                outcomes.add(event, sequence_id=requests.add(event))
                costs.add(event)
                shape.add(event)
            show(f"read {recording.whole.num_records:,} records")
    whole = recording.whole
    notes += [f"{whole.damage}; {whole.num_skipped} bytes were skipped"] if whole.damage else []
    notes += [f"{whole.num_lost} records were lost while it was recorded"] if whole.num_lost else []
    notes += [f"nodes of the fleet died or stopped {num_died} times: in a replay nobody does"] if num_died else []
    if error_s > MOST_ERROR_S:
        notes.append(f"clocks were known to ±{error_s * 1000:.1f} ms only: recorded times are off by as much")
    if requests.num_without_body:
        notes.append(f"{requests.num_without_body} requests are left out: their prompts are not in the recording")
    found = requests.in_order()
    if not found:
        why = f", and the {requests.num_without_body} that it saw have no prompts" if requests.num_without_body else ""
        raise CliError(f"{path} has no request in it{why}: there is nothing to replay")
    if limit is not None:
        found = found[:limit]
    return Tape(recording, tuple(found), outcomes.finish(), shape, costs.fit(), tuple(notes))
