"""The sides of bench/bus.py, one a file: each has ``serve(address)`` and ``client(address, pids)``."""
