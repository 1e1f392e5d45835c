"""``callboard route check``: whether a script loads, whether its types fit, and what it would do."""

import argparse

from callboard.router.script import load_text

from .change import script_text
from .dry_run import Outcome, Row, dry_run
from .types import check_types


def run(arguments: argparse.Namespace) -> int:
    """Print what a script does on simulated engines; return 1 if something is wrong with it."""
    text = script_text(arguments)
    script = load_text(text)
    options = ", ".join(f"{name}={value!r}" for name, value in script.options.items()) or "none"
    print(f"{script.name}  version {script.version}, options: {options}")
    for work in script.backgrounds:
        print(f"background: {work.name}, {'once' if work.every_s is None else f'every {work.every_s:g} s'}")
    types = None if arguments.no_types else check_types(text)
    outcome = dry_run(text)
    _print_rows(outcome)
    found = None if types is None else types.result()
    if found is not None:
        print(found.words)
    for problem in outcome.problems:
        print(f"\n{problem}")
    is_good = not outcome.problems and (found is None or found.is_good)
    print(f"\n{_verdict(outcome, has_types=found is not None and not found.is_good)}" if not is_good else "\nOK.")
    return 0 if is_good else 1


def _verdict(outcome: Outcome, *, has_types: bool) -> str:
    wrong = [f"{len(outcome.problems)} thing{'s' * (len(outcome.problems) != 1)} wrong"] if outcome.problems else []
    return f"{' and '.join([*wrong, *(['types that do not fit'] if has_types else [])])}."


def _print_rows(outcome: Outcome) -> None:
    if not outcome.rows:
        return
    print(f"\nOn simulated engines ({', '.join(outcome.engines)}):\n")
    width = max(len(row.name) for row in outcome.rows)
    print(f"{'REQUEST':{width}}  PROMPT  OUTPUT  TTFT MS       MS  VERBS, WITH RANGES OF THE PROMPT")
    for row in outcome.rows:
        first, *others = _lines(row) or [""]
        ttft = "-" if row.ttft_ms is None else f"{row.ttft_ms:.1f}"
        total = "failed" if row.is_failed else f"{row.total_ms or 0.0:.1f}"
        print(f"{row.name:{width}}  {row.num_prompt:>6}  {row.num_output:>6}  {ttft:>7}  {total:>7}  {first}".rstrip())
        for line in others:
            print(f"{'':{width + 36}}{line}")


def _lines(row: Row) -> list[str]:
    notes = [f"note: {name}={value}" for name, value in (row.notes or {}).items()]
    return [*row.verbs, *notes]
