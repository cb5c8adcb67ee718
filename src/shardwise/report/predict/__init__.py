"""A Prediction, a Sweep or LookUps, drawn."""

from shardwise.core.look_up import LookUps
from shardwise.core.prediction_run import PredictionRun
from shardwise.core.sweep import Sweep
from shardwise.report.common.room import Room

_HERE = "shardwise.report.predict"
ROOMS = (
    Room(
        PredictionRun,
        "predict",
        "prediction",
        f"{_HERE}.tables:prediction_report",
        f"{_HERE}.html:prediction_html",
    ),
    Room(Sweep, "sweep", "sweep", f"{_HERE}.sweep_tables:sweep_report", f"{_HERE}.sweep_html:sweep_html"),
    Room(
        LookUps,
        "look-ups",
        "look-ups",
        f"{_HERE}.look_up_tables:look_ups_report",
        f"{_HERE}.look_up_tables:look_ups_html",
    ),
)
