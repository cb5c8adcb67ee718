"""A MadePlan, and a model's Dims, drawn."""

from shardwise.core.dims import Dims
from shardwise.core.made_plan import MadePlan
from shardwise.report.common.room import Room

_HERE = "shardwise.report.plan"
ROOMS = (
    Room(MadePlan, "plan", "plan", f"{_HERE}.tables:plan_report", f"{_HERE}.html:plan_html"),
    Room(Dims, "dims", "dims", f"{_HERE}.tables:dims_report", f"{_HERE}.html:dims_html"),
)
