"""Imported first by the process from which others are forked: it imports all that they need."""

from shardwise.workers.garbage import collect_rarely

collect_rarely()
