"""``callboard replay``: run the requests of a recording again, and say what differs."""
