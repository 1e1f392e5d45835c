"""The arguments of ``callboard top`` and ``callboard metrics``; their modules are imported when they run."""

import argparse
from collections.abc import Callable
from typing import Any

SORTS = ("name", "output", "prompt", "load", "kv")

Command = Callable[..., argparse.ArgumentParser]


def add(command: Command) -> None:
    """Add the commands to the parser that ``command`` adds to."""
    top = command(
        "top",
        "watch a running fleet: rates, latencies, pools",
        "callboard top\ncallboard top demo --sort output\ncallboard top --once\ncallboard top --json > top.jsonl",
        "top:run",
    )
    top.add_argument("fleet", nargs="?", metavar="FLEET", help="its name or address, when several run")
    top.add_argument("--interval", type=_interval, default=1.0, metavar="S", help="seconds between frames (default 1)")
    top.add_argument("--sort", choices=SORTS, default="name", help="how engines are sorted")
    top.add_argument("--once", action="store_true", help="print one frame after one interval; so does a pipe")
    top.add_argument("--json", action="store_true", help="print a JSON object a line, every interval")
    _keys_option(top)

    metrics = command(
        "metrics",
        "print a running fleet's metrics, or the dashboard for them",
        "callboard metrics                        as Prometheus reads them, at the fleet's URL under /metrics\n"
        "callboard metrics demo\n"
        "callboard metrics --dashboard > callboard.json     for Grafana: Dashboards, New, Import",
        "metrics:run",
    )
    metrics.add_argument("fleet", nargs="?", metavar="FLEET", help="its name or address, when several run")
    metrics.add_argument("--dashboard", action="store_true", help="print the Grafana dashboard, as JSON")
    _keys_option(metrics)


def _keys_option(command: argparse.ArgumentParser) -> Any:
    command.add_argument("--keys", metavar="DIR", help="the fleet's keys, if not where it was started with them")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f'"{text}" is no interval: give seconds, from 0.1 to 3600')
    return seconds
