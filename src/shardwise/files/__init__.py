"""Bytes <-> nouns: programs, machine files, run folders, traces for Perfetto. Standard library and msgspec;
no torch."""
