"""`coin/textvqa`: CoIN's rule is the data set's own, `soft_accuracy`, divided by the number of predictions."""

from dymoe.tasks.scoring.policy import PREDICTIONS
from dymoe.tasks.scoring.soft_accuracy import lenient, readable, strict

__all__ = ["POLICY", "lenient", "readable", "strict"]

POLICY = PREDICTIONS
