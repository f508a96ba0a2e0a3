"""Answering, scoring and the accuracy matrix with its metrics."""

from dymoe.evaluation.matrix import AccuracyMatrix

__all__ = ["AccuracyMatrix"]
