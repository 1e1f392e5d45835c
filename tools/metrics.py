"""``callboard metrics``: what Prometheus reads of a fleet, and the Grafana dashboard that shows it."""

import argparse
import sys
import urllib.error
import urllib.request
from importlib.resources import files

from callboard.bus import BusError

from .bus_client import list_entries, why_not
from .errors import CliError
from .running import open_fleet

TIMEOUT_S = 5.0


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics of every frontend of a fleet, or the dashboard. Raises CliError."""
    if arguments.dashboard:
        print(dashboard(), end="")
        return 0
    fleet = open_fleet(arguments.fleet, keys=arguments.keys)
    try:
        entries = list_entries(fleet)
    except BusError as error:
        raise why_not(fleet, error) from None
    # Several at one port have one URL, and each tells of all.
    urls = dict.fromkeys(entry.detail["url"] for entry in entries if entry.kind == "frontend" and "url" in entry.detail)
    if not urls:
        raise CliError(f'fleet "{fleet.state.name}" has no frontend, and so no metrics')
    for url in urls:
        sys.stdout.write(_scrape(f"{url}/metrics"))
    return 0


def dashboard() -> str:
    """Return the Grafana dashboard, as JSON."""
    return (files("callboard.tools") / "grafana.json").read_text(encoding="utf-8")


def _scrape(url: str) -> str:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, OSError) as error:
        raise CliError(f"cannot read {url}: {error}") from None
