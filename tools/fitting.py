"""A table that leaves columns out where the terminal is too narrow for all: cut-off numbers say nothing."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table


class Fitting:
    """Shows ``table`` without as many columns of ``spare``, by their titles, the first one first, as it takes."""

    def __init__(self, table: Table, spare: Sequence[str]) -> None:
        self._table = table
        self._spare = spare

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render what fits."""
        shown = self._table
        for title in self._spare:
            if Measurement.get(console, options.update(max_width=1 << 16), shown).maximum <= options.max_width:
                break
            columns = [column for column in shown.columns if str(column.header) != title]
            shown = copy(shown)
            shown.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
        yield shown
