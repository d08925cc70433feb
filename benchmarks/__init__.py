"""Reproducible measurements beside other tools: `python -m benchmarks NAME`."""
