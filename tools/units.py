"""Sizes and durations as people write them: ``1GiB``, ``80%``, ``10s``."""

import math
import re

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZES |= {"TIB": 2**40, "K": 2**10, "M": 2**20, "G": 2**30}
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*")


def parse_size(text: str | int, *, whole: int) -> int:
    """Return bytes for ``"512MiB"``, a number of bytes, or ``"80%"`` of ``whole``. Raises ValueError."""
    if isinstance(text, int):
        return text
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is no size: write for example "1GiB", "512MiB" or "80%"')
    number, unit = float(match[1]), match[2]
    if unit == "%":
        if number > 100:
            raise ValueError(f'"{text}" is more than there is: write at most "100%"')
        return int(whole * number / 100)
    if unit.upper() not in _SIZES:
        raise ValueError(f'"{text}" is no size: write for example "1GiB", "512MiB" or "80%"')
    return int(number * _SIZES[unit.upper()])


def parse_duration(text: str | float) -> float:
    """Return seconds for ``"10s"``, ``"500ms"``, ``"2m"`` or a number of seconds. Raises ValueError."""
    if isinstance(text, int | float) and math.isfinite(text):
        return float(text)
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f'"{text}" is no duration: write for example "10s", "500ms" or "2m"')
    return float(match[1]) * _SECONDS[match[2]]


def format_span(seconds: float) -> str:
    """Return a time that has passed, for people, by its two largest units: ``2d 3h``, ``5m 07s``, ``9s``."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def format_count(number: float) -> str:
    """Return a number in at most five characters: ``87``, ``4.2k``, ``13M``."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.0f}{unit}" if not unit or abs(number) >= 99.5 else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def format_size(num_bytes: int) -> str:
    """Return ``num_bytes`` for people: ``1.0 GiB``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
