"""The sides of bench/transfer.py, a file each: ``near(setup)`` and ``far(setup)``."""
