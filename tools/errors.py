"""How a command ends when it cannot do what was asked: a sentence for people, and exit code 2.

CliError
├── FleetFileError   the fleet file has problems, each with its line
├── NoSuchFleet      no fleet of that name runs, or several do and none was named
├── FleetRuns        a fleet of that name runs already
└── StartFailed      the fleet could not be started (exit code 1)
"""


class CliError(Exception):
    """A command's failure; its text is shown to the user as it is."""

    exit_code = 2


class FleetFileError(CliError):
    """Everything that is wrong with a fleet file: one line of text per problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class NoSuchFleet(CliError):
    """No fleet to talk to."""


class FleetRuns(CliError):
    """The name is taken by a running fleet."""


class StartFailed(CliError):
    """A fleet that did not come up. Nothing of it is left."""

    exit_code = 1
