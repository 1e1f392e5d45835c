"""The sides of bench/router.py, and its client."""
