"""The strategies that ship, one a file; loaded by name (callboard.router.script)."""
