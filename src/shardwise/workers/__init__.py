"""Tasks on a few processes, which end with the command: a sweep's or search's traces, a run's trace files."""

from shardwise.workers.processes import Processes, on_processes

__all__ = ["Processes", "on_processes"]
