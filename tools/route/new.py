"""``callboard route new`` and ``list``: a script to begin with, and those that ship."""

import argparse
import ast
import re
from pathlib import Path

from callboard.router.script import find_script, shipped_scripts
from callboard.tools.errors import CliError

TEMPLATE = '''\
"""The prompt on one engine, the answer on another; a short prompt stays on one. (Say here what your script does.)

Names to be had: callboard.router has them all, and an editor completes and checks them.
"""

from callboard.router import Fleet, Request, Tokens, least_loaded


async def route(request: Request, fleet: Fleet, *, short: int = 64) -> Tokens:  # --set short=128
    d = least_loaded(fleet.decode)  # Counts the request as this engine's from here on.
    if request.num_tokens <= short:
        request.note(why="short")  # Seen in "callboard trace".
        async for token in d.start_generate(request):  # Computes all of the prompt, and decodes.
            yield token
        return
    p = least_loaded(fleet.prefill)
    async with d.prep_recv(request) as kv:  # Room for the prompt; kv.begin is the first token that is not cached.
        await p.remote_send(request, kv)  # Computes [kv.begin, kv.end) and writes its KV into that room.
        async for token in d.start_generate(request, begin=kv.end, kv=kv):
            yield token  # Every token, in order: the router counts them.
'''
"""What ``new`` writes."""


def run_new(arguments: argparse.Namespace) -> int:
    """Write a commented script. Raises CliError rather than overwrite one."""
    path = Path(arguments.name).expanduser()
    path = path if path.suffix == ".py" else path.with_name(f"{path.name}.py")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", path.stem):
        raise CliError(f'"{path.stem}" is no name for a script: take letters, digits and _, as in my_router')
    if path.stem in shipped_scripts():
        raise CliError(f'a script "{path.stem}" ships with Callboard, and would be meant by that name: take another')
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise CliError(f"{path} exists already: give another name") from None
    except OSError as error:
        raise CliError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from None
    print(f"Wrote {path}. Next: callboard route check {path}, callboard route set {path}")
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    """Print the shipped scripts with what they do."""
    names = shipped_scripts()
    width = max(len(name) for name in names)
    for name in names:
        words = ast.get_docstring(ast.parse(find_script(name).read_text(encoding="utf-8"))) or ""
        first = words.splitlines()[0] if words else ""
        print(f"{name:{width}}  {first.replace('``', '')}")
    return 0
