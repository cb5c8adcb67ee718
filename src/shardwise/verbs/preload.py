"""What the processes of a sweep need, imported once before they are forked."""

import shardwise.parallel.plans
import shardwise.text.traced_ids
import shardwise.trace.trace
import shardwise.verbs.sweep  # noqa: F401
