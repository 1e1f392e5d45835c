"""`callboard trace`: who did what for a request, live and afterwards."""
