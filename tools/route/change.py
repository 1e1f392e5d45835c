"""``callboard route set``, ``promote`` and ``rollback``: on all routers, or on none."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from callboard.actors.route_protocol import ScriptText
from callboard.bus import Node
from callboard.router.errors import ScriptError
from callboard.router.script import load_text, read_script
from callboard.router.swap.changer import Changer, Decide
from callboard.router.swap.swap import Swapped, Target, swap
from callboard.tools.errors import CliError

from .hanging import Hung, while_not_hung
from .routers import changer, options_of, visit

MOST_SHOWN = 3
"""Problems of a script that is not set."""
NEXT = 'Next: "callboard route show", then "route promote" or "route rollback".'


def run_set(arguments: argparse.Namespace) -> int:
    """Check a script, and make it the routers' one, a canary, or a shadow."""
    if arguments.shadow and arguments.canary is not None:
        raise CliError("a script is tried as a canary or as a shadow: leave --canary or --shadow out")
    text = script_text(arguments)
    if not arguments.no_check:
        check(text)

    def decide(who: Changer) -> Decide:
        if arguments.shadow or arguments.canary is not None:
            return who.try_script(text, share=arguments.canary, max_failures=arguments.max_failures)
        return who.set_script(text, max_failures=arguments.max_failures)

    return _change(arguments, decide)


def run_promote(arguments: argparse.Namespace) -> int:
    """Make what is tried the script."""
    return _change(arguments, lambda who: who.promote)


def run_rollback(arguments: argparse.Namespace) -> int:
    """Go back."""
    return _change(arguments, lambda who: who.roll_back(arguments.to))


def script_text(arguments: argparse.Namespace) -> ScriptText:
    """Read the script that ``arguments`` name; it loads, with its options. Raises CliError."""
    try:
        text = read_script(arguments.file, options_of(arguments.set))
        with while_not_hung(text.path):
            script = load_text(text)
    except ScriptError as error:
        raise CliError(str(error)) from None
    except Hung as hung:
        raise CliError(f"{text.path}:{hung.line}: its code outside of functions does not end") from None
    # The values as what they are, and the whole path: another machine's people are to know which file it was.
    given = {name: script.options[name] for name in text.options}
    return msgspec.structs.replace(text, options=msgspec.to_builtins(given), path=str(Path(text.path).absolute()))


def check(text: ScriptText) -> None:
    """Try a script on simulated engines. Raises CliError with what is wrong."""
    from .dry_run import dry_run

    outcome = dry_run(text)
    if outcome.problems:
        words = "\n".join(f"  {line}" for problem in outcome.problems[:MOST_SHOWN] for line in problem.splitlines())
        more = f'"callboard route check {text.path}" shows all of it; --no-check sets it anyway'
        raise CliError(f"callboard: {text.name} fails on simulated engines, and was not set:\n{words}\n{more}")


def _change(arguments: argparse.Namespace, decide_for: Callable[[Changer], Decide]) -> int:
    async def do(node: Node, targets: list[Target]) -> Swapped:
        return await swap(node, targets, decide_for(changer(node, arguments)))

    swapped = visit(arguments, do)
    change = swapped.change
    active, trial = change.active, change.trial
    if trial is None:
        print(f"New requests take {active.name} (version {active.number}); those in flight finish as they began.")
    elif change.share:
        print(f"{change.share:g} per cent of new requests take {trial.name} (version {trial.number}),")
        print(f"the others {active.name} (version {active.number}). {NEXT}")
    else:
        print(f"{trial.name} (version {trial.number}) decides in the shadow of {active.name}. {NEXT}")
    for name in swapped.late:
        print(f"Router {name} does not answer: it takes this over when it is back.", file=sys.stderr)
    return 0
