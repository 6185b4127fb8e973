"""Benchmarks: `run(...)` of each module prints a table and returns what becomes the last line, one JSON object."""
