"""What watches one run of a script: a shadow's comparison, or a dry run."""

from typing import Protocol

from .shared import Shared


class Watching(Protocol):
    """Is told how the run ends, and stands between it and the fleet."""

    is_finished: bool
    """Its last token has come. Set by who runs the script."""
    is_moved: bool
    """Something of it was handed over between engines, by whoever's wish. Set likewise."""

    @property
    def shared(self) -> Shared:
        """What the run is given in place of the router's."""

    def end(self) -> None:
        """The script is over; what it left behind has not been given back yet."""
