"""Tasks: samples, streams of tasks, instructions and scoring rules."""

from dymoe.tasks.base import Sample, Stream, Task, available, from_files, load_stream, task_names
from dymoe.tasks.source import Source

__all__ = ["Sample", "Source", "Stream", "Task", "available", "from_files", "load_stream", "task_names"]
