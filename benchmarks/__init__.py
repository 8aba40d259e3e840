"""Measurements whose figures the docs quote: `python -m benchmarks NAME`."""
