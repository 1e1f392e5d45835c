"""Whose fault a failure is: what a script alone causes counts against its version, and nothing else does."""

from callboard.bus import AskTimeout

from .attempt import Attempt
from .errors import NoEngine, ScriptError
from .patience import Patience
from .script import Script

HUNG_S = 10.0
"""A script that lets its deadline pass, and has waited for nothing of the fleet for so long, hangs by itself."""


def fault_in(
    verdict: Exception, error: BaseException, attempt: Attempt, script: Script, patience: Patience
) -> BaseException | None:
    """Return ``error`` if the script is to blame for it; None for deaths, full pools, bad requests, late answers.

    ``verdict`` is what the client is told. A script is also to blame for looking for a role that no engine has,
    or ever had: but not while engines may still come, such as to a router that was just started again.
    """
    if isinstance(verdict, ScriptError):
        return error if verdict.file == script.path else None  # Else of another router, that it handed the request to.
    if isinstance(verdict, AskTimeout) and attempt.alone_s() >= HUNG_S:
        return error
    if isinstance(verdict, NoEngine) and verdict.role and not patience.expects_engines(attempt.request):
        model, shared = attempt.request.model, attempt.shared
        engines = [entry for entry in shared.view.entries("engine") if entry.model == model]
        has_it = any(verdict.role in entry.roles or not entry.roles for entry in engines)
        if engines and not has_it and (model, verdict.role) not in shared.roles:
            return error
    return None
