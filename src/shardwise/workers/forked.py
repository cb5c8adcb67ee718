"""Imported first by the process from which others are forked, before it imports all that they need: all that
such a process can be told to do is to import."""

from shardwise.workers.garbage import collect_rarely

collect_rarely()
