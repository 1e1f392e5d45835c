"""``make demo``: the default fleet answers one question through the ``openai`` client, and shows how it did.

Run: python -m callboard.tools.demo
"""

import os
import signal
import sys
from pathlib import Path

from .down import stop_fleet
from .errors import CliError
from .log_lines import last_lines
from .requests import parts_of, print_parts
from .running import RunningFleet, running_fleets
from .up import start_detached

QUESTION = "What is the capital of France? Answer in one sentence."
TAIL_LINES = 20


def _find(name: str) -> RunningFleet | None:
    return next((fleet for fleet in running_fleets() if fleet.state.name == name), None)


def _ask(url: str, model: str) -> None:
    """Ask the question over HTTP and print the answer as it streams. Raises openai.OpenAIError."""
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], stream=True, max_tokens=64, temperature=0.0
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def _show(fleet: RunningFleet) -> None:
    assert fleet.state.url is not None
    print(f"\n> {QUESTION}")
    _ask(fleet.state.url, fleet.state.models[0])
    print("\nWhat the router made of it:")
    print_parts(parts_of(fleet, None))


def _print_logs(fleet: RunningFleet) -> None:
    for path in sorted(fleet.logs.glob("*.log")):
        lines = last_lines(path, TAIL_LINES)
        if lines:
            print(f"--- {path.name}", *lines, sep="\n", file=sys.stderr)


def main() -> int:
    """Start, ask, show, stop. Returns 0, or 1 after saying why not."""
    from openai import OpenAIError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = f"demo-{os.getpid()}"
    print("Starting the default fleet: one prefill and one decode engine on SmolLM2-135M.", flush=True)
    code = 1
    try:
        start_detached(None, name=name, port=0)
        fleet = _find(name)
        if fleet is None:
            raise CliError("the fleet ended right after it was up")
        _show(fleet)
        code = 0
    except (CliError, OpenAIError, OSError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        if (fleet := _find(name)) is not None:
            _print_logs(fleet)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        code = 130
    finally:
        if (fleet := _find(name)) is not None:
            stop_fleet(fleet)
    if code == 0:
        command = Path(sys.executable).with_name("callboard")
        print(f"\nThe demo's fleet is stopped. Start one that stays: {command} up")
    return code


if __name__ == "__main__":
    sys.exit(main())
