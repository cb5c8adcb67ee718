"""What the processes of a search need, imported once before they are forked. They do nothing but trace."""

import shardwise.parallel.plans
import shardwise.planner.groups
import shardwise.text.traced_ids
import shardwise.trace.trace  # noqa: F401
from shardwise.trace.fakes import keep_worlds

keep_worlds()
