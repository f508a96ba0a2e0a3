"""Answering, scoring and the accuracy matrix with its metrics."""

from dymoe.evaluation.metrics import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
