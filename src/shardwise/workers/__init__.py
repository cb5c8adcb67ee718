"""Tasks on a few processes, which end with the command: a sweep's or search's traces, a run's trace files."""
