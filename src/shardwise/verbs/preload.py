"""What the processes of a sweep need, imported once before they are forked. They do nothing but trace."""

import shardwise.parallel.plans
import shardwise.text.traced_ids
import shardwise.trace.trace
import shardwise.verbs.sweep  # noqa: F401
from shardwise.trace.fakes import keep_worlds

keep_worlds()
