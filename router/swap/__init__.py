"""Changing a router's script while it serves: versions, changes over several routers, shadows, background work."""
