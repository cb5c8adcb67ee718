"""Profiler trace files -> Timeline; ranks put together; two runs compared. No torch."""
