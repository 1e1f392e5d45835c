"""The parts of bench/strategies.py: workloads, the fleet, the client's process, what is measured, what it says."""
