"""The command line: start, watch and stop a fleet."""
