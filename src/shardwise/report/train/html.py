"""The page of a Training: its words, and the curve of its loss."""

from shardwise.core.training import Training
from shardwise.report.common.page import draw
from shardwise.report.train.tables import headline, train_report


def train_html(run: Training) -> str:
    return draw("train/train.html.j2", run=run, report=train_report(run), headline=tuple(headline(run)))
