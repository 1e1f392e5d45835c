"""A picture of the live view of the running fleet: ``python -m callboard.tools.trace.live.picture live.png``.

Needs Chromium, which draws what Textual exports; no font and nothing else is fetched for it.
"""

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from callboard.tools.bus_client import visitor
from callboard.tools.errors import CliError
from callboard.tools.running import open_fleet
from callboard.tools.trace.attach import Follower

from .app import LiveView

CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
INK = {"#4b4e55": "#16181c"}
"""Black is a grey on the bars of Rich's theme."""


def main() -> int:
    """Attach, wait a moment, draw."""
    parser = argparse.ArgumentParser(description="Take a picture of the live view of the running fleet.")
    parser.add_argument("output", type=Path, help="a .png, or a .svg")
    parser.add_argument("--size", default="120x38", metavar="COLUMNSxROWS")
    parser.add_argument("--keys", default="", metavar="KEYS", help="keys to press before, such as down,x")
    parser.add_argument("--fleet")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    try:
        svg = asyncio.run(_svg(arguments.fleet, width, height, arguments.keys))
    except CliError as error:
        print(f"picture: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.output.suffix == ".svg":
        arguments.output.write_text(svg)
    else:
        _rasterise(svg, arguments.output)
    return 0


async def _svg(name: str | None, width: int, height: int, keys: str) -> str:
    fleet = open_fleet(name)
    async with visitor(fleet) as node, Follower(node, fleet) as follower:
        app = LiveView(follower)
        async with app.run_test(size=(width, height)) as pilot:
            await pilot.pause(2.0)
            for key in filter(None, keys.split(",")):
                await pilot.press(key)
                await pilot.pause(0.3)
            svg = app.export_screenshot()
    svg = re.sub(r"@font-face\s*\{.*?\}|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    for before, after in INK.items():
        svg = svg.replace(before, after)
    return svg


def _rasterise(svg: str, output: Path) -> None:
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None, "Rich writes one"
    width, height = (int(float(each)) + 1 for each in box.groups())
    folder = Path(tempfile.mkdtemp())
    try:
        page = folder / "page.html"
        sized = svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1)
        page.write_text(f'<meta charset="utf-8"><body style="margin:0;background:#292929">{sized}')
        options = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        command = [*CHROMIUM.split(), *options, f"--screenshot={output.resolve()}", str(page)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
