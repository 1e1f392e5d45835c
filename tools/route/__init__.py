"""``callboard route``: the scripts of a fleet's routers, changed while it serves."""
