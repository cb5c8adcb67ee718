"""What the processes of a search need, imported once before they are forked."""

import shardwise.parallel.plans
import shardwise.planner.groups
import shardwise.text.traced_ids
import shardwise.trace.trace  # noqa: F401
