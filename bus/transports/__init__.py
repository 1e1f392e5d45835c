"""How batches of bytes move between nodes."""
