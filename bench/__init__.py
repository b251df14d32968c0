"""Benchmarks of qpilots_fast against the best loops a user could write without it: `python -m bench --help`."""
