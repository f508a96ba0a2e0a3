"""Encoded image bytes to an RGB picture, by the one decoder that there is, and how many cores may decode."""

import os

from dymoe.pictures import decode

__all__ = ["cores", "decode"]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
