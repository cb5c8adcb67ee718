"""Benchmarks as data: scripts that write results/<date>-<what>.json, and tables.py that makes the documents'
tables from those files."""
