"""Tasks: samples, streams of tasks, instructions and scoring rules."""

from dymoe.tasks.base import Sample, Stream, Task, available, load_stream, task_names

__all__ = ["Sample", "Stream", "Task", "available", "load_stream", "task_names"]
