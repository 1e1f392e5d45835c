"""What a router refuses with."""

from typing import Any

from callboard.bus import Refusal


class ScriptError(Refusal):
    """A script that cannot be loaded, or broke a rule while it ran. Fields: file, line (or None), reason, remedy."""

    def describe(self, fields: dict[str, Any]) -> str:
        """Return ``file:line: reason. remedy.``"""
        where = fields["file"] if fields.get("line") is None else f"{fields['file']}:{fields['line']}"
        remedy = f". {fields['remedy']}" if fields.get("remedy") else ""
        return f"{where}: {fields['reason']}{remedy}"


class NoEngine(Refusal):
    """No engine can take the request now. Fields: model, role ("" for any), known (what there is)."""

    def describe(self, fields: dict[str, Any]) -> str:
        """Return which engine is missing, and which engines there are."""
        role = f" with role {fields['role']!r}" if fields["role"] else ""
        return f"no ready engine serves model {fields['model']!r}{role} (known: {fields['known'] or 'none'})"


class QueueFull(Refusal):
    """The router has as many requests in flight as it admits. Come again later."""

    sentence = "{num_in_flight} requests are in flight and the router takes at most {max_queue}: try again later"


class RouteRefused(Refusal):
    """A change of a router's script that cannot be. Fields: reason, a sentence."""

    sentence = "{reason}"


class NoRouter(Refusal):
    """There is no router of that name to hand a request on to. Fields: name, known (what there is)."""

    sentence = "the fleet has no router {name!r} (known: {known})"
