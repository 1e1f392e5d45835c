"""One bar of the chart: what an actor was asked for, and over it what it did meanwhile."""

from dataclasses import dataclass

from callboard.tools.trace.story import Span, Story

from .canvas import Canvas
from .model import Tracked, Unit
from .view import Window
from .words import short_id, tokens, took

COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
"""Of requests, in turns. Red is for what failed."""
QUEUE, SEND, ARRIVE, CREDIT, LINE, HEAD = "░", "»", "«", "·", "─", "▸"
LEGEND = (
    ("█", "works"),
    (QUEUE, "waits in a queue"),
    (SEND, "sends pages"),
    (ARRIVE, "pages arrive"),
    (LINE, "awaits others"),
)
HATCHES = {"queue": QUEUE, "send": SEND, "credit": CREDIT, "client": CREDIT}
BOOKKEEPING = ("OpenWrite", "CloseWrite", "Admit", "Release")
"""Short asks between engines and KV managers: no newcomer needs their names."""
WORK = ("ComputeKv", "StartGenerate")
TITLES = {
    "PrepRecv": "prep_recv",
    "RemoteSend": "remote_send",
    "StartGenerate": "start_generate",
    "ComputeKv": "compute",
}
"""What has a number and a name on the chart."""
NEXT = {"queue": ("computes the prompt ...", "computes ..."), "prefill": ("decodes ...",)}
"""What an engine is at after a phase."""


def colour_of(tracked: Tracked) -> str:
    """Return a request's colour, always the same."""
    return COLOURS[tracked.number % len(COLOURS)]


@dataclass(frozen=True, slots=True)
class Bar:
    """A unit's place on the canvas, and how its request is drawn. Cells [x0, x1) of row y are not empty."""

    canvas: Canvas
    window: Window
    left: int
    """Where time begins on the canvas."""
    tracked: Tracked
    unit: Unit
    end: float
    x0: int
    x1: int
    y: int
    colour: str
    weight: str
    is_selected: bool
    is_running: bool

    @property
    def line(self) -> str:
        """The style of lines, hatches and names."""
        return f"{self.weight}{self.colour}"

    @property
    def fill(self) -> str:
        """The style of work."""
        return f"{self.weight}{'bright_white' if self.colour == 'blue' else 'black'} on {self.colour}"

    def x(self, time: float) -> int:
        """Return a moment's cell, perhaps beyond the canvas."""
        return self.left + self.window.cell(time)

    def draw(self, story: Story | None, number: int | None, phases: list[Span]) -> str:
        """Draw it; ``story`` is None where there are too many to look into. Return the name it had no room for."""
        # What engines do is work for the most part: where their phases are not looked at, all is shown so.
        name = self.unit.name
        is_filled = name in BOOKKEEPING or name == "PrepRecv" or (story is None and name in WORK)
        text = (" " if is_filled else LINE) * (self.x1 - self.x0)
        self.canvas.put(self.x0, self.y, text, self.fill if is_filled else self.line)
        is_written = False
        for phase in phases:
            is_written |= self._draw_phase(phase)
        is_written |= self._draw_rest(phases)
        left_out = ""
        if name == "Generate" and story is not None and (self.x1 - self.x0 > 5 or self.is_selected):
            self._draw_calls(story)
        else:
            left_out = self._draw_name(number, is_written=is_written)
        if self.is_running:
            self.canvas.put(self.x1 - 1, self.y, HEAD, self.canvas.at(self.x1 - 1, self.y)[1])
        if name == "http" and self.tracked.error not in ("", "cancelled"):
            self.canvas.put(self.x1 - 1, self.y, "✗", "bold red")
        return left_out

    def _draw_phase(self, phase: Span) -> bool:
        """Draw what was done for a while; return whether something was written on it."""
        end = self.end if phase.end is None else phase.end
        x0, x1 = max(self.x(phase.begin), self.left), min(max(self.x(end), self.x(phase.begin) + 1), self.canvas.width)
        if x1 <= x0:
            return False
        if hatch := HATCHES.get(phase.category):
            self.canvas.put(x0, self.y, hatch * (x1 - x0), self.line)
            texts = (f"{phase.name} {took(phase.seconds)}", phase.name) if phase.category == "queue" else ()
            return self._write(x0, x1, texts, self.line)
        if phase.category in ("compute", "frontend"):
            follows = x0 > self.x0 and self.canvas.at(x0 - 1, self.y)[1] == self.fill
            self.canvas.put(x0, self.y, ("▏" if follows else " ") + " " * (x1 - x0 - 1), self.fill)
            return self._write(x0, x1, _texts_of(phase), self.fill)
        return False

    def _draw_rest(self, phases: list[Span]) -> bool:
        """Draw what an engine must be at: it tells of a phase only when that is over, and phases come in order."""
        if not (self.is_running and self.unit.name in WORK and phases):
            return False
        last = max(phases, key=lambda phase: phase.end or 0.0)
        if last.end is None or last.name not in NEXT:
            return False
        x0 = max(self.x(last.end), self.left)
        if self.x1 <= x0:
            return False
        self.canvas.put(x0, self.y, " " * (self.x1 - x0), self.fill)
        return self._write(x0, self.x1, NEXT[last.name], self.fill)

    def _write(self, x0: int, x1: int, texts: tuple[str, ...], style: str) -> bool:
        """Write the first text that has room behind the first two cells: a number may stand there."""
        for text in texts:
            if len(text) + 2 <= x1 - x0:
                self.canvas.put(x0 + 2, self.y, text, style)
                return True
        return False

    def _draw_name(self, number: int | None, *, is_written: bool) -> str:
        """Write the number into the first cell, and the name where the bar is but a line; return it if it is not."""
        canvas, y, unit = self.canvas, self.y, self.unit
        name = TITLES.get(unit.name, "") if unit.name != "http" else f"request {short_id(self.tracked.id)}"
        # Beside many others a number in every bar would be noise.
        has_room = self.x1 - self.x0 > 2 or self.is_selected
        has_number = number is not None and number < 10 and unit.name in TITLES and has_room
        if has_number:
            style = canvas.at(self.x0, y)[1]
            canvas.put(self.x0, y, str(number), style if style == self.fill else f"{self.line} reverse")
        if is_written or not name:
            return ""
        begin = self.x0 + has_number
        free = "".join(canvas.at(x, y)[0] for x in range(begin, self.x1))
        at = free.find((LINE if LINE in free else " ") * (len(name) + 2))
        if at < 0:
            return name if self.x1 - self.x0 < len(name) else ""
        canvas.put(begin + at, y, f" {name} " if at or has_number else f"{name} ", canvas.at(begin + at, y)[1])
        return ""

    def _draw_calls(self, story: Story) -> None:
        """Write onto the router's bar which sub-requests it made, where it made them."""
        places: list[tuple[int, int, str]] = []
        for number, span in enumerate(story.sub_requests[:9], 1):
            x = self.x(span.begin)
            if span.source == self.unit.actor and self.x0 <= x < self.x1:
                # Two that begin in one cell stand side by side.
                places.append((max(x, places[-1][0] + 1 if places else x), number, span.name))
        for index, (x, number, name) in enumerate(places):
            after = places[index + 1][0] if index + 1 < len(places) else self.x1
            if x < self.x1:
                self.canvas.put(x, self.y, str(number), f"{self.line} reverse")
            if after - x >= len(name) + 3:
                self.canvas.put(x + 1, self.y, f" {name} ", self.line)
        if not places and self.x1 - self.x0 >= 10:
            self.canvas.put(self.x0, self.y, "router ", self.line)


def _texts_of(phase: Span) -> tuple[str, ...]:
    """Return what to write on a bar of work, the longest first."""
    num, time = phase.facts.get("num_tokens"), took(phase.seconds)
    if not isinstance(num, int):
        return f"{phase.name} {time}", phase.name
    what = tokens(num)
    if phase.name == "decode":
        return f"decodes {what}, {time}", f"decodes {what}", "decodes"
    if not num:
        return f"reads the prompt, {time}", "reads the prompt", "prompt"
    return f"computes {what} of the prompt, {time}", f"computes {what}, {time}", f"computes {what}", what, "prompt"
